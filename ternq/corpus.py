"""Which text a run trains on and is measured on: held-out tokens and a stream of blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ternq import checkpoint, data, hf
from ternq.perplexity import BLOCK
from ternq.progress import Progress
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe, demo_steps
from ternq.runs import OWN_TEXT_FILE
from ternq.text import is_offline

HELD_OUT_TOKENS = 8 * BLOCK
DEFAULT_DATA = "allenai/c4"
OWN_TEXT_STEPS = 100  # of text that the teacher writes where no budget is named
OWN_TEXT_TOKENS = 200_000  # written at most; a longer training reads them again


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
    offline: bool,
    progress: Progress,
    cache: Path | None,
) -> Corpus:
    """Open the text. ``cache`` is the run's folder, where the teacher's own text is kept."""
    length = recipe.training.sequence_length
    if not specs:
        return _demo(teacher, recipe, length)
    written: list[str] = []
    if has_own_text(specs):
        written = _own_text(teacher, recipe, progress, cache)
    n_blocks = max(1, len(written) // 8) if written else max(1, HELD_OUT_TOKENS // length)
    held_out, blocks = data.split_held_out(
        specs,
        teacher.tokenizer,
        length,
        n_blocks,
        seed=recipe.seed,
        offline=offline,
        progress=progress,
        written=written,
    )
    return Corpus(held_out.flatten(), blocks, "held out of " + ", ".join(specs), specs)


def has_own_text(specs: tuple[str, ...]) -> bool:
    """Whether the teacher's own text is among the sources."""
    return any(name == data.SELF for name, _ in data.parse_mix(specs))


def unwritten(specs: tuple[str, ...]) -> Corpus:
    """What stands for the teacher's own text where a plan does not have it written."""
    return Corpus(torch.empty(0, dtype=torch.int64), iter(()), "the teacher's own text", specs)


def _demo(teacher: hf.Loaded, recipe: Recipe, length: int) -> Corpus:
    documents = list(data.read_documents(str(DEMO_FOLDER / "heldout.jsonl.xz")))
    ids = torch.tensor([i for d in data.encode(documents, teacher.tokenizer) for i in d])
    if demo_steps() is not None:
        ids = ids[: 2 * BLOCK]
    stream = data.mixed([str(DEMO_FOLDER / "train.jsonl.xz")], seed=recipe.seed)
    blocks = data.blocks(stream, teacher.tokenizer, length)
    return Corpus(ids, blocks, "held-out modules of Python's standard library", ())


def _own_text(
    teacher: hf.Loaded, recipe: Recipe, progress: Progress, cache: Path | None
) -> list[str]:
    """Text that the teacher writes; kept in the run's folder, since writing it takes long."""
    settings = recipe.training
    length = settings.sequence_length
    per_step = settings.batch_size * length
    tokens = settings.tokens or (settings.steps or OWN_TEXT_STEPS) * per_step
    tokens += settings.calibration * length if settings.calibrated else 0
    blocks = max(16, min(tokens, OWN_TEXT_TOKENS) // length) + HELD_OUT_TOKENS // length // 4
    kept = None if cache is None else cache / OWN_TEXT_FILE
    key = [teacher.source, recipe.base, recipe.seed, blocks, length]
    if kept is not None and kept.is_file():
        record = checkpoint.read_json(kept)
        if record.get("key") == key:
            return list(record["text"])
    ids = data.teacher_text(
        teacher.model, teacher.tokenizer, blocks, length, seed=recipe.seed, progress=progress
    )
    written = [teacher.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(kept, {"key": key, "text": written})
    return written
