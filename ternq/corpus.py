"""Which text a run trains on and is measured on: held-out tokens and a stream of blocks."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import data, hf
from ternq.files import read_json, write_json
from ternq.memory import free_memory, model_bytes
from ternq.perplexity import BLOCK
from ternq.precision import products
from ternq.progress import Event, Progress
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe, Training, demo_steps
from ternq.runs import OWN_TEXT_FILE
from ternq.text import is_offline, read_documents

HELD_OUT_TOKENS = 8 * BLOCK
DEFAULT_DATA = "allenai/c4"
OWN_TEXT_STEPS = 100  # of text that the teacher writes where no budget is named
OWN_TEXT_TOKENS = 1_000_000  # written at most; a longer training reads them again


@dataclass
class Corpus:
    """Held-out tokens int64 ``[n]``, endless training blocks int64 ``[length]``, their names."""

    held_out: Tensor
    blocks: Iterator[Tensor]
    name: str
    specs: tuple[str, ...]


def choose(
    teacher: hf.Loaded, training_data: tuple[str, ...], offline: bool
) -> tuple[tuple[str, ...], str | None]:
    """The text asked for; else C4 streamed from the hub; else the teacher's own, said in a note.

    The demo has a text of its own, which is no source by name: nothing.
    """
    if training_data or teacher.source == DEMO:
        return training_data, None
    if is_offline(offline):
        why = "no --data was given and the hub is not to be reached"
        return (data.SELF,), f"Text: the teacher's own ({why})."
    return (DEFAULT_DATA,), f"Text: {DEFAULT_DATA} (no --data was given)."


def corpus(
    teacher: hf.Loaded,
    recipe: Recipe,
    specs: tuple[str, ...],
    *,
    device: str = "cpu",
    offline: bool,
    progress: Progress,
    cache: Path | None,
) -> Corpus:
    """Open the text. ``cache`` is the run's folder, where the teacher's own text is kept.

    The teacher writes on ``device``, wherever it is held before and after.
    """
    length = recipe.training.sequence_length
    if not specs:
        return _demo(teacher, recipe, length)
    written, n_blocks = [], HELD_OUT_TOKENS // length
    if count := own_blocks(recipe.training, specs):
        written = _own_text(teacher, recipe, count, device, progress, cache)
        n_blocks = min(n_blocks, int(count / _own_share(specs)) // 8)
    held_out, blocks = data.split_held_out(
        specs,
        teacher.tokenizer,
        length,
        max(1, n_blocks),
        seed=recipe.seed,
        offline=offline,
        progress=progress,
        written=written,
    )
    return Corpus(held_out.flatten(), blocks, "held out of " + ", ".join(specs), specs)


def has_own_text(specs: tuple[str, ...]) -> bool:
    """Whether the teacher's own text is among the sources."""
    return _own_share(specs) > 0


def own_blocks(training: Training, specs: tuple[str, ...]) -> int:
    """Blocks that the teacher writes: its share of what is read, and of what is held out."""
    share, length = _own_share(specs), training.sequence_length
    if not share:
        return 0
    tokens = training.tokens
    if tokens is None:
        steps = OWN_TEXT_STEPS if training.steps is None else training.steps
        tokens = steps * training.batch_size * length
    tokens += training.calibration * length if training.calibrated else 0
    tokens = min(math.ceil(tokens * share), OWN_TEXT_TOKENS)
    return max(16, tokens // length) + HELD_OUT_TOKENS // length // 4


def _own_share(specs: tuple[str, ...]) -> float:
    mix = data.parse_mix(specs)
    own = sum(weight for name, weight in mix if name == data.SELF)
    return own / sum(weight for _, weight in mix) if own else 0.0


def unwritten(specs: tuple[str, ...]) -> Corpus:
    """What stands for the teacher's own text where a plan does not have it written."""
    return Corpus(torch.empty(0, dtype=torch.int64), iter(()), "the teacher's own text", specs)


def _demo(teacher: hf.Loaded, recipe: Recipe, length: int) -> Corpus:
    documents = list(read_documents(str(DEMO_FOLDER / "heldout.jsonl.xz")))
    ids = torch.tensor([i for d in data.encode(documents, teacher.tokenizer) for i in d])
    if demo_steps() is not None:
        ids = ids[: 2 * BLOCK]
    stream = data.mixed([str(DEMO_FOLDER / "train.jsonl.xz")], seed=recipe.seed)
    blocks = data.blocks(stream, teacher.tokenizer, length)
    return Corpus(ids, blocks, "held-out modules of Python's standard library", ())


def _own_text(
    teacher: hf.Loaded,
    recipe: Recipe,
    blocks: int,
    device: str,
    progress: Progress,
    cache: Path | None,
) -> list[str]:
    """Text that the teacher writes; kept in the run's folder, since writing it takes long."""
    settings, length = recipe.training, recipe.training.sequence_length
    kept = None if cache is None else cache / OWN_TEXT_FILE
    key = [teacher.source, recipe.base, recipe.seed, blocks, length]
    if kept is not None and kept.is_file():
        record = read_json(kept)
        if record.get("key") == key:
            return list(record["text"])
    # what goes on from a run has another base, and so text that the run has not read
    digest = hashlib.blake2b(f"{recipe.seed} {recipe.base}".encode(), digest_size=6).digest()
    seed = int.from_bytes(digest, "big")
    with _lent(teacher.model, device, progress), products(settings, teacher.model.device):
        ids = data.teacher_text(
            teacher.model, teacher.tokenizer, blocks, length, seed=seed, progress=progress
        )
    written = [teacher.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"key": key, "text": written})
    return written


@contextlib.contextmanager
def _lent(model: Any, device: str, progress: Progress) -> Iterator[None]:
    """The model on a device for a while; it stays where it is if there is no room for it."""
    home, there = model.device, torch.device(device)
    moves = there.type != home.type
    if moves and model_bytes(model) > free_memory(there) / 2:
        said = f"The teacher does not fit on {device} as it is: it writes its text on {home}"
        progress(Event("text", said, level="warning"))
        moves = False
    if moves:
        model.to(there)
    try:
        yield
    finally:
        if moves:
            model.to(home)
