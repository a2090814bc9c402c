"""A decoder's blocks from outside: what each puts out, what each is called with, and none at all.

Nothing here knows a decoder's signature: what the model hands to its blocks beside the activations
(masks, positions) is caught as it comes, and given again.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ternq.errors import InputError
from ternq.linear import decoder_blocks

HIDDEN = "hidden_states"


class BlockOutputs:
    """While open, ``features`` holds the output ``[batch, tokens, hidden]`` of every block.

    ``output_hidden_states`` would not do: its last entry is taken after the final norm.

    Gradient checkpointing runs a block again during the backward pass; what a hook sees then is
    not taken, so the features stay those of the forward pass, which carry the gradient (with
    ``use_reentrant=False``, as Hugging Face does by default).
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = decoder_blocks(model)[1]
        self.features: list[Tensor] = []

    def __enter__(self) -> "BlockOutputs":
        self.features = []
        self._handles = [b.register_forward_hook(self._take) for b in self._blocks]
        return self

    def _take(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.features.append(_hidden(output))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Call:
    """What a decoder block is called with; its first argument is the activations."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The activations ``[batch, tokens, hidden]``."""
        found: Tensor = self.args[0] if self.args else self.kwargs[HIDDEN]
        return found

    def on(self, hidden: Tensor | None) -> "Call":
        """The same call with other activations."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs=self.kwargs | {HIDDEN: hidden})

    def to(self, device: torch.device) -> "Call":
        """The same call with all of its tensors there."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Call(tree_map(moved, self.args), tree_map(moved, self.kwargs))

    def run(self, block: nn.Module) -> Tensor:
        """What the block puts out, ``[batch, tokens, hidden]``."""
        return _hidden(block(*self.args, **self.kwargs))


class Passing:
    """While open, the blocks of a model hand on the activations that they get, and compute nothing.

    Only ``first``, the forward pass of the first block, is run, and once: it shows in what form
    blocks give their outputs. With ``result`` the last block gives that instead, so that the model
    does what comes after its blocks.
    """

    def __init__(self, blocks: nn.ModuleList, first: Callable[..., Any]) -> None:
        self.result: Tensor | None = None
        self._blocks = blocks
        self._like: Any = None
        self._first: Callable[..., Any] | None = first

    def __enter__(self) -> "Passing":
        last = len(self._blocks) - 1
        for index, block in enumerate(self._blocks):

            def hand_on(*args: Any, index: int = index, **kwargs: Any) -> Any:
                if self._first is not None:
                    self._like, self._first = self._first(*args, **kwargs), None  # let go of it
                hidden = Call(args, kwargs).hidden
                given = hidden if self.result is None or index < last else self.result
                like = self._like
                return (given, *like[1:]) if isinstance(like, tuple) else given

            vars(block)["forward"] = hand_on
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            vars(block).pop("forward", None)


@torch.no_grad()
def calls_of(
    model: Any, blocks: nn.ModuleList, passing: Passing, batches: tuple[Tensor, ...]
) -> list[list[Call]]:
    """For every block, the call that each batch makes; activations are kept for the first only.

    Raises:
        InputError: the blocks are not called one after another with ``hidden_states``.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):

            def take(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
                if not args and HIDDEN not in kwargs:
                    raise _unwalkable(model, f"not called with {HIDDEN}")
                call = Call(args, kwargs)
                calls[index].append(call if index == 0 else call.on(None))

            hooks.callback(block.register_forward_pre_hook(take, with_kwargs=True).remove)
        hooks.enter_context(passing)
        device = next(model.parameters()).device
        for batch in batches:
            model.base_model(input_ids=batch.to(device), use_cache=False)
    if any(len(made) != len(batches) for made in calls):
        raise _unwalkable(model, "not called one after another")
    return calls


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _unwalkable(model: Any, reason: str) -> InputError:
    said = (
        f"The blocks of {type(model).__name__} are {reason}, as walking them one by one needs it."
    )
    return InputError(said, "Use --start closed-form, end to end.")
