"""Token perplexity, as quantization papers print it, in the memory that is free.

The protocol is that of GPTQ's published code (Frantar et al. 2022, arXiv 2210.17323): the text is
cut into non-overlapping blocks, each block is read alone, the first token of a block is not
predicted, and the perplexity is the exponential of the mean over the blocks.
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternq.errors import InputError
from ternq.memory import free_memory
from ternq.progress import Event, Progress, ignore

BLOCK = 2048
"""Tokens of a block in the papers' tables."""

_ROWS, _TOKENS_ON_CPU = 64, 8192  # more at once gains nothing
_CHUNK = 512  # tokens whose logits are held in float32 at once


@torch.no_grad()
def token_perplexity(
    model: nn.Module,
    ids: Tensor,
    length: int = BLOCK,
    *,
    batch_size: int | None = None,
    stage: str = "perplexity",
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Perplexity of token ids [n] in blocks of ``length``, in float32; a rest is left out.

    A text shorter than one block is one shorter block, and that is said. Returns
    ``{token_perplexity, blocks, block_length, tokens}``. Raises `InputError` below two tokens.
    """
    blocks = _blocks(ids.flatten(), length, stage, progress)
    rows = batch_size or rows_that_fit(model, blocks.shape[1])
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    for batch in torch.split(blocks, rows):
        losses.append(block_losses(model, batch))
        progress(Event(stage, done=sum(map(len, losses)), total=len(blocks)))
    model.train(was_training)
    return {
        "token_perplexity": float(torch.cat(losses).mean().exp()),
        "blocks": len(blocks),
        "block_length": blocks.shape[1],
        "tokens": blocks.numel(),
    }


@torch.no_grad()
def divergence(
    model: nn.Module,
    baseline: nn.Module,
    ids: Tensor,
    length: int = BLOCK,
    *,
    batch_size: int | None = None,
    stage: str = "divergence",
    progress: Progress = ignore,
) -> dict[str, float | int]:
    """How far a model's next-token distributions are from a baseline's, on token ids [n].

    ``kl_divergence`` is KL(baseline || model) in nats, the mean over every predicted token of
    blocks of ``length``; ``kl_divergence_stderr`` the standard error of that mean over the blocks;
    ``top1_agreement`` the share of tokens for which both hold the same token likeliest;
    ``kl_tokens`` their number. Raises `InputError` where the vocabularies differ.
    """
    blocks = _blocks(ids.flatten(), length, stage, progress)
    rows = batch_size or max(1, rows_that_fit(model, blocks.shape[1]) // 2)
    models = (model.eval(), baseline.eval())
    found: list[Tensor] = []
    for batch in torch.split(blocks, rows):
        own, theirs = (one(batch.to(_device(one)), use_cache=False).logits for one in models)
        if own.shape != theirs.shape:
            raise InputError(
                f"The vocabularies have {own.shape[-1]} and {theirs.shape[-1]} tokens: their "
                "distributions cannot be compared."
            )
        pairs = zip(own[:, :-1], theirs[:, :-1], strict=True)
        found += [_divergence(a, b.to(a.device)).cpu() for a, b in pairs]
        progress(Event(stage, done=len(found), total=len(blocks)))
    kl, same = torch.stack(found).unbind(1)
    spread = float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else math.nan
    count = len(kl) * (blocks.shape[1] - 1)
    mean = {"kl_divergence": float(kl.mean()), "top1_agreement": float(same.mean())}
    return mean | {"kl_divergence_stderr": spread, "kl_tokens": count}


def _divergence(own: Tensor, theirs: Tensor) -> Tensor:
    """Means over the tokens of logits [t, v]: KL(theirs || own), and agreement of the likeliest."""
    sums = torch.zeros(2, dtype=torch.float64, device=own.device)
    parts = zip(torch.split(own, _CHUNK), torch.split(theirs, _CHUNK), strict=True)
    for mine, other in parts:
        q, p = mine.float().log_softmax(-1), other.float().log_softmax(-1)
        sums[0] += F.kl_div(q, p, reduction="sum", log_target=True).double()
        sums[1] += (mine.argmax(-1) == other.argmax(-1)).sum()
    return sums / len(own)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def block_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of the predicted tokens of each block of ids [b, t]: [b]."""
    ids = ids.to(_device(model))
    logits = model(ids, use_cache=False).logits
    means = [_loss(row[:-1], own[1:]) for row, own in zip(logits, ids, strict=True)]
    return torch.stack(means).cpu()


@torch.no_grad()
def tokens_per_second(model: Any, length: int, seconds: float = 1.0) -> float:
    """Tokens a model reads in a second: batches that grow until one takes ``seconds``.

    The last one counts, never the first, which sets things up.
    """
    rows = rows_that_fit(model, length)
    count, first = min(64, length), True
    while True:
        ids = torch.zeros(max(1, count // length), min(count, length), dtype=torch.int64)
        start = time.perf_counter()
        float(model(ids.to(_device(model)), use_cache=False).logits[0, 0, 0])  # waits for a GPU
        took = time.perf_counter() - start
        if not first and (took > seconds or count >= rows * length):
            return ids.numel() / took
        count, first = count if first else min(4 * count, rows * length), False


def rows_that_fit(model: Any, length: int) -> int:
    """Rows of ``length`` tokens whose logits and activations take an eighth of the free memory."""
    device = _device(model)
    config = model.config.get_text_config() if hasattr(model, "config") else None
    width = 2 * getattr(config, "vocab_size", 0) + 16 * getattr(config, "hidden_size", 0)
    fits = free_memory(device) // 8 // max(1, 4 * length * width)
    if device.type == "cpu":
        fits = min(fits, max(1, _TOKENS_ON_CPU // length))
    return max(1, min(fits, _ROWS))


def _blocks(ids: Tensor, length: int, stage: str, progress: Progress) -> Tensor:
    if len(ids) < 2:
        raise InputError(f"{stage}: the text has {len(ids)} tokens; predicting needs at least 2.")
    if len(ids) < length:
        said = f"the text is shorter than one block of {length}: one block of {len(ids)} tokens"
        progress(Event(stage, said, level="warning"))
        length = len(ids)
    return ids[: len(ids) // length * length].view(-1, length)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    parts = zip(torch.split(logits, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    sums = [F.cross_entropy(a.float(), b, reduction="sum").double() for a, b in parts]
    return torch.stack(sums).sum() / len(targets)
