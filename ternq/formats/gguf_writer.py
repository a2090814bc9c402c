"""A GGUF file written tensor by tensor: header, dense tensors, ternary layers last.

gguf-py's writer is told names, shapes and types first; then each tensor is made, written and let
go. What was written is remembered as a digest of its values, for whoever reads it back.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq.errors import RecipeError
from ternq.formats import Options
from ternq.formats.folders import refuse_not_finite
from ternq.formats.gguf_codec import DENSE, KINDS, Kind, encode
from ternq.formats.gguf_fit import fitted
from ternq.formats.gguf_models import ROPE_FACTORS, Model, interleaved
from ternq.formats.gguf_tokenizer import Vocabulary
from ternq.progress import Event, Progress
from ternq.source import Source

OWN_KEY = "ternq.source"  # JSON: configuration, group size and shift of what was exported
_DENSE = {dtype: number for number, dtype in DENSE.items()}


@dataclass
class Plan:
    """What goes into the file, and what came of it.

    ``meant`` has the SHA-256 of the values of every tensor that was written, in float32 and with
    rows as transformers has them.
    """

    source: Source
    model: Model
    kinds: Mapping[str, Kind]
    options: Options
    rounded: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    meant: dict[str, bytes] = field(default_factory=dict)

    def packed(self, module: str) -> Tensor:
        """The bytes of a layer; what it lost is noted."""
        kind, options = self.kinds[module], self.options
        fit = fitted(module, self.source.layer(module), kind, options.exact, options.lossy)
        if fit.lost is not None:
            self.lost[module] = fit.lost
        elif fit.error:
            self.rounded[module] = fit.error
        name = f"{module}.weight"
        self.meant[name] = digest(fit.blocks.values())
        return self.rows(name, encode(kind, fit.blocks))

    def dense(self, name: str, wide: bool) -> Tensor:
        """The bytes of another tensor; ``wide`` makes it float32."""
        tensor = self.source.tensor(name)
        refuse_not_finite(name, tensor)
        self.meant[name] = digest(tensor.float())
        rows = self.rows(name, tensor).contiguous()
        return rows.float() if wide else rows.view(torch.uint8)

    @property
    def usual(self) -> Kind:
        """The type of most weights; it names the file."""
        names = [kind.name for kind in self.kinds.values()]
        return KINDS[max(KINDS, key=names.count)]

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with its rows where llama.cpp wants them."""
        heads = self.model.heads.get(name)
        return tensor if heads is None else interleaved(tensor, heads)


def write(path: Path, plan: Plan, tokens: Vocabulary, progress: Progress) -> None:
    """Write the file; it is removed again if anything fails."""
    from gguf import GGUFWriter

    parts = list(_parts(plan))
    writer: Any = GGUFWriter(path, plan.model.architecture)  # takes ids of types it has no name for
    try:
        _add_settings(writer, plan)
        _add_tokens(writer, tokens)
        for part in parts:
            writer.add_tensor_info(*part.info, raw_dtype=part.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, part in enumerate(parts, 1):
            writer.write_tensor_data(part.data().numpy())
            progress(Event("pack", done=done, total=len(parts)))
    except BaseException:
        writer.close()
        path.unlink(missing_ok=True)
        raise
    writer.close()


@dataclass(frozen=True)
class _Part:
    """A tensor of the file: its name there, its type's id, its shape, and who makes its bytes."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: Callable[[], Tensor]

    @property
    def info(self) -> tuple[Any, ...]:
        """What gguf-py's writer is told of it; the type of its numbers is given apart."""
        import numpy as np

        return self.name, self.shape, np.dtype(np.int8), stored_bytes(self.type, self.shape)


def _parts(plan: Plan) -> Iterator[_Part]:
    """Every tensor, ternary layers last."""
    source, names = plan.source, plan.model.names
    factors = plan.model.rope_factors
    if factors is not None:
        yield _Part(ROPE_FACTORS, 0, tuple(factors.shape), lambda: factors)
    for name, (dtype, shape) in source.others.items():
        kind = _dense_type(name, dtype, shape)
        yield _Part(names[name], kind, shape, partial(plan.dense, name, kind == 0))
    for module in source.modules:
        columns, rows = source.size(module)
        data = partial(plan.packed, module)
        yield _Part(names[f"{module}.weight"], plan.kinds[module].id, (rows, columns), data)


def _dense_type(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if dtype not in _DENSE:
        raise RecipeError(f"{name} is {dtype}, which is not written to a GGUF file.")
    return 0 if len(shape) == 1 else _DENSE[dtype]


def stored_bytes(type_id: int, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor."""
    of = {number: (1, dtype.itemsize) for number, dtype in DENSE.items()}
    of |= {kind.id: (kind.block, kind.bytes) for kind in KINDS.values()}
    block, size = of[type_id]
    return torch.Size(shape).numel() // block * size


def _add_settings(writer: Any, plan: Plan) -> None:
    source = plan.source
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_license((source.about.get("base_model") or {}).get("license") or "")
    writer.add_quantization_version(2)
    writer.add_file_type(plan.usual.file_type)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in plan.model.settings.items():
        add[type(value)](key, value)
    own = {
        "config": dict(source.config),
        "group_size": source.group_size,
        "shift": source.shift,
    }
    writer.add_string(OWN_KEY, json.dumps(own))


def _add_tokens(writer: Any, tokens: Vocabulary) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.merges is not None:
        writer.add_token_merges(tokens.merges)
    if tokens.scores is not None:
        writer.add_token_scores(tokens.scores)
        writer.add_add_space_prefix(tokens.add_prefix)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, number in tokens.ids.items():
        add[name](number)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(tokens.add_eos)
    if tokens.chat_template:
        writer.add_chat_template(tokens.chat_template)


def digest(values: Tensor) -> bytes:
    """SHA-256 of shape and float32 values; -0 counts as 0."""
    found = hashlib.sha256(str(tuple(values.shape)).encode())
    found.update((values + 0.0).contiguous().numpy().data)
    return found.digest()
