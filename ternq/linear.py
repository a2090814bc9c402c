"""Ternary linear layers, and the one rule that says which layers of a model become ternary.

`TernaryLinear` learns (latent weight, scale, shift); `PackedLinear`, of `ternq.modeling_ternq`,
holds codes, five to a byte. Modules are swapped, not parametrized: names of parameters stay as they
were, so that checkpoints, tied weights and ``repr(model)`` tell the truth.
"""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternq import absmean, billm, grid, processes, rounding, softened, ternary
from ternq.errors import InputError, RecipeError
from ternq.modeling_ternq import PackedLinear, features, is_linear
from ternq.recipe import NOT_TERNARY, Scheme, Ste


class TernaryLinear(nn.Linear):
    """A linear layer whose weight ``[out, in]`` is rounded to ``scale * code + shift`` in use.

    ``weight`` is the latent weight that codes are taken from; ``weight_scale`` and ``weight_shift``
    (or None) are learned, float32 ``[out, groups]``.
    """

    once: "Once | None" = None  # while one rounding serves several forward passes
    hardness: float | None = None  # while rounding is softened
    weight_shift: nn.Parameter | None
    bias: nn.Parameter | None  # type: ignore[assignment]  # as nn.Linear has it without a bias

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group_size: int,
        shift: bool,
        ste: Ste = "identity",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.group_size, self.ste = group_size, ste
        shape = (out_features, ternary.n_groups(in_features, group_size))
        self.weight_scale = nn.Parameter(torch.ones(shape))
        self.weight_shift = nn.Parameter(torch.zeros(shape)) if shift else None

    @classmethod
    def from_dense(cls, layer: nn.Module, scheme: Scheme, ste: Ste = "identity") -> "TernaryLinear":
        """The closed-form start: codes by threshold, scale and shift by least squares."""
        weight, bias = dense_weight(layer), getattr(layer, "bias", None)
        out_features, in_features = weight.shape
        with torch.device("meta"):
            new = cls(
                in_features,
                out_features,
                bias=bias is not None,
                group_size=scheme.group_size,
                shift=scheme.shift,
                ste=ste,
            )
        codes = rounding.quantize(weight, scheme.group_size)
        scale, shift = ternary.fit(weight, codes, scheme.group_size, scheme.shift)
        # A Linear's own parameter is kept, so that whatever else refers to it still does.
        new.weight = layer.weight if isinstance(layer, nn.Linear) else nn.Parameter(weight)
        new.bias = bias
        new.weight_scale = nn.Parameter(scale)
        new.weight_shift = None if shift is None else nn.Parameter(shift)
        return new.train(layer.training)

    @classmethod
    def from_packed(cls, layer: "PackedLinear", ste: Ste = "identity") -> "TernaryLinear":
        """Training goes on from a packed layer: latent ``scale * code`` has the same codes."""
        codes, scale, shift = layer.unpacked()
        new = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            group_size=layer.group_size,
            shift=shift is not None,
            ste=ste,
        )
        new.weight = nn.Parameter(ternary.dequantize(codes, scale, None, layer.group_size))
        new.bias = layer.bias
        new.weight_scale = nn.Parameter(scale.float())
        new.weight_shift = None if shift is None else nn.Parameter(shift.float())
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        dtype = compute_dtype(input)
        if self.once is not None:
            return F.linear(input, self.once.value(dtype), self.bias)
        learned = self.weight, self.weight_scale, self.weight_shift
        if self.hardness is not None:
            weight = softened.soften(*learned, self.group_size, self.hardness, dtype)
        else:
            weight = rounding.fake_quantize(*learned, self.group_size, self.ste, dtype)
        return F.linear(input, weight, self.bias)

    def codes(self) -> Tensor:
        """The codes in use, int8 ``[out, in]``; of a weight in shards, this process's rows."""
        return rounding.quantize(processes.local(self.weight), self.group_size)

    def numbers(self) -> ternary.TernaryWeight:
        """Codes, scales and shifts as they are in training, on the CPU."""
        scale = self.weight_scale.detach().cpu()
        shift = None if self.weight_shift is None else self.weight_shift.detach().cpu()
        return ternary.TernaryWeight(self.codes().cpu(), scale, shift, self.group_size)

    def value(self) -> Tensor:
        """The weight as it is used, float32 ``[out, in]``."""
        return self.numbers().dequantized()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


