"""GGUF files: every byte of their blocks, what llama.cpp needs to know, refusals, and the way back.

The oracles are gguf-py, which decodes all types but Q2_0, bytes computed by hand, brute force, and
transformers, which loads such files. What llama.cpp itself makes of them is in bench/llama_cpp.py.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

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
from ternq.formats import Exported, Options
from ternq.formats import gguf as ours
from ternq.formats.gguf_codec import KINDS, Blocks, decode, encode, scales
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_fit import ONE_ROUNDING, fitted
from ternq.formats.gguf_import import opened
from ternq.formats.gguf_models import described, interleaved, uninterleaved
from ternq.formats.gguf_tokenizer import SPLITS, vocabulary
from ternq.formats.gguf_writer import OWN_KEY
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
    "ragged": (
        "LlamaConfig",
        WIDE | {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1},
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
@pytest.mark.parametrize(("name", "shift"), [("Q4_1", 2), ("Q4_1", 15), ("Q2_K", 3)])
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
    own = source("ragged", False, 256)
    path, result = export(own, tmp_path, encoding="tq2_0", exact=True)
    assert (result.encoding, result.reader[-5:]) == ("Q2_0+TQ2_0", "ternq")
    types = {name: entry.type for name, entry in Header(path).tensors.items()}
    assert types["blk.0.attn_q.weight"] == KINDS["Q2_0"].id
    assert types["blk.0.ffn_down.weight"] == KINDS["TQ2_0"].id
    assert "Q2_0, since blocks of 256 do not divide rows of 192" in result.notes[0]


def test_the_header_says_what_llama_cpp_wants(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    path, _ = export(source("llama-tied-bias"), tmp_path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {name: fields[name] for name in fields if name.startswith(("general", "llama"))} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "llama-tied-bias",
        "general.quantization_version": 2,
        "general.file_type": 3,
        "llama.vocab_size": VOCABULARY,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
    }
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "output.weight" not in types
    assert (types["token_embd.weight"], types["output_norm.weight"]) == ("BF16", "F32")
    assert types["blk.1.attn_k.bias"] == "F32"


def test_frequencies_of_llama_3_are_divided_as_transformers_divides_them(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = source("llama3")
    path, _ = export(own, tmp_path)
    factors = next(t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    config = transformers.AutoConfig.from_pretrained(own.base)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    assert torch.allclose(torch.from_numpy(factors.data.copy()).double(), plain / scaled.double())
    assert len({round(float(f), 3) for f in factors.data}) > 2  # 1, blends, and 8


def test_linear_scaling_of_positions_is_said(source: Callable[..., Source]) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    own = replace(source(), config={**source().config, "rope_parameters": rope})
    settings = described(own).settings
    assert settings["llama.rope.scaling.type"] == "linear"
    assert settings["llama.rope.scaling.factor"] == 4.0
    old = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e4}
    config = {k: v for k, v in source().config.items() if k != "rope_parameters"}
    assert described(replace(source(), config=config | old)).settings == settings


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gpt_neox"}, "of the type 'gpt_neox' are not written yet"),
    ("llama", {"hidden_act": "gelu"}, "cannot express hidden_act = gelu"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scaled by 'yarn'"),
    ("qwen2", {"rope_parameters": LLAMA3}, "scaled by 'llama3'"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("qwen2", {"head_dim": 8}, "head_dim = 8"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types = "),
    ("llama-tied-bias", {"model_type": "qwen3"}, "no place for model.layers.0.mlp.down_proj.b"),
]


@pytest.mark.parametrize(("kind", "change", "said"), REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(
    source: Callable[..., Source], kind: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    own = source(kind)
    with pytest.raises(RecipeError, match=said) as caught:
        export(replace(own, config={**own.config, **change}), tmp_path)
    assert "--format dense" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_a_window_that_llama_cpp_ignores_is_noted(source: Callable[..., Source]) -> None:
    own = source("of-mistral")
    assert not described(replace(own, config={**own.config, "sliding_window": 64})).notes
    (note,) = described(replace(own, config={**own.config, "sliding_window": 32})).notes
    assert "looks back 32 tokens" in note


def test_refusals_of_types(source: Callable[..., Source], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no type 'Q8_0'"):
        export(source(), tmp_path, encoding="Q8_0")
    with pytest.raises(RecipeError, match="rows of 100 weights, which blocks of 32"):
        export(source("odd"), tmp_path)
    with pytest.raises(RecipeError, match="its shift is rounded"):
        export(source("llama", True), tmp_path, exact=True)
    with pytest.raises(RecipeError, match="TQ2_0 does not hold layer model.layers.0.self_attn"):
        export(source("big", True, 256), tmp_path, encoding="TQ2_0")
    assert not list(tmp_path.iterdir())


def test_lossy_says_what_each_layer_lost(source: Callable[..., Source], tmp_path: Path) -> None:
    own = source("big", True, 256)
    path, result = export(own, tmp_path, encoding="TQ2_0", lossy=True)
    assert set(result.lost) == set(own.modules) and not result.rounded
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    stored = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    meant = own.layer("model.layers.0.mlp.up_proj").dequantized()
    error = float((stored - meant).norm() / meant.norm())
    assert result.lost["model.layers.0.mlp.up_proj"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", ["model.norm.weight", "model.embed_tokens.weight"])
def test_values_that_are_not_finite_are_refused(
    source: Callable[..., Source], spoilt: str, value: float, tmp_path: Path
) -> None:
    own = source()

    def tensor(name: str) -> torch.Tensor:
        found = own.tensor(name).clone()
        if name == spoilt:
            found[3] = value
        return found

    with pytest.raises(VerificationError, match=f"{spoilt} holds values that are not finite"):
        export(replace(own, tensor=tensor), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "part", ["blk.0.attn_q.weight", "blk.1.ffn_up.weight", "token_embd.weight"]
)
@pytest.mark.parametrize("kind", ["llama", "big"])
def test_a_changed_byte_is_found(
    source: Callable[..., Source],
    kind: str,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = part.replace("blk.1", "blk.0") if kind == "big" else part
    write = ours.write

    def changed(path: Path, *rest: Any) -> None:
        write(path, *rest)
        at = Header(path).tensors[part].offset + 1
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.write_bytes(data)

    monkeypatch.setattr(ours, "write", changed)
    with pytest.raises(VerificationError, match="is not in the file what was written"):
        export(source(kind, False, 128 if kind == "big" else 32), tmp_path)


# --- tokenizers -----------------------------------------------------------------------------------


def folder(path: Path, core: Tokenizer, **settings: Any) -> Path:
    path.mkdir(exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def split(pattern: str, invert: bool = False) -> Any:
    how = "removed" if invert else "isolated"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), how, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(("cut", "name"), SPLITS.items())
def test_ways_to_cut_text_have_names(cut: tuple[str, bool], name: str, tmp_path: Path) -> None:
    for invert in (False, True):
        core = bpe(split(cut[0], invert))
        core.model.ignore_merges = cut[1]
        found = vocabulary(folder(tmp_path, core), VOCABULARY, {}, lossy=False)
        assert (found.model, found.pre) == ("gpt2", name)
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert GGUF_PRE_TOKENIZER_SPLITS[name] == cut[0]


def test_single_digits_are_smollm(tmp_path: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core = bpe(pre_tokenizers.Sequence([digits, byte_level]))
    found = vocabulary(folder(tmp_path, core), VOCABULARY, {}, lossy=False)
    assert found.pre == "smollm"


UNKNOWN_CUTS = [
    split(r"\w+"),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]
    ),
    split(next(iter(SPLITS))[0]),  # Llama 3's, but with ignore_merges of another model
]


@pytest.mark.parametrize("number", range(len(UNKNOWN_CUTS)))
def test_an_unknown_way_to_cut_is_refused_unless_lossy(number: int, tmp_path: Path) -> None:
    core = bpe(UNKNOWN_CUTS[number])
    if number == 3:
        core = bpe(split(next(r for (r, _), name in SPLITS.items() if name == "qwen2")))
        core.model.ignore_merges = True
    base = folder(tmp_path, core)
    with pytest.raises(RecipeError, match="cuts text in a way that llama.cpp has no name for"):
        vocabulary(base, VOCABULARY, {}, lossy=False)
    found = vocabulary(base, VOCABULARY, {}, lossy=True)
    assert found.pre == "default" and "texts become other tokens" in found.notes[0]


def test_normalizers(tmp_path: Path) -> None:
    core = bpe()
    core.normalizer = normalizers.NFC()
    found = vocabulary(folder(tmp_path, core), VOCABULARY, {}, lossy=False)
    assert found.pre == "gpt-2" and "NFC" in found.notes[0]
    core.normalizer = normalizers.Lowercase()
    with pytest.raises(RecipeError, match=r"changes text first \(Lowercase\)"):
        vocabulary(folder(tmp_path, core), VOCABULARY, {}, lossy=False)


def test_tokens_their_types_and_special_ones(tmp_path: Path) -> None:
    core = bpe()
    size = core.get_vocab_size()
    core.add_special_tokens(["<bos>"])
    core.add_tokens(["<think>"])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", size), ("<eos>", 0)]
    )
    settings = {"bos_token": {"content": "<bos>"}, "chat_template": "{{ messages }}"}
    config = {"eos_token_id": [0, 5], "pad_token_id": 7}
    found = vocabulary(folder(tmp_path, core, **settings), VOCABULARY, config, lossy=False)
    assert len(found.tokens) == len(found.types) == VOCABULARY
    assert found.tokens[size : size + 3] == ["<bos>", "<think>", f"[PAD{size + 2}]"]
    assert (found.types[0], found.types[1]) == (3, 1)
    assert found.types[size : size + 3] == [3, 4, 5]
    assert found.ids == {"bos": size, "eos": 0, "padding": 7}
    assert (found.add_bos, found.add_eos) == (True, True)
    assert found.chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ other }}")
    assert vocabulary(tmp_path, VOCABULARY, config, lossy=False).chat_template == "{{ other }}"
    with pytest.raises(RecipeError, match="the embedding only 100 rows"):
        vocabulary(tmp_path, 100, config, lossy=False)


def sentencepiece(path: Path, shuffled: bool = False) -> Path:
    """BPE with byte fallback as transformers makes it of a SentencePiece model."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    merges = [("▁", "c"), ("a", "t"), ("▁c", "at"), ("c", "at")]
    pieces += ["▁", "a", "c", "t", "▁c", "at", "▁cat", "cat"]
    if shuffled:
        merges = [("c", "at"), ("▁", "c"), ("▁", "cat"), ("a", "t"), ("▁c", "at")]
    core = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return folder(
        path, core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


def test_sentencepiece_gets_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    found = vocabulary(sentencepiece(tmp_path), 270, {}, lossy=False)
    assert (found.model, found.merges, found.add_bos, found.add_prefix) == (
        "llama",
        None,
        True,
        True,
    )
    assert found.types[:4] == [2, 3, 3, 6] and found.types[-4:] == [1, 5, 5, 5]
    assert found.scores is not None
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert [score[t] for t in ("▁c", "at", "▁cat", "cat", "a")] == [-1, -2, -3, -4, 0]
    assert found.ids == {"bos": 1, "eos": 2, "unknown": 0}
    with pytest.raises(RecipeError, match="in no order that scores can express"):
        vocabulary(sentencepiece(tmp_path, shuffled=True), 270, {}, lossy=False)


MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no merges": lambda data: data["model"].pop("merges"),
    "no vocabulary": lambda data: data["model"].update(vocab={}) or data.pop("added_tokens"),
    "a list": lambda data: data["model"].update(vocab=[1]),
    "merges of numbers": lambda data: data["model"].update(merges=[[1, 2]]),
    "a number for a token": lambda data: data["added_tokens"][0].update(content=1),
    "a step without a name": lambda data: data.update(pre_tokenizer={"type": "Sequence"}),
    "no text": lambda data: data.update(
        post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}]}
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tokenizers_are_refused(case: str, tmp_path: Path) -> None:
    path = folder(tmp_path, bpe()) / "tokenizer.json"
    data = json.loads(path.read_text())
    MALFORMED[case](data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="The tokenizer in .* is damaged"):
        vocabulary(tmp_path, VOCABULARY, {}, lossy=False)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no tokenizer.json"):
        vocabulary(tmp_path, 10, {}, lossy=False)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(RecipeError, match=r"The tokenizer \(WordLevel\) is neither"):
        vocabulary(folder(tmp_path, words), 10, {}, lossy=False)
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(letters, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(RecipeError, match="has no merges"):
        vocabulary(folder(tmp_path, plain), 256, {}, lossy=False)


# --- files taken in -------------------------------------------------------------------------------

WAYS = [
    ("big", False, 256, "TQ1_0"),
    ("big", False, 256, "TQ2_0"),
    ("big", False, 512, "TQ2_0"),
    ("big", False, 128, "Q2_0"),
    ("ragged", False, 128, "Q2_0"),
    ("ragged", False, 256, "TQ2_0"),
    ("llama", False, 32, "Q4_1"),
    ("llama-tied-bias", True, 64, "Q4_1"),
    ("qwen2", True, 32, "Q4_1"),
    ("qwen3", True, 32, "Q4_1"),
    ("llama3", False, 32, "Q4_1"),
    ("big", True, 256, "Q2_K"),
]


@pytest.mark.parametrize(("kind", "shift", "size", "encoding"), WAYS)
def test_a_file_gives_back_its_source(
    source: Callable[..., Source],
    kind: str,
    shift: bool,
    size: int,
    encoding: str,
    tmp_path: Path,
) -> None:
    own = source(kind, shift, size)
    path, _ = export(own, tmp_path, encoding=encoding)
    with opened(path) as again:
        assert again.config == own.config
        assert (again.group_size, again.shift, again.dtype) == (size, shift, own.dtype)
        assert set(again.modules) == set(own.modules) and again.others == own.others
        for name, one in own.layers():
            other = again.layer(name)
            assert torch.equal(other.codes, one.codes) and torch.equal(other.scale, one.scale)
            if one.shift is not None and other.shift is not None:
                error = (other.shift.float() - one.shift.float()).abs()
                assert bool((error <= 2 * ONE_ROUNDING * one.scale.clamp(min=1e-4)).all())
        for name in own.others:
            assert torch.equal(again.tensor(name), own.tensor(name))
        theirs, mine = (AutoTokenizer.from_pretrained(s.base) for s in (again, own))
        for text in (tiny.text(20), "Käse 12345, it's\n\n<eos> x"):
            assert theirs(text)["input_ids"] == mine(text)["input_ids"]
    assert not again.base.exists()


def rewritten(path: Path, change: Callable[[str, Any], Any]) -> Path:
    """The file written anew by gguf-py with other values, or without keys where None is given."""
    reader = gguf.GGUFReader(path)
    new = path.with_name("other.gguf")
    writer = gguf.GGUFWriter(new, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = change(name, field.contents())
        if not name.startswith("GGUF.") and name != "general.architecture" and value is not None:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


@pytest.mark.parametrize(
    ("kind", "shift", "size", "found"),
    [("big", False, 256, 256), ("qwen3", True, 64, 64), ("llama", False, 96, 96)],
)
def test_a_file_of_another_program_is_understood_by_itself(
    source: Callable[..., Source], kind: str, shift: bool, size: int, found: int, tmp_path: Path
) -> None:
    own = source(kind, shift, size)
    path, _ = export(own, tmp_path)
    plain = rewritten(path, lambda name, value: None if name == OWN_KEY else value)
    with opened(plain) as again:
        assert (again.group_size, again.shift) == (found, shift)
        for name, one in own.layers():
            other = again.layer(name)
            assert torch.equal(other.codes, one.codes) and torch.equal(other.scale, one.scale)
        keys = ("head_dim", "rms_norm_eps", "tie_word_embeddings", "hidden_size")
        assert {k: again.config[k] for k in keys} == {k: pytest.approx(own.config[k]) for k in keys}


def test_single_digits_stay(source: Callable[..., Source], tmp_path: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    core = bpe(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)]))
    base = folder(tmp_path / "base", core, bos_token="<eos>", eos_token="<eos>")
    path, _ = export(replace(source(), base=base), tmp_path / "out")
    with opened(path) as again:
        cut = json.loads((again.base / "tokenizer.json").read_text())["pre_tokenizer"]
        assert [step["type"] for step in cut["pretokenizers"]] == ["Digits", "ByteLevel"]
    pieces = hf.load(str(path)).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12")
    assert [piece for piece, _ in pieces] == ["a", "1", "2"]


