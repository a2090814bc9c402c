"""The whole way of an artefact on tiny random models: packed, proved, loaded, saved, damaged."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ternq  # noqa: F401  registers the quantizer
from ternq import checkpoint, hf
from ternq.errors import InputError, RecipeError, ResourceError, VerificationError
from ternq.files import read_json
from ternq.formats import Options
from ternq.hf import Loaded
from ternq.linear import packed_layers, prepare, ternary_layers
from ternq.modeling_ternq import PackedLinear
from ternq.pack import pack, verify
from ternq.packing import pack_base3
from ternq.progress import Event
from ternq.publish import read_manifest, verify_files, write_manifest
from ternq.recipe import Scheme
from ternq.weights import weights_summary
from ternq.writer import TensorWriter

VOCABULARY = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA_LIKE = {**SMALL, "num_key_value_heads": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "llama-tied": ("LlamaConfig", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 12}),
    "gemma": ("GemmaConfig", {**LLAMA_LIKE, "head_dim": 12}),
    "gpt-neox": ("GPTNeoXConfig", SMALL),
    "phi": ("PhiConfig", SMALL),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 50, "word_embed_proj_dim": 36}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 32},
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


def student(kind: str = "llama", *, group_size: int = 16, shift: bool = True, seed: int = 0) -> Any:
    """A random model with ternary layers, its parameters moved as training would move them."""
    name, options = CONFIGS[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    prepare(model, Scheme(group_size=group_size, shift=shift))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def loaded(model: Any, dtype: torch.dtype = torch.float32) -> Loaded:
    return Loaded(model, tokenizer(), "tiny", "tiny", "run", None, dtype)


def logits(model: Any) -> Tensor:
    ids = torch.arange(20).view(2, 10) % VOCABULARY
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits.float()
    return result


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load_tensors(folder / checkpoint.TENSORS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artefact that tests read and copy, never change."""
    out = tmp_path_factory.mktemp("pack") / "tiny-ternary"
    pack(loaded(student()), out, extra={"note": "kept"})
    return out


@pytest.fixture
def artefact(shared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    out = tmp_path / "copy"
    out.mkdir()
    for file in shared.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


# Whole way


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_architecture_goes_out_and_comes_back(tmp_path: Path, kind: str, shift: bool) -> None:
    model = student(kind, shift=shift)
    before = copy.deepcopy(model.state_dict())
    result = pack(loaded(model), tmp_path / "out", keep_dtype=True)
    assert result["verify"]["ok"]
    assert result["verify"]["checked"] == len(ternary_layers(model)) > 0
    assert verify(tmp_path / "out")["weights"]["zero_share"] == result["weights"]["zero_share"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-3, rtol=1e-3)
    assert len(packed_layers(again)) == len(ternary_layers(model))
    assert again.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] > 2
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_codes_in_the_file_are_those_of_the_student(shared: Path) -> None:
    stored = tensors(shared)
    for name, layer in ternary_layers(student()).items():
        weight = layer.numbers().canonical()
        assert torch.equal(stored[f"{name}.weight"], pack_base3(weight.codes))
        assert torch.equal(stored[f"{name}.weight_scale"], weight.scale)
        assert weight.shift is not None
        assert torch.equal(stored[f"{name}.weight_shift"], weight.shift)


def test_loaded_artefact_saves_again(shared: Path, tmp_path: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(shared)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(first), logits(second))
    old, new = tensors(shared), tensors(tmp_path / "again")
    assert set(old) == set(new)
    assert all(torch.equal(old[n], new[n]) and old[n].dtype == new[n].dtype for n in old)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 3000)
    model = student("llama-tied")
    result = pack(loaded(model), tmp_path / "out")
    assert sum(f["path"].endswith(".safetensors") for f in result["files"]) > 2
    assert verify(tmp_path / "out")["verify"]["ok"]


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    pack(loaded(student("llama-tied")), tmp_path / "out")
    names = set(tensors(tmp_path / "out"))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_manifest_config_and_card(shared: Path) -> None:
    manifest = verify_files(shared)
    assert manifest["note"] == "kept"
    assert manifest["format"] == "ternq"
    config = read_json(shared / "config.json")
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "ternq",
        "format_version": 1,
        "codec": "base3",
        "group_size": 16,
        "shift": True,
        "modules": list(ternary_layers(student())),
        "int8_modules": [],
    }
    card = (shared / "README.md").read_text()
    assert "import ternq" in card
    assert "ignore_mismatched_sizes" in card
    assert {p.name for p in shared.iterdir() if p.suffix == ".py"} == {"modeling_ternq.py"}


# Types, numbers


