"""What a model costs to run: counts against closed forms, energy from counters made up, no orphans.

No time is asserted: only that rates are positive and agree with the time they were made of.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from conftest import Demo
from torch import nn

from ternq import efficiency, hf, kernels, memory
from ternq.efficiency import Meter, Times, measure
from ternq.errors import (
    InputError,
    InterruptedByUser,
    RecipeError,
    ResourceError,
    StoppedError,
)
from ternq.progress import Event, Progress
from ternq.recipe import DEMO_FOLDER
from ternq.subject import Subject, World


def saved(folder: Path, model: Any = None) -> Path:
    """A tiny model and its tokenizer on disk."""
    (model or tiny.model()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in this process, not in one of its own, whose start takes seconds."""

    def run(job: dict[str, Any], progress: Progress) -> Any:
        told = json.loads(json.dumps(job))
        return efficiency._measure(**told, progress=progress)

    monkeypatch.setattr(efficiency, "_run", run)


# -- the whole measurement -------------------------------------------------------------------------


def test_the_demo_costs_what_its_configuration_says() -> None:
    said: list[Event] = []
    began = time.monotonic()
    found = measure("demo", offline=True, prompt=16, new=8, progress=said.append)
    took = time.monotonic() - began
    config = hf.load("demo").model.config
    h, mlp, heads, keys = 256, 640, 4 * 64, 2 * 64
    layer = h * (heads + 2 * keys) + heads * h + 3 * h * mlp + 2 * h
    parameters = config.vocab_size * h + config.num_hidden_layers * layer + h  # the head is tied
    buffers = sum(b.numel() for b in hf.load("demo").model.buffers())
    assert found["parameter_bytes"] == 4 * (parameters + buffers)
    assert found["file_bytes"] == (DEMO_FOLDER / "model.safetensors").stat().st_size
    assert (found["prompt_tokens"], found["new_tokens"]) == (16, 8)
    assert (found["samples"], found["partial"]) == (1, False)
    assert found["peak_resident_bytes"] > found["resident_bytes"] > 0
    assert 0 < found["load_seconds"] < took
    assert 7 / found["decode_tokens_per_second"] + 16 / found["prefill_tokens_per_second"] < took
    assert not [key for key in found if key.startswith(("device_", "native_"))]
    stages = [event.stage for event in said if event.message is None]
    assert stages[0] == "efficiency: prefill"
    assert (said[-1].stage, said[-1].done, said[-1].total) == ("efficiency: decode", 8, 8)


@pytest.mark.usefixtures("here")
def test_a_packed_model_is_smaller(demo: Demo) -> None:
    packed = demo.folder / "demo-ternary"
    found = measure(str(packed), offline=True, prompt=4, new=2)
    assert found["file_bytes"] == sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    assert found["parameter_bytes"] == memory.model_bytes(hf.load(str(packed)).model)
    assert found["parameter_bytes"] < memory.model_bytes(hf.load("demo").model)
    native = [key for key in found if key.startswith("native_")]
    assert len(native) == (2 if kernels.library() else 0)
    assert all(found[key] > 0 for key in native)


@pytest.mark.usefixtures("here")
def test_the_type_asked_for_is_that_of_the_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    count = sum(p.numel() for p in tiny.model().parameters())
    buffers = memory.model_bytes(tiny.model()) - 4 * count
    found = measure(str(folder), dtype=torch.bfloat16, offline=True, prompt=4, new=2)
    assert found["parameter_bytes"] == 2 * count + buffers


@pytest.mark.usefixtures("here")
def test_an_end_token_ends_nothing_and_few_positions_are_said(tmp_path: Path) -> None:
    """All logits are equal, so that the first token, here the end of text, is always taken."""
    model = tiny.model(positions=48)
    nn.init.zeros_(model.lm_head.weight)
    for config in (model.config, model.generation_config):
        config.eos_token_id = 0
    said: list[Event] = []
    found = measure(str(saved(tmp_path / "m", model)), offline=True, progress=said.append)
    assert (found["prompt_tokens"], found["new_tokens"], found["partial"]) == (16, 32, True)
    (warning,) = [event for event in said if event.level == "warning"]
    assert "reads 48 tokens" in str(warning.message)


@pytest.mark.usefixtures("here")
def test_the_hubs_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub" / "models--somebody--tiny"
    saved(cache / "snapshots" / "0123abcd")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = measure("somebody/tiny", offline=True, prompt=4, new=2)
    weights = cache / "snapshots" / "0123abcd" / "model.safetensors"
    assert found["file_bytes"] == weights.stat().st_size
    whole = Subject("somebody/tiny", World(offline=True)).summary()
    files = [path.stat().st_size for path in weights.parent.iterdir()]
    assert weights.stat().st_size < whole["file_bytes"] == sum(files)


def test_fewer_positions_are_shared_in_proportion() -> None:
    for positions in range(3, 60):
        prompt, new = efficiency._fitted(17, 34, positions)
        assert prompt + new == min(positions, 51)
        assert prompt >= 1
        assert new >= 2
        assert positions < 6 or abs(2 * prompt - new) <= 2
    with pytest.raises(InputError, match="too few"):
        efficiency._fitted(17, 34, 2)


# -- what goes wrong -------------------------------------------------------------------------------


def test_what_the_process_finds_wrong_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without config.json") as caught:
        measure(str(tmp_path), offline=True)
    assert caught.value.exit_code == 3 and "hub id" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="2 new tokens"):
        measure("demo", new=1)


@pytest.mark.usefixtures("here")
def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder") as caught:
        measure(str(tmp_path / "none"), offline=True)
    assert caught.value.exit_code == 3


