"""How fast a packed model reads text, beside the same numbers in dense float32 layers.

    python bench/reading.py SmolLM2-ternary [--length 2048] [--rounds 24] [--dtype float32] [--json]

Both read the same block of random ids in turns, as a perplexity is measured, and change who is
first; so what disturbs the machine disturbs both. Medians, and the median ratio of the rounds.
"""

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch

from ternq import hf, kernels, proof
from ternq.perplexity import block_losses


def main() -> None:
    """Read in turns; print one line, or one JSON object."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    models = {
        "packed": hf.load(args.model, dtype=dtype, offline=True).model,
        "dense": proof.dense(hf.load(args.model, dtype=dtype, offline=True).model).to(dtype),
    }
    vocabulary = models["packed"].config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.rounds + 1):  # the first sets things up
        ids = torch.randint(vocabulary, (1, args.length), generator=generator)
        for name in sorted(models, reverse=turn % 2 == 1):
            took = _seconds(models[name], ids)
            if turn:
                seconds[name].append(took)
    ratios = [p / d for p, d in zip(seconds["packed"], seconds["dense"], strict=True)]
    found: dict[str, Any] = {name: statistics.median(values) for name, values in seconds.items()}
    found |= {"packed / dense": statistics.median(ratios), "length": args.length}
    found |= {"dtype": args.dtype, "rounds": args.rounds, "kernel": kernels.choice()}
    found |= {"machine": platform.processor() or platform.machine()}
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{args.length} tokens, {args.dtype}: {found['packed']:.2f} s packed, "
            f"{found['dense']:.2f} s dense; ratio {found['packed / dense']:.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}); {found['kernel']}"
        )


@torch.no_grad()
def _seconds(model: Any, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    block_losses(model, ids)
    return time.perf_counter() - began


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PACKED", help="a packed model")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
