"""Layers whose weights are frozen: codes alone (`--train scales`), or an adapter (`low-rank`).

Both hold one byte a weight, and no gradient or optimizer state of it. Their float weight exists
for one layer at a time: it is made in the forward pass, dropped, and made again in the backward
pass. `arrange` puts them in, and holds the teacher in fewer bytes where that is asked for
(`Compact`); `fold` turns adapters into codes when training has ended.

LR-QAT (Bondarenko et al. 2024, arXiv 2406.06385) as in its published code (`hijacker.py`,
`qat_utils.py` of github.com/Qualcomm-AI-research/lr-qat); the paper was not seen. What is ours is
the threshold rule in the place of its rounding, the group's own step of the 8-bit base, and no
factor ``alpha / rank`` before the adapter.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternq import rounding, ternary
from ternq.linear import TernaryLinear, compute_dtype, dense_weight, ternary_layers
from ternq.modeling_ternq import is_linear
from ternq.recipe import Training

_NO_SCALE = 1e-30  # below it, |scale| * code would not keep the codes


class Frozen(TernaryLinear):
    """A ternary layer whose ``weight`` is an int8 buffer ``[out, in]`` that never changes."""

    def __init__(self, layer: TernaryLinear, weight: Tensor) -> None:
        with torch.device("meta"):
            super().__init__(
                layer.in_features,
                layer.out_features,
                bias=False,
                group_size=layer.group_size,
                shift=layer.weight_shift is not None,
                ste=layer.ste,
            )
        del self.weight
        self.register_buffer("weight", weight)
        self.bias = layer.bias
        self.weight_scale, self.weight_shift = layer.weight_scale, layer.weight_shift
        self.train(layer.training)

    def values(self) -> Tensor:
        """The weight in use, float32 ``[out, in]``, with its gradient."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._use(input)
        used: Tensor = checkpoint(self._use, input, use_reentrant=False, preserve_rng_state=False)
        return used

    def _use(self, input: Tensor) -> Tensor:
        return F.linear(input, self.values().to(input.dtype), self.bias)


class FrozenCodes(Frozen):
    """``scale * code + shift`` with fixed codes: only scale and shift learn."""

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__(layer, layer.codes())

    def values(self) -> Tensor:
        """`ternq.ternary.dequantize` of the codes."""
        return ternary.dequantize(
            self.weight, self.weight_scale, self.weight_shift, self.group_size
        )

    def codes(self) -> Tensor:
        """The codes, int8 ``[out, in]``: the buffer itself."""
        return self.weight

    def latent(self, scale: Tensor) -> Tensor:
        """A latent weight with these codes, bfloat16 ``[out, in]``: ``|scale| * code``."""
        size = scale.abs().to(self.weight.device)
        size = torch.where(size > _NO_SCALE, size, torch.ones_like(size))
        return ternary.dequantize(self.weight, size, None, self.group_size).bfloat16()


class LowRank(Frozen):
    """Codes of a frozen base in 8 bits plus an adapter: ``base + unit * (B A)``.

    ``adapter_a`` ``[rank, in]`` and ``adapter_b`` ``[out, rank]`` learn, float32, beside scale and
    shift. ``unit`` ``[out, groups]`` is the scale at the start, so that the adapter counts in codes
    as LR-QAT's does; ``step`` the width of the base's 8-bit grid.
    """

    def __init__(self, layer: TernaryLinear, rank: int, generator: torch.Generator) -> None:
        weight = layer.weight.detach()
        integers, step = in_eight_bits(weight, layer.group_size)
        super().__init__(layer, integers)
        self.register_buffer("step", step)
        self.register_buffer("unit", layer.weight_scale.detach().abs())
        # nn.Linear's own start, as published: uniform within 1 / sqrt(in)
        a = torch.empty(rank, self.in_features).uniform_(-1, 1, generator=generator)
        self.adapter_a = nn.Parameter((a / math.sqrt(self.in_features)).to(weight.device))
        self.adapter_b = nn.Parameter(torch.zeros(self.out_features, rank, device=weight.device))

    step: Tensor
    unit: Tensor

    def latent(self) -> Tensor:
        """The weight that codes are taken from, float32 ``[out, in]``."""
        with torch.autocast(self.weight.device.type, enabled=False):  # as it will be packed
            change = self.adapter_b @ self.adapter_a
            base = ternary.dequantize(self.weight, self.step, None, self.group_size)
            return base + ternary.dequantize(change, self.unit, None, self.group_size)

    def values(self) -> Tensor:
        """`ternq.rounding.fake_quantize` of the latent weight."""
        return rounding.fake_quantize(
            self.latent(), self.weight_scale, self.weight_shift, self.group_size, self.ste
        )

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes in use, int8 ``[out, in]``."""
        return rounding.quantize(self.latent(), self.group_size)


class Compact(nn.Module):
    """A teacher's linear layer that holds its weight ``[out, in]`` in bfloat16, or in int8.

    In int8 a weight is ``step`` (float32 ``[out, groups]``) times the integer. What is used is made
    anew in every pass.
    """

    weight: Tensor
    step: Tensor | None

    def __init__(
        self, weight: Tensor, step: Tensor | None, group_size: int, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("step", step)
        self.group_size, self.bias = group_size, bias

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in use, ``[out, in]``."""
        if self.step is None:
            return self.weight.to(dtype)
        return ternary.dequantize(self.weight, self.step, None, self.group_size).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.values(compute_dtype(input)), self.bias)