class Once:
    """One rounding of a layer's weight for several forward passes; their gradients are summed."""

    def __init__(self, layer: TernaryLinear) -> None:
        self.layer = layer
        self._value: Tensor | None = None
        self._gradient: Tensor | None = None

    def value(self, dtype: torch.dtype) -> Tensor:
        """The rounded weight, a leaf; made when first asked for."""
        if self._value is None:
            layer = self.layer
            self._value, self._codes = rounding.rounded(
                layer.weight, layer.weight_scale, layer.weight_shift, layer.group_size, dtype
            )
            self._value.requires_grad_(torch.is_grad_enabled() and any(self._wanted()))
            if self._value.requires_grad:
                add_hook: Any = self._value.register_post_accumulate_grad_hook
                add_hook(self._take)
        return self._value

    def _wanted(self) -> tuple[bool, bool, bool]:
        layer = self.layer
        both = layer.weight.requires_grad, layer.weight_scale.requires_grad
        return *both, layer.weight_shift is not None and layer.weight_shift.requires_grad

    def _take(self, value: Tensor) -> None:
        """Add the gradient of one pass, in float32 whatever the pass was computed in."""
        gradient, value.grad = value.grad, None
        assert gradient is not None
        if self._gradient is None:
            self._gradient = gradient.float()
        else:
            self._gradient.add_(gradient)

    def backward(self) -> None:
        """Hand the sum on to weight, scale and shift."""
        if self._gradient is None:
            return
        layer, wanted = self.layer, self._wanted()
        found = rounding.straight_through(
            self._gradient,
            self._codes,
            layer.weight_scale,
            layer.group_size,
            layer.ste,
            dtype=layer.weight.dtype,
            wanted=wanted,
        )
        parameters = (layer.weight, layer.weight_scale, layer.weight_shift)
        pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
        torch.autograd.backward([p for p, _ in pairs if p is not None], [g for _, g in pairs])

    def close(self) -> None:
        """Let go of everything: the weight's hook holds this object, and it holds the weight."""
        self.layer.once = self._value = self._gradient = None


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """While open, a weight is rounded in the first forward pass alone; on leaving, gradients go on.

    The parameters get the gradients of all backward passes together, at the end. They must not
    change meanwhile. Costs no more memory than one pass: the sum of the gradients, in float32,
    stands where the parameters' would.
    """
    made = [Once(layer) for layer in ternary_layers(model).values()]
    for once in made:
        once.layer.once = once
    try:
        yield
        for once in made:
            once.backward()
            once.close()
    finally:
        for once in made:
            once.close()


@contextmanager
def rounded_softly(model: nn.Module, hardness: float | None) -> Iterator[None]:
    """While open, weights are those of `ternq.softened.soften`; None: rounded as always."""
    layers = [] if hardness is None else [*ternary_layers(model).values()]
    for layer in layers:
        layer.hardness = hardness
    try:
        yield
    finally:
        for layer in layers:
            layer.hardness = None


def compute_dtype(input: Tensor) -> torch.dtype:
    """The type in which a product with ``input`` is made: autocast's where it is on, or its own."""
    kind = input.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype


class AbsmeanLinear(TernaryLinear):
    """The same by TriLM's rule: one scale for the whole matrix, taken from the latent weight.

    Nothing but ``weight`` and ``bias`` is learned or stored in training. ``group_size`` is that of
    the stored form, which repeats the scale for every row.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group_size: int,
        shift: bool = False,
        ste: Ste = "identity",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias)
        self.group_size, self.ste = group_size, ste
        self.weight_shift = None

    @classmethod
    def from_dense(cls, layer: nn.Module, scheme: Scheme, ste: Ste = "identity") -> "AbsmeanLinear":
        """The layer's weight as the latent one."""
        weight, bias = dense_weight(layer), getattr(layer, "bias", None)
        with torch.device("meta"):
            new = cls(
                weight.shape[1],
                weight.shape[0],
                bias=bias is not None,
                group_size=scheme.group_size,
            )
        new.weight = layer.weight if isinstance(layer, nn.Linear) else nn.Parameter(weight)
        new.bias = bias
        return new.train(layer.training)

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]  # computed, where DLT learns it
        """The scale in use, repeated: float ``[out, groups]``."""
        return absmean.scales(self.weight.detach(), self.group_size)

    def forward(self, input: Tensor) -> Tensor:
        weight = absmean.fake_quantize(self.weight)
        return F.linear(input, weight.to(input.dtype), self.bias)

    def codes(self) -> Tensor:
        return absmean.quantize(self.weight.detach()).to(torch.int8)


