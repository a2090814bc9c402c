"""What becomes of outputs: half-made ones go on, finished ones stay, inputs are never replaced."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from huggingface_hub import ModelCard

from ternq import corpus, snapshots, train
from ternq import ternarize as verbs
from ternq.distill import distill
from ternq.errors import InputError, RecipeError, StoppedError, VerificationError
from ternq.files import read_json, sha256
from ternq.pack import pack
from ternq.recipe import Recipe
from ternq.shown import number
from ternq.ternarize import ternarize


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`ternarize` of one tiny model into ``out``."""
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)
    monkeypatch.setattr("ternq.samples.TOKENS", 2)
    source = checkpoints.folder(tmp_path / "model", "llama")
    text = checkpoints.text_file(tmp_path / "text.jsonl")
    recipe = checkpoints.recipe(source, text)

    def run(out: str = "out", **options: Any) -> dict[str, Any]:
        return ternarize(str(source), tmp_path / out, recipe, offline=True, **options)

    return run


def test_a_command_cut_off_after_packing_goes_on(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verbs, "samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert (tmp_path / "out" / "ternq.json").is_file()
    assert (tmp_path / "out.run").is_dir()
    monkeypatch.setattr(train.Trainer, "one_step", interrupted)  # nothing is trained again
    report = make()
    assert report["verify"]["ok"]
    assert report["results"][str(tmp_path / "out")]["held-out"]["token_perplexity"] > 1
    assert not (tmp_path / "out.run").exists()
    assert make() == read_json(tmp_path / "out.report" / "report.json")


def test_a_finished_output_without_its_report_is_still_finished(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    made = make()
    before = checkpoints.contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.report")
    again = make()
    assert again["weights"] == made["weights"]
    assert checkpoints.contents(tmp_path / "out") == before
    with pytest.raises(RecipeError, match="another recipe"):
        make(keep_dtype=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match="config.json has 2 bytes"):
        make()


@pytest.mark.parametrize("out", ["model", "model/"])
def test_the_input_is_never_the_output(
    make: Callable[..., dict[str, Any]], tmp_path: Path, out: str
) -> None:
    before = checkpoints.contents(tmp_path / "model")
    with pytest.raises(RecipeError):
        make(out, overwrite=True)
    assert checkpoints.contents(tmp_path / "model") == before


def test_a_run_is_not_overwritten_by_what_is_made_of_it(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    make()
    before = checkpoints.contents(tmp_path / "out")
    recipe = checkpoints.recipe(tmp_path / "out", tmp_path / "text.jsonl")
    with pytest.raises(RecipeError, match="the model itself"):
        ternarize(str(tmp_path / "out"), tmp_path / "out", recipe, overwrite=True, offline=True)
    assert checkpoints.contents(tmp_path / "out") == before


def test_overwriting_goes_on_with_its_own_stopped_run(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    with pytest.raises(Exception, match="checkpoint is saved"):
        make(overwrite=True, time_limit=1e-6)
    (saved,) = snapshots.checkpoints(tmp_path / "out.run")
    assert saved.name == "step-00000001"
    steps = checkpoints.counted_steps(monkeypatch)
    make(overwrite=True)
    assert steps[0] == 1


def test_the_card_tells_how_it_was_made_and_measured(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (tmp_path / "more.txt").write_text("the cat sat on the mat and the dog ran to see. " * 5)
    made = {"command": "ternq ternarize model", "versions": {"ternq": "9.9", "torch": "8.8"}}
    tasks = (str(tmp_path / "more.txt"),)
    report = make(embeddings="int8", tasks=tasks, made=made)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    model = str(tmp_path / "model")
    assert card.data["license"] == "mit" and card.data["base_model"] is None  # it is no hub id
    first = card.text.strip().splitlines()[0]
    assert first.startswith("Load it with") and "trust_remote_code=True" in first
    for said in (
        "| base model | model |",
        "| licence of the base model | mit |",
        "| training | 2 steps, 64 tokens, seed 0 |",
        "| embeddings and head | 8.444 bits a weight |",
        f"| held-out | token perplexity | {number(report['teacher']['perplexity'])} |",
        f"| {number(report['student']['word_perplexity'])} |",
        f"| {tasks[0]} | token perplexity |",
        f"`{sha256(tmp_path / 'text.jsonl')}`",
        "```bash\nternq ternarize model\n```",
        "With ternq 9.9, torch 8.8.",
        '"batch_size": 2',
    ):
        assert said in card.text, said
    for name in (model, str(tmp_path / "out")):
        assert report["results"][name][tasks[0]]["token_perplexity"] > 1
    assert make(embeddings="int8", tasks=tasks, made=made) == report  # finished: nothing to do
    with pytest.raises(RecipeError, match="other embeddings"):
        make()


def test_the_card_of_a_packed_run_tells_what_the_run_measured(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = checkpoints.recipe(tmp_path / "model", tmp_path / "text.jsonl")
    report = distill(str(tmp_path / "model"), tmp_path / "run", recipe, offline=True)
    pack(str(tmp_path / "run"), tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    values = [number(report[who]["perplexity"]) for who in ("teacher", "student")]
    assert f"| held-out | token perplexity | {values[0]} | {values[1]} |" in card
    assert "| the trained run, before packing |" in card
    assert "| training | 2 steps, 64 tokens, seed 0 |" in card


def test_tasks_that_cannot_be_measured_are_said_before_the_training(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        make(tasks=("./missing.txt",))
    text = str(tmp_path / "text.jsonl")
    with pytest.raises(RecipeError, match="has no metric 'acc'"):
        make(tasks=(f"{text}:acc",))
    with pytest.raises(RecipeError, match="Efficiency is measured from loading on"):
        make(tasks=("efficiency",))
    assert not (tmp_path / "out.run").exists()


def test_more_documents_are_another_request(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tasks = (f"{tmp_path / 'text.jsonl'}:token_perplexity",)
    made = make(tasks=tasks, limit=1)
    assert make(tasks=tasks, limit=1) == made
    with pytest.raises(RecipeError, match="other limit"):
        make(tasks=tasks, limit=2)


def test_another_strategy_does_not_go_on_with_a_run(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """One that the machine chose does, where the same is asked for."""
    recipe = checkpoints.recipe(tmp_path / "model", tmp_path / "text.jsonl", steps=4)
    scales = replace(recipe, training=replace(recipe.training, train="scales"))

    def trained(recipe: Recipe) -> dict[str, Any]:
        return distill(str(tmp_path / "model"), tmp_path / "run", recipe, offline=True, **limit)

    limit: dict[str, Any] = {"time_limit": 1e-6}
    with pytest.raises(StoppedError):
        trained(scales)
    limit = {}
    with pytest.raises(RecipeError, match="train: scales there, all here"):
        trained(recipe)
    assert trained(scales)["recipe"]["training"]["train"] == "scales"


def test_block_by_block_has_the_starts_that_read_text(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = {}
    for start in ("compensated", "reconstructed", "closed-form"):
        recipe = checkpoints.recipe(
            tmp_path / "model", tmp_path / "text.jsonl", block_by_block=True, calibration=4,
            reconstruction_epochs=1, start=start,
        )  # fmt: skip
        out = tmp_path / start
        found[start] = ternarize(str(tmp_path / "model"), out, recipe, offline=True)
    steps = {start: report["training"]["steps"] for start, report in found.items()}
    assert steps == {"compensated": 0, "reconstructed": 4, "closed-form": 4}
    said = "Start: block by block it is the reconstructed one"
    telling = [s for s, report in found.items() if any(said in n for n in report["notes"])]
    assert telling == ["closed-form"]
