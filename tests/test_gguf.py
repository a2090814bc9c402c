"""GGUF files: every byte of their blocks, what llama.cpp needs to know, refusals, and the way back.

The oracles are gguf-py, which decodes all types but Q2_0, bytes computed by hand, brute force, and
transformers, which loads such files. What llama.cpp itself makes of them is in bench/llama_cpp.py.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import checkpoints
import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ternq import hf
from ternq.errors import InputError, RecipeError, VerificationError
from ternq.formats import Exported, Options, gguf as ours
from ternq.formats.gguf_codec import KINDS, Blocks, decode, encode, scales
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_fit import ONE_ROUNDING, fitted
from ternq.formats.gguf_import import opened
from ternq.formats.gguf_models import described, interleaved, uninterleaved
from ternq.formats.gguf_tokenizer import SPLITS, vocabulary
from ternq.hf import Loaded
from ternq.linear import prepare
from ternq.pack import pack
from ternq.progress import ignore
from ternq.recipe import Scheme
from ternq.source import Source, open_artefact
from ternq.ternary import TernaryWeight

VOCABULARY = 300
WIDE = {
    **checkpoints.LLAMA,
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "rope_theta": 5000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", WIDE),
    "llama-tied-bias": ("LlamaConfig", WIDE | checkpoints.TIED | checkpoints.BIASED),
    "llama3": ("LlamaConfig", WIDE | {"rope_parameters": LLAMA3}),
    "of-mistral": ("MistralConfig", WIDE),
    "qwen2": ("Qwen2Config", WIDE | checkpoints.TIED),
    "qwen3": ("Qwen3Config", WIDE | {"head_dim": 32}),
    "big": ("LlamaConfig", WIDE | BIG),
    "smollm": (
        "LlamaConfig",
        WIDE | {"hidden_size": 576, "intermediate_size": 512, "num_hidden_layers": 1},
    ),
    "odd": ("LlamaConfig", WIDE | {"intermediate_size": 100, "num_hidden_layers": 1}),
}
MODELS = ("llama", "llama-tied-bias", "of-mistral", "qwen2", "qwen3")


def bpe(pre: Any = None) -> Tokenizer:
    """A byte-level tokenizer with a few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    core.train_from_iterator([tiny.text(200, seed=i) for i in range(4)], trainer)
    return core


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """Makes an artefact of a random model and opens it; each only once."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe(), bos_token="<eos>", eos_token="<eos>"
    )

    @cache
    def make(kind: str = "llama", shift: bool = False, group_size: int = 32) -> Source:
        name, options = CONFIGS[kind]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
        prepare(model, Scheme(group_size=group_size, shift=shift))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        out = tmp_path_factory.mktemp("source") / kind
        pack(Loaded(model, tokenizer, kind, kind, "run", None, torch.bfloat16), out)
        return open_artefact(out)

    return make


@pytest.fixture(autouse=True)
def door(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers makes of a file's header."""

    def save(file: Path, folder: Path) -> None:
        for kind in (transformers.AutoConfig, AutoTokenizer):
            kind.from_pretrained(folder, gguf_file=file.name).save_pretrained(folder)

    if not hasattr(hf, "save_gguf_base"):
        monkeypatch.setattr(hf, "save_gguf_base", save, raising=False)


def export(source: Source, folder: Path, **options: Any) -> tuple[Path, Exported]:
    folder.mkdir(exist_ok=True)
    result = ours.export(source, folder, Options(**options), ignore)
    (path,) = folder.glob("*.gguf")
    return path, result


