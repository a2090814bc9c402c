"""A student beside its teacher: a copy with ternary layers, and what never learns held once."""

import copy
from typing import Any

from torch import nn

from ternq.linear import Selection, decoder_blocks, prepare, settled
from ternq.optimize import kind_of
from ternq.recipe import Scheme, Training


def student_of(
    teacher: Any, scheme: Scheme, settings: Training, twin: Any = None
) -> tuple[Any, Selection]:
    """A student of a dense model, at its closed-form start, and which layers became ternary.

    Parameters that do not learn (embeddings, output head; where ``--train`` says so, all that there
    are, since its codes are made beside them) are the teacher's own, not copies.
    ``twin`` is made the student, where a copy of the teacher stands there already.
    """
    frozen = settings.train != "all" and not settings.calibrated
    kept = {} if settings.from_scratch else _kept(teacher, frozen)
    if twin is None:
        twin = copy.deepcopy(teacher, {id(p): p for p in kept.values()})
    for name, parameter in kept.items():
        module, _, own = name.rpartition(".")
        setattr(twin.get_submodule(module), own, parameter)
    return twin, prepare(twin, settled(twin, scheme), settings.ste)


def _kept(model: nn.Module, frozen: bool) -> dict[str, nn.Parameter]:
    """Parameters that do not learn, under all of their names; in the blocks only if ``frozen``."""
    inside = {id(p) for p in decoder_blocks(model)[1].parameters()}
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if frozen or (kind_of(module, own) is None and id(parameter) not in inside)
    }