class RoundedLinear(nn.Linear):
    """A linear layer of a baseline that is not ternary (`ternq.baseline`): dense until rounded.

    ``weight`` is ``[out, in]`` whatever the layer was. ``bits`` are those that the rounded weight
    would be stored in; ``code_bits`` the ones of its codes alone, 0 before it is rounded.
    """

    bits = code_bits = 0
    bias: nn.Parameter | None  # type: ignore[assignment]  # as nn.Linear has it without a bias

    @classmethod
    def from_dense(cls, layer: nn.Module, scheme: Scheme, ste: Ste = "identity") -> "RoundedLinear":
        """The layer's own weight."""
        weight = dense_weight(layer)
        rows, columns = weight.shape
        new = cls(columns, rows, bias=False, device="meta")
        new.weight = layer.weight if isinstance(layer, nn.Linear) else nn.Parameter(weight)
        new.bias = getattr(layer, "bias", None)
        if scheme.method == "billm":
            new.bits = billm.stored_bits(rows, columns, scheme.group_size)
        else:
            bits = scheme.bits or 2
            new.bits = grid.stored_bits(rows, columns, bits, scheme.symmetric, scheme.group_size)
        return new.train(layer.training)

    def value(self) -> Tensor:
        """The weight as it is used."""
        return self.weight.detach()


def layer_class(scheme: Scheme) -> type[Any]:
    """The layer of a scheme's method."""
    if scheme.method in NOT_TERNARY:
        return RoundedLinear
    return AbsmeanLinear if scheme.method == "absmean" else TernaryLinear


Ternary = TernaryLinear | PackedLinear


@dataclass(frozen=True)
class Dense:
    """A part of the model that stays dense, and why."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """The linear layers that become ternary, and everything that does not."""

    chosen: dict[str, nn.Module] = field(default_factory=dict)
    dense: list[Dense] = field(default_factory=list)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as ``[out, in]``."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach() if isinstance(layer, nn.Linear) else weight.detach().t().contiguous()


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder's blocks: the ``ModuleList`` with most parameters.

    Raises:
        InputError: the model has none.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    # Of nested lists (blocks of experts) the outermost holds most; ties go to the first.
    size = {n: sum(p.numel() for p in m.parameters()) for n, m in lists.items()}
    if not size or not max(size.values()):
        raise InputError(f"{type(model).__name__} has no list of decoder blocks.")
    name = max(size, key=lambda n: size[n])
    return name, lists[name]


def select(model: nn.Module, scheme: Scheme) -> Selection:
    """The one rule: every linear layer inside the decoder's blocks, but those that ``skip`` names.

    Raises:
        RecipeError: a pattern matches no linear layer, nothing is left, or a group is wider than
            every row.
        InputError: weights that this program does not handle (experts fused into 3-D parameters).
    """
    blocks, _ = decoder_blocks(model)
    inside = {n: m for n, m in model.named_modules() if is_linear(m) and n.startswith(blocks + ".")}
    _refuse_fused(model, blocks)
    skipped = _skipped(list(inside), scheme.skip)
    chosen = {n: m for n, m in inside.items() if n not in skipped}
    if not chosen:
        reason = f"{type(model).__name__} has no linear layer in its blocks."
        if skipped:
            reason = f"--skip {' --skip '.join(scheme.skip)} leaves no layer to make ternary."
            raise RecipeError(reason, "Skip fewer layers.")
        raise InputError(reason)
    widest = max(features(m)[0] for m in chosen.values())
    if scheme.group_size > widest:
        raise RecipeError(
            f"--group-size {scheme.group_size} is larger than the longest row ({widest}).",
            f"Choose at most {widest}.",
        )
    return Selection(chosen, list(dense_parts(model, set(chosen), skipped)))


def prepare(model: nn.Module, scheme: Scheme, ste: Ste = "identity") -> Selection:
    """Put a ternary layer in the place of every selected one, at its closed-form start.

    With the method ``float`` nothing is selected.
    """
    if scheme.method == "float":
        return Selection()
    selection = select(model, scheme)
    made = layer_class(scheme)
    for name, layer in selection.chosen.items():
        model.set_submodule(name, made.from_dense(layer, scheme, ste))
    return selection


def settled(model: nn.Module, scheme: Scheme) -> Scheme:
    """The scheme as it is stored: what its method does not leave open is filled in.

    Baselines but PT2-LLM have no shift, RTN and GPTQ some bits, and a group of absmean is the
    widest row.

    Raises:
        RecipeError: another group size was asked for.
    """
    if scheme.method in ("dlt", "pt2", "float"):
        return scheme
    if scheme.method != "absmean":
        bits = scheme.bits or 2 if scheme.method in ("rtn", "gptq") else None
        return replace(scheme, shift=False, bits=bits)
    chosen = select(model, replace(scheme, group_size=1)).chosen
    widest = max(features(layer)[0] for layer in chosen.values())
    if scheme.group_size not in (Scheme().group_size, widest):
        raise RecipeError(
            f"--method absmean has one scale a matrix; --group-size {scheme.group_size} asks for "
            "more.",
            "Leave --group-size out.",
        )
    return replace(scheme, group_size=widest, shift=False)


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """Name -> layer in training."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TernaryLinear)}


