"""Peak memory of ``ternq ternarize --block-by-block``: it must not grow with the number of blocks.

    python bench/blockwise.py [--blocks 2 4] [--hidden 4096 --mlp 14336 --vocabulary 128256] ...

Makes a random bfloat16 checkpoint in shards with the shapes of Llama-3-8B cut to so many blocks,
and makes it ternary in a child process, on the demo's text. Random weights learn nothing: what is
measured is memory and time. Prints a Markdown table; exits 1 if the peak of the most blocks is more
than 5 % above that of the fewest.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig

from ternq import outlines
from ternq.recipe import DEMO_FOLDER, Training
from ternq.walk import bytes_needed
from ternq.writer import TensorWriter

TEXT = DEMO_FOLDER / "train.jsonl.xz"
SHARD = 10**9


def main() -> None:
    args = _arguments()
    print("| blocks | checkpoint | peak memory | estimated | seconds |")
    print("| --- | --- | --- | --- | --- |")
    peaks = []
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            model = Path(work) / "model"
            size = checkpoint(model, blocks, args)
            training = Training(calibration=args.calibration, sequence_length=args.length,
                                reconstruction_epochs=args.epochs)  # fmt: skip
            estimate = bytes_needed(outlines.skeleton(model), training)
            peak, seconds = ternarize(model, Path(work) / "out", args)
        peaks.append(peak)
        print(f"| {blocks} | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {estimate / 1e9:.2f} GB | "
              f"{seconds:.0f} |", flush=True)  # fmt: skip
    if peaks[-1] > 1.05 * peaks[0]:
        raise SystemExit("The peak grows with the blocks.")


def checkpoint(folder: Path, blocks: int, args: argparse.Namespace) -> int:
    """Write a random model, tensor by tensor; the size of its weights in bytes."""
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    state = outlines.skeleton(folder).state_dict()
    layout = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(0)
    with TensorWriter(folder, layout, SHARD) as writer:
        for name, (dtype, shape) in layout.items():
            if "norm" in name:
                writer.write(name, torch.ones(shape, dtype=dtype))
            else:
                writer.write(name, torch.randn(shape, generator=generator, dtype=dtype) * 0.02)
    return sum(2 * tensor.numel() for tensor in state.values())


def ternarize(model: Path, out: Path, args: argparse.Namespace) -> tuple[int, float]:
    """Peak resident bytes and seconds of the command, in a process of its own."""
    command = [sys.executable, "-m", "ternq", "ternarize", str(model), "-o", str(out), "--json",
               "-q",
               "--data", str(TEXT), "--calibration", str(args.calibration),
               "--sequence-length", str(args.length),
               "--reconstruction-epochs", str(args.epochs)]  # fmt: skip
    command += [] if args.default else ["--block-by-block"]
    began = time.monotonic()
    child = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"},
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}\n{said}")
    assert json.loads(said)["verify"]["ok"]
    return _bytes(usage), time.monotonic() - began


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--work", type=Path, help="Where checkpoints are made. [temporary files]")
    parser.add_argument("--default", action="store_true", help="Leave --block-by-block out.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
