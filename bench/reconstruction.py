"""The rate of block-wise reconstruction (--reconstruction-lr), on the first blocks of a model.

    python bench/reconstruction.py MODEL --data TEXT [--rates 1e-4 3e-4 1e-3] [--blocks 4] ...

Each rate walks the same blocks from the same compensated rounding; what counts is the distance to
the dense block on text that is held out (`ternq.reconstruct.distance`), since the text that is
trained on always comes nearer. One JSON line a block.
"""

import argparse
import json
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from ternq import data, hf
from ternq.blocks import Passing, calls_of
from ternq.calibrate import Started, on, run, start_block, use, use_latent
from ternq.linear import decoder_blocks, ternary_layers
from ternq.recipe import Scheme, Training
from ternq.reconstruct import mean_distance, reconstruct
from ternq.student import student_of


@torch.no_grad()
def walk(dense: Any, ids: torch.Tensor, seen: int, rate: float, args: argparse.Namespace) -> None:
    """The first blocks, one after another; of ``ids`` the first ``seen`` are trained on."""
    settings = Training(reconstruction_lr=rate, reconstruction_epochs=args.epochs)
    scheme = Scheme(group_size=args.group_size)
    student = student_of(dense, scheme, settings)[0].eval()
    prefix, blocks = decoder_blocks(student)
    calls = calls_of(student, blocks, Passing(blocks, blocks[0].forward), torch.split(ids, 1))
    autocast, done = nullcontext(), Started()
    hidden = target = [call.hidden for call in calls[0]]
    for index in range(args.blocks):
        block = blocks[index]
        layers = {n: m for n, m in ternary_layers(student).items()
                  if n.startswith(f"{prefix}.{index}.")}  # fmt: skip
        now = on(calls[index], hidden)
        use_latent(layers)
        target = run(block, on(calls[index], target), autocast)
        start_block(block, layers, now[:seen], done, autocast, [], settings=None, seed=0)
        rounded = mean_distance(block, now[seen:], target[seen:], autocast)
        for layer in layers.values():
            use(layer, None)
        began = time.monotonic()
        before, after, _ = reconstruct(block, now[:seen], target[:seen], settings, seed=index,
                                       autocast=autocast)  # fmt: skip
        seconds = time.monotonic() - began
        for layer in layers.values():
            use(layer, layer.numbers().dequantized())
        held_out = mean_distance(block, now[seen:], target[seen:], autocast)
        hidden = run(block, now, autocast)
        row = {"rate": rate, "block": index, "calibration": seen, "epochs": args.epochs,
               "rounded": before, "trained": after, "rounded_held_out": rounded,
               "trained_held_out": held_out, "seconds": round(seconds, 1)}  # fmt: skip
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="Text, part of which is held out.")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--blocks", type=int, default=4, help="of the decoder, from the first")
    parser.add_argument("--calibration", type=int, default=32, help="Blocks of text trained on.")
    parser.add_argument("--held-out", type=int, default=16, help="Blocks of text for judging.")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    loaded = hf.load(args.model, offline=True)
    loaded.model.requires_grad_(False)
    held, train = data.split_held_out([args.data], loaded.tokenizer, args.length, args.held_out)
    seen = torch.stack(list(islice(train, args.calibration)))
    for rate in args.rates:
        walk(loaded.model, torch.cat([seen, held]), len(seen), rate, args)


if __name__ == "__main__":
    main()
