"""The whole pipeline on a tiny random checkpoint of every architecture, from files to files."""

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ternq  # noqa: F401  registers the quantizer
from ternq import corpus, hf, states
from ternq.errors import InputError
from ternq.linear import packed_layers
from ternq.pack import verify
from ternq.ternarize import ternarize

IDS = torch.arange(40).view(2, 20) * 5 % checkpoints.VOCABULARY


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less text for perplexities and samples."""
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)
    monkeypatch.setattr("ternq.samples.TOKENS", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.text_file(tmp_path_factory.mktemp("text") / "text.jsonl")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits.float()
    return result


def through(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    """Make it ternary, and see what every checkpoint must give."""
    before = checkpoints.contents(source)
    report = ternarize(str(source), out, checkpoints.recipe(source, text), offline=True, **options)
    assert checkpoints.contents(source) == before
    assert report["verify"]["ok"]
    assert report["verify"]["checked"] > 0
    for who in ("teacher", "untrained", "student"):
        assert 1 < report[who]["perplexity"] < 1e9
    assert verify(out)["verify"]["checked"] == report["verify"]["checked"]
    return report


@pytest.mark.parametrize("kind", list(checkpoints.CONFIGS))
def test_from_checkpoint_to_artefact_and_back(kind: str, text: Path, tmp_path: Path) -> None:
    source, out = checkpoints.folder(tmp_path / kind, kind), tmp_path / "out"
    report = through(source, out, text)
    assert {"embedding", "embedding, also the output head"} & {
        d["reason"] for d in report["dense_layers"]
    }

    first = AutoModelForCausalLM.from_pretrained(out)
    assert type(first) is type(checkpoints.model(kind))
    dense = checkpoints.model(kind)
    linear = {n for n, m in dense.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    head = {n for n, m in dense.named_modules() if m is dense.get_output_embeddings()}
    assert set(packed_layers(first)) == linear - head  # nothing is passed by silently
    tokenizer = AutoTokenizer.from_pretrained(out)
    asked = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    said = first.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        min_new_tokens=4,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=256,
    )
    assert said.shape[1] == asked.shape[1] + 4

    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(first), logits(second))
    old, new = (load_file(p / "model.safetensors") for p in (out, tmp_path / "again"))
    assert set(old) == set(new)
    assert all(torch.equal(old[n], new[n]) and old[n].dtype == new[n].dtype for n in old)


@pytest.mark.parametrize(
    ("dtype", "keep", "stored"),
    [
        (torch.float32, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, False, torch.bfloat16),
    ],
)
def test_dtypes_of_checkpoints(
    dtype: torch.dtype, keep: bool, stored: torch.dtype, text: Path, tmp_path: Path
) -> None:
    source = checkpoints.folder(tmp_path / "source", dtype=dtype)
    assert hf.load(str(source)).dtype == dtype
    report = through(source, tmp_path / "out", text, keep_dtype=keep)
    assert bool(report["dtype_note"]) == (dtype != stored)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == stored
    assert torch.equal(  # embeddings are not trained: they come through as they were
        tensors["model.embed_tokens.weight"],
        checkpoints.model("llama").to(dtype).to(stored).model.embed_tokens.weight,
    )


def test_sharded_checkpoint(text: Path, tmp_path: Path) -> None:
    whole = checkpoints.folder(tmp_path / "whole")
    source = checkpoints.folder(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert states.fingerprint(hf.load(str(source)).model) == states.fingerprint(
        hf.load(str(whole)).model
    )
    through(source, tmp_path / "out", text)


def test_tied_weights_stay_tied_and_are_stored_once(text: Path, tmp_path: Path) -> None:
    source, out = checkpoints.folder(tmp_path / "tied", "qwen2-tied"), tmp_path / "out"
    through(source, out, text)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_biases_stay_and_are_trained(text: Path, tmp_path: Path) -> None:
    source, out = checkpoints.folder(tmp_path / "biased", "llama-tied-bias"), tmp_path / "out"
    through(source, out, text)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(layer.bias is not None for layer in packed_layers(again).values())
    assert any(bool(layer.bias.any()) for layer in packed_layers(again).values())


def test_a_finished_artefact_is_left_as_it_is(text: Path, tmp_path: Path) -> None:
    source, out = checkpoints.folder(tmp_path / "source"), tmp_path / "out"
    first = through(source, out, text)
    before = checkpoints.contents(out)
    second = through(source, out, text)
    assert checkpoints.contents(out) == before
    assert second["student"] == first["student"]
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "out.report"}


@pytest.mark.parametrize("kind", list(checkpoints.FUSED))
def test_fused_experts_are_refused_in_words(kind: str, text: Path, tmp_path: Path) -> None:
    source, out = checkpoints.folder(tmp_path / kind, kind), tmp_path / "out"
    with pytest.raises(InputError, match="experts fused into 3-D tensors") as caught:
        ternarize(str(source), out, checkpoints.recipe(source, text), offline=True)
    assert caught.value.exit_code == 3
    assert "experts.gate_up_proj" in caught.value.message
    assert {p.name for p in tmp_path.iterdir()} == {kind}


def test_the_tokenizer_travels(text: Path, tmp_path: Path) -> None:
    source, out = checkpoints.folder(tmp_path / "source"), tmp_path / "out"
    through(source, out, text)
    sentence = tiny.text(20)
    old, new = (AutoTokenizer.from_pretrained(p) for p in (source, out))
    assert old(sentence)["input_ids"] == new(sentence)["input_ids"]
