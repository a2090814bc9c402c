"""Perplexities against closed forms and brute force; lm-eval against lm-eval itself."""

import math
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from torch import Tensor, nn

from ternq.errors import InputError, RecipeError
from ternq.evaluate import evaluate
from ternq.perplexity import token_perplexity
from ternq.progress import Event
from ternq.tasks import gptq_sample

MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mirror"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three datasets of `wikitext`, `c4` and `piqa`, a few rows each."""
    root = tmp_path_factory.mktemp("hub")
    pages = [{"page": tiny.text(120, i)} for i in range(6)]
    tiny.hub_dataset(
        root / "EleutherAI" / "wikitext_document_level",
        {"test": ("wt/test.jsonl", pages), "train": ("wt/train.jsonl", pages[:1])},
        "wikitext-2-raw-v1",
    )
    rows = [{"text": tiny.text(40, i)} for i in range(20)]
    tiny.hub_dataset(
        root / "Salesforce" / "wikitext", {"test": ("wt/test.jsonl", rows)}, "wikitext-2-raw-v1"
    )
    goals = [
        {
            "goal": tiny.text(5, i),
            "sol1": tiny.text(3, i + 50),
            "sol2": tiny.text(9, i),
            "label": i % 2,
        }
        for i in range(20)
    ]
    tiny.hub_dataset(
        root / "baber" / "piqa",
        {"validation": ("d/validation.jsonl", goals), "train": ("d/train.jsonl", goals[:5])},
        "default",
    )
    return root


# -- token perplexity ------------------------------------------------------------------------------


class Uniform(nn.Module):
    def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
        return type("Out", (), {"logits": torch.zeros(*ids.shape, 321)})


