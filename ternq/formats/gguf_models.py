"""Which models llama.cpp runs, and how it wants them: names, settings, the order of some rows.

Sources: ``src/models/*.cpp`` of llama.cpp (which tensors an architecture loads), its converter's
keys as gguf-py names them, and the rotary embedding of transformers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ternq.errors import RecipeError
from ternq.source import Source

ROPE_FACTORS = "rope_freqs.weight"
_ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v")
_ALL_BIASES = (*_ATTENTION_BIASES, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a model type, and what it does with it.

    ``interleaved``: its rotary embedding turns neighbouring rows of queries and keys together,
    where transformers turns rows half a head apart. ``biases`` are the layers that may have one.
    """

    name: str
    interleaved: bool
    biases: tuple[str, ...]


ARCHITECTURES = {
    "llama": Architecture("llama", True, _ALL_BIASES),
    "mistral": Architecture("llama", True, _ALL_BIASES),
    "qwen2": Architecture("qwen2", False, _ATTENTION_BIASES),
    "qwen3": Architecture("qwen3", False, _ATTENTION_BIASES),
}
_NEAREST = "--format dense writes a model that plain transformers loads."


@dataclass(frozen=True)
class Model:
    """A model as llama.cpp knows it.

    ``names`` maps every tensor of the source (ternary layers with ``.weight``) to its name in the
    file. ``heads`` has the number of heads of the tensors whose rows change places. ``settings``
    are keys and values of the file's header; ``rope_factors`` a tensor that llama.cpp wants beside.
    """

    architecture: str
    names: Mapping[str, str]
    heads: Mapping[str, int]
    settings: Mapping[str, int | float | str]
    rope_factors: Tensor | None
    notes: list[str]


def described(source: Source) -> Model:
    """What llama.cpp needs to know of a model.

    Raises:
        RecipeError: it is of a type, or has a setting or tensor, that cannot be expressed.
    """
    config = source.config
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise RecipeError(
            f"GGUF files of the type '{kind}' are not written yet; of {', '.join(ARCHITECTURES)} "
            "they are.",
            _NEAREST,
        )
    architecture = ARCHITECTURES[kind]
    _refuse_unknown(config, architecture)
    rope, factors = _rope(config, architecture)
    names = _names(source, architecture, int(config["num_hidden_layers"]))
    heads = heads_of(config, names) if architecture.interleaved else {}
    settings = _settings(config, architecture.name) | rope
    return Model(architecture.name, names, heads, settings, factors, _notes(config))


