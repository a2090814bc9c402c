"""A packed model of Llama's kind as one native call per token; the code is kernels/csrc/decode.c.

Where a token takes a few milliseconds, most of them are Python's: a model of 135 million parameters
is 210 products a token, none of which takes as long as it takes to call it. Here a step is a single
call, and the threads that work on it live as long as the `Decoder`.

It computes what transformers' forward computes, with a cache in float32. The products are those of
`ternq.kernels`, so logits differ from transformers' by rounding alone.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ternq import kernels, outlines
from ternq.errors import ResourceError
from ternq.kernels import native
from ternq.kernels.packed import PackedWeight
from ternq.memory import cache_bytes
from ternq.modeling_ternq import METHOD, Int8, PackedLinear

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not change with the length
BATCH = 128  # tokens of a prompt that are read together

_LAYERS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


class _Table(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, native.Matrix) for name in _LAYERS),
        *((f"{name}_bias", ctypes.c_void_p) for name in _LAYERS),
        *((name, ctypes.c_void_p) for name in _NORMS),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "wide", "vocabulary")
        ),
        ("epsilon", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("frequencies", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("blocks", ctypes.POINTER(_Block)),
        ("embedding", _Table),
        ("head", _Table),
    ]


def load_dtype(config: Any) -> torch.dtype | None:
    """The type to load a model in that `Decoder` will run; None where it will not.

    It takes less memory than float32, in which the decoder computes all the same.
    """
    kinds = getattr(config, "architectures", None) or ()
    runs = outlines.quantized_by(config) == METHOD and set(kinds) & set(ARCHITECTURES)
    return outlines.dtype_of(config) if runs else None


def obstacle(model: Any, context: int) -> str | None:
    """Why `Decoder` cannot run a model for so many positions, as a clause; None if it can."""
    config, kind = model.config, type(model).__name__
    if kind not in ARCHITECTURES:
        return f"it is a {kind}"
    if model.device.type != "cpu":
        return f"it is on {model.device.type}"
    rope = config.rope_parameters["rope_type"]
    if rope not in ROPES:
        return f"its rotary positions are '{rope}'"
    if 2 * model.model.rotary_emb.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        return "only a part of each head is rotated"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is '{config.hidden_act}'"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context:
        return f"it attends to {window} positions only"
    for block in model.model.layers:
        for name in _LAYERS.values():
            if not isinstance(block.get_submodule(name), PackedLinear):
                return "some of its layers are not ternary"
    if kernels.library() is None:
        return f"its products are made by {kernels.choice()}"
    return None


class Decoder:
    """Steps of a packed model, with a cache of ``context`` positions.

    It reads the model's own tensors and adds cache and activations to them alone. ``int8`` rounds
    activations to 8 bits before the ternary products, where otherwise 16 bits are used.

    Raises:
        ResourceError: there is no memory for the cache, or no thread to be had.
    """

    def __init__(self, model: Any, context: int, *, threads: int = 0, int8: bool = False) -> None:
        self.context, self.threads = context, threads or torch.get_num_threads()
        self.cache_bytes = cache_bytes(model, context)
        self._act = native.ACTS["int8" if int8 else "exact"]
        self._kept: list[Any] = []  # whatever the C code holds the address of
        self._logits = torch.empty(model.config.vocab_size)
        found = kernels.library()
        assert found is not None, "obstacle() says so"
        self._native = found
        described = self._describe(model)
        batch = min(BATCH, context)
        self._self = found.library.ternq_decoder_new(
            ctypes.addressof(described), context, batch, self.threads
        )
        if not self._self:
            raise ResourceError(f"There is not enough memory for {context} positions.")

    def logits(self, ids: Sequence[int], position: int) -> Tensor:
        """Read ids from ``position`` on; the logits after the last, float32 ``[vocabulary]``.

        What stands before ``position`` was read by earlier calls; 0 begins a new text. The tensor
        is overwritten by the next call.

        Raises:
            ValueError: no ids, ids that the model does not have, or too many for the cache; or the
                decoder was closed.
        """
        if not self._self:
            raise ValueError("the decoder was closed")
        for first in range(0, max(1, len(ids)), BATCH):  # between calls Python takes signals
            part = ids[first : first + BATCH]
            last = first + BATCH >= len(ids)
            status = self._native.library.ternq_decoder_step(
                self._self,
                (ctypes.c_int64 * len(part))(*part),
                len(part),
                position + first,
                self._act,
                self._logits.data_ptr() if last else None,
            )
            if status:
                raise ValueError(f"{len(ids)} tokens at position {position}: error {status}")
        return self._logits

    def close(self) -> None:
        """End the threads and free the cache; a second call does nothing."""
        if self._self:
            self._native.library.ternq_decoder_free(self._self)
            self._self = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_self", None):
            self.close()

    # -- addresses of the model's tensors ------------------------------------------------------

    def _describe(self, model: Any) -> _Model:
        config, inner = model.config, model.model
        blocks = (_Block * config.num_hidden_layers)(*map(self._block, inner.layers))
        self._kept.append(blocks)
        first = inner.layers[0].self_attn
        return _Model(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=first.head_dim,
            wide=config.intermediate_size,
            vocabulary=config.vocab_size,
            epsilon=inner.norm.variance_epsilon,
            rope_scale=inner.rotary_emb.attention_scaling,
            frequencies=self._floats(inner.rotary_emb.inv_freq),
            norm=self._floats(inner.norm.weight),
            blocks=blocks,
            embedding=self._table(inner.embed_tokens),
            head=self._table(model.lm_head),
        )

    def _block(self, block: Any) -> _Block:
        found = _Block()
        for name, where in _LAYERS.items():
            layer = block.get_submodule(where)
            setattr(found, name, self._matrix(layer))
            setattr(found, f"{name}_bias", self._floats(layer.bias))
        for name, where in _NORMS.items():
            norm = _submodule(block, where)
            setattr(found, name, None if norm is None else self._floats(norm.weight))
        return found

    def _matrix(self, layer: PackedLinear) -> native.Matrix:
        """The layer's own memory; small matrices, which torch is left to multiply, are copied."""
        weight = layer.form()
        if weight is None:
            of_file = PackedWeight.of(*layer.stored(), layer.in_features, layer.group_size)
            weight = self._native.convert(of_file)
        return native.matrix_of(self._keep(weight))

    def _table(self, layer: Any) -> _Table:
        """Rows of the embedding or the output head, in the type that they have."""
        scale = self._address(layer.scale()) if isinstance(layer, Int8) else None
        weight = layer.weight
        return _Table(rows=self._address(weight), scale=scale, dtype=native.TABLES[weight.dtype])

    def _floats(self, values: Tensor | None) -> int | None:
        return None if values is None else self._address(values.detach().float())

    def _address(self, values: Tensor) -> int:
        kept: Tensor = self._keep(values.detach().contiguous())
        return kept.data_ptr()

    def _keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing


def _submodule(block: Any, where: str) -> Any:
    for name in where.split("."):
        block = getattr(block, name, None)
    return block