def test_a_uniform_model_has_its_vocabulary_as_perplexity() -> None:
    found = token_perplexity(Uniform(), torch.randint(321, (1000,)), 64)
    assert found["token_perplexity"] == pytest.approx(321, rel=1e-6)
    assert (found["blocks"], found["block_length"], found["tokens"]) == (15, 64, 960)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_token_perplexity_equals_a_loop_over_tokens(batch_size: int | None) -> None:
    model, length = tiny.model(), 16
    ids = torch.randint(257, (100,), generator=torch.Generator().manual_seed(0))
    losses = []
    for start in range(0, 100 - length + 1, length):
        for at in range(start + 1, start + length):
            with torch.no_grad():
                logits = model(ids[None, start:at]).logits[0, -1]
            losses.append(-logits.double().log_softmax(-1)[ids[at]].item())
    expected = math.exp(sum(losses) / len(losses))
    found = token_perplexity(model, ids, length, batch_size=batch_size)
    assert found["token_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_text_shorter_than_a_block_is_one_shorter_block() -> None:
    said: list[Event] = []
    found = token_perplexity(Uniform(), torch.arange(10), 64, progress=said.append)
    assert (found["blocks"], found["block_length"]) == (1, 10)
    assert said[0].level == "warning"
    assert "shorter than one block of 64" in str(said[0].message)
    with pytest.raises(InputError, match="at least 2"):
        token_perplexity(Uniform(), torch.arange(1), 64)


def test_a_broken_model_is_not_a_number() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(token_perplexity(model, torch.arange(40), 16)["token_perplexity"])


def test_the_mode_of_the_model_is_kept() -> None:
    model = tiny.model().train()
    token_perplexity(model, torch.arange(40), 16)
    assert model.training


def test_gptq_sample_draws_as_the_published_loader() -> None:
    """Oracle: the loop of GPTQ's ``datautils.get_c4``, written out."""
    import random

    tok, length = tiny.tokenizer(), 100
    documents = [tiny.text(n, n) for n in range(60)]
    random.seed(0)
    blocks = []
    for _ in range(12):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tok(documents[i], return_tensors="pt").input_ids
            if ids.shape[1] > length:
                break
        i = random.randint(0, ids.shape[1] - length - 1)
        blocks.append(ids[:, i : i + length])
    assert torch.equal(gptq_sample(documents, tok, length, 12), torch.hstack(blocks)[0])


# -- tasks -----------------------------------------------------------------------------------------


def test_local_text(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(tiny.text(500))
    model = tiny.loaded()
    ids = torch.tensor(model.tokenizer(tiny.text(500))["input_ids"])
    expected = token_perplexity(model.model, ids, 64)
    (own,) = evaluate([model], tasks=[str(path)], offline=True)["results"]["tiny"].values()
    assert own["token_perplexity"] == expected["token_perplexity"]
    assert (own["samples"], own["partial"]) == (len(ids) // 64, False)
    (part,) = evaluate([model], tasks=(), text=[path], limit=2)["results"]["tiny"].values()
    assert (part["samples"], part["partial"]) == (2, True)


def test_numbers_are_those_of_lm_eval(data_dir: Path, tmp_path: Path) -> None:
    """Oracle: `lm_eval.simple_evaluate` on the same model, its tasks moved by its own YAML."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    stock = Path(lm_eval.__file__).parent / "tasks"
    (tmp_path / "wikitext.yaml").write_text(
        f"include: {stock}/wikitext/wikitext.yaml\ntask: wikitext\n"
        f"dataset_path: {data_dir}/EleutherAI/wikitext_document_level\n"
        f"dataset_kwargs: {{cache_dir: {tmp_path}/cache}}\n"
    )
    (tmp_path / "piqa.yaml").write_text(
        f"include: {stock}/piqa/piqa.yaml\ntask: piqa\ndataset_path: {data_dir}/baber/piqa\n"
        f"dataset_kwargs: {{cache_dir: {tmp_path}/cache}}\n"
    )
    model = tiny.loaded()
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4, max_length=64),
        tasks=["wikitext", "piqa"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=10,
    )["results"]
    found = evaluate([model], tasks=["wikitext", "piqa"], data_dir=data_dir, batch_size=4)
    wikitext, piqa = (found["results"]["tiny"][name] for name in ("wikitext", "piqa"))
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert wikitext[metric] == expected["wikitext"][f"{metric},none"]
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert piqa[metric] == expected["piqa"][f"{metric},none"]
    assert (piqa["samples"], piqa["partial"]) == (20, False)
    assert (wikitext["samples"], wikitext["partial"]) == (6, False)


def test_wikitext_token_perplexity_is_over_the_joined_split(data_dir: Path) -> None:
    model = tiny.loaded()
    text = "\n\n".join(tiny.text(40, i) for i in range(20))
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    expected = token_perplexity(model.model, ids, 64)["token_perplexity"]
    found = evaluate([model], tasks=["wikitext:token_perplexity"], data_dir=data_dir)
    own = found["results"]["tiny"]["wikitext"]
    assert own["token_perplexity"] == expected
    assert "word_perplexity" not in own


def test_changed_data_is_read_anew(tmp_path: Path) -> None:
    """`datasets` keys its cache by the folder's name and README, which are the same here."""
    found = []
    for seed in (1, 2):
        root = tmp_path / f"hub{seed}"
        pages = [{"page": tiny.text(30, seed), "text": tiny.text(30, seed)}]
        for owner, name in (("EleutherAI", "wikitext_document_level"), ("Salesforce", "wikitext")):
            splits = {"test": ("test.jsonl", pages), "train": ("train.jsonl", pages)}
            tiny.hub_dataset(root / owner / name, splits, "wikitext-2-raw-v1")
        (own,) = evaluate([tiny.loaded()], data_dir=root)["results"]["tiny"].values()
        found.append(own)
    assert found[0]["token_perplexity"] != found[1]["token_perplexity"]
    assert found[0]["word_perplexity"] != found[1]["word_perplexity"]


def test_equal_models_have_equal_numbers_and_the_batch_size_is_chosen(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, said = tiny.loaded(), tiny.loaded(), []
    one.name, two.name = "one", "two"
    results = evaluate(
        [one, two], tasks=["piqa"], data_dir=data_dir, limit=7, num_fewshot=1, progress=said.append
    )["results"]
    assert results["one"] == results["two"]
    assert (results["one"]["piqa"]["samples"], results["one"]["piqa"]["partial"]) == (7, True)
    assert said[-1].stage == "piqa"
    assert said[-1].done == said[-1].total == 7
    assert capsys.readouterr().out == ""


def test_only_the_metric_asked_for(data_dir: Path) -> None:
    own = evaluate([tiny.loaded()], tasks=["piqa:acc_norm"], data_dir=data_dir, limit=4)
    assert set(own["results"]["tiny"]["piqa"]) == {
        "acc_norm", "acc_norm_stderr", "samples", "partial"
    }  # fmt: skip
    with pytest.raises(RecipeError, match="has no metric 'f1'"):
        evaluate([tiny.loaded()], tasks=["piqa:f1"], data_dir=data_dir, limit=4)


def test_offline_is_said_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="'piqa' is on the hub, and ternq is offline"):
        evaluate(["no-such-model"], tasks=["piqa"], offline=True)
    assert time.monotonic() - start < 1


def test_missing_data_names_its_folder(tmp_path: Path) -> None:
    for task, dataset in (("hellaswag", "Rowan/hellaswag"), ("wikitext", "Salesforce/wikitext")):
        with pytest.raises(InputError, match=f"needs the dataset '{dataset}'") as caught:
            evaluate([tiny.loaded()], tasks=[task], data_dir=tmp_path)
        assert str(tmp_path / dataset) in str(caught.value.hint)
    with pytest.raises(InputError, match="no folder"):
        evaluate([tiny.loaded()], tasks=["piqa"], data_dir=tmp_path / "none")


def test_data_without_the_split_or_the_columns_is_an_input_error(tmp_path: Path) -> None:
    rows = [{"goal": "a"}]
    tiny.hub_dataset(tmp_path / "baber" / "piqa", {"train": ("d/t.jsonl", rows)}, "default")
    with pytest.raises(InputError, match="'piqa' has other splits or columns") as caught:
        evaluate([tiny.loaded()], tasks=["piqa"], data_dir=tmp_path)
    assert str(tmp_path / "baber" / "piqa") in str(caught.value.hint)


def test_unknown_tasks_and_limits(data_dir: Path) -> None:
    with pytest.raises(RecipeError, match="no task 'pika'") as caught:
        evaluate([tiny.loaded()], tasks=["pika"], data_dir=data_dir)
    assert "piqa" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="at least 1"):
        evaluate([tiny.loaded()], tasks=["piqa"], limit=0)
    with pytest.raises(RecipeError, match="Nothing to evaluate"):
        evaluate([tiny.loaded()], tasks=[])


def test_a_tokenizer_without_ends_is_refused_in_words(data_dir: Path) -> None:
    model = tiny.loaded()
    model.tokenizer = tiny.tokenizer(end=None)
    with pytest.raises(InputError, match="no token for the beginning or end"):
        evaluate([model], tasks=["piqa"], data_dir=data_dir)


def test_answers_longer_than_the_model_reads_are_refused_in_words(data_dir: Path) -> None:
    with pytest.raises(InputError, match="reads 16 at most"):
        evaluate([tiny.loaded(positions=16)], tasks=["piqa"], data_dir=data_dir)


@pytest.mark.skipif(not MIRROR.is_dir(), reason="the evaluation sets of the project are not here")
def test_real_sets() -> None:
    said: list[Event] = []
    tasks = ["wikitext", "c4", "arc_easy", "truthfulqa_mc1"]
    found = evaluate(
        [tiny.loaded(positions=512)], tasks=tasks, data_dir=MIRROR, limit=2, progress=said.append
    )["results"]["tiny"]
    assert list(found) == tasks
    for values in found.values():
        assert values["partial"]
        assert values["samples"] == 2
        assert all(math.isfinite(v) for v in values.values())
    assert any("not C4's validation shard" in str(event.message) for event in said)
