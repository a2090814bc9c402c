"""What one model costs to run: load time, file and memory, tokens per second, and energy if told.

The efficiency dimension of Jin et al. 2024 (arXiv 2402.16775): 256 tokens of prompt, 512 generated.
Everything is measured in a fresh interpreter, so that time and memory are those of the model, not
of what the process did before: `measure` starts this module as a program, which writes one JSON
object a line and ends with the process that started it, however that one ends.
"""

import gc
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ternq import errors
from ternq.errors import (
    InputError,
    InterruptedByUser,
    RecipeError,
    ResourceError,
    StoppedError,
    TernqError,
    is_memory,
)
from ternq.progress import Event, Progress, ignore

PROMPT, NEW = 256, 512
POWERCAP = Path("/sys/class/powercap")

_PREFILLS = 3  # repetitions, whose median counts
_WARM_UP = 3  # tokens generated before anything is timed
_SECONDS = 1.0  # between two readings of the energy counters, and two events
_STAGE = "efficiency"

Found = dict[str, float | int]
Counter = tuple[Callable[[], float], float]
"""Reads joules; and the joules at which it begins anew at 0."""


def measure(
    model: str,
    *,
    device: str = "cpu",
    dtype: Any = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    int8_activations: bool = False,
    prompt: int = PROMPT,
    new: int = NEW,
    progress: Progress = ignore,
) -> Found:
    """Load a model in a process of its own, and generate ``new`` tokens after ``prompt`` tokens.

    Greedy, with a cache, by transformers' ``generate``; no token ends it early. A model that the
    native decoder of ``ternq generate`` runs is measured by that as well. Returns:

    - ``load_seconds``: of `ternq.hf.load`, checks included; the files may be in the disk's cache;
    - ``file_bytes``: the files that hold tensors;
    - ``parameter_bytes``: parameters and buffers once loaded, tied ones once;
    - ``resident_bytes``: what loading added to the resident size, ``peak_resident_bytes``: the
      largest of the whole process, ``device_bytes``: the most that tensors took (CUDA only);
    - ``prefill_tokens_per_second``: a median; ``decode_tokens_per_second``: after the first token;
    - ``native_prefill_tokens_per_second``, ``native_decode_tokens_per_second``: by that decoder;
    - ``energy_joules_per_token``: while decoding, of the processors and their memory, or of the
      GPU on CUDA; absent where the machine does not tell it;
    - ``prompt_tokens``, ``new_tokens``: fewer, and ``partial``, if the model reads no more.

    ``dtype`` is a torch dtype or None. Raises what `ternq.hf.load` raises, `ResourceError` where
    memory does not suffice, and `RecipeError` for fewer than 1 and 2 tokens.
    """
    if prompt < 1 or new < 2:
        raise RecipeError("Measuring speed needs a prompt of 1 token and 2 new tokens at least.")
    job = {
        "model": model,
        "device": str(device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "offline": offline,
        "trust_remote_code": trust_remote_code,
        "int8_activations": int8_activations,
        "prompt": prompt,
        "new": new,
    }
    return _run(job, progress)


def _run(job: dict[str, Any], progress: Progress) -> Found:
    """The program below, which does not outlive this call."""
    command = [sys.executable, "-P", "-m", "ternq.efficiency", json.dumps(job)]
    cut_off = {"HF_HUB_OFFLINE": "1"} if job["offline"] else {}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | cut_off,
            encoding="utf-8",
        ) as child,
    ):
        try:
            assert child.stdout is not None
            answer = _relay(child.stdout, progress)
            status = child.wait()
        finally:
            child.kill()
        said.seek(0)
        if "result" not in answer:
            raise _failure(answer, status, said.read().decode("utf-8", errors="replace"))
    found: Found = answer["result"]
    return found


def _relay(lines: Iterable[str], progress: Progress) -> dict[str, Any]:
    """Hand events on; the last line is the answer, and {} if there is none."""
    answer: dict[str, Any] = {}
    for line in lines:
        answer = json.loads(line)
        if "event" in answer:
            progress(Event(**answer["event"]))
    return answer


