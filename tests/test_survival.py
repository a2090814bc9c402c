"""Runs that are killed, stopped, run out of disk or text, and go on; see ``survival.py``."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from ternq import (
    checkpoint,
    corpus,
    data,
    distill,
    hf,
    metrics,
    origin,
    runs,
    snapshots,
    stop,
    text,
)
from ternq.errors import InputError, RecipeError, ResourceError, StoppedError
from ternq.files import read_json, write_json
from ternq.progress import Event, ignore
from ternq.recipe import Recipe

# Killed and gone on with


def disturbed(verb: str, way: str, count: int = 0, start: str = "closed-form") -> dict[str, Any]:
    """What ``survival.py`` says that it did."""
    command = [sys.executable, str(ROOT / "tests" / "survival.py"), verb, way, str(count), start]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("way", "count"),
    [
        ("kill", 5),
        ("point", 3),
        pytest.param("kill", 10, marks=pytest.mark.slow),
        pytest.param("point", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_instant(way: str, count: int) -> None:
    assert disturbed("distill", way, count)[way] == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "way", "count", "start"),
    [
        ("distill", "kill", 300, "closed-form"),
        ("distill", "kill", 50, "compensated"),
        ("distill", "point", 150, "closed-form"),
        ("distill", "term", 40, "closed-form"),
        ("distill", "int", 40, "closed-form"),
        ("distill", "limit", 40, "closed-form"),
        ("distill", "full", 1, "closed-form"),
        ("ternarize", "kill", 60, "closed-form"),
        ("ternarize", "point", 60, "closed-form"),
        ("ternarize", "full", 1, "closed-form"),
    ],
)
def test_disturbed_in_every_way(verb: str, way: str, count: int, start: str) -> None:
    assert disturbed(verb, way, count, start)[way] >= count


# Checkpoints


class Small:
    """A model and an optimizer that has stepped, and a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.writer = snapshots.Writer(folder, keep=2)

    def step(self) -> None:
        self.model(torch.ones(3)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, *, aside: bool = False) -> None:
        self.writer.save(step, self.model, self.optimizer, {}, aside=aside)

    def restore(self, progress: Any = ignore) -> Any:
        return snapshots.restore(self.folder, self.model, self.optimizer, progress)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def names(self) -> list[str]:
        return [path.name for path in snapshots.checkpoints(self.folder)]


@pytest.fixture
def small(tmp_path: Path) -> Small:
    made = Small(tmp_path)
    made.step()
    return made


def test_the_newest_two_are_kept(small: Small) -> None:
    for step in (1, 2, 3):
        small.save(step)
    assert small.names() == ["step-00000002", "step-00000003"]
    small.save(1)  # those of a future that was gone back from are dropped
    assert small.names() == ["step-00000001"]


