"""What a training needs, loaded and checked: teacher, student, text, and the strategy that fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ternq
from ternq import budget, hf, optimize, origin, outlines, processes, scratch, states
from ternq import corpus as corpora
from ternq.errors import InputError, RecipeError
from ternq.frozen import arrange, held_once, made_on_host
from ternq.linear import (
    AbsmeanLinear,
    Selection,
    TernaryLinear,
    decoder_blocks,
    group_rule,
    packed_layers,
    prepare,
    ternary_layers,
)
from ternq.perplexity import BLOCK, token_perplexity
from ternq.precision import with_products
from ternq.progress import Event, Progress, ignore
from ternq.publish import MANIFEST, read_manifest
from ternq.recipe import Recipe, Scheme, Training, defaults, idle, with_rate, with_start
from ternq.student import student_of


@dataclass
class Prepared:
    """Everything the loop needs, checked; nothing is trained or written yet."""

    recipe: Recipe
    teacher: hf.Loaded | None  # None: learns from text alone
    student: hf.Loaded
    selection: Selection
    corpus: corpora.Corpus
    notes: list[str]
    teacher_weights: str  # their fingerprint
    dense: bool = True  # what is trained was; else it was ternary already
    device: str = "cpu"  # that it is trained on

    def settle(self) -> None:
        """Have weights held as training holds them, and where."""
        pair = [loaded.model for loaded in (self.student, self.teacher) if loaded is not None]
        self.selection.chosen.clear()  # dense layers, which are to go
        arrange(pair[0], self.recipe.training, self.recipe.seed, *pair[1:])
        once = held_once(*pair) if len(pair) > 1 else []
        for model in pair:
            model.to(self.device)
        for mine, theirs in once:  # buffers, of which each model has moved its own
            theirs.weight, theirs.step = mine.weight, mine.step


def prepare_run(
    model: str,
    recipe: Recipe,
    *,
    teacher: str | None = None,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
    cache: Path | None = None,
    record: dict[str, Any] | None = None,
    open_text: bool = True,
    notes: Sequence[str] = (),
) -> Prepared:
    """Load teacher and student, put the ternary layers in, choose strategy and text.

    The recipe has been through `fitting`, which said ``notes``.
    ``record`` is that of a run to go on with: what was chosen for it then is chosen again, whatever
    memory and network say now.
    """
    if device == "cpu":
        torch.manual_seed(recipe.seed)
    trains = not recipe.only_rounds
    options: dict[str, Any] = {
        "device": "cpu" if trains and made_on_host(recipe.training, device) else device,
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
    notes = list(notes)
    if recipe.training.from_scratch:
        base = hf.drawn(model, recipe.seed, progress=progress, **options)
    else:
        base = hf.load(model, dtype=torch.float32, progress=progress, **options)
    refuse_own_code(base)
    big: hf.Loaded | None
    if base.kind == "dense":
        recipe = replace(recipe, scheme=scratch.settle(base.model, recipe.scheme, notes))
    if recipe.training.from_scratch:
        big = None if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        student, selection = base, prepare(base.model, recipe.scheme, recipe.training.ste)
    elif base.kind == "dense":
        big = base if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        pupil, selection = student_of(base.model, recipe.scheme, recipe.training)
        student = replace(base, model=pupil)
    else:
        alone = recipe.training.objective == "ce" and _recorded_base(base) is None
        big, student = None if alone else _from_ternary(base, teacher, options), base
        selection, recipe = _selection_of(student, recipe, notes)
        scratch.check_scheme(recipe.scheme, recipe.training)
        if recipe.training.calibrated:
            notes.append("Start: the codes that the model has; --start is for dense models.")
    if big is not None:
        _same_shape(big, student)
        big.model.requires_grad_(False)
    rule = group_rule(selection, recipe.scheme.group_size)
    if rule and recipe.scheme.method != "absmean":
        notes.append(rule)
    recipe = replace(recipe, base=states.fingerprint(base.model), version=ternq.__version__)
    taught = "" if big is None else recipe.base if big is base else states.fingerprint(big.model)
    writer = big or student
    asked = recipe.training.data
    specs, note = text_of(writer, asked, record, offline, _text_before(base))
    notes += [note] if note else []
    if recipe.training.cache_teacher and recipe.training.off:
        notes.append("OFF: at the last block alone, which is what --cache-teacher keeps.")
    if recipe.training.teacher_dtype != "float32" and trains:
        held = recipe.training.teacher_dtype
        notes.append(f"Teacher: its layers are held in {held}, and so it is measured.")
    for note in notes:
        progress(Event("plan", note))
    if big is None:
        scratch.refuse_own_text(specs)
    if not open_text and corpora.has_own_text(specs):
        text = corpora.unwritten(specs)
    else:
        whole = recipe
        text = processes.main_first(
            lambda: corpora.corpus(
                writer, whole, specs, device=device, offline=offline, progress=progress, cache=cache
            )
        )
    dense = base.kind == "dense"
    return Prepared(recipe, big, student, selection, text, notes, taught, dense, device)


def refuse_own_code(base: hf.Loaded) -> None:
    """`InputError` for a model whose code could not go with what is packed."""
    if "auto_map" in vars(base.model.config):
        raise InputError(f"'{base.source}' brings its own code, which ternq cannot pack yet.")


def text_of(
    writer: hf.Loaded,
    asked: tuple[str, ...],
    record: dict[str, Any] | None,
    offline: bool,
    before: tuple[str, ...] = (),
) -> tuple[tuple[str, ...], str | None]:
    """The text to train on, and what is to be said of it; of a run that was begun, as it was.

    ``before`` is the text of the run that this one goes on from, if there is one.
    """
    if record is not None and not asked:
        return tuple(record.get("data", ())), None
    if before and not asked:
        return before, f"Text: that of the run, {', '.join(before)} (no --data was given)."
    return processes.from_main(lambda: corpora.choose(writer, asked, offline))


def _text_before(base: hf.Loaded) -> tuple[str, ...]:
    """The text of the run that a training goes on from; nothing where it has none by name."""
    found = origin.read_run(base.path).get("data") if base.kind == "run" and base.path else ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def fitting(
    built: outlines.Blueprint,
    recipe: Recipe,
    device: str,
    memory: int | None = None,
    record: dict[str, Any] | None = None,
    by_blocks: bool = False,
    exact: bool = False,
    crew: processes.Crew | None = None,
) -> tuple[Recipe, budget.Memory | None, list[str]]:
    """The recipe with the strategy that fits, and no more positions than the model has.

    Nothing is loaded for it. ``by_blocks``: going block by block is one of them; ``exact``: memory
    is counted even where there is plenty. ``memory`` are bytes, by default what the device has
    free; ``crew`` who trains together, by default those who do. Returns the memory counted for it
    (None where ``record`` has the strategy), and what was chosen in words.
    """
    notes: list[str] = []
    ternary = built.scheme is not None
    training, scheme = with_start(recipe, ternary), built.scheme or recipe.scheme
    crew = crew or processes.crew()
    optimize.refuse(training, device, crew)
    scratch.refuse_in_shards(scheme, training, crew)
    if record is None:
        training, said = with_products(training, device)
        notes += said
    longest = outlines.max_length(built)
    if training.sequence_length > longest:
        notes.append(f"Blocks of {longest} tokens: the model was made for no more positions.")
        training = replace(training, sequence_length=longest)
    counted, asked = None, training
    if recipe.only_rounds:
        counted, why = budget.rounding(built, training, device, memory)
        notes.append(f"Strategy: {why}.")
    elif record is None:
        by_blocks = by_blocks and built.by_blocks
        training, counted, why = budget.choose(
            built, scheme, training, device, memory, by_blocks=by_blocks, exact=exact, crew=crew
        )
        notes.append(f"Strategy: {why}.")
    else:
        training = _as_begun(training, record)
        notes += [f"Strategy: {budget.BY_BLOCKS}."] if training.block_by_block else []
    # of what was chosen no more than decides what is read: the rest was not asked for
    asked = replace(asked, block_by_block=training.block_by_block, train=training.train)
    notes += idle(replace(recipe, training=asked))
    return replace(recipe, training=with_rate(training, ternary)), counted, notes


def _as_begun(training: Training, record: dict[str, Any]) -> Training:
    """The training with the strategy that was chosen for a run, where the same is asked for again.

    Where another is asked for, that stays, for the recipes to differ.
    """
    then = Recipe.from_json(record["recipe"]).training
    asked = defaults(Training) | record.get("asked_strategy", {})
    same = [name for name in budget.STRATEGY if getattr(training, name) == asked[name]]
    return replace(training, **{name: getattr(then, name) for name in same})


def _from_ternary(base: hf.Loaded, teacher: str | None, options: dict[str, Any]) -> hf.Loaded:
    source = teacher or _recorded_base(base)
    if source is None:
        raise InputError(
            f"'{base.source}' is ternary, and does not say what it was made from.",
            "Name its full-precision teacher with --teacher.",
        )
    try:
        found = hf.load(source, dtype=torch.float32, **options)
    except InputError as error:
        hint = "Name the full-precision teacher with --teacher."
        raise InputError(error.message, hint) from error
    return found if teacher or found.kind == "dense" else _from_ternary(found, None, options)


def _recorded_base(base: hf.Loaded) -> str | None:
    if base.path is None:
        return None
    if base.kind == "run":
        record = origin.read_run(base.path)
    elif (base.path / MANIFEST).is_file():
        record = read_manifest(base.path)
    else:  # an artefact that was loaded and saved again
        return None
    recipe = record.get("recipe", {})
    if (recipe.get("training") or {}).get("from_scratch"):
        return None
    model = recipe.get("model")
    return model if isinstance(model, str) else None


def _selection_of(student: hf.Loaded, recipe: Recipe, notes: list[str]) -> tuple[Selection, Recipe]:
    """The layers that are ternary already, as layers in training; the scheme is theirs."""
    states.undo_int8(student.model)
    for name, layer in packed_layers(student.model).items():
        new = TernaryLinear.from_packed(layer, recipe.training.ste)
        student.model.set_submodule(name, new)
    layers = ternary_layers(student.model)
    if hasattr(student.model.config, "quantization_config"):
        del student.model.config.quantization_config
    first = next(iter(layers.values()))
    scheme = Scheme(
        group_size=first.group_size,
        shift=first.weight_shift is not None,
        method="absmean" if isinstance(first, AbsmeanLinear) else "dlt",
    )
    if recipe.scheme not in (scheme, Scheme()):
        raise RecipeError(
            f"'{student.source}' is ternary already, with --group-size {scheme.group_size} and "
            f"{'--shift' if scheme.shift else '--no-shift'}; its layers cannot be chosen again.",
            "Leave --group-size, --shift and --skip out, or start from the dense model.",
        )
    if scheme != recipe.scheme:
        shift = "with" if scheme.shift else "without"
        notes.append(f"Layers: groups of {scheme.group_size} {shift} shift, as the model has them.")
    return Selection(dict(layers)), replace(recipe, scheme=scheme)


def _same_shape(teacher: hf.Loaded, student: hf.Loaded) -> None:
    a, b = teacher.model, student.model
    vocabularies = [m.get_output_embeddings().weight.shape[0] for m in (a, b)]
    if vocabularies[0] != vocabularies[1] or teacher.tokenizer.get_vocab() != (
        student.tokenizer.get_vocab()
    ):
        raise RecipeError(
            f"Teacher '{teacher.source}' and student '{student.source}' differ in vocabulary."
        )
    if len(decoder_blocks(a)[1]) != len(decoder_blocks(b)[1]):
        raise RecipeError(
            f"Teacher '{teacher.source}' and student '{student.source}' differ in their blocks."
        )


def as_made(prepared: Prepared, steps: int) -> Recipe:
    """The recipe with what was left to the machine filled in, so that it can be replayed."""
    recipe = prepared.recipe
    training = replace(recipe.training, steps=steps, tokens=None, data=prepared.corpus.specs)
    return replace(recipe, training=training)


def perplexity(
    prepared: Prepared, loaded: hf.Loaded, progress: Progress, who: str
) -> dict[str, Any]:
    """Token perplexity on the held-out text, as the contract writes it."""
    length = min(BLOCK, outlines.max_length(loaded.model))
    measured = token_perplexity(
        loaded.model, prepared.corpus.held_out, length, progress=progress, stage=f"evaluate {who}"
    )
    return described(prepared, measured)


def described(prepared: Prepared, measured: dict[str, Any]) -> dict[str, Any]:
    """What `token_perplexity` found on the held-out text, as the contract writes it."""
    return {
        "perplexity": measured["token_perplexity"],
        "metric": "token_perplexity",
        "word_perplexity": _per_word(measured, prepared),
        "text": prepared.corpus.name,
        "samples": measured["blocks"],
        "length": measured["block_length"],
    }


def _per_word(measured: dict[str, Any], prepared: Prepared) -> float | None:
    """The perplexity per word of the same text: token perplexity to the power of tokens per word.

    Words are what lies between white space, as in lm-eval.
    """
    ids = prepared.corpus.held_out[: measured["tokens"]]
    words = len(prepared.student.tokenizer.decode(ids, skip_special_tokens=True).split())
    if not words:
        return None
    try:
        return float(measured["token_perplexity"] ** (measured["tokens"] / words))
    except OverflowError:
        return None
