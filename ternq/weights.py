"""What a ternary model weighs: coverage, bits per weight, share of zeros. All of it counted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import packing, ternary
from ternq.frozen import Compact
from ternq.linear import RoundedLinear, Ternary, TernaryLinear, dense_weight
from ternq.modeling_ternq import Int8, PackedLinear, is_linear


@dataclass
class Tally:
    """Parameters and the bits that they are stored in, by kind; tied parameters count once.

    ``linear_bits`` counts codes with their padding, scales and shifts.
    """

    linear: int = 0
    linear_bits: int = 0
    zeros: int | None = None  # not of layers without memory
    embedding: int = 0
    embedding_bits: int = 0
    other: int = 0
    other_bits: int = 0

    def add_layer(self, codes: Tensor, group_size: int, shift: bool) -> None:
        """Count a ternary layer with codes ``[out, in]``."""
        rows, columns = codes.shape
        self.linear += codes.numel()
        self.linear_bits += layer_bits(columns, rows, group_size, shift)
        if not codes.is_meta:
            self.zeros = (self.zeros or 0) + codes.numel() - int(codes.count_nonzero())

    def add_dense(self, count: int, bits: int, *, embedding: bool) -> None:
        """Count a tensor that is not ternary: of the embeddings and output head, or another."""
        if embedding:
            self.embedding += count
            self.embedding_bits += bits
        else:
            self.other += count
            self.other_bits += bits

    def summary(self) -> dict[str, Any]:
        """The contract's ``weights``."""
        everything = self.linear + self.embedding + self.other
        bits = self.linear_bits + self.embedding_bits + self.other_bits
        return {
            "coverage": self.linear / everything,
            "bpw_linear": self.linear_bits / self.linear if self.linear else None,
            "bpw_embeddings": self.embedding_bits / self.embedding if self.embedding else None,
            "bpw_total": bits / everything,
            "bytes": bits // 8,
            "bytes_dense_bf16": 2 * everything,
            "zero_share": self.zeros / self.linear
            if self.linear and self.zeros is not None
            else None,
            "parameters": everything,
        }


def with_file(weights: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with ``bpw_file``: all that the folder's tensor files hold, per parameter."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return weights | {"bpw_file": 8 * size / weights["parameters"]}


def weights_summary(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, *, int8_tables: bool = False
) -> dict[str, Any]:
    """The contract's ``weights`` of a model whose ternary layers are in training or packed.

    ``dtype`` is what the other parameters are stored in. ``bpw_linear`` counts stored codes,
    padding, scales and shifts; ``bpw_embeddings`` embeddings and output head; ``bpw_total`` every
    parameter as stored. ``coverage`` is the share of the dense model's parameters that are ternary.
    ``int8_tables``: embeddings and output head will be stored in 8 bits with a scale for each row.
    """
    tally = Tally()
    seen: set[int] = set()
    tables = [m for m in embeddings(model).values() if not isinstance(m, Int8)]
    for module in model.modules():
        if isinstance(module, TernaryLinear | PackedLinear):
            codes = module.codes() if isinstance(module, TernaryLinear) else module.unpacked()[0]
            tally.add_layer(codes, module.group_size, module.weight_shift is not None)
        elif isinstance(module, RoundedLinear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            tally.linear += module.weight.numel()
            tally.linear_bits += module.bits
        elif isinstance(module, Int8) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            stored = module.weight.nbytes + module.scale().nbytes
            tally.add_dense(module.weight.numel(), 8 * stored, embedding=True)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (isinstance(module, TernaryLinear) and name != "bias"):
                continue
            seen.add(id(parameter))
            bits = parameter.numel() * dtype.itemsize * 8
            if int8_tables and module in tables and name == "weight":
                bits = 8 * parameter.numel() + 16 * len(parameter)
            tally.add_dense(parameter.numel(), bits, embedding=module in tables)
    if not tally.linear:  # a dense model: its linear layers are among the others
        return tally.summary() | {"bpw_linear": 8.0 * dtype.itemsize}
    if not any(isinstance(m, TernaryLinear | PackedLinear) for m in model.modules()):
        return tally.summary() | {"coverage": 0.0}  # a baseline that is not ternary
    return tally.summary()


def layer_diagnostics(model: nn.Module, dense: nn.Module | None = None) -> list[dict[str, Any]]:
    """Of every ternary layer, in the model's order: ``{name, zero_share, error}``.

    ``zero_share`` is the share of codes that are zero; ``error`` the Frobenius norm of the
    difference to the same-named layer of ``dense``, relative to that layer's, or None without one.
    """
    others = {} if dense is None else dict(dense.named_modules())
    found: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear | PackedLinear):
            codes = module.codes() if isinstance(module, TernaryLinear) else module.unpacked()[0]
            zeros = codes.numel() - int(codes.count_nonzero())
            error = relative_error(module, others.get(name))
            found.append({"name": name, "zero_share": zeros / codes.numel(), "error": error})
    return found


def relative_error(layer: Ternary, dense: nn.Module | None) -> float | None:
    """``||W_dense - W_ternary|| / ||W_dense||``; None where that is not defined."""
    if isinstance(dense, Compact):
        wanted = dense.values().cpu()
    elif dense is not None and is_linear(dense):
        wanted = dense_weight(dense).float().cpu()
    else:
        return None
    numbers = layer.numbers() if isinstance(layer, TernaryLinear) else layer
    weight = numbers.dequantized().cpu()
    norm = float(wanted.norm())
    return float((wanted - weight).norm()) / norm if weight.shape == wanted.shape and norm else None


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Names of the input embedding and of the output head, and what stands there."""
    ends = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, end, lambda: None)() for end in ends]
    return {n: m for n, m in model.named_modules() if any(m is f for f in found)}


def stored_dtype(dtype: torch.dtype, keep_dtype: bool = False) -> torch.dtype:
    """What dense tensors are stored in: the checkpoint's type, but bfloat16 for float32."""
    return torch.bfloat16 if dtype == torch.float32 and not keep_dtype else dtype


def layer_bits(columns: int, rows: int, group_size: int, shift: bool) -> int:
    """Bits of a packed layer: codes with their padding, float16 scales and shifts."""
    values = 2 if shift else 1
    groups = ternary.n_groups(columns, group_size)
    return rows * (8 * packing.packed_width(columns) + 16 * values * groups)