def in_eight_bits(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The nearest integers int8 ``[out, in]`` of -127 ... 127, and the step ``[out, groups]``."""
    groups = ternary.grouped(weight.float(), group_size)
    step = groups.abs().amax(2) / 127
    safe = torch.where(step > 0, step, torch.ones_like(step)).unsqueeze(2)
    integers = ternary.ungrouped((groups / safe).round_(), weight.shape[1])
    return integers.to(torch.int8), step


def made_on_host(settings: Training, device: str) -> bool:
    """Whether models are loaded into the host's memory, since ``device`` is to hold less of them.

    A start that takes passes through the float weights has them on the device block by block.
    """
    less = settings.train != "all" or settings.teacher_dtype != "float32"
    return less and not device.startswith("cpu")


def arrange(model: nn.Module, settings: Training, seed: int = 0, teacher: Any = None) -> None:
    """Have ternary layers hold their weights as ``--train`` and ``--latent`` say, in place.

    Those of ``teacher`` of the same names hold theirs as ``--teacher-dtype`` says. Float weights
    are dropped one by one as others take their place; a second call changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    theirs = {} if teacher is None else dict(teacher.named_modules())
    for name in list(ternary_layers(model)):  # names alone: the layers are to go
        layer = model.get_submodule(name)
        assert isinstance(layer, TernaryLinear)
        weight = layer.weight
        if settings.latent == "bfloat16" and not isinstance(layer, Frozen):
            layer.weight.data = layer.weight.data.bfloat16()
        elif settings.train != "all" and not isinstance(layer, Frozen):
            layer = _frozen(layer, settings, generator)
            model.set_submodule(name, layer)
        other = theirs.pop(name, None)
        if settings.teacher_dtype != "float32" and is_linear(other):
            # The base of an adapter is the teacher's weight in 8 bits: it is held once.
            once = isinstance(layer, LowRank) and other.weight is weight
            base = layer if once else None
            teacher.set_submodule(name, _compact(other, settings, layer.group_size, base))
        del weight, other


def held_once(student: nn.Module, teacher: nn.Module) -> list[tuple[LowRank, Compact]]:
    """The layers of both whose base in 8 bits is one tensor."""
    theirs = dict(teacher.named_modules())
    pairs = [(m, theirs.get(n)) for n, m in ternary_layers(student).items()]
    return [(m, t) for m, t in pairs if isinstance(m, LowRank) and isinstance(t, Compact)
            and t.weight is m.weight]  # fmt: skip


def _frozen(layer: TernaryLinear, settings: Training, generator: torch.Generator) -> Frozen:
    if settings.train == "scales":
        return FrozenCodes(layer)
    return LowRank(layer, settings.rank, generator)


def _compact(layer: Any, settings: Training, group_size: int, base: Any) -> Compact:
    bias = getattr(layer, "bias", None)
    if settings.teacher_dtype == "bfloat16":
        return Compact(dense_weight(layer).bfloat16(), None, group_size, bias)
    if base is not None:
        return Compact(base.weight, base.step, group_size, bias)
    return Compact(*in_eight_bits(dense_weight(layer), group_size), group_size, bias)


def fold(model: nn.Module) -> None:
    """Fold every adapter into codes: what stays of training is codes, scales and shifts."""
    for name, layer in ternary_layers(model).items():
        if isinstance(layer, LowRank):
            model.set_submodule(name, FrozenCodes(layer))


def plain_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state with latent weights where `FrozenCodes` holds codes, as a run is stored.

    Scales are the state's: those of the model may be this process's shards.
    """
    layers = ternary_layers(model).items()
    codes = {f"{n}.weight": m for n, m in layers if isinstance(m, FrozenCodes)}
    scales = {n: state[f"{n}_scale"] for n in codes if f"{n}_scale" in state}
    return state | {n: codes[n].latent(scale).cpu() for n, scale in scales.items()}
