"""GGUF files of ternary types, taken in: codes and scales as they stand in the file.

Layers are read by `ternq.formats.gguf_layers`. Configuration and tokenizer come from transformers,
which is shown the header alone; the configuration of a file of ours stands in it as it was.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import hf, outlines, structure
from ternq.errors import InputError, VerificationError
from ternq.files import parse_json, read_json, write_json
from ternq.formats.gguf_codec import DENSE, KINDS
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_layers import Tensors, grouping, layer, values
from ternq.formats.gguf_models import ARCHITECTURES, ROPE_FACTORS, heads_of, name_map
from ternq.formats.gguf_writer import OWN_KEY
from ternq.source import Source

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The ternary model in a GGUF file; its configuration and tokenizer lie in a temporary folder.

    Raises:
        InputError: it is damaged, of an architecture that is not known here, or not ternary; the
            message names tensor and row.
    """
    header = Header(path)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        _write_base(header, base)
        yield _source(path, header, base)


# --- the source -----------------------------------------------------------------------------------


def _source(path: Path, header: Header, base: Path) -> Source:
    config = read_json(base / "config.json")
    skeleton = _skeleton(header, base, config)
    tensors = _named(header, config, skeleton)
    linears = {n for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    head = skeleton.get_output_embeddings()
    modules = tuple(
        name
        for name, module in skeleton.named_modules()
        if name in linears and module is not head and tensors.kind(f"{name}.weight") is not None
    )
    if not modules:
        raise InputError(
            f"{path} is not ternary: none of its linear layers is {', '.join(KINDS)}.",
            f"Make it ternary first: ternq ternarize {path}",
        )
    own = _own(header)
    size, shift = grouping(tensors, modules, own.get("group_size"))
    shift |= own.get("shift") is True
    weights = {f"{module}.weight" for module in modules}
    dtype = DENSE.get(header.tensors["token_embd.weight"].type, torch.float32)
    others = {n: _dense(tensors, n, dtype) for n in tensors.names if n not in weights}
    rounded: dict[str, float] = {}

    def tensor(name: str) -> Tensor:
        return tensors.rows(name, values(header, tensors.names[name])).to(others[name])

    return Source(
        name=path.stem,
        base=base,
        config=config,
        skeleton=skeleton,
        modules=modules,
        others={n: (kept, header.tensors[tensors.names[n]].shape) for n, kept in others.items()},
        group_size=size,
        shift=shift,
        dtype=dtype,
        layer=lambda name: layer(tensors, name, size, shift, rounded),
        tensor=tensor,
        rounded=rounded,
        about={"base_model": {"name": path.name, "license": _text(header, "general.license")}},
    )


def _dense(tensors: Tensors, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type a dense tensor is given in: the model's if its values are of that, else float32."""
    stored = tensors.names[name]
    kind = tensors.header.tensors[stored].type
    if kind != 0 or dtype == torch.float32:
        return DENSE.get(kind, torch.float32)
    found = values(tensors.header, stored)
    return dtype if torch.equal(found.to(dtype).float(), found) else torch.float32


def _skeleton(header: Header, base: Path, config: dict[str, Any]) -> Any:
    """The model of the configuration, which may be anyone's: it is checked before one is built.

    Raises:
        InputError: it is of another type, lacks a number, or asks for what no such file holds.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{header.path} is of the type '{kind}'; {', '.join(ARCHITECTURES)} are taken in."
        )
    for key in _COUNTS:
        if type(config.get(key)) is not int or config[key] < 1:
            raise InputError(f"{header.path} is damaged: its configuration has no {key}.")
    if type(config.get("rms_norm_eps")) not in (int, float):
        raise InputError(f"{header.path} is damaged: its configuration has no rms_norm_eps.")
    try:
        structure.check_config(base / "config.json", len(header.tensors))
        return outlines.skeleton(base)
    except (InputError, VerificationError) as error:
        said = error.message.replace(str(base / "config.json"), "its configuration")
        raise InputError(f"{header.path} is damaged: {said.replace(str(base), 'it')}") from error


def _named(header: Header, config: dict[str, Any], skeleton: Any) -> Tensors:
    """Every parameter of the model, and the tensor that holds it."""
    architecture = ARCHITECTURES[config["model_type"]]
    known = name_map(architecture.name, config["num_hidden_layers"])
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    names: dict[str, str] = {}
    for name, parameter in skeleton.state_dict().items():
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if name in tied and new not in header.tensors:
            continue
        if new not in header.tensors:
            raise InputError(
                f"{header.path} lacks {new or name}, which its configuration asks for."
            )
        if header.tensors[new].shape != tuple(parameter.shape):
            raise InputError(f"{header.path} is damaged: {new} has another shape in the model.")
        names[name] = new
    unknown = set(header.tensors) - set(names.values()) - {ROPE_FACTORS}
    if unknown:
        raise InputError(f"{header.path} holds {min(unknown)}, which the model has no place for.")
    heads: dict[str, int] = {}
    if architecture.interleaved:
        heads = heads_of(config, names)
    for name, count in heads.items():
        if header.tensors[names[name]].shape[0] % (2 * count):
            raise InputError(f"{header.path} is damaged: {names[name]} has heads of odd size.")
    return Tensors(header, names, heads)


def _own(header: Header) -> dict[str, Any]:
    """What a file of ours says of its source."""
    if OWN_KEY not in header.fields:
        return {}
    found = _text(header, OWN_KEY) or ""
    return parse_json(found.encode("utf-8"), Path(f"{header.path}: {OWN_KEY}"))


def _text(header: Header, key: str) -> str | None:
    """The value of a key if it is a string."""
    found = header.fields.get(key)
    return found if isinstance(found, str) else None


# --- configuration and tokenizer ------------------------------------------------------------------


def _write_base(header: Header, base: Path) -> None:
    """Have transformers write configuration and tokenizer; ours stands in the file as it was."""
    blocks = header.fields.get(f"{_text(header, 'general.architecture')}.block_count", 0)
    if type(blocks) is not int or not 0 <= blocks <= len(header.tensors):
        raise InputError(f"{header.path} is damaged: it has no such number of blocks.")
    header.without_data(base / "header.gguf")
    hf.save_gguf_base(base / "header.gguf", base)
    (base / "header.gguf").unlink()
    _drop_tokens(header, base)
    own = _own(header).get("config")
    found = read_json(base / "config.json")
    config = own if isinstance(own, dict) else _mended(header, found)
    left_out = ("quantization_config", "auto_map")
    write_json(base / "config.json", {k: v for k, v in config.items() if k not in left_out})


def _drop_tokens(header: Header, base: Path) -> None:
    """Take out the tokens that the file does not have.

    transformers 5.23 adds special tokens of its own when it builds a tokenizer, such as
    ``<|endoftext|>``; the embedding has no rows for them.
    """
    listed = header.fields.get("tokenizer.ggml.tokens")
    if not isinstance(listed, list):
        raise InputError(f"{header.path} is damaged: it has no list of tokens.")
    data = read_json(base / "tokenizer.json")
    added = data.get("added_tokens") or []
    data["added_tokens"] = [token for token in added if token["id"] < len(listed)]
    if len(data["added_tokens"]) < len(added):
        write_json(base / "tokenizer.json", data)


def _mended(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of another program's file that transformers does not read."""
    if ROPE_FACTORS in header.tensors:
        raise InputError(
            f"{header.path} scales its rotary embedding by {ROPE_FACTORS}, which cannot be put "
            "into a configuration."
        )
    name = header.fields.get("general.architecture")
    if header.fields.get(f"{name}.rope.scaling.type", "none") != "none":
        raise InputError(f"{header.path} scales its rotary embedding, which is not taken in yet.")
    size = header.fields.get(f"{name}.attention.key_length")
    if size is not None:
        config["head_dim"] = size
    config["attention_bias"] = name == "llama" and "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    return config
