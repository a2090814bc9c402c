"""``ternq generate``: both engines, chats, where texts end, what is told and what is refused."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Demo
from test_decoder import CASES
from test_pack import loaded, student
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ternq import cli, hf
from ternq.decoder import Decoder
from ternq.errors import InputError, RecipeError
from ternq.generate import generate
from ternq.linear import prepare
from ternq.pack import pack
from ternq.progress import Event
from ternq.recipe import Scheme

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}"
    "{{ raise_exception('no system') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model whose tokens are bytes, with a chat template."""
    torch.manual_seed(0)
    options = {**CASES["llama"][1], "vocab_size": 257, "eos_token_id": 256, "bos_token_id": None}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**options, initializer_range=0.5))
    prepare(model, Scheme(group_size=16))
    of = loaded(model.eval())
    of.tokenizer = tiny.tokenizer()
    of.tokenizer.chat_template = TEMPLATE
    out = tmp_path_factory.mktemp("generate") / "tiny-ternary"
    pack(of, out)
    return out


def asked(model: Path | str, prompt: str = "the cat", **options: Any) -> dict[str, Any]:
    return generate(str(model), prompt, offline=True, **options)


def test_the_engines_write_the_same_text(demo: Demo) -> None:
    """The demo's artefact, greedily: the native decoder, and transformers on the same model."""
    artefact = str(demo.folder / "demo-ternary")
    found = asked(artefact, "def read_config(path):", max_new_tokens=12)
    assert found["engine"] == "native"
    of = hf.load(artefact)
    ids = of.tokenizer("def read_config(path):", return_tensors="pt")
    with torch.inference_mode():
        written = of.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert found["text"] == of.tokenizer.decode(written[0, ids["input_ids"].shape[1] :])


def test_what_is_told(llama: Path) -> None:
    pieces: list[str] = []
    said: list[Event] = []
    found = asked(llama, write=pieces.append, progress=said.append, max_new_tokens=9)
    assert "".join(pieces) == found["text"] + "\n"
    assert (found["model"], found["prompt"]) == (str(llama), "the cat")
    assert (found["prompt_tokens"], found["tokens"]) == (7, 9)
    assert (found["engine"], found["note"], found["activations"]) == ("native", None, "exact")
    assert found["finish"] == "length"
    assert found["prefill_tokens_per_second"] > 0 and found["decode_tokens_per_second"] > 0
    assert found["resident_bytes"] > found["parameter_bytes"] > 0
    assert found["cache_bytes"] == 2 * 4 * 16 * 2 * 12  # float32, positions, blocks, a head of 12
    assert found["threads"] == torch.get_num_threads()
    assert "native" in str(said[-1].message) and "--max-new-tokens" in str(said[-1].message)


def test_a_seed_decides(llama: Path) -> None:
    drawn = [asked(llama, temperature=1.5, top_p=0.95, seed=seed)["text"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[hf.Loaded], object]) -> None:
    """From now on every model is changed when it has been loaded."""
    load = hf.load

    def loading(*args: Any, **options: Any) -> hf.Loaded:
        found = load(*args, **options)
        change(found)
        return found

    monkeypatch.setattr(hf, "load", loading)


def obstructed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every model goes through transformers."""
    monkeypatch.setattr("ternq.engines.obstacle", lambda *_: "a test says so")


@pytest.mark.parametrize("native", [True, False])
def test_a_text_ends_before_the_token_that_ends_texts(
    native: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of those that the generation settings name, and both engines stop there."""
    ids: list[int] = []

    def told(decoder: Decoder, of: Any, position: int) -> torch.Tensor:
        logits = step(decoder, of, position)
        ids.append(int(logits.argmax()))
        return logits

    step = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", told)
    whole = asked(llama, max_new_tokens=30)
    ends = [next(i for n, i in enumerate(ids) if n > 3 and i not in ids[:n]), 256]
    place = ids.index(ends[0])
    changed(monkeypatch, lambda of: setattr(of.model.generation_config, "eos_token_id", ends))
    if not native:
        obstructed(monkeypatch)
    found = asked(llama, max_new_tokens=30)
    assert found["engine"] == ("native" if native else "transformers")
    assert (found["finish"], found["tokens"]) == ("end", place + 1)
    assert whole["text"].startswith(found["text"]) and whole["text"] != found["text"]


