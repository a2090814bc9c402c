"""Perplexities against closed forms and brute force; lm-eval against lm-eval itself."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from conftest import Demo
from torch import Tensor, nn

from ternq import harness, measure
from ternq.errors import InputError, RecipeError
from ternq.evaluate import evaluate
from ternq.kernels import choice, using
from ternq.perplexity import divergence, token_perplexity
from ternq.progress import Event
from ternq.suites import SUITES, Suite
from ternq.tasks import gptq_sample, load_jobs

MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mirror"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
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
    (part,) = evaluate([model], tasks=[str(path)], limit=2)["results"]["tiny"].values()
    assert (part["samples"], part["partial"]) == (2, True)


def test_a_file_that_is_no_text_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's folder of tasks holds a README.md as well."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("words")
    with pytest.raises(InputError, match=r"README\.md.*text") as caught:
        evaluate([tiny.loaded()], tasks=["README.md"], offline=True)
    assert ".txt, .jsonl or .parquet" in str(caught.value.hint)


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


def test_activations_of_packed_layers_may_be_rounded(demo: Demo, tmp_path: Path) -> None:
    text, packed = tmp_path / "notes.txt", str(demo.folder / "demo-ternary")
    text.write_text(tiny.text(300))
    found, said = [], []
    for int8 in (False, True, True):
        found.append(evaluate([packed, "demo"], tasks=[str(text) + ":token_perplexity"],
                              int8_activations=int8, cache=tmp_path / "kept",
                              progress=said.append))  # fmt: skip
    exact, int8, again = (next(iter(f["results"][packed].values())) for f in found)
    assert exact["token_perplexity"] != int8["token_perplexity"] == again["token_perplexity"]
    assert int8["token_perplexity"] == pytest.approx(exact["token_perplexity"], rel=0.02)
    assert found[0]["results"]["demo"] == found[1]["results"]["demo"]
    kernels = [f["models"][packed]["kernel"] for f in found]
    assert kernels[0] == choice() and kernels[1] == f"{choice()}, int8 activations"
    assert "kernel" not in found[0]["models"]["demo"]
    assert "Activations of 'demo' are not rounded: it has no packed layers." in [
        event.message for event in said
    ]
    with using("torch"), pytest.raises(RecipeError, match="of the C kernels"):
        evaluate([packed], tasks=[str(text) + ":token_perplexity"], int8_activations=True)


def test_a_plan_says_what_would_be_read_and_measures_nothing(
    data_dir: Path, tmp_path: Path
) -> None:
    model = tiny.loaded()
    asked: dict[str, Any] = {"tasks": ["wikitext", "piqa"], "data_dir": data_dir, "limit": 3,
                             "cache": tmp_path / "kept"}  # fmt: skip
    planned = evaluate([model], plan=True, **asked)
    assert planned["results"] == {} and planned["plan"]
    (parts,) = planned["expected"].values()
    assert [part["task"] for part in parts] == ["wikitext", "wikitext", "piqa"]
    assert all(part["seconds"] > 0 and not part["kept"] for part in parts)
    assert planned["seconds"]["total"] == pytest.approx(sum(p["seconds"] for p in parts))
    (made,) = evaluate([model], **asked)["results"].values()
    assert parts[0]["tokens"] == made["wikitext"]["tokens"]
    (again,) = evaluate([model], plan=True, **asked)["expected"].values()
    assert all(part["kept"] and part["tokens"] == 0 for part in again)


def test_only_the_metric_asked_for(data_dir: Path) -> None:
    own = evaluate([tiny.loaded()], tasks=["piqa:acc_norm"], data_dir=data_dir, limit=4)
    assert set(own["results"]["tiny"]["piqa"]) == {
        "acc_norm", "acc_norm_stderr", "samples", "partial"
    }  # fmt: skip


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


# -- groups, suites, texts -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wmdp(data_dir: Path) -> Path:
    """The data of a group of three tasks, of several sizes."""
    configs: dict[str, tiny.Splits] = {}
    for size, name in ((5, "bio"), (9, "chem"), (14, "cyber")):
        rows = [
            {"question": tiny.text(6, i), "choices": [tiny.text(2, i + c) for c in range(4)],
             "answer": i % 4}
            for i in range(size)
        ]  # fmt: skip
        configs[f"wmdp-{name}"] = {"test": (f"{name}/test.jsonl", rows)}
    tiny.hub_configs(data_dir / "cais" / "wmdp", configs)
    return data_dir


def test_a_group_run_task_by_task_has_lm_evals_scores(wmdp: Path, tmp_path: Path) -> None:
    """Oracle: lm-eval on the whole group at once."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = tiny.loaded()
    (group,) = [job.task for job in load_jobs(["wmdp"], wmdp)]
    assert group is not None
    out = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=64),
        tasks=list(group.groups.values()),
        task_manager=group.manager,
        bootstrap_iters=1000,
    )
    found = evaluate([model], tasks=["wmdp"], data_dir=wmdp, batch_size=1)["results"]["tiny"]
    assert set(found) == {"wmdp", "wmdp_bio", "wmdp_chem", "wmdp_cyber"} == set(out["results"])
    for name, values in out["results"].items():
        assert found[name]["acc"] == values["acc,none"]
        assert found[name]["acc_stderr"] == values["acc_stderr,none"]
    assert (found["wmdp"]["samples"], found["wmdp"]["partial"]) == (28, False)
    part = evaluate([model], tasks=["wmdp"], data_dir=wmdp, limit=6)["results"]["tiny"]
    assert {name: own["samples"] for name, own in part.items()} == {
        "wmdp": 17, "wmdp_bio": 5, "wmdp_chem": 6, "wmdp_cyber": 6
    }  # fmt: skip
    assert {name for name, own in part.items() if own["partial"]} == set(found) - {"wmdp_bio"}


