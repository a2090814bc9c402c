"""Layers whose weights are frozen: codes alone (`--train scales`), or an adapter (`low-rank`).

Both hold one byte a weight, and no gradient or optimizer state of it. Their float weight exists
for one layer at a time: it is made in the forward pass, dropped, and made again in the backward
pass. `arrange` puts them in; `fold` turns adapters into codes when training has ended.

LR-QAT (Bondarenko et al. 2024, arXiv 2406.06385) as in its published code (`hijacker.py`,
`qat_utils.py` of github.com/Qualcomm-AI-research/lr-qat); the paper was not seen. What is ours is
the threshold rule in the place of its rounding, the group's own step of the 8-bit base, and no
factor ``alpha / rank`` before the adapter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternq import ternary
from ternq.linear import TernaryLinear, ternary_layers
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

    def latent(self) -> Tensor:
        """A latent weight with these codes, bfloat16 ``[out, in]``: ``|scale| * code``."""
        scale = self.weight_scale.detach().abs()
        scale = torch.where(scale > _NO_SCALE, scale, torch.ones_like(scale))
        return ternary.dequantize(self.weight, scale, None, self.group_size).bfloat16()


class LowRank(Frozen):
    """Codes of a frozen base in 8 bits plus an adapter: ``base + unit * (B A)``.

    ``adapter_a`` ``[rank, in]`` and ``adapter_b`` ``[out, rank]`` learn, float32, beside scale and
    shift. ``unit`` ``[out, groups]`` is the scale at the start, so that the adapter counts in codes
    as LR-QAT's does; ``step`` the width of the base's 8-bit grid.
    """

    def __init__(self, layer: TernaryLinear, rank: int, generator: torch.Generator) -> None:
        weight = layer.weight.detach().float()
        groups = ternary.grouped(weight, layer.group_size)
        step = groups.abs().amax(2) / 127
        safe = torch.where(step > 0, step, torch.ones_like(step)).unsqueeze(2)
        integers = ternary.ungrouped((groups / safe).round_(), weight.shape[1])
        super().__init__(layer, integers.to(torch.int8))
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
        """`ternq.ternary.fake_quantize` of the latent weight."""
        return ternary.fake_quantize(
            self.latent(), self.weight_scale, self.weight_shift, self.group_size, self.ste
        )

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes in use, int8 ``[out, in]``."""
        return ternary.quantize(self.latent(), self.group_size)


def arrange(model: nn.Module, settings: Training, seed: int = 0) -> None:
    """Have every ternary layer hold its weight as ``--train`` and ``--latent`` say.

    Float weights are dropped one by one as the frozen ones take their place.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in list(ternary_layers(model)):  # names alone: the layers are to go
        layer = model.get_submodule(name)
        assert isinstance(layer, TernaryLinear)
        if isinstance(layer, Frozen):
            continue
        if settings.train == "scales":
            model.set_submodule(name, FrozenCodes(layer))
        elif settings.train == "low-rank":
            model.set_submodule(name, LowRank(layer, settings.rank, generator))
        elif settings.latent == "bfloat16":
            layer.weight.data = layer.weight.data.bfloat16()


def fold(model: nn.Module) -> None:
    """Fold every adapter into codes: what stays of training is codes, scales and shifts."""
    for name, layer in ternary_layers(model).items():
        if isinstance(layer, LowRank):
            model.set_submodule(name, FrozenCodes(layer))


def plain_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state with latent weights where `FrozenCodes` holds codes, as a run is stored."""
    layers = ternary_layers(model).items()
    codes = {f"{n}.weight": m for n, m in layers if isinstance(m, FrozenCodes)}
    return {n: codes[n].latent().cpu() if n in codes else tensor for n, tensor in state.items()}
