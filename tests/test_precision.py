"""The type of products in training: what is chosen, what is said, and that a run keeps it."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch

from ternq import distill, origin, precision
from ternq.errors import RecipeError, StoppedError
from ternq.precision import products, with_products
from ternq.progress import Event
from ternq.recipe import Recipe, Training

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("quick")


def machine(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: bf16)


def kept(run: Path) -> Training:
    record = json.loads((run / origin.RUN_FILE).read_text("utf-8"))
    return Recipe.from_json(record["recipe"]).training


@pytest.mark.parametrize("bf16", [True, False])
def test_what_the_device_makes_is_taken(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    machine(monkeypatch, bf16)
    name = "bfloat16" if bf16 else "float32"
    assert with_products(Training(), "cpu") == (Training(dtype=name), [])
    a = torch.ones(2, 2)
    with products(Training(), CPU):
        assert (a @ a).dtype == getattr(torch, name)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_asked_for_goes_first(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: bool
) -> None:
    machine(monkeypatch, bf16)
    settings = Training(dtype=name)  # type: ignore[arg-type]
    found, said = with_products(settings, "cpu")
    assert found == settings
    assert any("emulate" in s for s in said) == (name == "bfloat16" and not bf16)
    a = torch.ones(2, 2)
    with products(settings, CPU):
        assert (a @ a).dtype == getattr(torch, name)


def test_a_card_that_is_not_here_is_planned_in_bfloat16() -> None:
    if not torch.cuda.is_available():
        assert with_products(Training(), "cuda")[0].dtype == "bfloat16"


def test_both_train_and_differ(source: Path, text: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("float32", "bfloat16"):
        recipe = checkpoints.recipe(source, text, steps=2, dtype=name)
        events: list[Event] = []
        done = distill.distill(
            str(source), tmp_path / name, recipe, offline=True, progress=events.append
        )
        assert kept(tmp_path / name).dtype == done["recipe"]["training"]["dtype"] == name
        losses[name] = done["training"]["loss_last"]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.05)


def test_a_run_keeps_its_type_on_another_machine(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = checkpoints.recipe(source, text, steps=2), tmp_path / "run"
    machine(monkeypatch, False)
    with pytest.raises(StoppedError):
        distill.distill(str(source), run, recipe, offline=True, time_limit=0.0)
    machine(monkeypatch, True)
    other = checkpoints.recipe(source, text, steps=2, dtype="bfloat16")
    with pytest.raises(RecipeError, match="dtype"):
        distill.distill(str(source), run, other, offline=True)
    distill.distill(str(source), run, recipe, offline=True)
    assert kept(run).dtype == "float32"