def test_a_suite_is_its_tasks_and_their_mean(wmdp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(("piqa", "wmdp_bio", "wmdp_chem"), ("wmdp_bio", "piqa"), "more is not there")
    monkeypatch.setitem(SUITES, "mine", suite)
    said: list[Event] = []
    found = evaluate([tiny.loaded()], tasks=["piqa", "mine"], data_dir=wmdp, progress=said.append)
    own = found["results"]["tiny"]
    assert list(own) == ["piqa", "wmdp_bio", "wmdp_chem", "mine"]
    assert own["mine"]["acc"] == (own["piqa"]["acc"] + own["wmdp_bio"]["acc"]) / 2
    errors = (own["piqa"]["acc_stderr"], own["wmdp_bio"]["acc_stderr"])
    assert own["mine"]["acc_stderr"] == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 2)
    assert own["mine"]["samples"] == 25
    assert said[0].message == "mine: more is not there."


def test_the_tasks_of_suites_are_lm_evals() -> None:
    known = {*harness._index().all_tasks, "ptb", "efficiency"}
    for suite in SUITES.values():
        assert set(suite.tasks) <= known
        assert set(suite.averaged) <= set(suite.tasks)
    assert not set(SUITES) & known


def test_metrics_of_one_task_asked_for_apart_are_taken_together(data_dir: Path) -> None:
    tasks = ["wikitext:word_perplexity", "wikitext:token_perplexity"]
    own = evaluate([tiny.loaded()], tasks=tasks, data_dir=data_dir)["results"]["tiny"]["wikitext"]
    assert {"word_perplexity", "token_perplexity"} < set(own)
    assert "bits_per_byte" not in own


