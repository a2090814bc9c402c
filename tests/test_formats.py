"""Formats of other programs: every number in them, how their readers take it, and what they refuse.

The oracles are the readers themselves (transformers, compressed-tensors, MLX where it is), bytes
computed by hand, and brute force.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from ternq import checkpoint
from ternq.errors import InputError, RecipeError, TernqError, VerificationError
from ternq.formats import Exported, Options, compressed, dense, folders, mlx
from ternq.formats.bits import packed, unpacked
from ternq.formats.groups import common_size, largest_error, regrouped, relative_error
from ternq.hf import Loaded
from ternq.linear import prepare
from ternq.pack import pack
from ternq.progress import ignore
from ternq.recipe import Scheme
from ternq.source import Source, open_artefact
from ternq.ternary import TernaryWeight

KINDS = list(checkpoints.CONFIGS)
LINEAR = [kind for kind in KINDS if kind != "gpt2"]  # whose layers are nn.Linear
EVEN = {**checkpoints.LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
CONFIGS = checkpoints.CONFIGS | {
    "even": ("LlamaConfig", EVEN),
    "even-tied-bias": ("LlamaConfig", EVEN | checkpoints.TIED | checkpoints.BIASED),
}
FORMATS = [dense, compressed, mlx]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """Makes an artefact of a random model and opens it; each only once."""

    @cache
    def make(kind: str, shift: bool = False, group_size: int = 16) -> Source:
        name, options = CONFIGS[kind]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
        prepare(model, Scheme(group_size=group_size, shift=shift))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        out = tmp_path_factory.mktemp("source") / kind
        pack(Loaded(model, tiny.tokenizer(), kind, kind, "run", None, torch.bfloat16), out)
        return open_artefact(out)

    return make


def export(module: Any, source: Source, folder: Path, **options: Any) -> Exported:
    folder.mkdir()
    result: Exported = module.export(source, folder, Options(**options), ignore)
    return result


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load_tensors(folder / checkpoint.TENSORS)


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def reference(source: Source, change: Callable[[Tensor], Tensor] = lambda w: w) -> Any:
    """The dense float32 model of a source, its values put in one by one."""
    model = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**{**source.config, "dtype": "float32"})
    )
    state = {name: source.tensor(name).float() for name in source.others}
    for name, weight in source.layers():
        values = change(weight.dequantized()).float()
        state[f"{name}.weight"] = values.t() if name in source.transposed else values
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(20).view(2, 10)).logits
    return result


def with_layer(source: Source, change: Callable[[TernaryWeight], TernaryWeight]) -> Source:
    """The source with every layer changed."""
    return replace(source, layer=lambda name: change(source.layer(name)))


def with_shifts(factor: float) -> Callable[[TernaryWeight], TernaryWeight]:
    """Shifts of so many scales, with odd digits that float16 must round."""

    def change(weight: TernaryWeight) -> TernaryWeight:
        scale = torch.where(weight.scale == 0, 0.1, weight.scale.float()).half()
        shift = (scale.float() * factor * 1.037).half()
        return replace(weight, scale=scale, shift=shift)

    return change


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 7, 50, 64, 576])
@pytest.mark.parametrize("group_size", [1, 4, 16, 64, 128, 600])
def test_the_common_size_is_the_largest_that_cuts_no_group(columns: int, group_size: int) -> None:
    edges = [*range(0, columns, group_size), columns]
    sizes = [n for n in range(1, columns + 1) if all(edge % n == 0 for edge in edges)]
    assert common_size(columns, group_size) == max(sizes)


@pytest.mark.parametrize("shift", [True, False])
def test_smaller_groups_hold_the_same_weights(shift: bool) -> None:
    codes = torch.randint(-1, 2, (3, 36), dtype=torch.int8)
    offsets = torch.randn(3, 3).half() if shift else None
    weight = TernaryWeight(codes, torch.rand(3, 3).half(), offsets, 16)
    for size in (1, 2, 4):
        assert torch.equal(regrouped(weight, size).dequantized(), weight.dequantized())
    with pytest.raises(ValueError, match="cannot be cut"):
        regrouped(weight, 8)


def test_errors_are_in_units_of_the_scale() -> None:
    weight = TernaryWeight(
        torch.tensor([[1, 0, 0, 0]], dtype=torch.int8),
        torch.tensor([[0.5, 0.0]]).half(),
        torch.tensor([[0.0, 0.25]]).half(),
        2,
    )
    stored = torch.tensor([[0.5, 0.05, 0.25, 0.25]])
    assert largest_error(weight, stored) == pytest.approx(0.1)
    assert largest_error(weight, torch.tensor([[0.5, 0, 0.25, 0.3]])) == pytest.approx(0.2)
    assert largest_error(weight, weight.dequantized()) == 0
    assert relative_error(weight, stored) == pytest.approx(0.05 / (0.25 + 2 * 0.0625) ** 0.5)


# --- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_weights_rounded(
    source: Callable[..., Source], tmp_path: Path, kind: str
) -> None:
    origin = source(kind, shift=True)
    result = export(dense, origin, tmp_path / "out")
    assert (result.encoding, result.reader) == ("bfloat16", "transformers")
    assert result.checked == len(origin.modules) == len(result.rounded)
    assert max(result.rounded.values()) < 0.02
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    expected = reference(origin, lambda weight: weight.bfloat16())
    assert torch.equal(logits(again.float()), logits(expected))


def test_dense_of_conv1d_is_transposed(source: Callable[..., Source], tmp_path: Path) -> None:
    origin = source("gpt2", shift=True)
    export(dense, origin, tmp_path / "out", encoding="float32")
    name = "transformer.h.0.mlp.c_fc"
    stored = tensors(tmp_path / "out")[f"{name}.weight"]
    assert torch.equal(stored, origin.layer(name).dequantized().t())
    assert stored.shape[0] < stored.shape[1]


def test_dense_in_float32_is_exact(source: Callable[..., Source], tmp_path: Path) -> None:
    origin = source("llama-tied-bias", shift=True)
    result = export(dense, origin, tmp_path / "out", encoding="float32", exact=True)
    assert (result.rounded, result.lost, result.notes) == ({}, {}, [])
    assert result.bits == 32 * sum(origin.layer(n).codes.numel() for n in origin.modules)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(reference(origin)))


def test_dense_without_shift_in_float16_is_exact(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    result = export(dense, source("llama"), tmp_path / "out", encoding="float16")
    assert result.rounded == {}


def test_a_large_model_is_compared_by_its_file(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dense, compressed):
        monkeypatch.setattr(module, "LARGEST_LOADED", 0)
    monkeypatch.setattr(folders, "SHARD_BYTES", 20_000)
    result = export(dense, source("llama"), tmp_path / "dense")
    assert result.reader == "safetensors, names and shapes by transformers"
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = reference(source("llama"), lambda weight: weight.bfloat16())
    assert torch.equal(logits(again.float()), logits(expected))
    result = export(compressed, source("llama"), tmp_path / "compressed")
    assert result.reader.endswith(", layer by layer")


# --- compressed-tensors ---------------------------------------------------------------------------


def test_two_bits_by_hand() -> None:
    """Digits 1 2 3 1 are 1 + 2*4 + 3*16 + 1*64 = 121 = 79; four zeros 2*(1 + 4 + 16 + 64) = aa."""
    codes = torch.tensor([[-1, 0, 1, -1] + [0] * 12 + [1, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.5]]).half()
    layer = compressed.Layer(TernaryWeight(codes, scale, None, 18), rounded=0.0, lost=0.0)
    stored = layer.tensors()
    assert stored["weight_packed"].numpy().tobytes().hex() == "79aaaaaa" + "0f000000"
    assert stored["weight_packed"].dtype == torch.int32
    assert stored["weight_scale"] is scale
    assert stored["weight_shape"].tolist() == [1, 18]


@pytest.mark.parametrize("columns", [1, 15, 16, 50, 256])
def test_two_bits_are_the_librarys(columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = torch.randint(-1, 2, (5, columns), dtype=torch.int8)
    words = packed((codes + 2).to(torch.uint8))
    assert torch.equal(words, pack_to_int32(codes, 2))
    assert torch.equal(unpacked(words)[:, :columns].to(torch.int8) - 2, codes)


@pytest.mark.parametrize("kind", LINEAR)
def test_compressed_tensors_holds_every_weight(
    source: Callable[..., Source], tmp_path: Path, kind: str
) -> None:
    origin = source(kind)
    result = export(compressed, origin, tmp_path / "out")
    assert result.reader == "compressed-tensors 0.20.0, through transformers"
    assert (result.checked, result.rounded, result.lost) == (len(origin.modules), {}, {})
    assert "Groups of 16 are stored as groups of " in result.notes[-1]
    assert not set(config(tmp_path / "out")["quantization_config"]["ignore"]) & {*origin.modules}


def test_a_row_of_one_group_is_a_channel(source: Callable[..., Source], tmp_path: Path) -> None:
    origin = source("even", group_size=64)
    result = export(compressed, origin, tmp_path / "out")
    assert result.encoding == "W2 group 32 and channel float16"
    groups = config(tmp_path / "out")["quantization_config"]["config_groups"]
    found = {g["weights"]["strategy"]: g for g in groups.values()}
    assert found["group"]["weights"]["group_size"] == 32
    assert all("down_proj" in name for name in found["group"]["targets"])
    stored = tensors(tmp_path / "out")
    assert stored["model.layers.0.self_attn.q_proj.weight_scale"].shape == (64, 1)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 3)


@pytest.mark.parametrize(("encoding", "exact"), [("float32", True), ("bfloat16", False)])
def test_compressed_scales_in_other_types(
    source: Callable[..., Source], tmp_path: Path, encoding: str, exact: bool
) -> None:
    origin = source("llama")
    result = export(compressed, origin, tmp_path / "out", encoding=encoding, exact=exact)
    assert (result.rounded == {}) is exact
    assert all(error < 2**-8 for error in result.rounded.values())
    if not exact:
        with pytest.raises(RecipeError, match="is not exact in bfloat16"):
            export(compressed, origin, tmp_path / "no", encoding=encoding, exact=True)


def test_shifts_are_refused_or_dropped(source: Callable[..., Source], tmp_path: Path) -> None:
    origin = source("llama", shift=True)
    with pytest.raises(RecipeError, match="has shifts, and compressed-tensors holds none") as told:
        export(compressed, origin, tmp_path / "no")
    assert told.value.hint is not None
    assert all(word in told.value.hint for word in ("mlx", "Q4_1", "dense", "--lossy"))
    result = export(compressed, origin, tmp_path / "out", lossy=True)
    for name, weight in origin.layers():
        exact = weight.dequantized()
        without = replace(weight, shift=None).dequantized()
        single = (weight.scale == 0).repeat_interleave(16, 1)[:, : exact.shape[1]]
        difference = torch.where(single, 0, without - exact)
        assert result.lost[name] == pytest.approx(float(difference.norm() / exact.norm()))


def test_a_group_of_one_value_needs_no_shift(source: Callable[..., Source], tmp_path: Path) -> None:
    def constant(weight: TernaryWeight) -> TernaryWeight:
        zeros = torch.zeros_like(weight.scale)
        shift = torch.linspace(-1, 1, zeros.numel()).view_as(zeros).half()
        return TernaryWeight(torch.zeros_like(weight.codes), zeros, shift, weight.group_size)

    result = export(compressed, with_layer(source("llama", shift=True), constant), tmp_path / "out")
    assert (result.lost, result.rounded) == ({}, {})


def test_a_missing_package_is_said_first(
    source: Callable[..., Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(InputError, match="needs the package compressed-tensors") as told:
        export(compressed, source("llama"), tmp_path / "out")
    assert told.value.hint == "pip install 'ternq[compressed-tensors]'"
    assert not list((tmp_path / "out").iterdir())


# --- plain transformers, in a process that knows no ternq -----------------------------------------

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for _ in range(2):  # torch's first pass in a process may round otherwise, later ones agree
            logits = model(input_ids=torch.arange(20).view(2, 10)).logits
    torch.save(logits, folder + "/logits.pt")
assert not any(name.split(".")[0] == "ternq" for name in sys.modules)
"""


