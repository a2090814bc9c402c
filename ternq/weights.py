"""What a ternary model weighs: coverage, bits per weight, share of zeros. All of it counted."""

from typing import Any

import torch
from torch import Tensor, nn

from ternq import packing, ternary
from ternq.linear import PackedLinear, TernaryLinear


def weights_summary(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The contract's ``weights`` of a model whose ternary layers are in training or packed.

    ``dtype`` is what the other parameters are stored in. ``bpw_linear`` counts stored codes,
    padding, scales and shifts; ``bpw_total`` every parameter as stored. ``coverage`` is the share
    of the dense model's parameters that are ternary. Tied parameters count once.
    """
    layers = [m for m in model.modules() if isinstance(m, TernaryLinear | PackedLinear)]
    linear = sum(m.in_features * m.out_features for m in layers)
    bits = sum(_bits(m) for m in layers)
    others = _other_parameters(model)
    other_bits = others * torch.finfo(dtype).bits
    zeros = sum(int((_codes(m) == 0).sum()) for m in layers)
    everything = linear + others
    return {
        "coverage": linear / everything,
        "bpw_linear": bits / linear,
        "bpw_total": (bits + other_bits) / everything,
        "bytes": (bits + other_bits) // 8,
        "bytes_dense_bf16": 2 * everything,
        "zero_share": zeros / linear,
        "parameters": everything,
    }


def stored_dtype(dtype: torch.dtype, keep_dtype: bool = False) -> torch.dtype:
    """What dense tensors are stored in: the checkpoint's type, but bfloat16 for float32."""
    return torch.bfloat16 if dtype == torch.float32 and not keep_dtype else dtype


def _bits(layer: TernaryLinear | PackedLinear) -> int:
    groups = ternary.n_groups(layer.in_features, layer.group_size)
    values = 2 if layer.weight_shift is not None else 1
    return layer.out_features * (8 * packing.packed_width(layer.in_features) + 16 * values * groups)


def _codes(layer: TernaryLinear | PackedLinear) -> Tensor:
    return layer.exported()[0] if isinstance(layer, TernaryLinear) else layer.unpacked()[0]


def _other_parameters(model: nn.Module) -> int:
    """Parameters outside ternary weights, each once: embeddings, head, norms, biases."""
    total, seen = 0, set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = isinstance(module, TernaryLinear) and name != "bias"
            if not ours and id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel()
    return total
