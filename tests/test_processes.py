"""Two processes do what one does: the same losses, the same student, each other's checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers
from conftest import ROOT
from test_train import trainer
from together import KIND, SETTINGS, finish

from ternq import checkpoint, cli, metrics, origin, outlines, processes, snapshots, stop
from ternq.errors import RecipeError, StoppedError
from ternq.files import read_json
from ternq.footprint import footprint
from ternq.prepared import fitting
from ternq.processes import Crew
from ternq.recipe import Recipe, Scheme, Training

ENGINES = ["ddp", "fsdp"]


def together(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of Python's in two processes, by torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, whole and stopped after two steps, and those of two."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("whole", "one", "features-alone", "scales"):
        (folder / name).mkdir()
    finish(trainer(folder / "whole", KIND, **SETTINGS))
    finish(trainer(folder / "features-alone", KIND, **SETTINGS, kl=0.0))
    finish(trainer(folder / "scales", KIND, **SETTINGS, train="scales"))
    made = trainer(folder / "one", KIND, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(stop, "requested", lambda: "SIGTERM" if made.step == 2 else None)
        made.run()
    done = together(str(Path(__file__).with_name("together.py")), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def same(a: Path, b: Path) -> None:
    """The same metrics and the same student, within rounding."""
    one, two = metrics.steps(a), metrics.steps(b)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    for left, right in zip(one, two, strict=True):
        del left["seconds"], right["seconds"]
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    first, second = (checkpoint.load_tensors(run / origin.STUDENT_FILE) for run in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        rtol = 2**-7 if tensor.dtype == torch.bfloat16 else 1e-4  # latents of frozen codes
        assert torch.allclose(tensor, second[name], rtol=rtol, atol=1e-5), name


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(folder: Path, engine: str) -> None:
    same(folder / "whole", folder / engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_scales_as_one(folder: Path, engine: str) -> None:
    same(folder / "scales", folder / f"{engine}-scales")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_go_on_where_one_stopped(folder: Path, engine: str) -> None:
    same(folder / "whole", folder / f"{engine}-resumed")


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_where_two_stopped(folder: Path, engine: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / f"{engine}-stopped", run)
    made = trainer(run, KIND, **SETTINGS)
    assert made.restore()
    assert made.step == 2
    finish(made)
    same(folder / "whole", run)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_to_one_stops_all_after_the_same_step(folder: Path, engine: str) -> None:
    run = folder / f"{engine}-stopped"
    said = {(run / f"said-{rank}").read_text() for rank in (0, 1)}
    assert said == {"Stopped after step 2 of 4 (SIGTERM); a checkpoint is saved."}
    assert [p.name for p in snapshots.checkpoints(run)] == ["step-00000002"]
    assert [line["step"] for line in metrics.steps(run)] == [1, 2]  # the main process alone writes


def test_what_each_holds_of_shards_is_what_was_counted(folder: Path) -> None:
    """`ternq.footprint` for two processes, against the tensors that are there."""
    name, options = checkpoints.CONFIGS[KIND]
    config = getattr(transformers, name)(**options)
    found = footprint(
        lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32),
        Scheme(group_size=16),
        Training(**SETTINGS, sequence_length=16, steps=4),
        "cpu",
        Crew(2, sharded=True),
    )
    for rank in (0, 1):
        held = read_json(folder / f"fsdp-held-{rank}")
        assert held["weights"] == pytest.approx(found.weights, rel=0.1)
        assert held["optimizer"] == pytest.approx(found.optimizer, rel=0.1)


def test_parameters_that_get_no_gradient(folder: Path) -> None:
    same(folder / "features-alone", folder / "features")


def test_a_batch_that_cannot_be_shared_is_refused(folder: Path) -> None:
    for rank in (0, 1):
        assert "--batch-size 3 cannot be shared" in (folder / f"uneven-{rank}").read_text()


@pytest.mark.parametrize(
    ("scheme", "training", "crew", "said"),
    [
        ({}, {"offload": True}, Crew(2), "--offload is of one process"),
        ({}, {"optimizer": "adamw-8bit"}, Crew(2, True), "--optimizer adamw-8bit does not go"),
        ({}, {"latent": "bfloat16"}, Crew(2, True), "--latent bfloat16 does not go"),
        ({}, {"train": "low-rank"}, Crew(2, True), "--train low-rank does not go"),
        ({"method": "absmean"}, {}, Crew(2, True), "--method absmean does not go"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    source: Path, scheme: dict[str, str], training: dict[str, str], crew: Crew, said: str
) -> None:
    asked = Recipe(
        model=str(source),
        scheme=Scheme(**scheme),  # type: ignore[arg-type]
        training=Training(start="closed-form", **training),  # type: ignore[arg-type]
    )
    with pytest.raises(RecipeError, match=said):
        fitting(outlines.blueprint(str(source)), asked, "cuda", 2**40, crew=crew)


# Alone


def test_without_a_launcher_nothing_changes() -> None:
    rows = torch.arange(6).view(3, 2)
    assert (processes.rank(), processes.count(), processes.is_main()) == (0, 1, True)
    assert processes.share(rows) is rows or torch.equal(processes.share(rows), rows)
    assert processes.mean({"loss": 0.1}) == {"loss": 0.1}
    assert processes.agreed(None, False) == (None, False)
    assert processes.gathered({"a": rows})["a"] is rows
    assert processes.device_of("cuda") == "cuda"


def test_each_process_has_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.device_of("cuda") == "cuda:1"
    assert processes.device_of("cpu") == "cpu"
    assert (processes.rank(), processes.count(), processes.is_main()) == (3, 4, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED was asked"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1 was asked"),
    ],
)
def test_other_engines_are_refused(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=said):
        processes.sharding()


# The command line


def started(source: Path, text: Path, out: Path, *more: str, steps: str = "3") -> list[str]:
    """A command of two processes."""
    settings = f"--group-size 16 --sequence-length 16 --batch-size 4 --steps {steps} --offline"
    settings += " --start closed-form"
    return ["-m", "--", "ternq", *more, str(source), "--data", str(text), *settings.split(),
            "-o", str(out), "--json"]  # fmt: skip


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.text_file(tmp_path_factory.mktemp("text") / "text.jsonl", 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_the_whole_job_by_two_processes(
    source: Path, long_text: Path, tmp_path: Path, sharded: str
) -> None:
    out = tmp_path / "out"
    command = started(source, long_text, out, "ternarize")
    done = together(*command, ACCELERATE_USE_FSDP=sharded)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["status"] == "ok"
    assert result["verify"]["ok"]
    assert len((tmp_path / "out.report" / metrics.METRICS).read_text().splitlines()) == 3
    assert done.stderr.count("Loading") == 1  # others are silent
    assert not (tmp_path / "out.run").exists()


@pytest.mark.slow
def test_a_stopped_command_says_so_once_and_goes_on(
    source: Path, long_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = started(source, long_text, run, "distill")
    stopped = together(*command, "--time-limit", "0.001")
    assert stopped.returncode == 1  # the launcher's own; it prints those of its processes
    assert stopped.stderr.count("exitcode  : 75") == 2
    assert json.loads(stopped.stdout)["exit_code"] == 75
    assert cli.run(command[3:]) == 0
    assert [line["step"] for line in metrics.steps(run)] == [1, 2, 3]


@pytest.mark.slow
def test_what_one_process_does_is_refused(tmp_path: Path) -> None:
    done = together("-m", "--", "ternq", "eval", str(tmp_path), "--json")
    assert done.stderr.count("exitcode  : 2") == 2
    assert "one process" in json.loads(done.stdout)["error"]["message"]
