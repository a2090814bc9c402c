"""Memory of training by choice: measured at a model, and counted (`ternq.footprint`).

    python bench/memory.py demo                       # every choice, each in a process of its own
    python bench/memory.py MODEL --device cuda --batch-size 1 --sequence-length 2048 --json
    python bench/memory.py --hidden 4096 --mlp 14336 --blocks 32 --vocabulary 128256 --kv 1024

Measured is the peak during steps, after the start: on the CPU of resident memory, less what the
process holds once a tiny model has trained with the same settings (libraries, allocator); on CUDA
of allocated memory. Counted are its parts: weights of student and teacher, optimizer states, and
what a step takes beside them; without a model nothing else is shown. Linux.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ternq import hf, outlines
from ternq.footprint import footprint
from ternq.progress import ignore
from ternq.recipe import Scheme, Training
from ternq.student import student_of
from ternq.train import Trainer

CHOICES: dict[str, dict[str, Any]] = {
    "all": {},
    "all, recomputed": {"gradient_checkpointing": True},
    "all, 8-bit states": {"optimizer": "adamw-8bit"},
    "all, bfloat16": {"latent": "bfloat16"},
    "all, bfloat16, 8-bit states": {"latent": "bfloat16", "optimizer": "adamw-8bit"},
    "low-rank": {"train": "low-rank"},
    "low-rank, recomputed": {"train": "low-rank", "gradient_checkpointing": True},
    "low-rank, recomputed, 8-bit states": {
        "train": "low-rank",
        "gradient_checkpointing": True,
        "optimizer": "adamw-8bit",
    },
    "low-rank, recomputed, teacher in 8 bits": {
        "train": "low-rank",
        "gradient_checkpointing": True,
        "teacher_dtype": "int8",
    },
    "scales": {"train": "scales"},
    "scales, recomputed": {"train": "scales", "gradient_checkpointing": True},
}
ON_CUDA: dict[str, dict[str, Any]] = {
    "all, offloaded": {"offload": True},
    "all, bfloat16, 8-bit states, offloaded": {
        "latent": "bfloat16",
        "optimizer": "adamw-8bit",
        "offload": True,
    },
}


def llama(hidden: int, mlp: int, blocks: int, vocabulary: int, kv: int) -> Any:
    """A Llama of these sizes, heads of 128 (or 16 where that is too wide)."""
    head = 128 if kv % 128 == 0 else 16
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        num_attention_heads=hidden // head,
        num_key_value_heads=kv // head,
        head_dim=head,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def counted(build: Callable[[], Any], settings: Training, device: str) -> dict[str, int]:
    """What `ternq.footprint` counts, by kind."""
    found = footprint(build, Scheme(), settings, device)
    return {kind: getattr(found, kind) for kind in ("weights", "optimizer", "step")}


def trainer(teacher: Any, settings: Training, folder: Path) -> Trainer:
    """A student at its start, and a trainer of it on random tokens."""
    student, _ = student_of(
        teacher, Scheme(group_size=min(128, teacher.config.hidden_size)), settings
    )
    vocabulary = student.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (256, settings.sequence_length), generator=generator)
    steps = settings.steps or 0
    return Trainer(student, teacher, iter(ids), settings, steps, folder, ignore)


def peak(model: str, settings: Training, device: str) -> dict[str, int]:
    """Bytes at the peak of training, and at the start before it; run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = llama(64, 96, 1, 260, 32).to(device).requires_grad_(False)
        for _ in range(2):
            trainer(tiny, settings, Path(folder)).one_step()
        gc.collect()
        bare = _now(device)
        _reset(device)
        teacher = hf.load(model, dtype=torch.float32, device=device).model.requires_grad_(False)
        made = trainer(teacher, settings, Path(folder))
        gc.collect()
        start = _highest(device) - bare
        _reset(device)
        for step in range(made.steps):
            made.step = step
            made.one_step()
        found = {"start": start, "training": _highest(device) - bare}
    return found | counted(outlines.blueprint(model), settings, device)


def _now(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def _highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _reset(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def asked(args: argparse.Namespace, choice: dict[str, Any]) -> dict[str, Any]:
    """The settings of a choice."""
    usual = {"steps": args.steps, "batch_size": args.batch_size}
    return usual | {"sequence_length": args.sequence_length} | choice


def measured(args: argparse.Namespace, choice: dict[str, Any]) -> dict[str, int]:
    """`peak` in a child process."""
    given = [args.model, json.dumps(asked(args, choice)), args.device]
    command = [sys.executable, __file__, "--child", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure or compute every choice, print."""
    if sys.argv[1:2] == ["--child"]:
        model, settings, device = sys.argv[2:]
        print(json.dumps(peak(model, Training(**json.loads(settings)), device)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="demo, a hub id, folder or .gguf file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", default="", help="choices whose name begins so")
    for name, default in [("hidden", 4096), ("mlp", 14336), ("blocks", 32), ("kv", 1024)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    choices = CHOICES | (ON_CUDA if args.model is None or args.device != "cpu" else {})
    rows = {}

    def build() -> Any:
        return llama(args.hidden, args.mlp, args.blocks, args.vocabulary, args.kv)

    for name, choice in choices.items():
        if name.startswith(args.only):
            if args.model:
                rows[name] = measured(args, choice)
            else:
                rows[name] = counted(build, Training(**asked(args, choice)), "cuda")
            if not args.json:
                _line(name, rows[name], first=len(rows) == 1)
    if args.json:
        print(json.dumps(rows, indent=1))


def _line(name: str, row: dict[str, int], first: bool) -> None:
    """A row of the table in GB, after the heads if it is the first."""
    shown = row | {"counted": sum(row[k] for k in ("weights", "optimizer", "step"))}
    if first:
        print(" " * 40 + "".join(f"{key:>11}" for key in shown) + "   GB")
    print(f"{name:40}" + "".join(f"{value / 1e9:11.3f}" for value in shown.values()), flush=True)


if __name__ == "__main__":
    main()