def head_size(config: Mapping[str, Any]) -> int:
    """Columns of one attention head."""
    own = config.get("head_dim")
    return int(own or config["hidden_size"] // config["num_attention_heads"])


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows ``[out, ...]`` as llama.cpp has them: of each head 0, h/2, 1, h/2 + 1, ... of h rows."""
    return torch.unflatten(rows, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def uninterleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return torch.unflatten(rows, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def name_map(architecture: str, blocks: int) -> Any:
    """gguf-py's map from the names of transformers to those of llama.cpp."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, blocks)


def _names(source: Source, architecture: Architecture, blocks: int) -> dict[str, str]:
    known = name_map(architecture.name, blocks)
    names: dict[str, str] = {}
    for name in [*source.others, *(f"{module}.weight" for module in source.modules)]:
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        part = "" if new is None else new.split(".")[-2]
        if new is None or (new.endswith(".bias") and part not in architecture.biases):
            raise RecipeError(
                f"llama.cpp has no place for {name} in a model of type '{architecture.name}'.",
                _NEAREST,
            )
        names[name] = new
    _name_tied(names, bool(source.config.get("tie_word_embeddings")))
    return names


def _name_tied(names: dict[str, str], tied: bool) -> None:
    """Tied embeddings stand in the file once, as ``token_embd``, whatever name they came under."""
    stands = {new: name for name, new in names.items()}
    if "token_embd.weight" in stands:
        return
    if not tied or "output.weight" not in stands:
        raise RecipeError("The model has no embedding that llama.cpp could look tokens up in.")
    names[stands["output.weight"]] = "token_embd.weight"


def heads_of(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """The number of heads of the tensors of queries and keys."""
    queries = int(config["num_attention_heads"])
    keys = int(config.get("num_key_value_heads") or queries)
    of = {"attn_q": queries, "attn_k": keys}
    parts = {name: new.split(".")[-2] for name, new in names.items()}
    return {name: of[part] for name, part in parts.items() if part in of}


def _settings(config: Mapping[str, Any], name: str) -> dict[str, int | float | str]:
    size = head_size(config)
    heads = int(config["num_attention_heads"])
    return {
        f"{name}.vocab_size": int(config["vocab_size"]),
        f"{name}.context_length": int(config["max_position_embeddings"]),
        f"{name}.embedding_length": int(config["hidden_size"]),
        f"{name}.block_count": int(config["num_hidden_layers"]),
        f"{name}.feed_forward_length": int(config["intermediate_size"]),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{name}.attention.key_length": size,
        f"{name}.attention.value_length": size,
        f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{name}.rope.dimension_count": size,
    }


def _refuse_unknown(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Settings that llama.cpp's model of this type has no counterpart for."""
    layers = set(config.get("layer_types") or ()) - {"full_attention"}
    narrow = architecture.name == "qwen2" and config["hidden_size"] != (
        head_size(config) * config["num_attention_heads"]
    )
    wrong = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "layer_types": bool(layers) and config.get("model_type") != "mistral",
        "partial_rotary_factor": _rope_settings(config).get("partial_rotary_factor", 1) != 1,
        "head_dim": narrow or head_size(config) % 2 != 0,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            value = _rope_settings(config).get(name, config.get(name))
            raise RecipeError(
                f"llama.cpp's '{architecture.name}' cannot express {name} = {value}.", _NEAREST
            )


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the rotary embedding, where transformers 5 puts them and where others did."""
    old = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    if "partial_rotary_factor" in config:
        old["partial_rotary_factor"] = config["partial_rotary_factor"]
    scaling = dict(config.get("rope_scaling") or {})
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    return {**old, **scaling, **(config.get("rope_parameters") or {})}


def _rope(
    config: Mapping[str, Any], architecture: Architecture
) -> tuple[dict[str, int | float | str], Tensor | None]:
    """Settings of the rotary embedding, and the factors of frequencies that Llama 3 has."""
    rope = _rope_settings(config)
    kind, name = rope["rope_type"], architecture.name
    settings: dict[str, int | float | str] = {
        f"{name}.rope.freq_base": float(rope.get("rope_theta") or 10000.0)
    }
    if kind == "default":
        return settings, None
    if kind == "linear":
        settings[f"{name}.rope.scaling.type"] = "linear"
        settings[f"{name}.rope.scaling.factor"] = float(rope["factor"])
        return settings, None
    if kind == "llama3" and name == "llama":
        return settings, _llama3_factors(rope, head_size(config))
    raise RecipeError(
        f"The rotary embedding is scaled by '{kind}', which is not written to GGUF of '{name}'.",
        _NEAREST,
    )


def _llama3_factors(rope: Mapping[str, Any], size: int) -> Tensor:
    """What each frequency is divided by: float32 ``[head / 2]``.

    1 for wavelengths that fit ``high_freq_factor`` times into the context of pretraining,
    ``factor`` for those that fit less than ``low_freq_factor`` times, and between them a blend of
    the frequencies, linear in that count (transformers, ``modeling_rope_utils``).
    """
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
    frequency = float(rope.get("rope_theta") or 10000.0) ** -exponent
    turns = float(rope["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (blend + (1 - blend) / factor)).float()


def _notes(config: Mapping[str, Any]) -> list[str]:
    window, length = config.get("sliding_window"), int(config["max_position_embeddings"])
    if config.get("model_type") != "mistral" or not window or window >= length:
        return []
    return [
        f"The model looks back {window} tokens; llama.cpp's looks back over all of the context, so "
        "longer texts come out otherwise."
    ]