def _failure(answer: dict[str, Any], status: int, said: str) -> Exception:
    """What the program raised, was ended by, or wrote to stderr."""
    if "error" in answer:
        error = answer["error"]
        kind: type[TernqError] = getattr(errors, error["type"])
        return kind(error["message"], error["hint"])
    if status == -signal.SIGINT:
        return InterruptedByUser("The process that measured efficiency was interrupted.")
    if status == -signal.SIGTERM:
        return StoppedError("The process that measured efficiency was stopped by SIGTERM.")
    if status < 0:
        return ResourceError(
            f"The process that measured efficiency was ended by signal {-status}.",
            "If that was for want of memory, try a smaller --dtype, or a smaller model.",
        )
    lines = said.strip().splitlines() or [f"exit status {status}"]
    found = RuntimeError(f"measuring efficiency failed: {lines[-1]}")
    found.add_note(said)
    return found


# -- the program -----------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Measure what the JSON of the first argument asks for; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no JSON

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        say(result=_measure(**json.loads(arguments[0]), progress=lambda e: say(event=asdict(e))))
    except TernqError as error:
        kind = type(error).__name__
        say(error={"type": kind, "message": error.message, "hint": error.hint})
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        message = "Not enough memory to run the model."
        say(error={"type": "ResourceError", "message": message, "hint": None})
        return ResourceError.exit_code
    return 0


def _end_with_the_parent() -> None:
    """The parent never writes: its end of the pipe is closed when it is gone, however it went."""
    os.read(0, 1)
    os._exit(1)


def _measure(
    model: str,
    device: str,
    dtype: str | None,
    offline: bool,
    trust_remote_code: bool,
    int8_activations: bool,
    prompt: int,
    new: int,
    progress: Progress,
) -> Found:
    import torch

    from ternq import hf, outlines
    from ternq.memory import model_bytes, peak, resident
    from ternq.recipe import DEMO_FOLDER

    outlines.skeleton(DEMO_FOLDER)  # imports transformers' code, which is none of the model's
    before, began = resident(), time.perf_counter()
    loaded = hf.load(
        model,
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        int8_activations=int8_activations,
        progress=progress,
    )
    found: Found = {"load_seconds": time.perf_counter() - began}
    gc.collect()
    found["resident_bytes"] = resident() - before
    found["file_bytes"] = _file_bytes(loaded)
    found["parameter_bytes"] = model_bytes(loaded.model)
    asked = (prompt, new)
    prompt, new = _fitted(prompt, new, outlines.max_length(loaded.model))
    if (prompt, new) != asked:
        said = f"{model} reads {prompt + new} tokens: measured with {prompt} and {new} new ones"
        progress(Event(_STAGE, said, level="warning"))
    found |= _speed(loaded.model, prompt, new, progress)
    if loaded.model.device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(loaded.model.device)
    found["peak_resident_bytes"] = peak()
    if dtype in (None, "float32"):
        found |= _native_speed(loaded.model, prompt, new, int8_activations)
    return found | {"samples": 1, "partial": (prompt, new) != asked}


