"""``ternq generate``: both engines, chats, where texts end, what is reported and what is refused."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Demo
from test_decoder import CASES
from test_pack import loaded, student
from transformers import AutoModelForCausalLM, LlamaConfig

from ternq import cli, hf
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


def test_a_text_ends_before_the_token_that_ends_texts(llama: Path, tmp_path: Path) -> None:
    """Those of the generation settings count too; both engines stop at the same token."""
    whole = asked(llama, max_new_tokens=30)
    of = hf.load(str(llama))
    ids = of.tokenizer("the cat")["input_ids"]
    with torch.inference_mode():
        written = of.model.generate(
            torch.tensor([ids]), max_new_tokens=30, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
    end = next(token for i, token in enumerate(written) if i and token not in written[:i])
    place = written.index(end)
    settings = llama / "generation_config.json"
    before = settings.read_text()
    manifest = llama / "ternq.json"
    try:
        settings.write_text(json.dumps(json.loads(before) | {"eos_token_id": [end, 256]}))
        kept = _without_hash(manifest, settings.name)
        for dtype in (None, torch.bfloat16):
            found = asked(llama, max_new_tokens=30, dtype=dtype)
            if dtype is None:
                assert (found["finish"], found["tokens"]) == ("end", place + 1)
                assert whole["text"].startswith(found["text"])
            assert found["finish"] == "end" or found["engine"] == "transformers"
    finally:
        settings.write_text(before)
        manifest.write_text(kept)
