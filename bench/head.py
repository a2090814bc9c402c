"""Peak memory and time of the distillation loss of a large vocabulary, three ways.

    python bench/head.py --tokens 512 2048 --json

Each way runs in a process of its own: loss and gradient for the hidden states of random tokens,
with a head for the student and one for the teacher. Memory is the growth of the process's largest
resident size over that with the inputs made, a small run behind it.

    plain       logits of both, log-softmax and KL as written down, autograd
    whole       logits of both, then `logit_loss`, by chunks of tokens
    chunks      `head_loss`: logits are made chunk by chunk
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ternq.losses import Head, head_loss, logit_loss

WAYS = ("plain", "whole", "chunks")


def loss(way: str, own: Tensor, other: Tensor, heads: list[Tensor], labels: Tensor) -> Tensor:
    """KL of the teacher's and the student's distributions, the mean over tokens."""
    if way == "chunks":
        return head_loss(own, Head(heads[0]), other, Head(heads[1]), labels)[0]
    with torch.no_grad():
        target = F.linear(other, heads[1])
    logits = F.linear(own, heads[0])
    if way == "whole":
        return logit_loss(logits, target, labels)[0]
    log_q, log_p = logits.float().log_softmax(-1), target.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def child(way: str, tokens: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One way, measured in this process."""
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, asked.dtype)
    # made in their own type: a passing float32 copy would hide what is measured
    shape = (asked.vocabulary, asked.hidden)
    heads = [torch.empty(shape, dtype=dtype).normal_(std=0.02) for _ in range(2)]
    hidden = [torch.randn(tokens, asked.hidden).to(dtype) for _ in range(2)]
    labels = torch.randint(asked.vocabulary, (tokens,))
    small = [h[:2].clone().requires_grad_() for h in hidden]
    loss(way, small[0], small[1], [h[:100] for h in heads], labels[:2] % 100).backward()
    own = hidden[0].requires_grad_()
    before, began = _peak(), time.perf_counter()
    value = loss(way, own, hidden[1], heads, labels)
    value.backward()
    seconds = time.perf_counter() - began
    assert own.grad is not None
    return {
        "way": way,
        "tokens": tokens,
        "bytes": _peak() - before,
        "seconds": seconds,
        "loss": float(value.detach()),
        "gradient": float(own.grad.double().norm()),
    }


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child, asked.tokens[0], asked)))
        return
    rows = []
    for tokens in asked.tokens:
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", way]
            command += ["--tokens", str(tokens), "--threads", str(asked.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            if not asked.json:
                print("{way:8}{tokens:6} tokens  {0:8.0f} MB  {seconds:7.2f} s  loss {loss:.6f}"
                      .format(rows[-1]["bytes"] / 1e6, **rows[-1]), flush=True)  # fmt: skip
    if asked.json:
        shape = {"vocabulary": asked.vocabulary, "hidden": asked.hidden}
        print(json.dumps(shape | {"dtype": asked.dtype, "threads": asked.threads, "rows": rows}))


if __name__ == "__main__":
    main()
