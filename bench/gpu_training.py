"""How fast ternary distillation trains on a card, as a share of what the card can multiply.

    nohup python bench/gpu_training.py --model SmolLM2-135M --out gpu > gpu.log 2>&1 &
    python bench/gpu_training.py --shape tiny --device cpu --steps 2 --out rehearsal

Without --model the weights are random, in the shape of SmolLM2-135M: speed and memory do not
depend on them. In one process and in turn: the card's matrix rate in bf16; then with and without
compiled decoder blocks the plan's probe (`ternq.budget.probe`) and whole training steps, autocast
to bf16 where the device has it. Writes OUT.json after every measurement, and OUT.md. What
--time-limit leaves no time to begin is written as not measured.

Operations are counted, not measured: for each token 6 for every weight of a matrix product in the
student and 2 in the teacher, and in each layer 12 and 4 times width times block length for
attention. (So model FLOPs utilisation is usually counted: PaLM, arXiv 2204.02311, original not
seen.) What rounding, losses and the optimizer cost is part of the time and not of the count.
"""

import argparse
import copy
import json
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import budget, hf
from ternq.linear import decoder_blocks, prepare
from ternq.modeling_ternq import is_linear
from ternq.precision import has_bf16
from ternq.progress import ignore
from ternq.recipe import Scheme, Training
from ternq.train import Trainer

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = SMOLLM2 | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
SHAPES = {"smollm2-135m": SMOLLM2, "tiny": TINY}
WARM_UP = 3  # steps, in which blocks are compiled


def model_of(source: str | None, shape: str, device: str) -> Any:
    """The model named, or a random one of a shape, in float32."""
    if source:
        return hf.load(source, dtype=torch.float32, device=device).model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(device).eval()


def matrix_rate(device: str, size: int, seconds: float = 2.0) -> float:
    """Operations a second of a square bf16 product: the best of runs of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best, began = float("inf"), time.monotonic()
    while time.monotonic() - began < seconds:
        wait(device)
        start = time.monotonic()
        for _ in range(10):
            a @ b
        wait(device)
        best = min(best, (time.monotonic() - start) / 10)
    return 2 * size**3 / best


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def operations(model: Any, length: int) -> float:
    """Of student and teacher, for one token."""
    weights = sum(m.weight.numel() for m in model.modules() if is_linear(m))
    config, layers = model.config, len(decoder_blocks(model)[1])
    return float(8 * weights + 16 * layers * config.hidden_size * length)


def compile_blocks(model: Any) -> None:
    """Only their ``forward``: hooks and names of parameters stay as they are."""
    for block in decoder_blocks(model)[1]:
        block.forward = torch.compile(block.forward)


def measure(teacher: Any, settings: Training, device: str, compiled: bool) -> dict[str, Any]:
    """Tokens a second by the plan's probe and in training; peak memory of all of it."""
    teacher, student = copy.deepcopy(teacher).requires_grad_(False), copy.deepcopy(teacher)
    prepare(student, Scheme(), settings.ste)
    for model in (student, teacher) if compiled else ():
        compile_blocks(model)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        made = Trainer(
            student=student,
            teacher=teacher,
            blocks=random_blocks(student, settings.sequence_length),
            settings=settings,
            steps=WARM_UP + (settings.steps or 0),
            folder=Path(folder),
            progress=ignore,
        )
        train(made, WARM_UP)
        probed = budget.probe(made)
        wait(device)
        began = time.monotonic()
        train(made, settings.steps or 0)
        wait(device)
        seconds = time.monotonic() - began
    tokens = (settings.steps or 0) * settings.batch_size * settings.sequence_length
    return {
        "tokens_per_second": tokens / seconds,
        "probe_tokens_per_second": probed,
        "peak_bytes": peak(device),
    }


def train(made: Trainer, steps: int) -> None:
    """Some steps, none of them recorded."""
    for _ in range(steps):
        made.one_step()
        made.step += 1


def random_blocks(model: Any, length: int) -> Iterator[Tensor]:
    """Tokens drawn evenly, endlessly."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(model.config.vocab_size, (length,), generator=generator)


def peak(device: str) -> int:
    """Bytes: of the card since it was last asked; of a CPU's process since it began."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings = record["settings"]
    lines = [
        f"{record['model']} on {record['device']}, torch {record['torch']}: "
        f"{settings['batch_size']} blocks of {settings['sequence_length']} tokens a step, "
        f"micro batches of {settings['micro_batch_size'] or settings['batch_size']}; "
        f"bf16 products {record['matrix_rate'] / 1e12:.3g} TFLOP/s.",
        "",
        "| compile | tokens/s | the plan's probe | share of the matrix rate | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in record["compile"].items():
        if "tokens_per_second" not in row:
            lines.append(f"| {name} | {row['not_measured']} | | | |")
            continue
        lines.append(
            f"| {name} | {row['tokens_per_second']:,.0f} | {row['probe_tokens_per_second']:,.0f} | "
            f"{row['share']:.1%} | {row['peak_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or hub id; else random weights")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of random weights")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="measured, after the first few")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both")
    parser.add_argument("--matrix", type=int, help="rows of the matrices that are multiplied")
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds")
    parser.add_argument("--out", type=Path, required=True, help="for OUT.json and OUT.md")
    args = parser.parse_args()
    began = time.monotonic()
    on_card = args.device.startswith("cuda")
    settings = Training(
        steps=args.steps,
        batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
        sequence_length=args.sequence_length,
    )
    teacher = model_of(args.model, args.shape, args.device)
    record: dict[str, Any] = {
        "model": args.model or f"random weights, {args.shape}",
        "device": torch.cuda.get_device_name() if on_card else platform.processor() or "CPU",
        "torch": torch.__version__,
        "bf16": has_bf16(torch.device(args.device)),
        "settings": asdict(settings),
        "matrix_rate": matrix_rate(args.device, args.matrix or (8192 if on_card else 512)),
        "operations_per_token": operations(teacher, args.sequence_length),
        "compile": {},
    }
    for name in ("off", "on") if args.compile == "both" else (args.compile,):
        if time.monotonic() - began > args.time_limit:
            row: dict[str, Any] = {"not_measured": "no time left"}
        else:
            try:
                row = measure(teacher, settings, args.device, name == "on")
                rate = row["tokens_per_second"] * record["operations_per_token"]
                row["share"] = rate / record["matrix_rate"]
            except RuntimeError as error:  # out of memory, or no compiler
                row = {"not_measured": str(error).strip().splitlines()[0]}
        record["compile"][name] = row
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