def weight(
    rows: int, columns: int, size: int, *, shift: float | None = None, seed: int = 0
) -> TernaryWeight:
    """Random codes and scales; shifts as many times the scale as said, at most."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=random, dtype=torch.int8)
    scale = torch.rand(rows, -(-columns // size), generator=random) + 0.1
    spread = 2 * torch.rand(scale.shape, generator=random) - 1
    shifts = None if shift is None else (spread * shift * scale).half()
    return TernaryWeight(codes, scale.half(), shifts, size)


def blocks_of(name: str, seed: int = 0) -> Blocks:
    kind, random = KINDS[name], torch.Generator().manual_seed(seed)
    top = 2 if name.startswith("TQ") else kind.top
    shape, fine = (5, 512 // kind.block), (2, 5, 32)
    factors = torch.randint(0, 16, fine, generator=random, dtype=torch.uint8)
    return Blocks(
        torch.randint(0, top + 1, (5, 512), generator=random, dtype=torch.uint8),
        torch.randn(shape, generator=random).half(),
        torch.randn(shape, generator=random).half() if kind.minimum else None,
        (factors[0], factors[1]) if name == "Q2_K" else None,
    )


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_blocks_come_back(name: str) -> None:
    blocks = blocks_of(name)
    data = encode(KINDS[name], blocks)
    again = decode(KINDS[name], data)
    assert data.shape == (5, 512 // KINDS[name].block * KINDS[name].bytes)
    assert torch.equal(again.levels, blocks.levels)
    assert torch.equal(again.values(), blocks.values())
    scale, minimum = scales(KINDS[name], data)
    assert torch.equal(scale, blocks.scale)
    assert (minimum is None) == (blocks.minimum is None)
    assert minimum is None or torch.equal(minimum, again.minimum)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "Q2_0"])
def test_gguf_py_decodes_the_same(name: str) -> None:
    blocks = blocks_of(name)
    data = encode(KINDS[name], blocks).numpy()
    kind = gguf.GGMLQuantizationType[name]
    assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (
        KINDS[name].id,
        (KINDS[name].block, KINDS[name].bytes),
    )
    assert np.array_equal(gguf.quants.dequantize(data, kind), blocks.values().numpy())


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_gguf_py_encodes_the_same(name: str) -> None:
    blocks = blocks_of(name)
    blocks = replace(blocks, scale=blocks.scale.abs() + 1)
    theirs = gguf.quants.quantize(blocks.values().numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(KINDS[name], blocks).numpy(), theirs)


def test_a_block_of_q2_0_by_hand() -> None:
    """Codes -1 0 1 1, then zeros; scale 1.5: ``3e00``; levels 0 1 2 2 from the lowest bits up."""
    levels = torch.ones(1, 64, dtype=torch.uint8)
    levels[0, :4] = torch.tensor([0, 1, 2, 2])
    data = encode(KINDS["Q2_0"], Blocks(levels, torch.tensor([[1.5]]).half()))
    assert bytes(data[0].tolist()) == bytes.fromhex("003e" + "a4" + "55" * 15)
    assert decode(KINDS["Q2_0"], data).values()[0, :5].tolist() == [-1.5, 0, 1.5, 1.5, 0]


# --- what a type can hold -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("TQ1_0", 256), ("TQ2_0", 512), ("Q2_0", 64), ("Q2_0", 128), ("Q4_1", 32), ("Q2_K", 256)],
)
def test_without_shift_every_weight_is_exact(name: str, size: int) -> None:
    own = weight(4, 512, size)
    fit = fitted("w", own, KINDS[name], exact=True, lossy=False)
    assert (fit.error, fit.lost) == (0, None)
    assert torch.equal(fit.blocks.values(), own.dequantized())


def test_a_short_last_group_is_exact() -> None:
    own = weight(3, 576, 128)
    for name in ("Q2_0", "Q4_1"):
        fit = fitted("w", own, KINDS[name], exact=True, lossy=False)
        assert torch.equal(fit.blocks.values(), own.dequantized())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "shift"), [("Q4_1", 2), ("Q4_1", 14), ("Q2_K", 2)])
def test_with_shift_one_rounding_is_lost(name: str, shift: float, seed: int) -> None:
    own = weight(64, 512, 256, shift=shift, seed=seed)
    fit = fitted("w", own, KINDS[name], exact=False, lossy=False)
    error = (fit.blocks.values() - own.dequantized()).abs()
    unit = own.scale.float().repeat_interleave(256, 1)
    assert 0 < fit.error == float((error / unit).max()) <= ONE_ROUNDING
    with pytest.raises(RecipeError, match="its shift is rounded"):
        fitted("w", own, KINDS[name], exact=True, lossy=False)


def test_a_shift_that_is_far_larger_than_its_scale_is_refused() -> None:
    own = weight(8, 64, 64, shift=400)
    with pytest.raises(RecipeError, match="rounding moves a weight by"):
        fitted("w", own, KINDS["Q4_1"], exact=False, lossy=False)
    fit = fitted("w", own, KINDS["Q4_1"], exact=False, lossy=True)
    assert fit.error > ONE_ROUNDING and fit.lost is not None and fit.lost < 1e-3


@pytest.mark.parametrize("name", ["Q4_1", "Q2_K"])
def test_groups_of_one_value_are_exact(name: str) -> None:
    zero = torch.zeros(1, 2).half()
    own = TernaryWeight(
        torch.zeros(1, 512, dtype=torch.int8), zero, torch.tensor([[-3.3, 0.1]]).half(), 256
    )
    fit = fitted("w", own, KINDS[name], exact=True, lossy=False)
    assert torch.equal(fit.blocks.values(), own.dequantized())


def test_equal_neighbouring_scales_share_a_block() -> None:
    own = weight(4, 512, 128)
    own.scale[:, 1::2] = own.scale[:, ::2]
    empty = replace(own, scale=own.scale.clone(), codes=own.codes.clone())
    empty.scale[:, 1] = 0
    empty.codes[:, 128:256] = 0
    for one in (own, empty):
        fit = fitted("w", one, KINDS["TQ2_0"], exact=True, lossy=False)
        assert torch.equal(fit.blocks.values(), one.dequantized())


LOSSES = [
    ("TQ2_0", 256, 0.5, "it has no shift", "Q4_1 holds it with one rounding", 0.5),
    ("TQ1_0", 128, None, "blocks of 256 span groups of 128", "Q2_0 holds it exactly", 0.5),
    ("Q2_K", 128, None, "blocks of 256 span groups of 128", "Q2_0 holds it exactly", 0.06),
    ("Q2_K", 128, 0.5, "blocks of 256 span groups of 128", "Q4_1 holds it", 0.06),
    ("Q4_1", 16, 0.5, "blocks of 32 span groups of 16", "No GGUF type holds it", 0.06),
]


@pytest.mark.parametrize(("name", "size", "shift", "reason", "hint", "most"), LOSSES)
def test_what_loses_more_is_refused_unless_lossy(
    name: str, size: int, shift: float | None, reason: str, hint: str, most: float
) -> None:
    own = weight(16, 512, size, shift=shift)
    with pytest.raises(RecipeError, match=reason) as caught:
        fitted("some.layer", own, KINDS[name], exact=False, lossy=False)
    assert "some.layer" in caught.value.message
    assert hint in str(caught.value.hint)
    fit = fitted("some.layer", own, KINDS[name], exact=False, lossy=True)
    difference = (fit.blocks.values() - own.dequantized()).norm() / own.dequantized().norm()
    assert fit.lost == pytest.approx(float(difference))
    assert 0 < fit.lost < most


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(RecipeError, match="rows of 576 weights, which blocks of 256") as caught:
        fitted("w", weight(2, 576, 128), KINDS["TQ2_0"], exact=False, lossy=True)
    assert caught.value.hint == "Q2_0 holds it exactly."


# --- rows of queries and keys ---------------------------------------------------------------------


def test_rows_change_places_as_the_rotary_embedding_wants() -> None:
    """Row ``i`` and row ``i + half`` of a head become rows ``2 i`` and ``2 i + 1``."""
    heads, size = 3, 8
    rows = torch.arange(heads * size * 2).reshape(heads * size, 2)
    new = interleaved(rows, heads)
    for head in range(heads):
        for i in range(size // 2):
            assert torch.equal(new[head * size + 2 * i], rows[head * size + i])
            assert torch.equal(new[head * size + 2 * i + 1], rows[head * size + i + size // 2])
    assert torch.equal(uninterleaved(new, heads), rows)


# --- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same_of_the_file(
    source: Callable[..., Source], kind: str, shift: bool, tmp_path: Path
) -> None:
    own = source(kind, shift)
    path, result = export(own, tmp_path / "out", encoding="Q4_1")
    assert (result.encoding, result.reader) == ("Q4_1", f"gguf-py {_version()}")
    assert bool(result.rounded) == shift and not result.lost
    assert all(0 < error <= ONE_ROUNDING for error in result.rounded.values())
    more = {}
    if kind in (
        "llama-tied-bias",
        "qwen3",
    ):  # biases and head_dim, which transformers does not read
        more["config"] = transformers.AutoConfig.from_pretrained(own.base)
        del more["config"].quantization_config
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **more
    )
    other = hf.load(str(own.base), dtype=torch.float32, offline=True).model
    ids = torch.arange(24).reshape(1, 24) % VOCABULARY
    with torch.no_grad():
        a, b = model(ids).logits, other(ids).logits
    assert float((a - b).abs().max()) < (2e-2 if shift else 1e-4) * float(b.std())


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("gguf")


@pytest.mark.parametrize(
    ("kind", "size", "shift", "expected"),
    [
        ("big", 256, False, "TQ2_0"),
        ("big", 512, False, "TQ2_0"),  # one group a row in some layers, two in others
        ("big", 128, False, "Q2_0"),
        ("llama", 64, False, "Q4_1"),  # rows of 96 are no multiple of 64
        ("big", 256, True, "Q4_1"),
    ],
)
def test_the_type_is_the_smallest_that_fits(
    source: Callable[..., Source],
    kind: str,
    size: int,
    shift: bool,
    expected: str,
    tmp_path: Path,
) -> None:
    path, result = export(source(kind, shift, size), tmp_path)
    assert (result.encoding, path.name) == (expected, f"{kind}-{expected}.gguf")
    assert result.notes[0].startswith(f"The type is {expected}: ")
    header = Header(path)
    kinds = {entry.type for name, entry in header.tensors.items() if "blk" in name}
    assert kinds == {KINDS[expected].id, 0}  # 0: norms are float32
    size_of = KINDS[expected].bytes / KINDS[expected].block
    own = source(kind, shift, size)
    weights = sum(int(np.prod(own.size(name))) for name in own.modules)
    assert result.bits == 8 * size_of * weights


def test_a_layer_whose_rows_a_type_does_not_divide_gets_a_smaller_one(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    own = source("smollm", False, 256)
    path, result = export(own, tmp_path, encoding="tq2_0", exact=True)
    assert (result.encoding, result.reader[:5]) == ("Q2_0+TQ2_0", "ternq")
    types = {name: entry.type for name, entry in Header(path).tensors.items()}
    assert types["blk.0.attn_q.weight"] == KINDS["Q2_0"].id
    assert types["blk.0.ffn_down.weight"] == KINDS["TQ2_0"].id
    assert "Q2_0, since blocks of 256 do not divide rows of 576" in result.notes[0]
