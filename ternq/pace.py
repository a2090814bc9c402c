"""How long making a model takes, part by part: from a few steps and a few pages measured here."""

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ternq import baseline, budget, data, hf, outlines, streamed
from ternq.calibrate import run, stages
from ternq.compensate import inverse_root
from ternq.corpus import HELD_OUT_TOKENS, own_blocks
from ternq.linear import prepare, rounded_layers, ternary_layers
from ternq.perplexity import BLOCK, tokens_per_second
from ternq.precision import products
from ternq.prepared import Prepared
from ternq.progress import Event, Progress
from ternq.recipe import CALIBRATED, Recipe, Scheme
from ternq.reconstruct import reconstruct, rows_at_once, work
from ternq.samples import PROMPTS, TOKENS
from ternq.streamed import put_in
from ternq.train import Trainer
from ternq.walk import TOKENS_AT_ONCE, Walk

T = TypeVar("T")

SAVING = 200e6  # bytes a second that a checkpoint is written, read back and compared at
TEXTS = 2 * len(PROMPTS[""]) * TOKENS  # tokens that teacher and student write for the report
WALKS = 3  # passes of a model that a start over its text is worth; too many rather than too few
SOME = 1024  # rows and columns of a layer that is rounded to know how long all take
PASSES = 3  # over the held-out text: teacher, untrained and packed student


def end_to_end(
    prepared: Prepared, out: Path, starting: float, loading: float, progress: Progress
) -> dict[str, Any]:
    """``training`` and ``seconds`` of a plan: its budget, and how long each part takes."""
    progress(Event("plan", "Measuring how fast this machine trains and reads"))
    prepared.settle()
    student, recipe = prepared.student.model, prepared.recipe
    teacher = prepared.teacher and prepared.teacher.model
    length = min(BLOCK, outlines.max_length(student))
    with torch.no_grad():
        reading = tokens_per_second(student.eval(), length)
        passes = (PASSES - 1) / reading
        passes += 1 / tokens_per_second(teacher.eval(), length) if teacher else 0.0
    rounding, rate = 0.0, None
    calibrated = recipe.scheme.method in CALIBRATED or recipe.training.calibrated
    if calibrated:
        layers = {**ternary_layers(student), **rounded_layers(student)}
        rounding = _rounding([layer.weight.shape for layer in layers.values()], recipe.scheme)
    if not recipe.only_rounds:
        trainer = Trainer(
            student=student,
            teacher=teacher,
            blocks=iter(()),
            settings=recipe.training,
            steps=1,
            folder=out,
            progress=progress,
        )
        rate = budget.probe(trainer)
    training = budgeted(recipe, rate)
    held_out = len(prepared.corpus.held_out) or HELD_OUT_TOKENS
    state = sum(p.nbytes for p in student.parameters()) * (3 if training["steps"] else 1)
    parts = {
        "starting": starting,
        "loading": loading,
        "writing": _writing(prepared),
        "start": rounding + (_walking(recipe, reading, rate) if calibrated else 0.0),
        "training": training["seconds"] or 0.0,
        "evaluation": held_out * passes,
        "saving": state / SAVING,
        "packing": loading,  # written, read back and loaded again
        "texts": TEXTS * _forward(student),
    }
    return {"training": training, "seconds": parts | {"total": sum(parts.values())}}