@pytest.mark.parametrize("native", [True, False])
def test_a_text_ends_where_the_context_does(
    native: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        obstructed(monkeypatch)
    found = asked(llama, "x" * 195, max_new_tokens=30)
    assert (found["finish"], found["tokens"], found["prompt_tokens"]) == ("context", 5, 195)
    with pytest.raises(RecipeError, match="200 tokens"):
        asked(llama, "x" * 200)


def test_sampling_through_transformers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told all three, and takes nothing from the generation settings."""
    obstructed(monkeypatch)
    likeliest = asked(llama)["text"]
    assert asked(llama, temperature=5.0, top_k=1)["text"] == likeliest
    assert asked(llama, temperature=5.0, top_p=1e-6)["text"] == likeliest
    changed(monkeypatch, lambda of: setattr(of.model.generation_config, "repetition_penalty", 9.0))
    assert asked(llama)["text"] == likeliest


def test_a_chat_is_the_templates(llama: Path) -> None:
    chat = asked(llama, "hi", chat=True, system="be kind", max_new_tokens=5)
    plain = asked(llama, "<system>be kind<user>hi<assistant>", max_new_tokens=5)
    assert (chat["text"], chat["prompt_tokens"]) == (plain["text"], plain["prompt_tokens"])
    with pytest.raises(InputError, match="no system"):
        asked(llama, "hi", chat=True, system="no")


def test_what_is_not_covered_goes_through_transformers(tmp_path: Path) -> None:
    """In float32 as ever: what is stored in bfloat16 is widened, not rounded again."""
    pack(loaded(student("gpt2").eval()), tmp_path / "out")
    said: list[Event] = []
    found = asked(tmp_path / "out", "w3 w4", max_new_tokens=4, progress=said.append)
    assert (found["engine"], found["cache_bytes"]) == ("transformers", None)
    assert found["note"] == "Through transformers' generate: it is a GPT2LMHeadModel."
    assert found["note"] in [event.message for event in said]
    with pytest.raises(RecipeError, match="GPT2LMHeadModel"):
        asked(tmp_path / "out", "w3", int8_activations=True)


def test_float32_is_what_transformers_computes_in(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstructed(monkeypatch)
    types = []
    forward = LlamaForCausalLM.forward

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        types.append(self.dtype)
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    asked(llama, max_new_tokens=1)
    asked(llama, max_new_tokens=1, dtype=torch.bfloat16)
    assert types == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("native", [True, False])
def test_logits_that_are_not_finite_are_refused(
    native: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(of: hf.Loaded) -> None:
        with torch.no_grad():
            of.model.model.norm.weight.fill_(float("nan"))

    changed(monkeypatch, broken)
    if not native:
        obstructed(monkeypatch)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="not finite"):
            asked(llama, temperature=temperature)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"system": "be kind"},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    """Before anything is loaded."""
    with pytest.raises(RecipeError):
        asked("no such model", **options)


def test_text_is_streamed_beside_the_json_unless_quiet(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(llama), "hi", "--max-new-tokens", "5", "--json"]
    for options, streamed in (([], True), (["-q"], False)):
        assert cli.run([*command, *options]) == 0
        found = capsys.readouterr()
        assert (json.loads(found.out)["text"] in found.err) == streamed
        assert streamed or not found.err


def test_a_plan_writes_nothing(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": 9, "write": pieces.append}
    found = asked(llama, plan=True, **options)
    assert not pieces and "text" not in found
    made = asked(llama, **options)
    assert found["engine"] == made["engine"] == "native"
    assert (found["prompt_tokens"], found["max_new_tokens"]) == (7, 9)
    assert found["memory"]["needed"] == made["parameter_bytes"] + made["cache_bytes"]
    assert found["fits"] and found["reason"] is None
    command = ["generate", str(llama), "hi", "--plan"]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    assert "native" in said and "2 read, 64 new at most" in said
    monkeypatch.setattr("ternq.memory.free_memory", lambda device: 10)
    assert cli.run([*command, "--json"]) == 4
    refused = json.loads(capsys.readouterr().out)
    assert refused["plan"] and "cache" in refused["error"]["message"]


def test_a_plan_of_another_engine_says_so(llama: Path) -> None:
    found = asked(llama, plan=True, dtype=torch.bfloat16)
    assert found["engine"] == "transformers"
    assert len(found["notes"]) == 2 and "not counted" in found["notes"][1]
    with pytest.raises(RecipeError, match="native decoder"):
        asked(llama, plan=True, dtype=torch.bfloat16, int8_activations=True)


def test_a_prompt_from_stdin(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the cät\n".encode())))
    assert cli.run(["generate", str(llama), "-", "--max-new-tokens", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["prompt_tokens"], found["tokens"]) == ("the cät", 8, 2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert cli.run(["generate", str(llama), "-"]) == 3
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert cli.run(["generate", str(llama), "-"]) == 3
    assert cli.run(["generate", str(llama), "half \udcff"]) == 3  # such bytes were no UTF-8
    assert cli.run(["generate", str(llama), "a", "--seed", str(2**64)]) == 2
    assert cli.run(["generate", str(llama), "a", "--device", "meta"]) == 4


def test_a_tokenizer_without_template(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(demo.folder / "demo-ternary"), "hi", "--chat"]) == 3
    assert "no chat template" in capsys.readouterr().err
