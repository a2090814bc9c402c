"""What is ternary already goes in without training; what is not is named by layer and row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
from torch import Tensor
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

from ternq import checkpoint
from ternq.errors import InputError, RecipeError, VerificationError
from ternq.files import read_json
from ternq.formats import Options
from ternq.linear import select
from ternq.pack import pack, verify
from ternq.publish import write_manifest
from ternq.recipe import Scheme
from ternq.source import open_artefact


def per_tensor(weight: Tensor, shards: int = 1, dim: int = 1) -> Tensor:
    """TriLM's form: the sign of the larger weights times one scale for each shard."""
    parts = [
        (p / p.abs().mean()).round().clamp(-1, 1) * p.abs().mean().half().float()
        for p in weight.float().chunk(shards, dim)
    ]
    return torch.cat(parts, dim)


def checkpoint_of(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float16, shards: int = 1
) -> dict[str, Tensor]:
    """A checkpoint that is ternary by value; returns its linear weights as ``[out, in]``."""
    model = checkpoints.model(kind)
    weights = {}
    for name, layer in select(model, Scheme(group_size=1)).chosen.items():
        conv = type(layer).__name__ == "Conv1D"
        dense = layer.weight.detach().t() if conv else layer.weight.detach()
        dense = per_tensor(dense, shards).to(dtype)
        weights[name] = dense
        layer.weight = torch.nn.Parameter((dense.t() if conv else dense).contiguous().float())
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder)
    return weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "llama-tied-bias", "gpt2"])
def test_a_dense_checkpoint_that_is_ternary_comes_back_to_the_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    weights = checkpoint_of(tmp_path / "dense", kind, dtype)
    result = pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    source = open_artefact(tmp_path / "out")
    assert set(source.modules) == set(weights) and not source.shift
    for name, weight in source.layers():
        assert torch.equal(weight.dequantized().to(dtype), weights[name]), name
        assert weight.scale.shape[1] == 1
    assert result["verify"]["rounded"] == {}
    assert result["verify"]["max_abs_logit_diff"] < 0.05
    assert verify(tmp_path / "out", str(tmp_path / "dense"))["verify"]["ok"]


def test_a_scale_for_each_shard_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no group size from 16 up fits them all"):
        checkpoint_of(tmp_path / "odd", shards=2)  # 36 and 50 columns: groups of 18 and of 25
        pack(str(tmp_path / "odd"), tmp_path / "out", offline=True)
    wide = checkpoints.LLAMA | {"hidden_size": 96, "intermediate_size": 128}
    monkeypatch.setitem(checkpoints.CONFIGS, "llama", ("LlamaConfig", wide))
    weights = checkpoint_of(tmp_path / "dense", shards=2)
    result = pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["group_size"] == 16  # 48 and 64 have this in common
    for name, weight in open_artefact(tmp_path / "out").layers():
        assert torch.equal(weight.dequantized().half(), weights[name])
    assert any("groups of" in note for note in result["notes"])


def test_what_is_packed_comes_back_from_its_dense_export(tmp_path: Path) -> None:
    """Shifts too: the values, not always the very pair of scale and shift."""
    from test_pack import loaded, student

    pack(loaded(student()), tmp_path / "first", keep_dtype=True)
    pack(str(tmp_path / "first"), tmp_path / "dense", format="dense")
    pack(str(tmp_path / "dense"), tmp_path / "again", offline=True, group_size=16)
    first, again = open_artefact(tmp_path / "first"), open_artefact(tmp_path / "again")
    assert again.shift and again.group_size == 16
    for (name, a), (_, b) in zip(first.layers(), again.layers(), strict=True):
        assert torch.equal(a.dequantized().bfloat16(), b.dequantized().bfloat16()), name


def test_float32_scales_are_rounded_once_and_exact_refuses(tmp_path: Path) -> None:
    model = checkpoints.model("llama")
    for layer in select(model, Scheme(group_size=1)).chosen.values():
        layer.weight.data = torch.sign(layer.weight.data) * 0.1  # 0.1 is no float16 number
    model.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(RecipeError, match="--exact: float16 does not hold the scales of 14 layers"):
        pack(
            str(tmp_path / "dense"),
            tmp_path / "out",
            options=Options(exact=True),
            keep_dtype=True,
            offline=True,
        )
    assert not (tmp_path / "out").exists()
    result = pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    errors = result["verify"]["rounded"]
    assert len(errors) == 14 and all(0 < e < 2**-11 for e in errors.values())