def _writing(prepared: Prepared) -> float:
    """Seconds that the teacher takes to write its share of the text.

    What it keeps of the tokens before grows with each, and so does the time for the next one: in
    ``n`` steps ``a * n + b * n**2``, of which both are found by writing a little and some more.
    """
    settings = prepared.recipe.training
    blocks, steps = own_blocks(settings, prepared.corpus.specs), settings.sequence_length - 1
    if not blocks:
        return 0.0
    writer = prepared.teacher or prepared.student
    rows = min(blocks, data.side_by_side(writer.model, settings.sequence_length))

    def written(count: int) -> float:
        return _timed(lambda: data.teacher_text(writer.model, writer.tokenizer, rows, 1 + count))[1]

    few, more = min(4, steps), min(32, steps)
    with products(settings, writer.model.device):
        written(1)  # sets things up
        first, second = written(few) / few, written(more) / more
    growth = max(0.0, second - first) / max(1, more - few)
    return (first + growth * (steps - few)) * steps * -(-blocks // rows)


def by_blocks(
    loaded: hf.Loaded,
    folder: Path,
    recipe: Recipe,
    device: str,
    starting: float,
    progress: Progress,
) -> dict[str, Any]:
    """The same for a model without weights, from what the first block of its ``folder`` takes.

    Raises:
        InputError: the weights there are not those of the configuration.
    """
    progress(Event("plan", "Measuring how fast this machine reads, rounds and trains a block"))
    walk, opening = _timed(lambda: Walk(loaded.source, folder, device))
    settings, blocks = recipe.training, len(walk.blocks)
    length = min(BLOCK, outlines.max_length(loaded.model))
    held = min(settings.calibration * settings.sequence_length, HELD_OUT_TOKENS) // length or 1
    page = torch.zeros(1, length, dtype=torch.int64)
    held_call = walk.calls(page, 1)[0][0]
    block, reading = _timed(lambda: walk.block(0))
    _, passing = _timed(lambda: run(block, [held_call], nullcontext()))
    some = page[:, : min(length, TOKENS_AT_ONCE + 1)]
    hidden = held_call.hidden[:, : some.shape[1]]
    _, head = _timed(lambda: walk.losses(some, [hidden]))
    tensors: list[Any] = [p.numpy() for p in block.cpu().parameters()]
    _, hashing = _timed(lambda: [hashlib.sha256(memoryview(t)) for t in tensors])
    block.to(walk.device)
    share = sum(p.numel() for p in walk.model.parameters()) / sum(
        p.numel() for p in block.parameters()
    )

    one = reading + len(streamed.WHO) * held * passing
    one += _trained(walk, block, folder, recipe)
    seconds = blocks * one
    training = budgeted(recipe)
    rate = training["tokens"] / seconds or None  # there is none where no block is trained
    training |= {"seconds": seconds, "tokens_per_second": rate}
    pages = len(streamed.WHO) * held * -(-(length - 1) // TOKENS_AT_ONCE) * head
    parts = {
        "starting": starting,
        "loading": opening + share * (reading + hashing),
        "training": seconds,
        "evaluation": pages * (1 + 1 / len(streamed.WHO)) + held * blocks * passing,
        "packing": 2 * share * reading,
    }
    return {"training": training, "seconds": parts | {"total": sum(parts.values())}}


def _trained(walk: Walk, block: nn.Module, folder: Path, recipe: Recipe) -> float:
    """Seconds that a dense block takes to become ternary; it does, on a little text."""
    settings, scheme, device = recipe.training, recipe.scheme, walk.device
    rows = rows_at_once(settings)
    count = -(-settings.calibration // rows)
    ids = torch.zeros(rows, settings.sequence_length, dtype=torch.int64)
    call = walk.calls(ids, rows)[0][0]
    autocast = products(settings, device)
    target, dense = _timed(lambda: run(block, [call], autocast))
    student = outlines.skeleton(folder)
    prepare(student, scheme, settings.ste)
    layers, closed_form = _timed(
        lambda: put_in(block, walk.within(0), ternary_layers(student), recipe)
    )
    _, ternary = _timed(lambda: run(block, [call], autocast))
    shapes = [tuple(layer.weight.shape) for layer in layers.values()]
    product = _product(device)
    found = stages(block, layers, call, autocast)  # each has one Hessian
    moments = sum(ids.numel() * stage.reader.in_features**2 for stage in found) * product
    passes = len(found) / 2 + 2  # up to each stage; the dense block's, the finished one's
    seconds = closed_form + _rounding(shapes, scheme, device) + count * (passes * dense + moments)
    if settings.passes:
        once = replace(settings, reconstruction_epochs=1)
        _, both = _timed(
            lambda: reconstruct(block, [call] * 2, target * 2, once, seed=0, autocast=autocast)
        )
        # both distances round once, for two calls here and for all of them in a run
        step = max(0.0, both / 2 - ternary - dense)
        seconds += count * (dense + settings.passes * step)  # what is only rounded, and steps
    return seconds


def budgeted(recipe: Recipe, rate: float | None = None) -> dict[str, Any]:
    """Steps and tokens, where they are named or a rate is known; and how long they take."""
    settings = recipe.training
    if settings.block_by_block:  # each block by itself
        made, read = work(settings)
        return {"steps": made, "tokens": read, "tokens_per_second": None, "seconds": None}
    named = settings.steps is not None or settings.tokens is not None
    steps = budget.planned_steps(settings, rate or 0.0) if named or rate else None
    tokens = None if steps is None else steps * settings.batch_size * settings.sequence_length
    seconds = tokens / rate if rate and tokens is not None else None
    return {"steps": steps, "tokens": tokens, "tokens_per_second": rate, "seconds": seconds}


def _walking(recipe: Recipe, reading: float, rate: float | None) -> float:
    """Seconds that the text of a start takes through the blocks, and their training on it."""
    settings = recipe.training
    tokens = settings.calibration * settings.sequence_length
    return WALKS * tokens / reading + settings.passes * tokens / (rate or reading)


def _rounding(
    shapes: Iterable[tuple[int, ...]], scheme: Scheme, device: torch.device | str = "cpu"
) -> float:
    """Seconds of rounding layers of shapes ``(out, in)`` by their inputs.

    Measured is a group of some rows, which others repeat. Passing errors on and comparing outputs
    is ``5 out in^2`` operations, the factor of the Hessian ``in^3``.
    """
    group = min(scheme.group_size, SOME)
    small, moments = (torch.eye(n, device=device) for n in (group, SOME))
    weight = torch.randn(SOME, group, device=device)
    _, rounded = _timed(lambda: baseline.round_weight(weight, small, scheme))
    _, factor = _timed(lambda: inverse_root(moments))
    product = _product(device)
    return sum(
        rounded * rows * columns / weight.numel()
        + 2.5 * product * rows * columns**2
        + factor * (columns / SOME) ** 3
        for rows, columns in shapes
    )


def _product(device: torch.device | str) -> float:
    """Seconds of one multiplication and addition of a large float32 matrix product."""
    square = torch.randn(SOME, SOME, device=device)
    square @ square
    _, seconds = _timed(lambda: float((square @ square)[0, 0]))
    return seconds / SOME**3


def _forward(model: Any) -> float:
    """Seconds of a pass over one token."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model.eval()
        return min(
            _timed(lambda: float(model(ids, use_cache=False).logits[0, 0, 0]))[1] for _ in range(4)
        )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns, and how many seconds it took."""
    began = time.monotonic()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.monotonic() - began
