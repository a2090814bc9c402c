"""Embeddings in 8 bits: the rounding, the layers, ties, and whole artefacts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_pack import loaded, logits, student, tensors
from transformers import AutoModelForCausalLM

import ternq  # noqa: F401  registers the quantizer
from ternq import checkpoint, hf, states
from ternq.errors import RecipeError, VerificationError
from ternq.int8 import dequantize_rows, quantize_rows
from ternq.modeling_ternq import Int8Embedding, Int8Linear
from ternq.pack import pack, verify
from ternq.publish import write_manifest
from ternq.weights import weights_summary


def test_rows_are_rounded_to_the_nearest_step() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 33) * torch.logspace(-3, 3, 50).unsqueeze(1)
    codes, scale = quantize_rows(rows)
    assert torch.equal(scale, (rows.abs().amax(1) / 127).half())
    step = scale.float().unsqueeze(1)
    everything = torch.arange(-127, 128).float()
    best = (everything * step.unsqueeze(2) - rows.unsqueeze(2)).abs().amin(2)
    assert torch.allclose((dequantize_rows(codes, scale) - rows).abs(), best, atol=0, rtol=1e-5)


def test_zero_rows_and_what_float16_cannot_hold() -> None:
    codes, scale = quantize_rows(torch.tensor([[0.0, 0.0], [1e-9, 0.0]]))
    assert not codes.any() and not scale.any()
    for value in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError):
            quantize_rows(torch.tensor([[value]]))


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """An artefact with 8-bit embeddings, the model it is of, and what packing said."""
    model = student(request.param).eval()
    out = tmp_path_factory.mktemp("int8") / "out"
    return out, model, pack(loaded(model), out, embeddings="int8")


def test_the_artefact_holds_rounded_rows_once(made: tuple[Path, Any, Any]) -> None:
    out, model, result = made
    stored = tensors(out)
    tied = model.config.tie_word_embeddings
    names = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    for name in names:
        codes, scale = quantize_rows(model.get_submodule(name).weight)
        assert torch.equal(stored[f"{name}.weight"], codes)
        assert torch.equal(stored[f"{name}.weight_scale"], scale)
        assert 0 < result["verify"]["int8_error"][f"{name}.weight"] < 0.01
    assert ("lm_head.weight" in stored) != tied
    assert result["weights"]["bpw_embeddings"] == 8 + 16 / 36
    planned = weights_summary(model, int8_tables=True)
    for key in ("bpw_embeddings", "bpw_total", "bytes"):
        assert planned[key] == result["weights"][key]
    assert verify(out)["weights"] == result["weights"]


def test_it_loads_ties_runs_and_saves(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    out, model, result = made
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert isinstance(embedding, Int8Embedding) and isinstance(head, Int8Linear)
    tied = model.config.tie_word_embeddings
    assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == tied
    assert again.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] > 2
    assert weights_summary(again)["bpw_total"] == result["weights"]["bpw_total"]
    again.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(second))
    exact = hf.load(str(out), dtype=torch.float32).model
    states.undo_int8(model)
    assert (logits(exact) - logits(model)).abs().max() < 0.1 * logits(model).std() * 5


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux tells what is mapped")
def test_nothing_of_a_loaded_model_lies_in_its_file(made: tuple[Path, Any, Any]) -> None:
    out, _, _ = made
    for dtype in (torch.float32, torch.bfloat16):
        model = hf.load(str(out), dtype=dtype).model
        assert str(out) not in Path("/proc/self/maps").read_text()
        assert torch.isfinite(logits(model)).all()


def test_a_cast_keeps_the_stored_numbers(made: tuple[Path, Any, Any]) -> None:
    out, _, _ = made
    model = hf.load(str(out), dtype=torch.float32).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.nn.Module.to(model, torch.bfloat16)
    assert model.get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16
    after = model.state_dict()
    for name, tensor in before.items():
        if "scale" in name or "shift" in name or tensor.dtype in (torch.int8, torch.uint8):
            assert torch.equal(after[name], tensor), name


def test_plain_layers_come_back(made: tuple[Path, Any, Any]) -> None:
    out, model, _ = made
    again = hf.load(str(out), dtype=torch.float32).model
    before = logits(again)
    states.undo_int8(again)
    assert torch.allclose(logits(again), before, atol=1e-5)
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert type(embedding) is torch.nn.Embedding and type(head) is torch.nn.Linear
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings


def test_an_artefact_is_packed_again_with_8_bits(tmp_path: Path) -> None:
    pack(loaded(student()), tmp_path / "first")
    pack(str(tmp_path / "first"), tmp_path / "second", embeddings="int8")
    old, new = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert all(torch.equal(old[n], new[n]) for n in old if "embed" not in n and "head" not in n)
    pack(str(tmp_path / "second"), tmp_path / "third")
    assert verify(tmp_path / "third")["weights"]["bpw_embeddings"] == 16


def test_a_head_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ternq import artefact

    class Special(torch.nn.Embedding):
        pass

    monkeypatch.setattr(artefact, "embeddings", lambda m: {"model.embed_tokens": Special(2, 2)})
    with pytest.raises(RecipeError, match="Special"):
        pack(loaded(student()), tmp_path / "out", embeddings="int8")


def test_a_row_of_minus_128_is_no_stored_form(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    out, _, _ = made
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = tensors(folder)
    stored["model.embed_tokens.weight"][0, 0] = -128
    checkpoint.save_tensors(stored, folder / checkpoint.TENSORS)
    write_manifest(folder)
    with pytest.raises(VerificationError, match="embed_tokens"):
        verify(folder)