def test_what_is_not_ternary_is_named(tmp_path: Path) -> None:
    checkpoints.folder(tmp_path / "dense")
    with pytest.raises(
        InputError, match=r"q_proj, row 0, columns 0 to 35 hold 36 distinct values"
    ) as caught:
        pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    assert "ternq ternarize" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_one_row_that_is_not_ternary_is_found_where_no_sample_was_taken(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense", dtype=torch.float32)
    tensors = checkpoint.TensorFolder(tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj.weight"
    stored = checkpoint.load_tensors(tensors.path(name))
    stored[name][12, 5] += 0.01  # of 50 rows, 0 to 7, 21 to 28 and 42 to 49 are looked at first
    checkpoint.save_tensors(stored, tensors.path(name))
    with pytest.raises(InputError, match=r"up_proj, row 12, columns 0 to 35 hold 4 distinct"):
        pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    skip = ("model.layers.1.mlp.up_proj",)
    pack(str(tmp_path / "dense"), tmp_path / "out", skip=skip, offline=True)
    assert "model.layers.1.mlp.up_proj" not in open_artefact(tmp_path / "out").modules


def test_missing_weights_and_other_quantizers_are_refused(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense")
    config = read_json(tmp_path / "dense" / "config.json")
    for quantization, said in (
        ({"quant_method": "gptq"}, "quantized by 'gptq'"),
        ({"quant_method": "bitnet"}, "lacks .*weight_scale"),
        ({"quant_method": "bitnet", "linear_class": "x"}, "unknown linear_class"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "normalises inside"),
        (None, "lacks weights"),
    ):
        extra = {"num_hidden_layers": 3} if quantization is None else {}
        changed = config | {"quantization_config": quantization} | extra
        (tmp_path / "dense" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint, which become one file."""
    tensors = checkpoint.TensorFolder(folder)
    state = {name: tensors[name].clone() for name in tensors}
    for path in [*folder.glob("*.safetensors"), folder / checkpoint.INDEX]:
        path.unlink(missing_ok=True)
    change(state)
    checkpoint.save_tensors(state, folder / checkpoint.TENSORS)


UP = "model.layers.1.mlp.up_proj.weight"
ODD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "scale": (lambda s: s.update({f"{UP}_scale": torch.ones(1)}), "no place for"),
    "shape": (lambda s: s.update({UP: s[UP][:, :-1].contiguous()}), "as 50x35; .* 50x36"),
    "int8": (lambda s: s.update({UP: s[UP].to(torch.int8)}), "its type is torch.int8"),
    "float64": (lambda s: s.update({UP: s[UP].double()}), "its type is torch.float64"),
    "nan": (lambda s: s[UP].fill_(float("nan")), "not finite|not ternary"),
}


@pytest.mark.parametrize("kind", sorted(ODD))
def test_odd_tensors_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    checkpoint_of(tmp_path / "dense")
    change, said = ODD[kind]
    changed(tmp_path / "dense", change)
    with pytest.raises(InputError, match=said):
        pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)


def test_buffers_of_older_versions_and_equal_ties_are_passed_over(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense", "llama-tied-bias")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    changed(tmp_path / "dense", lambda s: s.update(extra))
    table = "model.embed_tokens.weight"
    changed(tmp_path / "dense", lambda s: s.update({"lm_head.weight": s[table].clone()}))
    pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    changed(tmp_path / "dense", lambda s: s.update({"lm_head.weight": s[table] + 1}))
    with pytest.raises(InputError, match="ties lm_head.weight"):
        pack(str(tmp_path / "dense"), tmp_path / "again", offline=True)


def test_a_configuration_that_asks_for_much_is_refused(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = read_json(path)
    for change in ({"num_hidden_layers": 10**6}, {"attn_implementation": "owner/kernel"}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=next(iter(change))):
            pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)


def test_verifying_looks_for_the_artefacts_own_groups_and_layers(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense")
    choice: dict[str, Any] = {"group_size": 16, "skip": ("down_proj",)}
    pack(str(tmp_path / "dense"), tmp_path / "out", offline=True, **choice)
    assert verify(tmp_path / "out", str(tmp_path / "dense"))["verify"]["ok"]


def test_a_model_of_another_family_is_not_the_artefacts(tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):
        checkpoint_of(tmp_path / kind, kind)
    pack(str(tmp_path / "llama"), tmp_path / "out", offline=True)
    with pytest.raises(InputError, match="none of the artefact's ternary layers"):
        verify(tmp_path / "out", str(tmp_path / "gpt2"))


def test_bitnet_with_every_layer_left_out_is_not_ternary(tmp_path: Path) -> None:
    bitnet(tmp_path / "bitnet", "autobitlinear", "online")
    path = tmp_path / "bitnet" / "config.json"
    config = read_json(path)
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="not ternary"):
        pack(str(tmp_path / "bitnet"), tmp_path / "out", offline=True)


def test_what_a_strangers_manifest_says_is_checked(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense")
    said = {"recipe": {"x": 1}, "base_model": {"name": "a\n# b"}, "results": {"x": {}}}
    pack(str(tmp_path / "dense"), tmp_path / "first", offline=True)
    write_manifest(tmp_path / "first", said)
    pack(str(tmp_path / "first"), tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert "| base model | a # b |" in card and "\n# b" not in card and "## Results" not in card


def test_verifying_against_another_model_names_layer_and_row(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense", dtype=torch.float32)
    pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    tensors = checkpoint.TensorFolder(tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj.weight"
    stored = checkpoint.load_tensors(tensors.path(name))
    stored[name][12] *= -1
    checkpoint.save_tensors(stored, tensors.path(name))
    with pytest.raises(VerificationError, match=r"up_proj is not .* the first is row 12"):
        verify(tmp_path / "out", str(tmp_path / "dense"))


def test_what_names_its_own_layers_takes_no_choice_of_them(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "dense")
    pack(str(tmp_path / "dense"), tmp_path / "out", offline=True)
    for choice in ({"group_size": 16}, {"skip": ("down_proj",)}):
        with pytest.raises(RecipeError, match="says itself which layers"):
            pack(str(tmp_path / "out"), tmp_path / "again", **choice)


# --- BitNet ---------------------------------------------------------------------------------------


def bitnet(folder: Path, kind: str, mode: str = "offline") -> dict[str, tuple[Tensor, Tensor]]:
    """A checkpoint as transformers stores BitNet b1.58; returns codes and scale of each layer."""
    model = checkpoints.model("llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    made = {}
    for name, layer in select(model, Scheme(group_size=1)).chosen.items():
        weight = layer.weight.detach()
        mean = weight.abs().mean()
        codes = (weight / mean).round().clamp(-1, 1)
        scale = mean if mode == "online" else mean.bfloat16().float()
        made[name] = (codes.to(torch.int8), scale)
        if mode == "offline":
            state[f"{name}.weight"] = pack_weights(codes.to(torch.int8))
            stored = 1 / scale if kind == "bitlinear" else scale
            state[f"{name}.weight_scale"] = stored.reshape(1)
    folder.mkdir()
    checkpoint.save_tensors(state, folder / checkpoint.TENSORS)
    quantization = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": mode}
    quantization |= {"modules_to_not_convert": ["lm_head"]}
    config = model.config.to_dict() | {"quantization_config": quantization, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")],
)
def test_both_meanings_of_bitnets_scale(tmp_path: Path, kind: str, mode: str) -> None:
    made = bitnet(tmp_path / "bitnet", kind, mode)
    result = pack(str(tmp_path / "bitnet"), tmp_path / "out", keep_dtype=True, offline=True)
    source = open_artefact(tmp_path / "out")
    assert set(source.modules) == set(made)
    for name, weight in source.layers():
        codes, scale = made[name]
        assert torch.equal(weight.codes, codes)
        assert (weight.scale == scale.half()).all()
    assert any("activations" in note for note in result["notes"])
    if kind == "autobitlinear" and mode == "offline":  # a bfloat16 scale is a float16 one
        assert result["verify"]["rounded"] == {}


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_a_layer_computes_what_transformers_own_computes(tmp_path: Path, kind: str) -> None:
    """Activations of whole numbers up to 127 are not changed by BitNet's rounding of them."""
    bitnet(tmp_path / "bitnet", kind)
    pack(str(tmp_path / "bitnet"), tmp_path / "out", keep_dtype=True, offline=True)
    weight = dict(open_artefact(tmp_path / "out").layers())["model.layers.0.mlp.up_proj"]
    stored = checkpoint.load_tensors(tmp_path / "bitnet" / checkpoint.TENSORS)
    packed = stored["model.layers.0.mlp.up_proj.weight"]
    scale = stored["model.layers.0.mlp.up_proj.weight_scale"]
    torch.manual_seed(0)
    x = torch.randint(-126, 127, (3, 36)).float()
    x[:, 0] = 127
    theirs = plain_bitnet(kind, packed, scale, x)
    torch.testing.assert_close(x @ weight.dequantized().t(), theirs, rtol=1e-3, atol=1e-3)


def plain_bitnet(kind: str, packed: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """The forward pass of transformers' layers without `torch.compile`, which needs a compiler."""
    import transformers.integrations.bitnet as theirs

    unpack: Any = theirs.unpack_weights
    codes = unpack.__wrapped__(packed, dtype=torch.float32)[:50]
    if kind == "bitlinear":
        after: Any = BitLinear.post_quant_process
        ones = torch.ones(len(x), 1)  # 127 is the largest activation of each row
        result: Tensor = after.__wrapped__(None, x @ codes.t(), scale, ones)
        return result
    layer = AutoBitLinear(36, 50, bias=False)
    layer.weight.data, layer.weight_scale = codes, scale
    return torch.nn.functional.linear(x, layer.weight) * layer.weight_scale


def test_a_bitnet_code_that_is_none_is_named(tmp_path: Path) -> None:
    bitnet(tmp_path / "bitnet", "bitlinear")
    stored = checkpoint.load_tensors(tmp_path / "bitnet" / checkpoint.TENSORS)
    stored["model.layers.0.mlp.up_proj.weight"][3, 4] |= 0b11 << 2
    checkpoint.save_tensors(stored, tmp_path / "bitnet" / checkpoint.TENSORS)
    with pytest.raises(InputError, match=r"up_proj.weight, row 16: a code is none"):
        pack(str(tmp_path / "bitnet"), tmp_path / "out", offline=True)
