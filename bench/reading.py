"""How fast a packed model reads text, beside the same numbers in dense float32 layers.

    python bench/reading.py SmolLM2-ternary [--length 2048] [--rounds 24] [--dtype float32] [--json]
    python bench/reading.py SmolLM2-ternary --task wikitext --data-dir FOLDER

Both read the same block in turns, as a perplexity is measured, and change who is first; so what
disturbs the machine disturbs both. Blocks are random ids, or all those of a task's text. Sums,
medians, the median ratio of the rounds, and the perplexities of both.
"""

import argparse
import json
import math
import platform
import statistics
import time
from typing import Any

import torch

from ternq import hf, kernels, proof, tasks
from ternq.perplexity import block_losses


def main() -> None:
    """Read in turns; print one line, or one JSON object."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    packed = hf.load(args.model, dtype=dtype, offline=True)
    models = {
        "packed": packed.model,
        "dense": proof.dense(hf.load(args.model, dtype=dtype, offline=True).model).to(dtype),
    }
    blocks = _blocks(args, packed)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        _read(model, blocks[:1])  # sets things up
    for turn, block in enumerate(blocks.split(1)):
        for name in sorted(models, reverse=turn % 2 == 1):
            took, loss = _read(models[name], block)
            seconds[name].append(took)
            losses[name].append(loss)
    ratios = [p / d for p, d in zip(seconds["packed"], seconds["dense"], strict=True)]
    found: dict[str, Any] = {name: statistics.median(values) for name, values in seconds.items()}
    found |= {f"{name}, all": sum(values) for name, values in seconds.items()}
    found |= {
        f"{name}, perplexity": math.exp(statistics.mean(values)) for name, values in losses.items()
    }
    found |= {"packed / dense": statistics.median(ratios), "length": args.length}
    found |= {"dtype": args.dtype, "blocks": len(blocks), "kernel": kernels.choice()}
    found |= {"machine": platform.processor() or platform.machine()}
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{len(blocks)} blocks of {args.length} tokens, {args.dtype}: "
            f"{found['packed']:.2f} s packed, {found['dense']:.2f} s dense, "
            f"all {found['packed, all']:.0f} and {found['dense, all']:.0f} s; "
            f"ratio {found['packed / dense']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
            f"perplexity {found['packed, perplexity']:.4f} and {found['dense, perplexity']:.4f}; "
            f"{found['kernel']}"
        )


def _blocks(args: argparse.Namespace, loaded: hf.Loaded) -> torch.Tensor:
    """Token ids ``[blocks, length]``."""
    if args.task is None:
        vocabulary = loaded.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (args.rounds, args.length), generator=generator)
    name = f"{args.task}:{tasks.TOKEN_PERPLEXITY}"
    (job,) = tasks.load_jobs([name], args.data_dir, offline=True)
    assert job.text is not None
    ids = job.text.ids(loaded.tokenizer, args.length)
    return ids[: len(ids) // args.length * args.length].view(-1, args.length)


@torch.no_grad()
def _read(model: Any, block: torch.Tensor) -> tuple[float, float]:
    """The seconds that one block ``[1, length]`` takes, and its mean loss."""
    began = time.perf_counter()
    loss = float(block_losses(model, block))
    return time.perf_counter() - began, loss


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="PACKED", help="a packed model")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--task", help="read the text of this task of ternq eval, all of it")
    parser.add_argument("--data-dir", help="with --task: a folder in the hub's layout")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