def _fitted(prompt: int, new: int, positions: int) -> tuple[int, int]:
    """Both numbers, or as many in proportion as there are positions.

    >>> _fitted(256, 512, 1024), _fitted(256, 512, 96)
    ((256, 512), (32, 64))
    """
    if positions >= prompt + new:
        return prompt, new
    if positions < 3:
        raise InputError(f"The model reads {positions} tokens, too few to measure its speed.")
    short = min(max(1, prompt * positions // (prompt + new)), positions - 2)
    return short, positions - short


# -- speed and energy ------------------------------------------------------------------------------


def _speed(model: Any, prompt: int, new: int, progress: Progress) -> Found:
    """Tokens per second of both phases, and the energy of the second."""

    model.generation_config = type(model.generation_config)()  # nothing that ends or changes it
    ids = _prompt(model, prompt).to(model.device)
    generated(model, ids, min(new, _WARM_UP), Times())
    seconds = []
    for repetition in range(_PREFILLS):
        times = generated(model, ids, 1, Times())
        seconds.append(times.stamps[1] - times.stamps[0])
        progress(Event(f"{_STAGE}: prefill", done=repetition + 1, total=_PREFILLS))
    times = generated(model, ids, new, Times(new, meter(model.device), progress))
    decoded = len(times.stamps) - 2
    found: Found = {
        "prefill_tokens_per_second": prompt / statistics.median(seconds),
        "decode_tokens_per_second": decoded / (times.stamps[-1] - times.stamps[1]),
        "prompt_tokens": prompt,
        "new_tokens": decoded + 1,
    }
    if times.meter is not None:
        found["energy_joules_per_token"] = times.meter.joules / decoded
    return found


def _prompt(model: Any, length: int) -> Any:
    """Random ids ``[1, length]``, the same in every run."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def _native_speed(model: Any, prompt: int, new: int, int8: bool) -> Found:
    """Both phases by the native decoder; nothing of a model that it does not run."""
    from ternq.decoder import Decoder, obstacle
    from ternq.kernels import one_thread

    if obstacle(model, prompt + new) is not None:
        return {}
    ids = _prompt(model, prompt)[0].tolist()
    # torch's threads spin a while after work, on the decoder's cores
    with Decoder(model, prompt + new, int8=int8) as decoder, one_thread():
        seconds = []
        for _ in range(_PREFILLS):
            began = time.perf_counter()
            token = int(decoder.logits(ids, 0).argmax())
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for position in range(prompt, prompt + new - 1):
            token = int(decoder.logits([token], position).argmax())
        decoding = time.perf_counter() - began
    return {
        "native_prefill_tokens_per_second": prompt / statistics.median(seconds),
        "native_decode_tokens_per_second": (new - 1) / decoding,
    }


def generated(model: Any, ids: Any, new: int, times: "Times") -> "Times":
    """``new`` greedy tokens after ``ids`` ``[1, length]``, whatever they say; their times."""
    import torch

    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            streamer=times,
        )
    times.read(last=True)
    return times


@dataclass
class Times:
    """A streamer of transformers that notes when the prompt and each token came.

    The energy counted is that between the first token and the last.
    """

    total: int = 0
    meter: "Meter | None" = None
    progress: Progress = ignore
    stamps: list[float] = field(default_factory=list)
    _read: float = 0.0

    def put(self, ids: Any) -> None:
        self.stamps.append(time.perf_counter())
        if len(self.stamps) == 2 and self.meter is not None:
            self.meter.begin()
        if len(self.stamps) == 2 or self.stamps[-1] - self._read >= _SECONDS:
            self.read()

    def end(self) -> None:
        """Nothing is held back."""

    def read(self, last: bool = False) -> None:
        """The energy so far, and a word of progress."""
        self._read = self.stamps[-1]
        if self.meter is not None:
            self.meter.add()
        if self.total:
            done = self.total if last else len(self.stamps) - 1
            self.progress(Event(f"{_STAGE}: decode", done=done, total=self.total))


class Meter:
    """Joules of several counters since `begin`, if `add` comes before any has gone round."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.joules, self._last = 0.0, self._now()

    def add(self) -> None:
        """Add what was used since the last reading."""
        now = self._now()
        for before, after, (_, wrap) in zip(self._last, now, self._counters, strict=True):
            self.joules += (after - before) % wrap
        self._last = now

    def _now(self) -> list[float]:
        return [read() for read, _ in self._counters]


def meter(device: Any) -> Meter | None:
    """What counts the energy of a device here, or None."""
    try:
        counters = _nvml(device) if device.type == "cuda" else _rapl()
        return Meter(counters) if counters else None
    except (OSError, ValueError):  # only root may read it, mostly
        return None


def _rapl() -> list[Counter]:
    """Linux' counters of each processor package and its memory; those inside these are left out."""
    zones = {zone: (zone / "name").read_text().strip() for zone in POWERCAP.glob("intel-rapl:*")}
    if not any(name.startswith("package") for name in zones.values()):
        return []
    counted = [zone for zone, name in zones.items() if name.startswith(("package", "dram"))]
    return [
        (_microjoules(z / "energy_uj"), _microjoules(z / "max_energy_range_uj")()) for z in counted
    ]


def _microjoules(file: Path) -> Callable[[], float]:
    return lambda: int(file.read_text()) / 1e6


def _nvml(device: Any) -> list[Counter]:
    """The counter of an NVIDIA GPU, where the package pynvml is installed."""
    import torch

    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (nvml.NVMLError, AttributeError):
        return []
    return [(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)]


# -- bytes -----------------------------------------------------------------------------------------


def _file_bytes(loaded: Any) -> int:
    """Bytes of the files that a model's tensors were read from."""
    from ternq import checkpoint, origin

    path: Path | None = loaded.path
    if path is not None and path.is_file():
        return path.stat().st_size
    if path is not None and loaded.kind == "run":
        return (path / origin.STUDENT_FILE).stat().st_size
    folder = origin.model_folder(loaded.source, path, offline=True)  # by now it is in the cache
    return sum(file.stat().st_size for file in checkpoint.TensorFolder(folder).files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
