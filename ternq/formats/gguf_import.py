"""GGUF files of ternary types, taken in: codes and scales as they stand in the file.

Layers are read by `ternq.formats.gguf_layers`. Configuration and tokenizer come from transformers,
which is shown the header alone; the configuration of a file of ours stands in it as it was.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import checkpoint, hf
from ternq.errors import InputError
from ternq.formats.gguf_codec import KINDS
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_layers import Tensors, group_size, has_shift, layer, values
from ternq.formats.gguf_models import ARCHITECTURES, ROPE_FACTORS, name_map
from ternq.formats.gguf_writer import OWN_KEY
from ternq.source import Source

_DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


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
    config = checkpoint.read_json(base / "config.json")
    skeleton = hf.skeleton(base)
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
    size = group_size(tensors, modules, own.get("group_size"))
    shift = own.get("shift") is True or has_shift(tensors, modules)
    weights = {f"{module}.weight" for module in modules}
    dtype = _DENSE.get(header.tensors["token_embd.weight"].type, torch.float32)
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
        about={"base_model": {"name": path.name, "license": header.fields.get("general.license")}},
    )


def _dense(tensors: Tensors, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type a dense tensor is given in: the model's if its values are of that, else float32."""
    stored = tensors.names[name]
    kind = tensors.header.tensors[stored].type
    if kind != 0 or dtype == torch.float32:
        return _DENSE.get(kind, torch.float32)
    found = values(tensors.header, stored)
    return dtype if torch.equal(found.to(dtype).float(), found) else torch.float32


def _named(header: Header, config: dict[str, Any], skeleton: Any) -> Tensors:
    """Every parameter of the model, and the tensor that holds it."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{header.path} is of the type '{kind}'; {', '.join(ARCHITECTURES)} are taken in."
        )
    architecture = ARCHITECTURES[kind]
    known = name_map(architecture.name, int(config["num_hidden_layers"]))
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
        queries = int(config["num_attention_heads"])
        of = {"attn_q": queries, "attn_k": int(config.get("num_key_value_heads") or queries)}
        parts = {name: new.split(".")[-2] for name, new in names.items()}
        heads = {name: of[part] for name, part in parts.items() if part in of}
    return Tensors(header, names, heads)


def _own(header: Header) -> dict[str, Any]:
    """What a file of ours says of its source."""
    try:
        own = json.loads(header.fields.get(OWN_KEY, "{}"))
    except (ValueError, TypeError):
        own = None
    if not isinstance(own, dict):
        raise InputError(f"{header.path} is damaged: {OWN_KEY} is no JSON object.")
    return own


# --- configuration and tokenizer ------------------------------------------------------------------


def _write_base(header: Header, base: Path) -> None:
    """Have transformers write configuration and tokenizer; ours stands in the file as it was."""
    header.without_data(base / "header.gguf")
    hf.save_gguf_base(base / "header.gguf", base)
    (base / "header.gguf").unlink()
    own = _own(header).get("config")
    found = checkpoint.read_json(base / "config.json")
    config = own if isinstance(own, dict) else _mended(header, found)
    left_out = ("quantization_config", "auto_map")
    checkpoint.write_json(
        base / "config.json", {k: v for k, v in config.items() if k not in left_out}
    )


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