@pytest.mark.usefixtures("here")
def test_a_device_that_is_not_here_is_a_resource(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No device 'cuda:99'"):
        measure(str(saved(tmp_path / "m")), device="cuda:99", offline=True, prompt=4, new=2)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(-2, InterruptedByUser), (-9, ResourceError), (-15, StoppedError), (1, RuntimeError)],
)
def test_the_end_of_the_process_is_told_apart(status: int, kind: type[Exception]) -> None:
    failure = efficiency._failure({}, status, "Traceback\nValueError: something\n")
    assert type(failure) is kind
    if status == 1:
        assert "ValueError: something" in str(failure)
        assert "Traceback" in failure.__notes__[0]


@pytest.mark.parametrize("error", ["MemoryError()", 'RuntimeError("can\'t allocate memory")'])
def test_want_of_memory_is_a_resource(error: str) -> None:
    program = (
        "import sys; from ternq import efficiency\n"
        f"def full(**job): print('no JSON'); raise {error}\n"
        "efficiency._measure = full; sys.exit(efficiency.main(['{}']))"
    )
    ours, theirs = os.pipe()
    done = subprocess.run([sys.executable, "-c", program], stdin=ours, capture_output=True)
    os.close(ours), os.close(theirs)
    assert done.returncode == ResourceError.exit_code
    failure = efficiency._failure(json.loads(done.stdout), done.returncode, "")
    assert isinstance(failure, ResourceError)
    assert "memory" in str(failure)


@pytest.mark.skipif(sys.platform != "linux", reason="there the starting process counts")
def test_the_largest_size_is_not_that_of_the_process_that_started_it() -> None:
    ballast = b"1" * 500_000_000
    program = "from ternq.memory import peak, resident; print(resident(), peak())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    resident, peak = map(int, done.stdout.split())
    assert 0 < resident <= peak + 2**20 < len(ballast)


# -- no orphans ------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def gone(pid: int, seconds: float = 60) -> bool:
    """Whether a process ends within the time; a zombie that nobody waits for has ended."""
    import psutil

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_the_process_ends_with_the_one_that_started_it(number: signal.Signals) -> None:
    program = (
        "from ternq.efficiency import measure\n"
        "say = lambda event: print(event.stage, flush=True)\n"
        "measure('demo', offline=True, prompt=500, new=520, progress=say)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"load\n"
    (child,) = children(parent.pid)
    os.kill(parent.pid, number)
    parent.wait(60)
    parent.stdout.close()
    assert parent.returncode != 0
    assert gone(child)


def test_a_progress_that_raises_ends_the_process() -> None:
    seen: list[int] = []

    def stop(event: Event) -> None:
        seen.extend(children(os.getpid()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure("demo", offline=True, prompt=4, new=2, progress=stop)
    assert len(seen) == 1
    assert gone(seen[0])


# -- energy ----------------------------------------------------------------------------------------


def zone(folder: Path, name: str, what: str, used: int, most: int = 1_000_000) -> Path:
    """A zone of the Linux powercap folder; in microjoules."""
    (folder / name).mkdir(parents=True)
    (folder / name / "name").write_text(f"{what}\n")
    (folder / name / "energy_uj").write_text(f"{used}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / name / "energy_uj"


CPU = torch.device("cpu")


def test_energy_is_that_of_packages_and_memory_round_the_counters_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficiency, "POWERCAP", tmp_path)
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    inside = zone(tmp_path, "intel-rapl:0:0", "core", 7)
    platform = zone(tmp_path, "intel-rapl:1", "psys", 7)
    meter = efficiency.meter(CPU)
    assert meter is not None
    for file in (inside, platform):
        file.write_text("999999")
    package.write_text("950000")
    meter.add()
    assert meter.joules == pytest.approx(0.05)
    package.write_text("150000")  # gone round once
    memory.write_text("300005")
    meter.add()
    assert meter.joules == pytest.approx(0.05 + 0.2 + 0.3)
    meter.begin()
    meter.add()
    assert meter.joules == 0


def test_energy_that_the_machine_does_not_tell_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficiency, "POWERCAP", tmp_path / "none")
    assert efficiency.meter(CPU) is None
    monkeypatch.setattr(efficiency, "POWERCAP", tmp_path)
    zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    assert efficiency.meter(CPU) is None  # memory alone is no energy of a processor
    hidden = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    assert efficiency.meter(CPU) is not None
    hidden.unlink()
    assert efficiency.meter(CPU) is None


def test_the_gpu_tells_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([1000, 1000, 3500, 3500])
    nvml = SimpleNamespace(
        NVMLError=LookupError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(used),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = SimpleNamespace(uuid="0-1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    meter = efficiency.meter(torch.device("cuda", 0))
    assert meter is not None
    meter.add()
    assert meter.joules == 2.5
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert efficiency.meter(torch.device("cuda", 0)) is None


def test_energy_and_rate_are_of_the_tokens_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock and a counter made up: 2 s a token, 10 J before the first token, 3 J each after."""
    clock = iter([0.0, 7.0, 9.0, 11.0, 13.0])
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(clock))
    used = [0.0]
    times = Times(4, Meter([(lambda: used[0], 100.0)]))
    for joules in (0.0, 10.0, 3.0, 3.0, 3.0):
        used[0] += joules
        times.put(None)
    times.read(last=True)
    assert times.stamps == [0.0, 7.0, 9.0, 11.0, 13.0]
    assert times.meter is not None
    assert times.meter.joules == 9.0
