"""Trackers get what ``metrics.jsonl`` gets, and their folder is the run's."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from test_train import random_blocks, trainer

from ternq import cli, metrics, runs, ternarize, trackers
from ternq.errors import RecipeError
from ternq.progress import Event
from ternq.train import Trainer


class Kept(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.finished = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.lines.append({"step": step} | values)

    def finish(self) -> None:
        self.finished = True


def with_tracker(folder: Path, kept: Kept, **settings: Any) -> Trainer:
    made = trainer(folder, **settings)
    made.log_with = (kept,)  # type: ignore[assignment]
    made.accelerator = made._accelerator()
    return made


def test_a_tracker_gets_the_metrics_and_the_settings(tmp_path: Path) -> None:
    kept = Kept()
    with_tracker(tmp_path, kept, steps=3, lr=1e-3).run()
    lines = metrics.steps(tmp_path)
    for line in lines:
        del line["seconds"]
    assert kept.lines == lines
    assert kept.finished
    assert kept.settings["lr"] == 1e-3
    assert kept.settings["data"] == ""
    assert all(isinstance(v, bool | int | float | str) for v in kept.settings.values())


def test_trackers_are_closed_when_training_fails(tmp_path: Path) -> None:
    kept = Kept()
    made = with_tracker(tmp_path, kept)
    made.blocks = iter([])
    with pytest.raises(StopIteration):
        made.run()
    assert kept.finished


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [("nothing", "no such tracker", "tensorboard, wandb"), ("wandb", "not installed", "pip")],
)
def test_what_cannot_track_is_refused(
    name: str, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(RecipeError, match=said) as caught:
        trackers.check((name,))
    assert hint in str(caught.value.hint)


def test_it_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    out = tmp_path / "run"
    line = ["distill", "demo", "-o", str(out), "--log-with", "tensorboard,wandb", "--json"]
    assert cli.run(line) == 2
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "pip install tensorboard"
    assert not out.exists()


def test_a_tracker_that_will_not_begin_is_said(tmp_path: Path) -> None:
    class Refusing(Kept):
        def start(self) -> None:
            raise OSError("No API key configured.\nmore")

    with pytest.raises(RecipeError, match=r"--log-with: No API key configured\.$"):
        trackers.begin(Accelerator(cpu=True, log_with=[Refusing()]), tmp_path, {})


def test_logs_go_to_the_report_and_leave_with_the_run(tmp_path: Path) -> None:
    run, out = tmp_path / "a.run", tmp_path / "a"
    for _ in range(2):  # the second replaces the first's
        (run / trackers.LOGS).mkdir(parents=True)
        (run / trackers.LOGS / "events").touch()
        ternarize.keep_reports(run, out)
        kept = (tmp_path / "a.report" / trackers.LOGS).iterdir()
        assert [path.name for path in kept] == ["events"]
    (run / trackers.LOGS).mkdir()
    runs.remove(run)
    assert not run.exists()


def test_going_on_says_how_far_the_text_was_read(tmp_path: Path) -> None:
    events: list[Event] = []
    made = trainer(tmp_path, batch_size=2, steps=3)
    made.read, made.progress = 4, events.append
    expected = random_blocks()
    for _ in range(4):
        next(expected)
    made._find_place()
    assert (events[-1].stage, events[-1].done, events[-1].total) == (
        "finding the place in the text", 4, 4,
    )  # fmt: skip
    assert (next(made.blocks) == next(expected)).all()


def test_the_tracker_is_no_part_of_the_recipe() -> None:
    recipe = checkpoints.recipe("model", Path("text"))
    assert "log_with" not in recipe.to_json()["training"]
