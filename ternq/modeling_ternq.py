"""Packed ternary models in transformers: layers, configuration and quantizer, in one file.

It needs torch and transformers alone, and nothing of ternq: a copy of it lies in every artefact, so
that ``from_pretrained(..., trust_remote_code=True)`` loads one where ternq is not installed. Where
ternq is imported, these same classes are used, and the copy is not; there, packed layers compute by
ternq's kernels. The format is docs/format.md.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from ternq import kernels
except ImportError:
    kernels = None  # type: ignore[assignment]

METHOD = "ternq"
FORMAT_VERSION = 1
_STORED = ("weight", "weight_scale", "weight_shift")  # the buffers of a packed layer
_changing = threading.RLock()  # held while a layer goes from one form to the other


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Codes int8 ``[out, columns]`` of bytes uint8 ``[out, ceil(columns / 5)]``."""
    codes = five_codes(packed.device).index_select(0, packed.flatten().int())
    return codes.view(len(packed), -1)[:, :columns]


@functools.cache
def five_codes(device: torch.device) -> Tensor:
    """The codes that each byte stands for: int8 ``[256, 5]``, the first in the 81s."""
    places = torch.tensor([81, 27, 9, 3, 1])
    digits = torch.arange(256).unsqueeze(1).div(places, rounding_mode="floor") % 3
    return (digits - 1).to(torch.int8).to(device)


def by_column(values: Tensor, columns: int, group_size: int) -> Tensor:
    """Values of groups ``[out, groups]`` repeated for every column, float32 ``[out, columns]``."""
    return values.float().repeat_interleave(group_size, dim=1)[:, :columns]


class Packed(nn.Module):
    """What packed layers share: a cast of the model leaves their stored values as they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move to a device, but keep float16 scales, which another type would round."""
        kept = {
            n: b for n, b in self._buffers.items() if b is not None and b.dtype == torch.float16
        }
        for name, buffer in kept.items():
            self._buffers[name] = buffer.view(torch.int16)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name in kept:
                moved = self._buffers[name]
                assert moved is not None
                self._buffers[name] = moved.view(torch.float16)
        return self