def test_a_code_that_is_none_is_refused(source: Callable[..., Source], tmp_path: Path) -> None:
    path, _ = export(source("big", False, 128), tmp_path)
    header = Header(path)
    entry = header.tensors["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[entry.offset + 7 * 256 // 64 * 18 + 2] |= 3  # row 7, its first code
    path.write_bytes(data)
    with opened(path) as again, pytest.raises(InputError) as caught:
        again.layer("model.layers.0.mlp.up_proj")
    assert "blk.0.ffn_up.weight, row 7 holds the value 3" in caught.value.message


@pytest.mark.parametrize(
    ("shift", "said"),
    [(True, "row 0 has 16 levels; a ternary"), (False, "row 0 holds the value 15 of Q4_1")],
)
def test_four_bit_weights_are_not_ternary(
    source: Callable[..., Source], shift: bool, said: str, tmp_path: Path
) -> None:
    path, _ = export(source("llama", shift), tmp_path)
    entry = Header(path).tensors["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[entry.offset + 4 : entry.offset + 20] = bytes(range(0, 256, 16))
    path.write_bytes(data)
    with opened(path) as again, pytest.raises(InputError, match=said):
        again.layer("model.layers.0.mlp.up_proj")


def changed_block(path: Path, name: str, block: bytes) -> None:
    """Put other bytes in the place of the first block of a tensor."""
    at = Header(path).tensors[name].offset
    data = bytearray(path.read_bytes())
    data[at : at + len(block)] = block
    path.write_bytes(data)


def halves(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


CONSTANTS = {
    "zeros with a scale": (False, halves(0.5, -0.5) + b"\x11" * 16, 0.0),
    "all +1": (False, halves(0.5, -0.5) + b"\x22" * 16, 0.5),
    "a negative scale": (False, halves(-0.5, 0.5) + b"\x02" * 16, None),
    "one level": (True, halves(0.5, 1.0) + b"\x33" * 16, 2.5),
    "the highest level": (True, halves(0.5, 1.0) + b"\xff" * 16, 8.5),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_layers_come_in_their_stored_form(
    source: Callable[..., Source], case: str, tmp_path: Path
) -> None:
    shift, block, value = CONSTANTS[case]
    path, _ = export(source("llama", shift), tmp_path, encoding="Q4_1")
    changed_block(path, "blk.0.ffn_up.weight", block)
    meant = decode(KINDS["Q4_1"], torch.tensor([list(block)], dtype=torch.uint8)).values()[0]
    assert value is None or bool((meant == value).all())
    with opened(path) as again:
        found = again.layer("model.layers.0.mlp.up_proj")
        assert torch.equal(found.dequantized()[0, :32], meant)
        assert found.is_canonical() and not again.rounded


def test_values_beyond_float16_are_refused(source: Callable[..., Source], tmp_path: Path) -> None:
    path, _ = export(source("llama", True), tmp_path, encoding="Q4_1")
    changed_block(path, "blk.0.ffn_up.weight", halves(6e4, 0) + b"\x32" * 16)
    said = "blk.0.ffn_up.weight cannot be taken in: a shift is not finite or too large"
    with opened(path) as again, pytest.raises(InputError, match=said):
        again.layer("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_file_can_be_written_again(
    source: Callable[..., Source], kind: str, tmp_path: Path
) -> None:
    """transformers adds <|endoftext|>, for which neither file nor embedding has a place."""
    path, _ = export(source(kind), tmp_path / "first", encoding="Q4_1")
    with opened(path) as again:
        second, _ = export(again, tmp_path / "second", encoding="Q4_1")
    tokens = "tokenizer.ggml.tokens"
    assert Header(second).fields[tokens] == Header(path).fields[tokens]
    assert "<|endoftext|>" not in Header(path).fields[tokens]


FOREIGN: dict[str, tuple[Any, str]] = {
    "no layers": ({"num_hidden_layers": None}, "its configuration has no num_hidden_layers"),
    "layers": ({"num_hidden_layers": 10**6}, "its configuration: num_hidden_layers is 1000000"),
    "size": ({"hidden_size": 2**40}, "its configuration: hidden_size is"),
    "words": ({"num_key_value_heads": "two"}, "is damaged: "),
    "kernel": ({"attn_implementation": "some/kernel"}, "attn_implementation names what was not"),
    "weights": ({"transformers_weights": "x"}, "transformers_weights names what was not checked"),
    "NaN": ({"initializer_range": float("nan")}, "initializer_range is not a number"),
    "type": ({"model_type": "gpt2"}, "is of the type 'gpt2'"),
    "dtype": ({"dtype": "int3"}, "dtype is none of"),
    "epsilon": ({"rms_norm_eps": "x"}, "has no rms_norm_eps"),
    "deep": ('{"config": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
    "very deep": ('{"config": ' + "[" * 10**5 + "]" * 10**5 + "}", "ternq.source is damaged"),
    "no JSON": ("{", "ternq.source is damaged: it is not JSON"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_configuration_in_a_file_is_not_trusted(
    source: Callable[..., Source], case: str, tmp_path: Path
) -> None:
    change, said = FOREIGN[case]

    def changed(name: str, value: Any) -> Any:
        if name != OWN_KEY:
            return value
        if isinstance(change, str):
            return change
        own = json.loads(value)
        return json.dumps(own | {"config": own["config"] | change})

    path, _ = export(source(), tmp_path, encoding="Q4_1")
    with pytest.raises(InputError, match=said), opened(rewritten(path, changed)):
        pass


def test_a_file_without_ternary_layers_is_refused(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    own = source("big", False, 256)
    path, _ = export(own, tmp_path)
    reader = gguf.GGUFReader(path)
    new = tmp_path / "dense.gguf"
    writer = gguf.GGUFWriter(new, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="none of its linear layers is TQ1_0"), opened(new):
        pass


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is not a GGUF file"),
    "another file": (lambda data: b"PK" + data[2:], "is not a GGUF file"),
    "version": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version or byte order"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "byte order"),
    "counts": (lambda data: data[:8] + b"\xff" * 8 + data[16:], "is damaged: it counts"),
    "cut header": (lambda data: data[:400], "is damaged"),
    "cut data": (lambda data: data[:-40_000], "is damaged: it ends inside"),
    "alignment": (
        lambda data: _with(data, b"general.file_type", 4, b"general.alignment"),
        "its alignment is no small power of two",
    ),
    "shape": (
        lambda data: _with(data, b"blk.0.ffn_up.weight", 4, more=struct.pack("<4Q", *[2**39] * 4)),
        "blk.0.ffn_up.weight has an impossible shape",
    ),
    "offset": (
        lambda data: _with(
            data, b"blk.0.ffn_up.weight", 2, more=struct.pack("<QQIQ", 64, 96, 3, 2**63)
        ),
        "it ends inside of blk.0.ffn_up.weight",
    ),
    "blocks": (
        lambda data: _with(data, b"llama.block_count", 4, more=struct.pack("<I", 10**9)),
        "has no such number of blocks",
    ),
    "key's type": (lambda data: _with(data, b"general.type", 77), "value of unknown type 77"),
}


def _with(
    data: bytes, key: bytes, kind: int, new_key: bytes | None = None, more: bytes = b""
) -> bytes:
    """The type of a key, or the number of dimensions of a tensor, and what follows, changed."""
    at = data.index(key)
    new = (new_key or key) + struct.pack("<I", kind) + more
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_are_refused(
    source: Callable[..., Source], kind: str, tmp_path: Path
) -> None:
    path, _ = export(source(), tmp_path)
    change, said = DAMAGES[kind]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=said), opened(path) as again:
        for name in again.modules:
            again.layer(name)


def test_gguf_py_reads_the_header_alone(source: Callable[..., Source], tmp_path: Path) -> None:
    path, _ = export(source("big", False, 128), tmp_path)
    with pytest.raises(ValueError, match="42"):
        gguf.GGUFReader(path)  # once it can, Q2_0 needs no decoder of ours
    Header(path).without_data(tmp_path / "header.gguf")
    reader = gguf.GGUFReader(tmp_path / "header.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(Header(path).tensors)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens == Header(path).fields["tokenizer.ggml.tokens"]
