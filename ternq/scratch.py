"""Models from scratch: what contradicts itself is refused, and ternary layers put into place.

A model from scratch has its configuration and tokenizer from MODEL and its weights from the seed;
with ``--objective ce`` it has no teacher. TriLM is one of the method ``absmean``, FloatLM its dense
counterpart of the method ``float``; both are trained by the loop that distils.
"""

from torch import nn

from ternq.corpus import has_own_text
from ternq.errors import InputError, RecipeError
from ternq.linear import settled
from ternq.processes import Crew
from ternq.recipe import Recipe, Scheme, Training


def check(recipe: Recipe, teacher: str | None) -> None:
    """Refuse what contradicts itself between method, objective and start.

    Raises:
        RecipeError: which two, and what to leave out.
    """
    scheme, training = recipe.scheme, recipe.training
    scratch, alone = training.from_scratch, training.objective == "ce"
    started = training.calibrated
    if teacher is not None and alone:
        raise RecipeError("--objective ce learns from text alone: it has no --teacher.")
    if scratch and teacher is None and not alone:
        raise RecipeError(
            "--from-scratch has no teacher: MODEL gives its configuration, not its weights.",
            "Add --objective ce, or name a --teacher.",
        )
    if scheme.method == "float" and not scratch:
        raise RecipeError(
            "--method float rounds nothing, and there is a dense model already.",
            "It is for --from-scratch, as the dense counterpart of a ternary model.",
        )
    if scheme.method == "float" and scheme.skip:
        raise RecipeError(
            "--method float leaves every layer dense; --skip has no meaning beside it."
        )
    if started and (scratch or scheme.method != "dlt"):
        beside = "--from-scratch" if scratch else f"--method {scheme.method}"
        raise RecipeError(f"--start {training.start} rounds a trained model by DLT, not {beside}.")
    check_scheme(scheme, training)


def check_scheme(scheme: Scheme, training: Training) -> None:
    """Refuse what is of DLT alone beside another method: asked for, or that of a ternary model.

    Raises:
        RecipeError: what to leave out.
    """
    other = scheme.method != "dlt"
    if (training.from_scratch or other) and (training.train != "all" or training.cache_teacher):
        one = "--cache-teacher" if training.cache_teacher else f"--train {training.train}"
        raise RecipeError(f"{one} is for a trained model and --method dlt.")
    if other and training.block_by_block:
        raise RecipeError(f"--block-by-block is of --method dlt, not of {scheme.method}.")
    if other and (training.scale_lr is not None or training.ste != "identity"):
        one = "--ste" if training.ste != "identity" else "--scale-lr"
        raise RecipeError(f"{one} is of --method dlt; {scheme.method} learns no scales.")


def refuse_in_shards(scheme: Scheme, training: Training, crew: Crew) -> None:
    """`RecipeError` for layers whose weight in use is made of more than this process's shard."""
    if not crew.sharded:
        return
    what = "--method absmean" if scheme.method == "absmean" else None
    what = "--train low-rank" if training.train == "low-rank" else what
    if what:
        raise RecipeError(
            f"{what} does not go with parameters in shards (FSDP).",
            "Launch without --use_fsdp, or leave it out.",
        )


def settle(model: nn.Module, scheme: Scheme, notes: list[str]) -> Scheme:
    """The scheme as it is stored with a model, see `ternq.linear.settled`."""
    if scheme.method == "absmean":
        notes.append("Method absmean: one scale a matrix and no shift; a row stores it once.")
    return settled(model, scheme)


def refuse_own_text(specs: tuple[str, ...]) -> None:
    """`InputError` where the text would be a teacher's and there is none."""
    if has_own_text(specs):
        raise InputError(
            "There is no teacher to write the text that is trained on.",
            "Name text with --data: a file, a folder, or a dataset of the hub.",
        )