class PackedLinear(Packed):
    """A linear layer that holds its codes packed, five to a byte.

    Buffers are named as in the file: ``weight`` uint8 ``[out, ceil(in / 5)]``, ``weight_scale`` and
    ``weight_shift`` float16 ``[out, groups]``. Under the name ``weight`` a program that does not
    know ternq meets a wrong shape and stops, where a new name would leave it random weights.

    Without a kernel the weight is unpacked whenever it is used. With one it is brought into the
    kernel's form when first used, and the buffers are given up: asked for by name or saved, they
    are made again, to the bit. ``act`` is what the kernel rounds activations to.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_shift: Tensor | None
    act: Literal["exact", "int8"] = "exact"
    _form: Any = None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, group_size: int, shift: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size
        groups = (out_features, -(-in_features // group_size))
        width = -(-in_features // 5)
        self.register_buffer("weight", torch.zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(groups, dtype=torch.float16))
        shifts = torch.zeros(groups, dtype=torch.float16) if shift else None
        self.register_buffer("weight_shift", shifts)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``weight``, ``weight_scale`` and ``weight_shift`` as in the file."""
        with _changing:
            if self._form is None:
                return self.weight, self.weight_scale, self.weight_shift
            form = kernels.restore(self._form)
            assert form.scale is not None
            return form.codes, form.scale, form.shift

    def prepare(self) -> bool:
        """Bring the weight into the form of this device's kernel; whether there is one."""
        with _changing:
            if self._form is None and kernels is not None:
                of_file = kernels.PackedWeight.of(*self.stored(), self.in_features, self.group_size)
                form = kernels.convert(of_file)
                if form is not of_file:
                    self._form = form
                    for name in _STORED:
                        del self._buffers[name]
                    self.register_buffer("words", form.codes, persistent=False)
            return self._form is not None

    def form(self) -> Any:
        """The weight as the kernel of its device reads it; None where there is none."""
        return self._form if self.prepare() else None

    def _give_up_form(self) -> None:
        """Back to the form of the file."""
        with _changing:
            if self._form is not None:
                stored = self.stored()
                self._form = None
                del self.words
                for name, buffer in zip(_STORED, stored, strict=True):
                    self.register_buffer(name, buffer)

    def __getattr__(self, name: str) -> Any:
        if name in _STORED and self._form is not None:
            return self.stored()[_STORED.index(name)]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STORED:
            self._give_up_form()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        prepared = self._form is not None
        self._give_up_form()
        super()._apply(fn, recurse)
        if prepared:  # a compiler that meets the layer cannot
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._give_up_form()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._form is not None:
            for name, buffer in zip(_STORED, self.stored(), strict=True):
                if buffer is not None:
                    destination[prefix + name] = buffer

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes int8 ``[out, in]``, scale and shift float16 ``[out, groups]``."""
        codes, scale, shift = self.stored()
        return unpack(codes, self.in_features), scale, shift

    def dequantized(self) -> Tensor:
        """The weight ``scale * code + shift``, float32 ``[out, in]``."""
        if self._form is not None:
            return kernels.dequantized(self._form)
        codes, scale, shift = self.unpacked()
        weight = codes.float().mul_(by_column(scale, self.in_features, self.group_size))
        if shift is not None:
            weight.add_(by_column(shift, self.in_features, self.group_size))
        return weight

    def forward(self, input: Tensor) -> Tensor:
        if self._computes(input):
            if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
                input = input.to(torch.get_autocast_dtype(input.device.type))
            return kernels.ternary_matmul(input, self._form, self.act, self.bias)
        weight = self.dequantized()
        if input.is_floating_point():  # of others torch says that they do not fit
            weight = weight.to(input.dtype)
        return F.linear(input, weight, self.bias)

    def _computes(self, input: Tensor) -> bool:
        """Whether a kernel makes the product: there is one, and nobody wants a gradient."""
        if torch.is_grad_enabled() and (
            input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        ):
            return False
        return self._form is not None or (not torch.compiler.is_compiling() and self.prepare())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={self.group_size}"
        )


class Int8(Packed):
    """What 8-bit layers share: a row is ``weight_scale * weight``, weight in -127 ... 127.

    ``weight`` is int8 ``[rows, columns]``, ``weight_scale`` float16 ``[rows]``. The weight is a
    parameter, since transformers ties parameters alone; the scale is not, or it would give the
    model its dtype. ``table`` is the layer that a tied weight is from: its scale serves both.
    """

    weight: nn.Parameter
    weight_scale: Tensor | None

    def __init__(self, rows: int, columns: int, table: "Int8 | None" = None) -> None:
        super().__init__()
        self.__dict__["table"] = table  # a module of the model already, and no part of this one
        codes = torch.zeros(rows, columns, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = None if table is not None else torch.zeros(rows, dtype=torch.float16)
        self.register_buffer("weight_scale", scale)

    def scale(self) -> Tensor:
        """Float16 ``[rows]``."""
        if self.weight_scale is None:
            table: Int8 = self.__dict__["table"]
            return table.scale()
        return self.weight_scale

    def dequantized(self) -> Tensor:
        """The rows, float32."""
        return self.weight.float() * self.scale().float().unsqueeze(1)


class Int8Embedding(Int8):
    """An embedding whose rows are int8 with one scale each; it answers in ``dtype``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight).float()
        return (rows * F.embedding(ids, self.scale().unsqueeze(1)).float()).to(self.dtype)


class Int8Linear(Int8):
    """An output head whose rows are int8 with one scale each."""

    def __init__(self, in_features: int, out_features: int, table: Int8 | None = None) -> None:
        super().__init__(out_features, in_features, table)
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None = None

    def forward(self, input: Tensor) -> Tensor:
        found = _few(input, self.weight, self.scale(), self.bias)
        if found is not None:
            return found
        return F.linear(input, self.dequantized().to(input.dtype), self.bias)


class DenseHead(nn.Linear):
    """The output head of a packed model that stays dense: a few tokens go through a kernel."""

    def forward(self, input: Tensor) -> Tensor:
        found = (
            None if input.dtype != self.weight.dtype else _few(input, self.weight, bias=self.bias)
        )
        return super().forward(input) if found is None else found


