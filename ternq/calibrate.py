"""The error-compensated start of a model: block by block, each on what the ones before it give.

Inputs of the first block, and whatever else the model hands to each of its blocks, are caught by
hooks in one forward pass, so that no decoder's signature needs to be known. Within a block, layers
that read the same tensor are rounded together, in the order in which they are called. As in GPTQ's
published code (see `ternq.compensate`), each layer is rounded for the inputs that the layers
rounded before it produce. Held at once: the activations between two blocks, the Hessians of layers
that read one tensor.
"""

from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternq.compensate import DAMPING, Compensated, compensate
from ternq.errors import InputError
from ternq.linear import TernaryLinear, decoder_blocks, ternary_layers
from ternq.progress import Event, Progress, ignore

HIDDEN = "hidden_states"


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

    def run(self, block: nn.Module) -> Tensor:
        """What the block puts out, ``[batch, tokens, hidden]``."""
        output = block(*self.args, **self.kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


@dataclass
class Started:
    """What became of the layers: their number, their mean relative error, and what was unusual."""

    errors: list[float] = field(default_factory=list)
    dead: int = 0
    damped: dict[str, float] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    def add(self, name: str, found: Compensated) -> None:
        """Count a layer."""
        self.errors.append(found.error)
        self.dead += found.dead
        if found.damping > DAMPING:
            self.damped[name] = found.damping

    def said(self, ids: Tensor) -> list[str]:
        """In sentences, for ids ``[blocks, length]``."""
        count = len(self.errors)
        mean = sum(self.errors) / max(1, count)
        said = [
            f"Start: {count} layers rounded with their errors compensated, on {len(ids)} blocks of "
            f"{ids.shape[1]} tokens; a layer's output loses {mean:.1%} of its energy on average."
        ]
        if self.dead:
            said.append(f"{self.dead} input channels of layers were 0 in all of the calibration.")
        for name, damping in self.damped.items():
            said.append(f"The Hessian of {name} was singular: damped by {damping:g}.")
        if self.shared:
            said.append(f"{', '.join(self.shared)}: weights of several modules, only rounded.")
        return said


@torch.no_grad()
def compensated_start(
    model: nn.Module,
    ids: Tensor,
    *,
    rows: int = 4,
    autocast: AbstractContextManager[Any] | None = None,
    progress: Progress = ignore,
) -> list[str]:
    """Give every `TernaryLinear` of a model at its closed-form start the error-compensated one.

    ``ids`` ``[blocks, length]`` are the text, ``rows`` blocks at a time. Latent weights, scales and
    shifts change in place. Returns what was done, in sentences.

    Raises:
        InputError: the blocks are not called one after another, or numbers are not finite.
    """
    autocast = autocast or nullcontext()
    was_training = model.training
    model.eval()
    done, layers = Started(), _own_weights(model)
    done.shared = sorted(ternary_layers(model).keys() - layers.keys())
    for layer in layers.values():
        _use(layer, layer.weight)
    try:
        prefix, blocks = decoder_blocks(model)
        with autocast:
            calls = _calls(model, blocks, torch.split(ids, rows))
        hidden = [call.hidden for call in calls[0]]
        for index, block in enumerate(blocks):
            now = [c.on(h) for c, h in zip(calls[index], hidden, strict=True)]
            within = f"{prefix}.{index}."
            own = {n: m for n, m in layers.items() if n.startswith(within)}
            for stage in _stages(block, own, now[0], autocast):
                for name, hessian in _hessians(block, stage, now, autocast).items():
                    done.add(name, _start(name, layers[name], hessian))
                    _use(layers[name], layers[name].numbers().dequantized())
            with autocast:
                hidden = [call.run(block) for call in now]
            calls[index] = []
            for layer in own.values():
                _use(layer, None)
            shown = {"error": sum(done.errors) / max(1, len(done.errors))}
            progress(Event("calibrate", done=index + 1, total=len(blocks), values=shown))
    finally:
        for layer in layers.values():
            _use(layer, None)
        model.train(was_training)
    return done.said(ids)


def _own_weights(model: nn.Module) -> dict[str, TernaryLinear]:
    """The layers whose weight no other module shares."""
    owners = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    return {n: m for n, m in ternary_layers(model).items() if owners[id(m.weight)] == 1}


def _use(layer: TernaryLinear, weight: Tensor | None) -> None:
    """Have the layer use ``weight`` as it is, not rounded anew in every call; None: as always."""
    vars(layer).pop("forward", None)
    if weight is not None:
        fixed = weight.to(layer.weight.device)
        vars(layer)["forward"] = lambda x: F.linear(x, fixed.to(x.dtype), layer.bias)


def _calls(
    model: nn.Module, blocks: nn.ModuleList, batches: tuple[Tensor, ...]
) -> list[list[Call]]:
    """For every block, the call that each batch makes; activations are kept for the first only."""
    calls: list[list[Call]] = [[] for _ in blocks]
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):

            def take(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
                if not args and HIDDEN not in kwargs:
                    raise _unwalkable(model, f"not called with {HIDDEN}")
                call = Call(args, kwargs)
                calls[index].append(call if index == 0 else call.on(None))

            handle = block.register_forward_pre_hook(take, with_kwargs=True)
            hooks.callback(handle.remove)
        device = next(model.parameters()).device
        for batch in batches:
            model(input_ids=batch.to(device), use_cache=False)
    if any(len(made) != len(batches) for made in calls):
        raise _unwalkable(model, "not called one after another")
    return calls


def _unwalkable(model: nn.Module, reason: str) -> InputError:
    said = f"The blocks of {type(model).__name__} are {reason}, as --start compensated needs it."
    return InputError(said, "Use --start closed-form.")


def _stages(
    block: nn.Module,
    layers: dict[str, TernaryLinear],
    call: Call,
    autocast: AbstractContextManager[Any],
) -> list[list[tuple[str, TernaryLinear]]]:
    """Layers that read the same tensor, in the order of their calls; last those never called."""
    seen: list[tuple[str, Tensor]] = []  # tensors are held, so that none takes another's place
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def see(module: Any, args: Any, name: str = name) -> None:
                seen.append((name, args[0]))

            hooks.callback(layer.register_forward_pre_hook(see).remove)
        with autocast:
            call.run(block)
    stages: list[list[tuple[str, TernaryLinear]]] = []
    left, last = dict(layers), None
    for name, tensor in seen:
        if name in left:
            if tensor is not last:
                stages.append([])
            stages[-1].append((name, left.pop(name)))
            last = tensor
    return stages + ([list(left.items())] if left else [])


def _hessians(
    block: nn.Module,
    stage: list[tuple[str, TernaryLinear]],
    calls: list[Call],
    autocast: AbstractContextManager[Any],
) -> dict[str, Tensor]:
    """``2 / n * X'X`` of the inputs of each layer of a stage, float32 ``[in, in]``."""
    found: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name, layer in stage:
            size = layer.in_features
            found[name] = torch.zeros(size, size, device=layer.weight.device)

            def take(module: Any, args: Any, name: str = name) -> None:
                x = args[0].flatten(0, -2).float()
                counts[name] += len(x)
                with torch.autocast(x.device.type, enabled=False):
                    found[name].addmm_(x.t(), x)

            hooks.callback(layer.register_forward_pre_hook(take).remove)
        with autocast:
            for call in calls:
                call.run(block)
    return {name: total.mul_(2 / max(1, counts[name])) for name, total in found.items()}


def _start(name: str, layer: TernaryLinear, hessian: Tensor) -> Compensated:
    """Round one layer, and put what it became in its place."""
    try:
        found = compensate(layer.weight, hessian, layer.group_size, layer.weight_shift is not None)
    except ValueError as error:
        raise InputError(f"The compensated start of {name} failed: {error}.") from error
    layer.weight.copy_(found.latent)
    layer.weight_scale.copy_(found.scale)
    if layer.weight_shift is not None and found.shift is not None:
        layer.weight_shift.copy_(found.shift)
    return found