def rounded_layers(model: nn.Module) -> dict[str, RoundedLinear]:
    """Name -> layer of a baseline that is not ternary."""
    return {n: m for n, m in model.named_modules() if isinstance(m, RoundedLinear)}


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Name -> packed layer."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def group_rule(selection: Selection, group_size: int) -> str | None:
    """How rows that the group size does not divide are cut, in a sentence; None if none are."""
    widths = sorted({features(m)[0] for m in selection.chosen.values()})
    ragged = [w for w in widths if w % group_size]
    if not ragged:
        return None
    cuts = "; ".join(f"{w} = {w // group_size} x {group_size} + {w % group_size}" for w in ragged)
    return f"The last group of a row is shorter, with its own scale and shift: {cuts}."


def _skipped(names: list[str], patterns: tuple[str, ...]) -> set[str]:
    skipped: set[str] = set()
    for pattern in patterns:
        matched = {n for n in names if _matches(n, pattern)}
        if not matched:
            raise RecipeError(
                f"--skip '{pattern}' matches no linear layer.",
                f"Names look like '{names[0]}'; '*' stands for anything." if names else None,
            )
        skipped |= matched
    return skipped


def _matches(name: str, pattern: str) -> bool:
    """The whole name, or its end after a dot: ``down_proj`` means every ``...down_proj``."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)


def _refuse_fused(model: nn.Module, blocks: str) -> None:
    fused = [(n, p) for n, p in model.named_parameters() if p.ndim == 3 and n.startswith(blocks)]
    fused = [(n, p) for n, p in fused if min(p.shape) > 1 and "conv" not in n]
    if fused:
        total = sum(p.numel() for p in model.parameters())
        share = sum(p.numel() for _, p in fused) / total
        name, parameter = fused[0]
        raise InputError(
            f"{share:.0%} of the parameters are experts fused into 3-D tensors (such as {name}, "
            f"{'x'.join(map(str, parameter.shape))}), which ternq cannot make ternary yet.",
            "Use a model whose decoder is built of nn.Linear.",
        )


def dense_parts(model: nn.Module, chosen: set[str], skipped: set[str]) -> Iterator[Dense]:
    """Every module with parameters of its own that is not among ``chosen``, and why."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if own and name not in chosen:
            yield Dense(name, sum(p.numel() for p in own), _reason(model, name, module, skipped))


def _reason(model: nn.Module, name: str, module: nn.Module, skipped: set[str]) -> str:
    if name in skipped:
        return "skipped by --skip"
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tied = head is not None and head.weight is module.weight
        return "embedding, also the output head" if tied else "embedding"
    if module is getattr(model, "get_output_embeddings", lambda: None)():
        return "output head"
    if "norm" in kind.lower():
        return "normalisation"
    return "linear layer outside the decoder blocks" if is_linear(module) else f"no linear ({kind})"
