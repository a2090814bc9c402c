"""Token perplexity, as quantization papers print it, in the memory that is free.

The protocol is that of GPTQ's published code (Frantar et al. 2022, arXiv 2210.17323): the text is
cut into non-overlapping blocks, each block is read alone, the first token of a block is not
predicted, and the perplexity is the exponential of the mean over the blocks.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternq.errors import InputError
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


def block_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of the predicted tokens of each block of ids [b, t]: [b]."""
    device = next((p.device for p in model.parameters()), ids.device)
    ids = ids.to(device)
    logits = model(ids, use_cache=False).logits
    means = [_loss(row[:-1], own[1:]) for row, own in zip(logits, ids, strict=True)]
    return torch.stack(means).cpu()


def rows_that_fit(model: Any, length: int) -> int:
    """Rows of ``length`` tokens whose logits and activations take an eighth of the free memory."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    config = model.config.get_text_config() if hasattr(model, "config") else None
    width = 2 * getattr(config, "vocab_size", 0) + 16 * getattr(config, "hidden_size", 0)
    fits = free_memory(device) // 8 // max(1, 4 * length * width)
    if device.type == "cpu":
        fits = min(fits, max(1, _TOKENS_ON_CPU // length))
    return max(1, min(fits, _ROWS))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available = int(psutil.virtual_memory().available)
    return min(available, _left_in_container() or available)


def _left_in_container() -> int | None:
    """Bytes that a container's limit leaves; None where there is none, or none is told."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return int(limit) - used if limit.isdecimal() else None


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