def test_names_and_metrics_are_told_apart(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "a:b.txt", "folder/x.txt", "piqa", "wikitext"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(tiny.text(200))
    tasks = ["notes.txt:token_perplexity", "./notes.txt:word_perplexity", "a:b.txt", "folder",
             "folder:bits_per_byte", "./folder:byte_perplexity"]  # fmt: skip
    found = evaluate(tiny.loaded(), tasks=",".join(tasks), offline=True)["results"]["tiny"]
    kinds = {
        name: {m for m in own if m.endswith(("plexity", "byte"))} for name, own in found.items()
    }
    every = {"token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert kinds == {
        "notes.txt": {"token_perplexity"}, "./notes.txt": {"word_perplexity"}, "a:b.txt": every,
        "folder": every, "./folder": {"byte_perplexity"},
    }  # fmt: skip
    own = evaluate(tiny.loaded(), tasks=["piqa"], data_dir=data_dir)["results"]["tiny"]
    assert "acc" in own["piqa"]  # the task, though a file has its name


def test_a_metric_of_a_group_takes_nothing_from_its_tasks(wmdp: Path) -> None:
    for tasks in (["wmdp:acc", "wmdp_bio"], ["wmdp_bio", "wmdp:acc"]):
        said: list[Event] = []
        own = evaluate(tiny.loaded(), tasks=tasks, data_dir=wmdp, progress=said.append)
        assert "acc_stderr" in own["results"]["tiny"]["wmdp_bio"]
        assert sum(e.stage == "wmdp_bio" and e.done == 5 for e in said) == 1  # measured once


def test_a_mistyped_task_is_said_offline_too() -> None:
    with pytest.raises(RecipeError, match="no task 'piqua'") as caught:
        evaluate(tiny.loaded(), tasks=["piqua"], offline=True)
    assert "piqa" in str(caught.value.hint)


def test_what_cannot_be_measured_is_said_before_anything_is(
    data_dir: Path, measured: list[str]
) -> None:
    options: dict[str, Any] = {"data_dir": data_dir, "offline": True}
    for metric in ("f1", "token_perplexity"):
        with pytest.raises(RecipeError, match=f"has no metric '{metric}'"):
            evaluate(tiny.loaded(), tasks=["wikitext", f"piqa:{metric}"], **options)
    for model in ("no-such-model", "./none", str(data_dir)):
        with pytest.raises(InputError):
            evaluate([tiny.loaded(), model], tasks=["piqa"], **options)
        with pytest.raises(InputError):
            evaluate(tiny.loaded(), baseline=model, tasks=["piqa"], **options)
    assert measured == []


@pytest.mark.parametrize(
    "wrong",
    [{"limit": 1.5}, {"limit": "x"}, {"limit": True}, {"batch_size": -3}, {"batch_size": 0},
     {"num_fewshot": -1}, {"max_length": 2.5}],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(data_dir: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="at least"):
        evaluate(tiny.loaded(), tasks=["piqa"], data_dir=data_dir, **wrong)


def test_perplexities_of_other_blocks_are_said_without_a_baseline_too(data_dir: Path) -> None:
    other = tiny.loaded(positions=32)
    other.name = "short"
    task = "wikitext:token_perplexity"
    (note,) = evaluate([tiny.loaded(), other], tasks=task, data_dir=data_dir)["notes"]
    assert "of tiny and short cannot be compared (blocks" in note


def test_a_local_text_has_lm_evals_perplexities_too(tmp_path: Path) -> None:
    """Oracle: lm-eval's own log likelihoods of the documents, added up here."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    documents = [tiny.text(60, i) for i in range(4)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"text": "{d}"}}\n' for d in documents))
    model = tiny.loaded()
    adapter = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=64)
    requests = [Instance("loglikelihood_rolling", {}, (d,), 0) for d in documents]
    total = -sum(adapter.loglikelihood_rolling(requests, disable_tqdm=True))
    (own,) = evaluate([model], tasks=[str(path)], batch_size=1)["results"]["tiny"].values()
    words, letters = sum(len(d.split()) for d in documents), sum(map(len, documents))
    assert own["word_perplexity"] == pytest.approx(math.exp(total / words))
    assert own["byte_perplexity"] == pytest.approx(math.exp(total / letters))
    assert own["bits_per_byte"] == pytest.approx(total / letters / math.log(2))


def test_ptb_is_read_as_gptq_reads_it(tmp_path: Path) -> None:
    rows = [{"sentence": tiny.text(30, i)} for i in range(8)]
    folder = tmp_path / "ptb-text-only" / "ptb_text_only"
    tiny.hub_dataset(folder, {"test": ("t.jsonl", rows)}, "penn_treebank")
    model = tiny.loaded()
    text = " ".join(str(row["sentence"]) for row in rows)
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    (own,) = evaluate([model], tasks=["ptb"], data_dir=tmp_path)["results"]["tiny"].values()
    assert own["token_perplexity"] == token_perplexity(model.model, ids, 64)["token_perplexity"]
    assert own["word_perplexity"] > 1
    broken = [{"text": "no sentence"}]
    tiny.hub_dataset(folder, {"test": ("t.jsonl", broken)}, "penn_treebank")
    with pytest.raises(InputError, match="no column 'sentence' but text"):
        evaluate([model], tasks=["ptb"], data_dir=tmp_path)


def test_c4_is_drawn_from_the_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    rows = [{"text": tiny.text(60, i)} for i in range(30)]
    folder = tmp_path / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    for name in ("c4-validation.00000-of-00008", "c4-train.00000-of-01024"):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    files = "\n  data_files:\n  - split: validation\n    path: en/*.gz\n"
    (folder.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: en{files}---\n")
    monkeypatch.setattr("ternq.tasks._C4_ROWS", 30)
    model, said = tiny.loaded(), []
    found = evaluate([model], tasks=["c4"], data_dir=tmp_path, limit=5, progress=said.append)
    own = found["results"]["tiny"]["c4"]
    ids = gptq_sample([str(row["text"]) for row in rows], model.tokenizer, 64, 256)
    expected = token_perplexity(model.model, ids[: 5 * 64], 64)["token_perplexity"]
    assert own["token_perplexity"] == expected
    assert "drawn" not in own  # of the 256 blocks only five were read
    monkeypatch.setattr("ternq.tasks.C4_BLOCKS", 3)
    monkeypatch.setattr("ternq.measure.C4_BLOCKS", 3)
    whole = evaluate([model], tasks=["c4:token_perplexity"], data_dir=tmp_path)
    assert whole["results"]["tiny"]["c4"]["drawn"] == "gptq3"
    lines = [str(event.message) for event in said if event.stage == "expect"]
    assert "c4: 5 blocks of 64 tokens, drawn as GPTQ draws them, about" in lines[1]
    assert "c4: the first 5 of 30 documents, about" in lines[2]
    assert "in all about" in lines[3]


def test_documents_too_short_to_draw_blocks_from_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ternq.tasks._MISSES", 50)
    with pytest.raises(InputError, match="50 documents in a row have fewer than 64 tokens"):
        gptq_sample(["short"] * 9, tiny.tokenizer(), 64, 2)


def test_windows_are_as_long_as_asked(data_dir: Path) -> None:
    task = ["wikitext:token_perplexity"]
    found = evaluate([tiny.loaded()], tasks=task, data_dir=data_dir, max_length=32)
    assert found["results"]["tiny"]["wikitext"]["block_length"] == 32
    found = evaluate([tiny.loaded()], tasks=task, data_dir=data_dir, max_length=999)
    assert found["results"]["tiny"]["wikitext"]["block_length"] == 64  # all that the model reads
    with pytest.raises(RecipeError, match="--max-length is 1"):
        evaluate([tiny.loaded()], tasks=task, data_dir=data_dir, max_length=1)


def test_a_model_that_gives_no_numbers_has_no_accuracy(data_dir: Path) -> None:
    """The likeliest of NaNs is the first answer: an accuracy would look like chance."""
    model, said = tiny.loaded(), []
    with torch.no_grad():
        model.model.lm_head.weight.fill_(math.nan)
    found = evaluate([model], tasks=["piqa"], data_dir=data_dir, progress=said.append)
    assert math.isnan(found["results"]["tiny"]["piqa"]["acc"])
    assert "piqa" not in found["answers"]["tiny"]
    assert any("not finite" in str(event.message) for event in said)


def test_chat_needs_a_template(data_dir: Path) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        evaluate([tiny.loaded()], tasks=["piqa"], data_dir=data_dir, chat=True)
    model = tiny.loaded(positions=256)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain, chat = (
        evaluate([model], tasks=["piqa"], data_dir=data_dir, limit=3, chat=chat)["results"]["tiny"]
        for chat in (False, True)
    )
    assert set(plain["piqa"]) == set(chat["piqa"])


def test_tasks_that_write_say_that_there_is_no_template(data_dir: Path) -> None:
    rows = [{"question": tiny.text(5, i), "answer": f"so it is\n#### {i}"} for i in range(6)]
    splits = {"test": ("m/test.jsonl", rows), "train": ("m/train.jsonl", rows)}
    tiny.hub_dataset(data_dir / "openai" / "gsm8k", splits, "main")
    said: list[Event] = []
    options: dict[str, Any] = {"tasks": ["gsm8k"], "data_dir": data_dir, "limit": 2}
    found = evaluate([tiny.loaded(positions=512)], **options, num_fewshot=0, progress=said.append)
    own = found["results"]["tiny"]["gsm8k"]
    assert own["exact_match@strict-match"] == 0.0
    assert (own["samples"], own["partial"]) == (2, True)
    assert found["answers"]["tiny"]["gsm8k"] == "00"
    assert any("has no chat template" in str(event.message) for event in said)
    assert (said[-1].stage, said[-1].done, said[-1].total) == ("gsm8k", 2, 2)
    with pytest.raises(InputError, match="has 256 tokens written; 'tiny' reads 64 at most"):
        evaluate([tiny.loaded()], **options)


def test_examples_that_a_task_never_takes_are_said(wmdp: Path) -> None:
    said: list[Event] = []
    options: dict[str, Any] = {"tasks": ["wmdp_bio"], "data_dir": wmdp, "progress": said.append}
    evaluate([tiny.loaded()], **options, num_fewshot=2)
    assert any("--num-fewshot does nothing" in str(event.message) for event in said)


def test_all_that_is_missing_is_said_at_once(data_dir: Path) -> None:
    with pytest.raises(InputError) as caught:
        evaluate([tiny.loaded()], tasks=["ternaryllm"], data_dir=data_dir)
    assert f"'{data_dir}/allenai/c4/en/c4-validation.00000-of-00008.json.gz'" in str(
        caught.value.hint
    )
    for name in ("ptb", "c4", "arc_easy", "arc_challenge", "hellaswag", "winogrande"):
        assert f"'{name}'" in caught.value.message
    assert "'piqa'" not in caught.value.message
    assert str(data_dir / "allenai" / "winogrande") in str(caught.value.hint)
    assert "winogrande_xl/validation.parquet" in str(caught.value.hint)


# -- against a baseline ----------------------------------------------------------------------------


def test_divergence_equals_a_loop_over_tokens() -> None:
    own, base = tiny.model(seed=1), tiny.model(seed=2)
    ids = torch.randint(257, (70,), generator=torch.Generator().manual_seed(0))
    total, same = [], []
    for start in range(0, 64, 16):
        block = ids[None, start : start + 16]
        with torch.no_grad():
            q, p = (torch.distributions.Categorical(logits=m(block).logits[0].double())
                    for m in (own, base))  # fmt: skip
        kl = torch.distributions.kl_divergence(p, q)[:-1]
        total.append(kl.mean().item())
        same += (p.logits.argmax(-1) == q.logits.argmax(-1))[:-1].tolist()
    found = divergence(own, base, ids, 16, batch_size=3)
    assert found["kl_divergence"] == pytest.approx(sum(total) / 4, rel=1e-5)
    spread = torch.tensor(total).std().item() / 2
    assert found["kl_divergence_stderr"] == pytest.approx(spread, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(sum(same) / len(same))
    assert found["kl_tokens"] == 60
    own = divergence(base, base, ids, 16)
    assert (own["kl_divergence"], own["top1_agreement"]) == (pytest.approx(0, abs=1e-9), 1.0)
    with pytest.raises(InputError, match="300 and 257 tokens"):
        divergence(tiny.model(vocabulary=300), base, ids, 16)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    own, base = tiny.loaded(seed=1), tiny.loaded(seed=2)
    own.name, base.name = "own", "base"
    return own, base


def test_a_baseline_adds_differences_ratios_and_what_averages_hide(
    pair: tuple[Any, Any], data_dir: Path
) -> None:
    own, base = pair
    found = evaluate([own], baseline=base, tasks=["wikitext", "piqa"], data_dir=data_dir)
    assert found["baseline"] == "base"
    assert list(found["results"]) == ["own", "base"]
    mine, theirs = found["results"]["own"], found["results"]["base"]
    text, piqa = found["comparison"]["own"]["wikitext"], found["comparison"]["own"]["piqa"]
    for metric in ("token_perplexity", "word_perplexity"):
        ratio = mine["wikitext"][metric] / theirs["wikitext"][metric]
        assert text[f"{metric}_ratio"] == pytest.approx(ratio)
    assert text["kl_divergence"] > 0
    assert piqa["acc_difference"] == pytest.approx(mine["piqa"]["acc"] - theirs["piqa"]["acc"])
    assert piqa["flips_won"] - piqa["flips_lost"] == pytest.approx(piqa["acc_difference"])
    answers = found["answers"]["own"]["piqa"]
    assert answers.count("1") / 20 == mine["piqa"]["acc"]


def test_other_tokens_are_not_compared_one_by_one(pair: tuple[Any, Any], data_dir: Path) -> None:
    own, base = pair[0], tiny.loaded(vocabulary=300)
    base.name = "base"
    base.tokenizer.add_tokens(["the"])
    task = ["wikitext:token_perplexity"]
    found = evaluate([own], baseline=base, tasks=task, data_dir=data_dir)
    assert any("other tokens" in note for note in found["notes"])
    assert any("cannot be compared (" in note for note in found["notes"])
    assert not found["comparison"]["own"]


def test_results_in_a_file_are_a_baseline(
    pair: tuple[Any, Any], data_dir: Path, tmp_path: Path
) -> None:
    own, base = pair
    options: dict[str, Any] = {"tasks": ["wikitext", "piqa"], "data_dir": data_dir, "limit": 8}
    live = evaluate([own], baseline=base, **options)
    file = tmp_path / "base.json"
    made = evaluate([base], **options)
    file.write_text(json.dumps({"schema_version": 1, "model": "base"} | made))
    found = evaluate([own], baseline=str(file), **options)
    gone = {"kl_divergence", "kl_divergence_stderr", "kl_tokens", "top1_agreement"}
    for task, values in live["comparison"]["own"].items():
        kept = {name: value for name, value in values.items() if name not in gone}
        assert found["comparison"]["own"][task] == kept
    assert found["results"][str(file)] == live["results"]["base"]
    with pytest.raises(RecipeError, match="--limit 8 there, 7 here; .*piqa: other data"):
        evaluate([own], baseline=str(file), **options | {"limit": 7})
    with pytest.raises(RecipeError, match="--num-fewshot not given there, 1 here"):
        evaluate([own], baseline=str(file), **options, num_fewshot=1)
    other = evaluate([own], baseline=str(file), **options | {"tasks": ["piqa"]})
    assert set(other["comparison"]["own"]) == {"piqa"}
    text = tmp_path / "other.txt"
    text.write_text(tiny.text(99))
    with pytest.raises(RecipeError, match="has none of these tasks, but wikitext, piqa"):
        evaluate([own], baseline=str(file), tasks=[str(text)])


def test_two_models_of_one_name_are_refused(data_dir: Path) -> None:
    with pytest.raises(RecipeError, match="Two models are named 'tiny'"):
        evaluate([tiny.loaded(), tiny.loaded(seed=1)], tasks=["piqa"], data_dir=data_dir)


# -- what is kept ----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is measured, as it is measured."""
    names: list[str] = []
    run, perplexity = harness.run, measure.token_perplexity

    def noted(task: Any, leaf: str, *rest: Any) -> Any:
        names.append(leaf)
        return run(task, leaf, *rest)

    def noted_text(*args: Any, **options: Any) -> Any:
        names.append(options["stage"])
        return perplexity(*args, **options)

    monkeypatch.setattr(harness, "run", noted)
    monkeypatch.setattr(measure, "token_perplexity", noted_text)
    return names


def test_the_same_measurement_again_is_free(
    data_dir: Path, tmp_path: Path, measured: list[str]
) -> None:
    options: dict[str, Any] = {"tasks": ["wikitext", "piqa"], "data_dir": data_dir}
    options |= {"cache": tmp_path, "limit": 5}
    first = evaluate([tiny.loaded()], **options)
    assert measured == ["wikitext: token perplexity", "wikitext", "piqa"]
    again = evaluate([tiny.loaded()], **options)
    assert measured[3:] == []
    assert again["cached"] == [["tiny", "wikitext"], ["tiny", "piqa"]]
    assert {**again, "cached": []} == first
    assert evaluate([tiny.loaded()], **options | {"cache": None})["results"] == first["results"]
    assert len(measured) == 6


@pytest.mark.parametrize(
    "change",
    [{"limit": 4}, {"num_fewshot": 1}, {"batch_size": 2}, {"max_length": 60}, {"seed": 1},
     {"dtype": torch.bfloat16}],
)  # fmt: skip
def test_another_setting_is_measured_anew(
    change: dict[str, Any], data_dir: Path, tmp_path: Path, measured: list[str]
) -> None:
    options: dict[str, Any] = {"tasks": ["piqa"], "data_dir": data_dir, "cache": tmp_path}
    evaluate([tiny.loaded()], **options | {"limit": 5})
    evaluate([tiny.loaded()], **options | {"limit": 5} | change)
    assert measured == ["piqa", "piqa"]


def test_other_examples_are_measured_anew(tmp_path: Path, measured: list[str]) -> None:
    goals = [{"goal": tiny.text(5, i), "sol1": tiny.text(3, i), "sol2": tiny.text(4, i), "label": 0}
             for i in range(9)]  # fmt: skip
    for train in (goals[:4], goals[4:], goals[:4]):
        splits = {"validation": ("v.jsonl", goals[:3]), "train": ("t.jsonl", train)}
        tiny.hub_dataset(tmp_path / "baber" / "piqa", splits, "default")
        for shots in (0, 2):
            evaluate(tiny.loaded(), tasks=["piqa"], data_dir=tmp_path, cache=tmp_path / "kept",
                     num_fewshot=shots)  # fmt: skip
    assert len(measured) == 3  # once without examples, twice with


def test_another_model_is_measured_anew(
    data_dir: Path, tmp_path: Path, measured: list[str]
) -> None:
    options: dict[str, Any] = {"tasks": ["piqa"], "data_dir": data_dir, "cache": tmp_path}
    model = tiny.loaded()
    folder = tmp_path / "model"
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    evaluate([str(folder)], **options)
    evaluate([str(folder)], **options)
    assert measured == ["piqa"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    evaluate([str(folder)], **options)
    assert measured == ["piqa"] * 2
    evaluate([tiny.loaded(seed=3)], **options)
    evaluate([tiny.loaded(seed=3)], **options)
    for _ in range(2):
        model = tiny.loaded(vocabulary=300)
        evaluate([model], **options)
    model.tokenizer.add_tokens(["the"])
    evaluate([model], **options)
    assert measured == ["piqa"] * 5


def test_a_stopped_measurement_goes_on_where_it_was(
    wmdp: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tasks": ["piqa", "wmdp"], "data_dir": wmdp, "cache": tmp_path}

    def stop(event: Event) -> None:
        if event.stage == "wmdp_chem" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([tiny.loaded()], **options, progress=stop)
    assert measured == ["piqa", "wmdp_bio", "wmdp_chem"]
    found = evaluate([tiny.loaded()], **options)
    assert measured[3:] == ["wmdp_chem", "wmdp_cyber"]
    whole = evaluate([tiny.loaded()], **options | {"cache": None})
    assert found["results"] == whole["results"]


# -- lm-eval's own command -------------------------------------------------------------------------


@pytest.mark.slow  # a process of twenty seconds; `simple_evaluate` is compared above
def test_numbers_are_those_of_lm_evals_own_command(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny.loaded(positions=256)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    arguments = f"pretrained={folder},dtype=float32,max_length=256"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments,
               "--tasks", "piqa", "--num_fewshot", "1", "--batch_size", "3", "--device", "cpu",
               "--output_path", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, cwd=data_dir, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]["piqa"]
    options: dict[str, Any] = {"tasks": ["piqa"], "data_dir": data_dir, "batch_size": 3}
    own = evaluate([str(folder)], **options, num_fewshot=1)["results"][str(folder)]["piqa"]
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert own[metric] == theirs[f"{metric},none"]