def test_training_goes_on_while_a_checkpoint_is_written(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write, meant = threading.Event(), snapshots.write, small.weights()

    def slow(*arguments: Any) -> None:
        go.wait(60)
        write(*arguments)

    monkeypatch.setattr(snapshots, "write", slow)
    small.save(1, aside=True)
    assert small.writer.busy()
    small.step()
    assert not torch.equal(small.weights(), meant)
    assert small.names() == []
    go.set()
    small.writer.wait()
    assert not small.writer.busy()
    small.restore()
    assert torch.equal(small.weights(), meant)


def test_without_memory_for_copies_it_is_written_in_line(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    small.writer.progress = events.append
    monkeypatch.setattr(snapshots, "free_memory", lambda device: 100)
    for step in (1, 2):
        small.save(step, aside=True)
        assert small.names()[-1] == f"step-{step:08d}"
    assert [event.message for event in events if "no room" in str(event.message)] == [
        events[0].message
    ]


@pytest.mark.parametrize("aside", [True, False])
def test_what_cannot_be_written_leaves_the_last_checkpoint(
    small: Small, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save(1)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ResourceError, match="no space is left"):
        small.save(2, aside=aside)
        small.writer.wait()
    assert [p.name for p in (small.folder / snapshots.CHECKPOINTS).iterdir()] == ["step-00000001"]


def test_what_reads_back_as_something_else_is_no_checkpoint(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save(1)
    write = checkpoint.save_tensors

    def wrong(tensors: dict[str, Tensor], path: Path) -> None:
        write({name: torch.zeros_like(t) for name, t in tensors.items()}, path)

    monkeypatch.setattr(checkpoint, "save_tensors", wrong)
    with pytest.raises(ResourceError, match="does not read back"):
        small.save(2)
    assert small.names() == ["step-00000001"]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["student.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(small: Small, file: str) -> None:
    small.save(1)
    first = small.weights()
    small.step()
    small.save(2)
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    (small.folder / metrics.METRICS).write_text("".join(lines) + '{"step": 1, "lo')
    damage(small.folder / snapshots.CHECKPOINTS / "step-00000002" / file)
    events: list[Event] = []
    assert small.restore(events.append)["step"] == 1
    assert torch.equal(small.weights(), first)
    assert [event.level for event in events] == ["warning"]
    assert "step-00000002 is damaged" in str(events[0].message)
    assert (small.folder / metrics.METRICS).read_text() == lines[0]
    damage(small.folder / snapshots.CHECKPOINTS / "step-00000001" / file)
    with pytest.raises(InputError, match="No checkpoint in .* is whole"):
        small.restore()


def test_a_checkpoint_of_another_format_is_refused(small: Small) -> None:
    small.save(1)
    path = small.folder / snapshots.CHECKPOINTS / "step-00000001" / "state.json"
    path.write_text('{"step": 1, "seconds": 1.0, "losses": []}')  # as the first ternq wrote it
    with pytest.raises(RecipeError, match="checkpoint format 1"):
        small.restore()


def test_random_numbers_go_on(small: Small) -> None:
    small.save(1)
    drawn = torch.rand(3)
    small.restore()
    assert torch.equal(torch.rand(3), drawn)


# Whole runs


@pytest.fixture
def tiny_recipe(source: Path, text_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)
    return checkpoints.recipe(source, text_copy, steps=3)


@pytest.fixture
def text_copy(text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(text, tmp_path / "text.jsonl"))


def stopped(recipe: Recipe, out: Path) -> None:
    """A run that was stopped after its first step."""
    with pytest.raises(StoppedError):
        distill.distill(recipe.model, out, recipe, offline=True, time_limit=0.0)


def test_the_file_that_changed_is_named(
    tiny_recipe: Recipe, text_copy: Path, tmp_path: Path
) -> None:
    stopped(tiny_recipe, tmp_path / "run")
    with text_copy.open("a") as file:
        file.write('{"text": "and more"}\n')
    with pytest.raises(RecipeError, match=r"text\.jsonl is not the file that it was"):
        distill.distill(tiny_recipe.model, tmp_path / "run", tiny_recipe, offline=True)


@pytest.mark.parametrize("option", ["base", "teacher"])
def test_other_weights_are_refused(option: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    other = checkpoints.model("llama", seed=1)
    other.save_pretrained(tmp_path / "other")
    hf.load(tiny_recipe.model).tokenizer.save_pretrained(tmp_path / "other")
    stopped(tiny_recipe, tmp_path / "run")
    model, teacher = str(tmp_path / "other"), None
    if option == "teacher":
        model, teacher = tiny_recipe.model, model
    with pytest.raises(RecipeError, match=f"{option}( model)?'s weights"):
        distill.distill(model, tmp_path / "run", tiny_recipe, teacher=teacher, offline=True)


def change_record(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = read_json(run / origin.RUN_FILE)
    change(record)
    write_json(run / origin.RUN_FILE, record)


def test_a_run_of_another_format_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(tiny_recipe, run)
    change_record(run, lambda record: record.update({runs.FORMAT: 9}))
    with pytest.raises(RecipeError, match="another version of ternq"):
        distill.distill(tiny_recipe.model, run, tiny_recipe, offline=True)
    distill.distill(tiny_recipe.model, run, tiny_recipe, offline=True, overwrite=True)


def test_what_changes_the_last_bits_is_said(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run, events = tmp_path / "run", list[Event]()
    stopped(tiny_recipe, run)
    change_record(run, lambda record: record["machine"].update({"threads": 99}))
    report = distill.distill(
        tiny_recipe.model, run, tiny_recipe, offline=True, progress=events.append
    )
    said = [event.message for event in events if event.level == "warning"]
    assert any("threads 99 then" in str(message) for message in said)
    assert any("threads 99 then" in note for note in report["notes"])


def test_a_removal_that_was_cut_off_is_gone_on_with(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(tiny_recipe, run)
    (run / origin.RUN_FILE).rename(run / f".{origin.RUN_FILE}.removed")
    report = distill.distill(tiny_recipe.model, run, tiny_recipe, offline=True)
    assert len((run / metrics.METRICS).read_text().splitlines()) == 3
    assert report["training"]["steps"] == 3


def test_the_clock_jumps(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 2e9 * (next(jumps) % 2))
    recipe = replace(tiny_recipe, training=replace(tiny_recipe.training, checkpoint_minutes=0.0))
    report = distill.distill(recipe.model, tmp_path / "run", recipe, offline=True, time_limit=900)
    assert 0 < report["training"]["seconds"] < 900
    lines = (tmp_path / "run" / metrics.METRICS).read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)


# The lock


def lock(run: Path) -> None:
    """Hold a run, and let it go."""
    with runs.locked(run, None, False, []):
        pass


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with runs.locked(run, None, False, []):
        with pytest.raises(RecipeError, match=f"in use by process {os.getpid()} on") as caught:
            lock(run)
        assert caught.value.exit_code == 2
        assert runs.existing(run, None, False) is None
    assert not run.exists()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = (
        "import sys, time; from pathlib import Path; from ternq import runs\n"
        "with runs.locked(Path(sys.argv[1]), None, False, []):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match=f"process {holder.pid} "):
            lock(run)
        holder.kill()
    assert (run / runs.LOCK).is_file()  # stale
    lock(run)
    assert not run.exists()


def test_a_folder_of_something_else_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="no run of ternq"):
        lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# Text that fails


def failing(after: int, error: Exception) -> Callable[..., Iterator[Tensor]]:
    """`data.blocks` that ends in an error after so many blocks."""
    blocks = data.blocks

    def broken(*arguments: Any) -> Iterator[Tensor]:
        stream = blocks(*arguments)
        for _ in range(after):
            yield next(stream)
        raise error

    return broken


def test_text_that_fails_leaves_a_checkpoint(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "blocks", failing(5, InputError("The cable is out.")))
        with pytest.raises(InputError, match="cable") as caught:
            distill.distill(tiny_recipe.model, run, tiny_recipe, offline=True)
    assert "goes on from there" in str(caught.value.hint)
    assert [path.name for path in snapshots.checkpoints(run)] == ["step-00000002"]
    distill.distill(tiny_recipe.model, run, tiny_recipe, offline=True)
    whole = tmp_path / "whole"
    distill.distill(tiny_recipe.model, whole, tiny_recipe, offline=True)
    found = [checkpoints.contents(folder)[origin.STUDENT_FILE] for folder in (run, whole)]
    assert found[0] == found[1]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = checkpoints.text_file(tmp_path / "a.jsonl", lines=5)
    documents = text.read_documents(str(path))
    path.write_text('{"text": "another"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl' changed while"):
        list(documents)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[str]], tuple[Any, list[Event]]]:
    """A stream that comes from the hub, and what is said while it is read."""

    def open_it(documents: Iterator[str]) -> tuple[Any, list[Event]]:
        events: list[Event] = []
        monkeypatch.setattr(text, "is_offline", lambda offline: False)
        monkeypatch.setattr(text, "_dataset", lambda *_: documents)
        return text.open_source("some/text", progress=events.append)(0), events

    return open_it


def test_a_stream_keeps_its_order_and_ends(hub: Any) -> None:
    documents = [str(number) for number in range(300)]
    stream, _ = hub(iter(documents))
    assert list(stream) == documents


def test_what_a_stream_raises_comes_in_its_place(hub: Any) -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise InputError("gone")

    stream, _ = hub(broken())
    assert next(stream) == "a"
    with pytest.raises(InputError, match="gone"):
        next(stream)


def test_a_stall_is_said_and_at_last_stops(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "STALL_SAID", 0.05)
    monkeypatch.setattr(text, "STALL_ENDS", 0.3)
    go = threading.Event()

    def stalling() -> Iterator[str]:
        yield "a"
        go.wait(60)
        yield "b"

    stream, events = hub(stalling())
    assert next(stream) == "a"
    with pytest.raises(StoppedError, match="No text came from some/text"):
        next(stream)
    warnings = [event.message for event in events if event.level == "warning"]
    assert warnings
    assert all("no text from some/text" in str(message) for message in warnings)
    go.set()
    names = {thread.name: thread for thread in threading.enumerate()}
    if thread := names.get("text of some/text"):
        thread.join(10)
        assert not thread.is_alive()


def test_a_request_to_stop_is_heard_in_a_stall(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "STALL_SAID", 0.05)
    monkeypatch.setattr(stop, "pending", lambda: "SIGTERM")
    go = threading.Event()
    stream, _ = hub(iter(lambda: go.wait(60), None))
    with pytest.raises(StoppedError, match="waiting for text"):
        next(stream)
    go.set()


def test_a_dataset_that_breaks_off_is_said_in_words() -> None:
    def rows() -> Iterator[Any]:
        yield {"text": "a"}
        raise ConnectionResetError("peer")

    stream = text._unbroken("some/text", rows())
    assert next(stream) == {"text": "a"}
    with pytest.raises(InputError, match="'some/text' broke off: peer"):
        next(stream)