def test_transformers_loads_them_without_ternq(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    export(dense, source("gpt2", shift=True), tmp_path / "dense", encoding="float32")
    export(compressed, source("qwen2"), tmp_path / "compressed")
    export(compressed, source("llama-tied-bias"), tmp_path / "tied")
    names = {"dense": source("gpt2", shift=True), "compressed": source("qwen2")}
    names["tied"] = source("llama-tied-bias")
    command = [sys.executable, "-c", PLAIN, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, origin in names.items():
        found = torch.load(tmp_path / name / "logits.pt")
        assert torch.allclose(found, logits(reference(origin)), rtol=0, atol=1e-5)


# --- MLX ------------------------------------------------------------------------------------------


def test_mlx_by_hand() -> None:
    """Digits 0 1 2 0 are 0 + 1*4 + 2*16 + 0*64 = 36 = 24; four zeros 1 + 4 + 16 + 64 = 85 = 55."""
    codes = torch.tensor([[-1, 0, 1, -1] + [0] * 28], dtype=torch.int8)
    weight = TernaryWeight(codes, torch.tensor([[0.5]]).half(), torch.tensor([[0.125]]).half(), 32)
    form = mlx.affine(weight)
    words = form.tensors()["weight"]
    assert words.dtype == torch.uint32
    assert words.view(torch.int32).numpy().tobytes().hex() == "24555555" + "55555555"
    assert (float(form.scales), float(form.biases)) == (0.5, -0.375)
    assert torch.equal(form.values(32), weight.dequantized())


def test_mlx_takes_the_sign_that_rounds_less() -> None:
    codes = torch.tensor([[-1, 0, 1, 1]], dtype=torch.int8)
    shift = torch.tensor([[-(2**-11)]]).half()
    form = mlx.affine(TernaryWeight(codes, torch.ones(1, 1).half(), shift, 4))
    assert float(form.scales) == -1  # 1 - 2^-11 is a float16, and 1 + 2^-11 is none
    assert form.digits.tolist() == [[2, 1, 0, 0]]
    assert torch.equal(form.values(4), codes.float() - 2**-11)


@settings(deadline=None, max_examples=200)
@given(st.floats(0.001, 30), st.floats(-2, 2))
def test_one_rounding_is_within_its_bound(scale: float, factor: float) -> None:
    codes = torch.tensor([[-1, 0, 1, 0]], dtype=torch.int8)
    half = torch.tensor([[scale]]).half()
    weight = TernaryWeight(codes, half, (half.float() * factor).clamp(-60, 60).half(), 4)
    if abs(float(weight.shift)) <= 2 * float(half):  # type: ignore[arg-type]
        assert largest_error(weight, mlx.affine(weight).values(4)) <= mlx.BOUND
    assert largest_error(weight, mlx.affine(weight, torch.float32).values(4)) <= 1e-7
    plain = replace(weight, shift=None)
    assert largest_error(plain, mlx.affine(plain).values(4)) == 0


@pytest.mark.parametrize("kind", ["even", "even-tied-bias"])
@pytest.mark.parametrize("shift", [True, False])
def test_mlx_holds_every_weight(
    source: Callable[..., Source], tmp_path: Path, kind: str, shift: bool
) -> None:
    origin = source(kind, shift=shift, group_size=64)
    result = export(mlx, origin, tmp_path / "out")
    assert result.checked == len(origin.modules)
    assert bool(result.rounded) is shift
    assert all(0 < error <= mlx.BOUND for error in result.rounded.values())
    stored = tensors(tmp_path / "out")
    assert {t.dtype for t in stored.values()} == {torch.uint32, torch.float16}
    settings = config(tmp_path / "out")
    assert settings["quantization"] == settings["quantization_config"]
    assert settings["dtype"] == "float16"
    narrow = {"group_size": 32, "bits": 2, "mode": "affine"}
    layers = {f"model.layers.{i}.mlp.down_proj": narrow for i in range(2)}
    assert settings["quantization"] == {**narrow, "group_size": 64, **layers}
    with pytest.raises((ValueError, RuntimeError, KeyError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # never random weights


def test_mlx_in_float32_holds_shifts_exactly(source: Callable[..., Source], tmp_path: Path) -> None:
    origin = source("even", shift=True, group_size=64)
    result = export(mlx, origin, tmp_path / "out", encoding="float32", exact=True)
    assert (result.rounded, result.notes[:-1]) == ({}, [])


def test_mlx_refuses_what_rounds_too_much(source: Callable[..., Source], tmp_path: Path) -> None:
    origin = source("even", shift=True, group_size=64)
    with pytest.raises(RecipeError, match="not exact"):
        export(mlx, origin, tmp_path / "exact", exact=True)
    wide = with_layer(origin, with_shifts(7.3))
    with pytest.raises(RecipeError, match="shifts much larger than their scales"):
        export(mlx, wide, tmp_path / "no")
    result = export(mlx, wide, tmp_path / "out", lossy=True)
    assert max(result.rounded.values()) > mlx.BOUND


def test_mlx_refuses_groups_that_it_does_not_know(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"q_proj has rows of 36 .* 32, 64 or 128 only") as told:
        export(mlx, source("llama"), tmp_path / "out")
    assert "--format dense" in str(told.value.hint)


def test_mlx_reads_what_was_written(source: Callable[..., Source], tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    result = export(mlx, source("even", shift=True, group_size=64), tmp_path / "out")
    assert result.reader.startswith("mlx ")


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FORMATS)
def test_the_folder_holds_known_files_only(
    source: Callable[..., Source], tmp_path: Path, module: Any
) -> None:
    origin = source("even", group_size=64)
    assert {"README.md", "ternq.json"} <= {path.name for path in origin.base.iterdir()}
    export(module, origin, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("encoding", ["float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("module", FORMATS)
def test_values_that_are_not_finite_are_refused(
    source: Callable[..., Source],
    tmp_path: Path,
    module: Any,
    value: float,
    encoding: str,
) -> None:
    origin = source("even", group_size=64)
    spoilt = "model.norm.weight"

    def tensor(name: str) -> Tensor:
        found = origin.tensor(name).clone()
        if name == spoilt:
            found[3] = value
        return found

    with pytest.raises(VerificationError, match=f"{spoilt} holds values that are not finite"):
        export(module, replace(origin, tensor=tensor), tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize("module", [compressed, mlx])
def test_conv1d_is_refused(source: Callable[..., Source], tmp_path: Path, module: Any) -> None:
    with pytest.raises(RecipeError, match="is a Conv1D") as told:
        export(module, source("gpt2"), tmp_path / "out")
    assert "dense" in str(told.value.hint)


@pytest.mark.parametrize("module", FORMATS)
def test_an_unknown_encoding_is_refused(
    source: Callable[..., Source], tmp_path: Path, module: Any
) -> None:
    with pytest.raises(RecipeError, match="has no encoding 'Q4_1'"):
        export(module, source("even", group_size=64), tmp_path / "out", encoding="Q4_1")


@pytest.mark.parametrize(
    ("module", "damaged"),
    [
        (dense, "model.layers.0.mlp.up_proj.weight"),
        (dense, "model.norm.weight"),
        (compressed, "model.layers.0.mlp.up_proj.weight_packed"),
        (compressed, "model.layers.0.mlp.up_proj.weight_scale"),
        (compressed, "model.norm.weight"),
        (mlx, "model.layers.0.mlp.up_proj.weight"),
        (mlx, "model.layers.0.mlp.up_proj.biases"),
        (mlx, "model.norm.weight"),
    ],
)
def test_a_file_that_is_not_what_was_meant_is_found(
    source: Callable[..., Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    damaged: str,
) -> None:
    write = folders.write_tensors

    def wrong(folder: Path, layout: Any, tensor: Callable[[str], Tensor], limit: int) -> None:
        def changed(name: str) -> Tensor:
            value = tensor(name).clone()
            if name == damaged:
                value.view(torch.uint8)[..., 0] ^= 1
            return value

        write(folder, layout, changed, limit)

    monkeypatch.setattr(folders, "write_tensors", wrong)
    with pytest.raises(VerificationError, match="is not in the file what was written"):
        export(module, source("even", group_size=64), tmp_path / "out")


@pytest.mark.parametrize("module", FORMATS)
def test_a_tensor_too_many_is_found(
    source: Callable[..., Source], tmp_path: Path, module: Any
) -> None:
    origin = source("even", group_size=64)
    others = {**origin.others, "model.stray": (torch.float32, (2,))}
    tensor = {"model.stray": torch.ones(2)}
    more = replace(
        origin,
        others=others,
        tensor=lambda name: tensor[name] if name in tensor else origin.tensor(name),
    )
    with pytest.raises(VerificationError, match="The model has no model.stray"):
        export(module, more, tmp_path / "out")


@pytest.mark.parametrize("module", [compressed, mlx])
def test_rounding_of_other_tensors_is_said(
    source: Callable[..., Source], tmp_path: Path, module: Any
) -> None:
    origin = source("even", group_size=64)

    def norm(value: float) -> Source:
        def tensor(name: str) -> Tensor:
            found = origin.tensor(name)
            return torch.full_like(found, value) if name == "model.norm.weight" else found

        return replace(origin, tensor=tensor)

    result = export(module, norm(1.5 * 2**-25), tmp_path / "out")
    assert "values of tensors that are not ternary are rounded to float16" in result.notes[0]
    with pytest.raises(RecipeError, match="is not exact in float16"):
        export(module, norm(1.5 * 2**-25), tmp_path / "exact", exact=True)
    with pytest.raises(RecipeError, match=r"model.norm.weight has values that float16 cannot hold"):
        export(module, norm(1e30), tmp_path / "large")


@pytest.mark.parametrize(("module", "encoding"), [(dense, "float16"), (mlx, "float16")])
def test_values_beyond_float16_are_refused(
    source: Callable[..., Source], tmp_path: Path, module: Any, encoding: str
) -> None:
    def huge(weight: TernaryWeight) -> TernaryWeight:
        scale = torch.full_like(weight.scale, 60_000)
        return replace(weight, codes=weight.codes.abs() * 0 + 1, scale=scale, shift=scale)

    origin = with_layer(source("even", shift=True, group_size=64), huge)
    with pytest.raises(TernqError, match=r"q_proj has values that float16 cannot hold"):
        export(module, origin, tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize("module", FORMATS)
def test_readers_of_older_names_find_the_rotary_settings(
    source: Callable[..., Source], tmp_path: Path, module: Any
) -> None:
    """mlx-lm looks for ``rope_theta``, where transformers 5 writes ``rope_parameters`` only."""
    origin = source("even", group_size=64)
    assert "rope_theta" not in origin.config
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    export(
        module, replace(origin, config={**origin.config, "rope_parameters": rope}), tmp_path / "a"
    )
    written = config(tmp_path / "a")
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert written["rope_parameters"] == rope
    assert folders.older_names({"rope_theta": 1.0}) == {}
    assert folders.older_names(
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    ) == {"rope_theta": 1e4, "rotary_emb_base": 1e4, "rotary_pct": 1.0}