@pytest.mark.parametrize(
    ("have", "keep", "want"),
    [
        (torch.float32, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_dtypes(tmp_path: Path, have: torch.dtype, keep: bool, want: torch.dtype) -> None:
    events: list[Event] = []
    result = pack(
        loaded(student(), have), tmp_path / "out", keep_dtype=keep, progress=events.append
    )
    stored = tensors(tmp_path / "out")
    assert stored["model.norm.weight"].dtype == want
    assert stored["model.layers.0.self_attn.q_proj.weight_scale"].dtype == torch.float16
    assert (result["dtype_note"] is not None) == (have != want)
    assert result["dtype_note"] in [e.message for e in events]


def test_weights_are_counted_by_hand(shared: Path) -> None:
    # q, o: 36x36; k, v: 12x36; gate, up: 50x36; down: 36x50; groups of 16: 3 a row of 36, 4 of 50
    ternary = 2 * (2 * 36 * 36 + 2 * 12 * 36 + 3 * 50 * 36)
    rows36, rows50 = 2 * (36 + 36 + 12 + 12 + 50 + 50), 2 * 36
    packed_bits = rows36 * (8 * 8 + 2 * 16 * 3) + rows50 * (8 * 10 + 2 * 16 * 4)
    dense = 2 * VOCABULARY * 36 + 5 * 36
    for weights in (
        weights_summary(student()),
        weights_summary(hf.load(str(shared), offline=True).model),
        read_manifest(shared)["weights"],
    ):
        assert weights["coverage"] == ternary / (ternary + dense)
        assert weights["bpw_linear"] == packed_bits / ternary
        assert weights["bpw_total"] == (packed_bits + 16 * dense) / (ternary + dense)
        assert weights["bytes"] == packed_bits // 8 + 2 * dense
        assert weights["bytes_dense_bf16"] == 2 * (ternary + dense)
        assert 0.3 < weights["zero_share"] < 0.6
    assert sum(t.nbytes for t in tensors(shared).values()) == weights["bytes"]


def test_dense_layers_are_named_with_reasons(tmp_path: Path) -> None:
    model = student("llama-tied")
    linear_left = nn.Linear(36, 36, bias=False)
    model.set_submodule("model.layers.1.self_attn.q_proj", linear_left)
    result = pack(loaded(model), tmp_path / "out")
    reasons = {d["name"]: d["reason"] for d in result["dense_layers"]}
    assert reasons["model.embed_tokens"] == "embedding, also the output head"
    assert "skip" in reasons["model.layers.1.self_attn.q_proj"]
    assert verify(tmp_path / "out")["verify"]["checked"] == 13


# Refusals and proof


def nothing_written(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_a_dense_or_packed_model_is_no_input(shared: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA_LIKE))
    with pytest.raises(InputError, match="not ternary"):
        pack(loaded(model), tmp_path / "out")
    packed = loaded(AutoModelForCausalLM.from_pretrained(shared))
    with pytest.raises(InputError, match="packed already"):
        pack(packed, tmp_path / "out")
    assert nothing_written(tmp_path)


def test_output_that_exists_or_is_the_input(shared: Path) -> None:
    with pytest.raises(RecipeError, match="exists"):
        pack("never looked at", shared)
    model = loaded(student())
    model.path = shared
    with pytest.raises(RecipeError, match="the model itself"):
        pack(model, shared, overwrite=True)
    assert verify(shared)["verify"]["ok"]


@pytest.mark.parametrize("format", ["ternq", "dense"])
def test_a_plan_says_what_would_be_written_and_writes_nothing(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    out = tmp_path / "out"
    found = pack(str(shared), out, format=format, plan=True)
    assert nothing_written(tmp_path)
    made = pack(str(shared), out, format=format)
    tensors = sum(f["bytes"] for f in made["files"] if f["path"].endswith(".safetensors"))
    assert found["disk"]["needed"] == pytest.approx(tensors, rel=0.3)  # headers, on a tiny model
    for key in ("parameters", "coverage", "bytes_dense_bf16"):
        assert found["weights"][key] == made["weights"][key]
    assert found["dense_layers"] == made["dense_layers"] and found["fits"]
    assert found["seconds"]["total"] > 0
    again = pack(str(shared), out, format=format, plan=True)  # and pack itself does nothing
    assert again["weights"] == found["weights"]
    with pytest.raises(RecipeError, match="exists"):
        pack(str(shared), out, format=format, group_size=8, plan=True)
    monkeypatch.setattr("ternq.pack.free_disk", lambda _: 10)
    small = pack(str(shared), tmp_path / "other", format=format, plan=True)
    assert not small["fits"] and "are free" in small["reason"]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("gguf", Options(encoding="nonsense")),
        ("dense", Options(encoding="Q4_1")),
        ("mlx", Options(encoding="Q4_1")),
        ("dense", Options(exact=True)),
        ("compressed-tensors", Options()),  # the model has shifts
    ],
)
def test_a_plan_refuses_what_a_format_would(
    shared: Path, tmp_path: Path, format: str, options: Options
) -> None:
    said = []
    for plan in (True, False):
        with pytest.raises(RecipeError) as told:
            pack(str(shared), tmp_path / "out", format=format, options=options, plan=plan)
        said.append(told.value.message)
    assert said[0] == said[1]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ternq.pack.free_disk", lambda _: 10)
    with pytest.raises(ResourceError, match="are free"):
        pack(loaded(student()), tmp_path / "out")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("part", ["weight_scale", "weight_shift"])
def test_values_beyond_float16_are_refused(tmp_path: Path, part: str) -> None:
    model = student()
    name, layer = next(iter(ternary_layers(model).items()))
    getattr(layer, part).data[0, 0] = 70000.0
    with pytest.raises(VerificationError, match=name):
        pack(loaded(model), tmp_path / "out")
    assert nothing_written(tmp_path)


def test_scale_and_shift_that_only_together_are_beyond_float16(tmp_path: Path) -> None:
    model = student()
    layer = next(iter(ternary_layers(model).values()))
    layer.weight.data[0, :16] = 1.0  # a group of equal codes is stored as one shift
    layer.weight_scale.data[0, 0] = layer.weight_shift.data[0, 0] = 60000.0
    with pytest.raises(VerificationError, match="float16"):
        pack(loaded(model), tmp_path / "out")


def test_a_row_that_float16_makes_constant_is_fatal_and_a_dead_one_counted(tmp_path: Path) -> None:
    model = student()
    layer = next(iter(ternary_layers(model).values()))
    layer.weight_scale.data[0] = layer.weight_shift.data[0] = 0.0
    assert pack(loaded(model), tmp_path / "dead", keep_dtype=True)["verify"]["constant_rows"] == 1
    layer.weight_scale.data[0] = 1e-9
    with pytest.raises(VerificationError, match="1 rows constant"):
        pack(loaded(model), tmp_path / "lost", keep_dtype=True)
    assert {p.name for p in tmp_path.iterdir()} == {"dead"}


def test_negative_scales_are_stored_positive(tmp_path: Path) -> None:
    model = student()
    for layer in ternary_layers(model).values():
        layer.weight_scale.data.neg_()
    pack(loaded(model), tmp_path / "out", keep_dtype=True)
    assert all(
        bool((layer.weight_scale >= 0).all())
        for layer in packed_layers(hf.load(str(tmp_path / "out")).model).values()
    )


def flip_code(stored: dict[str, Tensor]) -> None:
    stored["model.layers.1.mlp.up_proj.weight"][3, 2] ^= 1


def move_scale(stored: dict[str, Tensor]) -> None:
    stored["model.layers.0.mlp.up_proj.weight_scale"][0, 0] *= 1.01


def move_norm(stored: dict[str, Tensor]) -> None:
    stored["model.norm.weight"][0] += 0.01


@pytest.mark.parametrize("damage", [flip_code, move_scale, move_norm])
def test_proof_sees_a_file_that_is_not_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    leave = TensorWriter.__exit__

    def damaged(self: TensorWriter, *error: Any) -> None:
        leave(self, *error)
        stored = tensors(self.folder)
        damage(stored)
        checkpoint.save_tensors(stored, self.folder / checkpoint.TENSORS)

    monkeypatch.setattr(TensorWriter, "__exit__", damaged)
    with pytest.raises(VerificationError):
        pack(loaded(student()), tmp_path / "out")
    assert nothing_written(tmp_path)


def test_proof_sees_a_forward_pass_that_is_not_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda s, x: forward(s, x) * 1.001)
    with pytest.raises(VerificationError, match="logits"):
        pack(loaded(student()), tmp_path / "out")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    "choice",
    [
        {"format": "zip"},
        {"embeddings": "int4"},
        {"options": Options(lossy=True)},
        {"options": Options(encoding="float32")},
        {"options": Options(exact=True, lossy=True), "format": "mlx"},
        {"format": "mlx", "embeddings": "int8"},
        {"format": "dense", "keep_dtype": True},
    ],
)
def test_choices_that_do_not_fit_each_other(tmp_path: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        pack("never looked at", tmp_path / "out", **choice)


def test_what_is_finished_is_left_as_it_is_until_its_source_changes(
    shared: Path, tmp_path: Path
) -> None:
    for options in ({}, {"format": "dense"}):
        out = tmp_path / f"out{len(options)}"
        made = pack(str(shared), out, **options)
        before = (out / "README.md").stat().st_mtime_ns
        assert pack(str(shared), out, **options)["files"] == made["files"]
        assert (out / "README.md").stat().st_mtime_ns == before
        damaged = tmp_path / f"damaged{len(options)}"
        shutil.copytree(out, damaged)
        (damaged / "config.json").write_text("{}")
        with pytest.raises(VerificationError, match="config.json has 2 bytes"):
            pack(str(shared), damaged, **options)
        with pytest.raises(RecipeError, match="exists already"):
            pack(str(shared), out, options=Options(exact=True), **options)
    source = tmp_path / "source"
    shutil.copytree(shared, source)
    pack(str(source), tmp_path / "other")
    os.utime(source / "config.json", ns=(1, 1))
    with pytest.raises(RecipeError, match="exists already"):
        pack(str(source), tmp_path / "other")


def test_exact_refuses_what_rounds_and_an_output_inside_the_model(
    shared: Path, tmp_path: Path
) -> None:
    exact = Options(exact=True)
    with pytest.raises(RecipeError, match="int8 rounds"):
        pack(str(shared), tmp_path / "out", embeddings="int8", options=exact)
    with pytest.raises(RecipeError, match="bfloat16 in the file"):
        pack(loaded(student()), tmp_path / "out", options=exact)
    with pytest.raises(RecipeError, match="inside the model"):
        pack(str(shared), shared / "sub")
    assert nothing_written(tmp_path)


def test_the_card_of_an_export_tells_the_whole_way(tmp_path: Path) -> None:
    first = {"made": {"command": "ternq ternarize x", "versions": {"ternq": "1"}}}
    pack(loaded(student(shift=False)), tmp_path / "first", extra=first)
    second = {"made": {"command": "ternq pack 'my art'", "versions": {"ternq": "2"}}}
    pack(str(tmp_path / "first"), tmp_path / "my art", format="dense", extra=second)
    card = (tmp_path / "my art" / "README.md").read_text()
    assert card.index("ternq ternarize x") < card.index("ternq pack 'my art'")
    assert "by transformers" in card and "| embeddings and head | 16.000 bits a weight |" in card
    checked = verify(tmp_path / "my art")
    assert checked["verify"]["checked"] == 0 and "no reader of dense" in checked["notes"][0]


# A damaged artefact


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Damage that the hashes do not see, since the manifest is made anew."""
    stored = tensors(folder)
    change(stored)
    checkpoint.save_tensors(stored, folder / checkpoint.TENSORS)
    write_manifest(folder)


Q = "model.layers.0.self_attn.q_proj"


def set_value(part: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        stored[f"{Q}.{part}"][1, -1] = value

    return change


def drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        del stored[f"{Q}.{part}"]

    return change


def resize(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(stored: dict[str, Tensor]) -> None:
        stored[f"{Q}.{part}"] = stored[f"{Q}.{part}"][:, :-1]

    return change


def unused(stored: dict[str, Tensor]) -> None:
    stored["model.layers.0.extra"] = torch.zeros(1)


DAMAGE = {
    "byte over 242": set_value("weight", 243),
    "padding": set_value("weight", 122),
    "negative scale": set_value("weight_scale", -0.5),
    "nan scale": set_value("weight_scale", float("nan")),
    "infinite shift": set_value("weight_shift", float("inf")),
    "codes under scale 0": set_value("weight_scale", 0.0),
    "no codes": drop("weight"),
    "no scale": drop("weight_scale"),
    "no shift": drop("weight_shift"),
    "narrow codes": resize("weight"),
    "narrow scale": resize("weight_scale"),
    "unused tensor": unused,
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_verify_sees_damage_behind_a_good_manifest(artefact: Path, kind: str) -> None:
    rewrite(artefact, DAMAGE[kind])
    with pytest.raises(VerificationError):
        verify(artefact)


def test_verify_sees_a_flipped_bit(artefact: Path) -> None:
    path = artefact / checkpoint.TENSORS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(VerificationError, match=r"model\.safetensors has changed"):
        verify(artefact)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"hidden_size": 2**62},
        {"vocab_size": -5},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"intermediate_size": 10**7},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": {"quant_method": "ternq", "modules": ["../x"]}},
        {"quantization_config": {"quant_method": "ternq", "modules": "lm_head"}},
        {"quantization_config": {"quant_method": "ternq", "modules": [], "group_size": 16}},
        {"quantization_config": {"quant_method": "ternq", "group_size": -16}},
        {"quantization_config": {"quant_method": "ternq", "codec": "zip"}},
    ],
)
def test_verify_refuses_impossible_configurations(artefact: Path, change: dict[str, Any]) -> None:
    config = read_json(artefact / "config.json")
    (artefact / "config.json").write_text(json.dumps({**config, **change}))
    write_manifest(artefact)
    with pytest.raises(VerificationError):
        verify(artefact)


def test_verify_of_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a ternq artefact"):
        verify(tmp_path)