def _few(
    input: Tensor, table: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor | None:
    """What a kernel makes of a few tokens and an output head; None if torch is to make it."""
    found = None if kernels is None else kernels.table_product(input, table, scale)
    return found if found is None or bias is None else found + bias


def is_linear(module: nn.Module | None) -> bool:
    """A plain linear layer, or GPT-2's ``Conv1D`` (a linear layer stored transposed)."""
    return type(module) in (nn.Linear, DenseHead) or type(module).__name__ == "Conv1D"


def features(layer: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear layer, also of one on the meta device."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # is_linear saw to it
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


class TernqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # not followed by mypy
    """``quantization_config`` of an artefact: what is needed to read its packed layers.

    Raises:
        ValueError: a format of a later version, or values that no artefact has.
    """

    def __init__(
        self,
        group_size: int = 128,
        shift: bool = True,
        modules: list[str] | None = None,
        int8_modules: list[str] | None = None,
        codec: str = "base3",
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise ValueError(
                f"this is version {format_version} of the ternq format; "
                f"this ternq reads version {FORMAT_VERSION}: install a newer ternq"
            )
        if codec != "base3":
            raise ValueError(f"unknown ternq codec {codec!r}; version 1 has 'base3' alone")
        if type(group_size) is not int or group_size < 1:
            raise ValueError(f"group_size is {group_size!r}; it is a whole number, at least 1")
        if type(shift) is not bool:
            raise ValueError(f"shift is {shift!r}; it is true or false")
        self.quant_method = METHOD  # a plain string, since transformers' enum is closed
        self.group_size, self.shift = group_size, shift
        self.modules = _names("modules", modules)
        self.int8_modules = _names("int8_modules", int8_modules)
        self.codec, self.format_version = codec, format_version


def _names(key: str, names: Any) -> list[str]:
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is not a list of names")
    if len(set(names)) < len(names):
        raise ValueError(f"{key} names a module twice")
    return list(names)


class TernqQuantizer(HfQuantizer):  # type: ignore[misc]  # not followed by mypy
    """Swaps in the packed layers before the weights are read."""

    quantization_config: TernqConfig
    requires_calibration = True  # refuses use on the fly: packing is ternq's work

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        put_packed(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer in model.modules():
            if isinstance(layer, PackedLinear):
                layer.prepare()
        if not model.is_remote_code() and hasattr(model.config, "auto_map"):
            del model.config.auto_map  # save_pretrained would name a file that it does not write
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """What was loaded may be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes cannot be trained; ``ternq distill`` unpacks them."""
        return False


def put_packed(model: Any, config: TernqConfig) -> None:
    """Put empty packed layers in the places that the configuration names.

    Raises:
        ValueError: it names something that is no plain linear layer or embedding.
    """
    modules = dict(model.named_modules())
    for name in config.modules:
        layer = modules.get(name)
        if layer is None or not is_linear(layer):
            raise ValueError(f"quantization_config names '{name}', which is no linear layer")
        in_features, out_features = features(layer)
        bias = getattr(layer, "bias", None) is not None
        with torch.device("meta"):
            packed = PackedLinear(
                in_features,
                out_features,
                bias=bias,
                group_size=config.group_size,
                shift=config.shift,
            )
        if packed.bias is not None:
            packed.bias = layer.bias  # in the model's dtype
        model.set_submodule(name, packed)
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in sorted(config.int8_modules, key=lambda name: f"{name}.weight" in tied):
        source = tied.get(f"{name}.weight", "").removesuffix(".weight")
        table = model.get_submodule(source) if source in config.int8_modules else None
        model.set_submodule(name, _int8(name, modules.get(name), table))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is nn.Linear:
        head.__class__ = DenseHead  # in its place, so that what is tied to it stays tied


def _int8(name: str, layer: nn.Module | None, table: Any) -> nn.Module:
    with torch.device("meta"):
        if type(layer) is nn.Embedding:
            dtype = layer.weight.dtype
            return Int8Embedding(layer.num_embeddings, layer.embedding_dim, dtype)
        if type(layer) is nn.Linear:
            head = Int8Linear(layer.in_features, layer.out_features, table)
            head.bias = layer.bias
            return head
    raise ValueError(f"quantization_config names '{name}', which is no embedding or output head")


def register() -> None:
    """Make transformers know ``ternq``; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(TernqConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(TernqQuantizer)


register()
