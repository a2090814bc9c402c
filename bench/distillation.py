"""A distillation step of a ternary student against that of a dense one of the same size.

    python bench/distillation.py                    # the demo
    python bench/distillation.py MODEL --threads 2 --micro-batch-size 2 --json

Both students learn from the same teacher on the same batch, in one process and in turn, each step
whole: forward, backward, gradient norm, AdamW. Parts, each measured apart:

    dense                     nn.Linear, divergence from the teacher (KL)
    ternary                   the same with TernaryLinear
    ternary+off               and OFF at every block
    ternary+off+diagnostics   and codes compared before and after the step, spread over all steps as
                              in training (a twentieth of them)

Printed are the median seconds of each part and the median over rounds of its ratio to ``dense`` in
the same round. The goal is at most 1.15 for everything together.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ternq import hf
from ternq.linear import prepare
from ternq.precision import has_bf16
from ternq.progress import ignore
from ternq.recipe import DEMO, Scheme, Training
from ternq.rounding import fuses
from ternq.train import Trainer
from ternq.watch import DIAGNOSE_SHARE

DENSE = "dense"
PARTS = (DENSE, "ternary", "ternary+off", "ternary+off+diagnostics")


def trainer(teacher: Any, part: str, asked: argparse.Namespace) -> Trainer:
    """A trainer of a student of one kind."""
    settings = Training(
        steps=1,
        batch_size=asked.batch_size,
        micro_batch_size=asked.micro_batch_size,
        sequence_length=asked.sequence_length,
        off=10.0 if "off" in part else 0.0,
    )
    student = copy.deepcopy(teacher).requires_grad_(True)
    if part != DENSE:
        prepare(student, Scheme(), settings.ste)
    made = Trainer(
        student=student,
        teacher=teacher,
        blocks=iter(()),
        settings=settings,
        steps=10**6,
        folder=Path(tempfile.gettempdir()),
        progress=ignore,
    )
    if part == DENSE:
        made.optimizer = _dense_optimizer(student)
    return made


def _dense_optimizer(student: Any) -> torch.optim.Optimizer:
    """AdamW over the weights that the ternary student learns too: all but embeddings and head."""
    fixed = {
        id(m.weight) for m in (student.get_input_embeddings(), student.get_output_embeddings())
    }
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in fixed)
    return torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)


def step(made: Trainer, batch: torch.Tensor, diagnose: bool) -> None:
    """One optimizer step on a batch, as `Trainer.one_step` makes it."""
    made.blocks = iter(batch)
    if isinstance(made.optimizer, torch.optim.AdamW):  # dense: nothing of it is watched
        made.accumulate(batch)
        made.clip()
        made.optimizer.step()
        made.optimizer.zero_grad()
        return
    made.watch.due = lambda *_: diagnose  # type: ignore[method-assign]
    made.step = 0
    made.one_step()


def seconds(made: Trainer, batch: torch.Tensor, diagnose: bool = False) -> float:
    """Of one step, with the device's work done."""
    _wait(made.device)
    began = time.perf_counter()
    step(made, batch, diagnose)
    _wait(made.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Every part in turn, ``rounds`` times."""
    teacher = hf.load(asked.model, dtype=torch.float32, device=asked.device).model
    teacher.requires_grad_(False)
    kinds = {p: trainer(teacher, p, asked) for p in asked.parts if "diagnostics" not in p}
    if PARTS[3] in asked.parts and PARTS[2] not in kinds:
        kinds[PARTS[2]] = trainer(teacher, PARTS[2], asked)
    vocabulary = teacher.get_output_embeddings().weight.shape[0]
    shape = (asked.batch_size, asked.sequence_length)
    batch = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    for made in kinds.values():  # not counted
        seconds(made, batch, diagnose=True)
    found: dict[str, list[float]] = {part: [] for part in (*kinds, *asked.parts)}
    for _ in range(asked.rounds):
        for part, made in kinds.items():
            found[part].append(seconds(made, batch))
        if PARTS[3] in asked.parts:
            plain, watched = found[PARTS[2]][-1], seconds(kinds[PARTS[2]], batch, diagnose=True)
            found[PARTS[3]].append(plain + DIAGNOSE_SHARE * (watched - plain))
    ratios = {
        part: statistics.median(a / b for a, b in zip(found[part], found[DENSE], strict=True))
        for part in asked.parts
    }
    return {
        "model": asked.model,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "device": _device(asked.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bf16": has_bf16(torch.device(asked.device)),
        "compiled": fuses(torch.device(asked.device)),
        "batch": [*shape, asked.micro_batch_size or asked.batch_size],
        "rounds": asked.rounds,
        "seconds": {part: statistics.median(found[part]) for part in asked.parts},
        "ratio": ratios,
    }


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO, help="folder or .gguf file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one object")
    asked = parser.parse_args()
    asked.parts = [p for p in PARTS if p in {DENSE, *asked.parts}]
    if asked.threads:
        torch.set_num_threads(asked.threads)
    found = measure(asked)
    if asked.json:
        print(json.dumps(found))
        return
    print("{model}: {parameters:,} parameters, {device}, {threads} threads".format(**found))
    for part in asked.parts:
        print(f"{part:26}{found['seconds'][part]:9.3f} s   x {found['ratio'][part]:.3f}")


if __name__ == "__main__":
    main()
