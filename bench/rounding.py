"""Latent weights to ternary values and back: the C kernels beside torch's passes, in turn.

    OMP_NUM_THREADS=2 python bench/rounding.py [--shapes 576x1536 4096x4096] [--rounds 20]

A weight of each shape (groups of 128) is rounded to bfloat16 as a forward pass does, and a bfloat16
gradient of it becomes that of the latent weight, scales and shifts, as a backward pass does. Prints
medians in milliseconds, and the median of the ratios of one round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ternq import kernels, rounding, ternary

SHAPES = ["576x576", "576x1536", "2048x8192", "4096x4096", "14336x4096"]
GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(f"{kernels.choice()}, torch {torch.__version__}\n")
    print("| weight | forward: C, torch | ratio | backward: C, torch | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for shape in args.shapes:
        cells = [cell(run, args.rounds) for run in passes(*map(int, shape.split("x")))]
        print(f"| {shape} | {' | '.join(cells)} |", flush=True)


def passes(rows: int, columns: int) -> list[Callable[[], object]]:
    """The two passes over one weight."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    groups = rows, ternary.n_groups(columns, GROUP)
    scale, shift = (torch.rand(groups, generator=generator) for _ in range(2))
    given, codes = gradient.bfloat16(), rounding.quantize(weight, GROUP)
    return [
        lambda: rounding.rounded(weight, scale, shift, GROUP, torch.bfloat16),
        lambda: rounding.straight_through(given, codes, scale, GROUP),
    ]


def cell(run: Callable[[], object], rounds: int) -> str:
    """Medians of both ways, and of their ratio."""
    seconds: dict[str, list[float]] = {"auto": [], "torch": []}
    for turn in range(rounds + 2):
        for kernel, taken in seconds.items():
            with kernels.using(kernel):
                began = time.perf_counter()
                run()
                if turn >= 2:  # the first warm up
                    taken.append(time.perf_counter() - began)
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    both = ", ".join(f"{1e3 * statistics.median(taken):.2f}" for taken in seconds.values())
    return f"{both} ms | {ratio:.2f}"


if __name__ == "__main__":
    main()
