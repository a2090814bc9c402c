"""The compensated start of whole models: order, inputs, codes; and how a run keeps it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor, nn

from ternq import calibrate, checkpoint, distill, origin, runs, states, stop
from ternq.blocks import BlockOutputs, Call
from ternq.calibrate import compensated_start
from ternq.compensate import Compensated, compensate
from ternq.errors import InputError, RecipeError, StoppedError
from ternq.files import read_json, write_json
from ternq.linear import TernaryLinear, decoder_blocks, prepare, ternary_layers
from ternq.prepared import prepare_run
from ternq.progress import Event
from ternq.publish import MANIFEST
from ternq.recipe import Recipe, Scheme, Training
from ternq.ternarize import _made, ternarize
from ternq.train import Trainer

SCHEME = Scheme(group_size=16)

pytestmark = pytest.mark.usefixtures("quick")


def ids(blocks: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(checkpoints.VOCABULARY, (blocks, 20), generator=generator)


def students(kind: str, scheme: Scheme = SCHEME) -> tuple[Any, Any, Any]:
    """A model, and two that were made ternary of it."""
    dense = checkpoints.model(kind)
    one = copy.deepcopy(dense)
    prepare(one, scheme)
    return dense, one, copy.deepcopy(one)


def distance(model: Any, dense: Any) -> float:
    """Of what the last block puts out, relative."""
    with torch.no_grad(), BlockOutputs(model) as own, BlockOutputs(dense) as other:
        model(input_ids=ids(), use_cache=False)
        dense(input_ids=ids(), use_cache=False)
    return float((own.features[-1] - other.features[-1]).norm() / other.features[-1].norm())


def untouched(model: Any) -> bool:
    """Whether nothing that watched the model is left on it."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and not any("forward" in vars(m) for m in ternary_layers(model).values())


@pytest.mark.parametrize("kind", list(checkpoints.CONFIGS))
def test_every_decoder_is_walked(kind: str) -> None:
    dense, plain, student = students(kind)
    events: list[Event] = []
    said = compensated_start(student, ids(), rows=4, progress=events.append)
    layers = ternary_layers(student)
    assert said[0].startswith(f"Start: {len(layers)} layers")
    assert [e.done for e in events] == [1, 2]
    assert {e.total for e in events} == {2}
    assert untouched(student)
    assert any((a.codes() != b.codes()).any() for a, b in pairs(plain, student))
    assert distance(student, dense) < distance(plain, dense)


def pairs(one: Any, other: Any) -> Any:
    return zip(ternary_layers(one).values(), ternary_layers(other).values(), strict=True)


def inputs_of(layer: nn.Module, model: Any) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids(), use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "phi"])
def test_each_layer_is_rounded_for_what_the_ones_before_it_give(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessian used for a layer is that of its inputs in the finished model."""
    used: list[tuple[Tensor, Tensor]] = []

    def spied(weight: Tensor, hessian: Tensor, group_size: int, shift: bool) -> Compensated:
        found = compensate(weight, hessian, group_size, shift)
        used.append((hessian, found.codes))
        return found

    monkeypatch.setattr(calibrate, "compensate", spied)
    _, _, student = students(kind)
    compensated_start(student, ids(), rows=3)  # the last batch is a shorter one
    layers = list(ternary_layers(student).values())
    assert len(used) == len(layers)
    for layer in layers:
        x = inputs_of(layer, student)
        found = [h for h, codes in used if torch.equal(codes, layer.codes())]
        assert len(found) == 1  # codes() of the start are the compensated ones
        assert torch.allclose(found[0], 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)


def test_no_more_of_a_block_is_run_than_comes_before_a_stage() -> None:
    """Inputs of q, k, v, then o, then gate and up are had without the activation behind them."""
    _, _, student = students("llama")
    calls: list[nn.Module] = []
    for block in decoder_blocks(student)[1]:
        block.mlp.act_fn.register_forward_hook(lambda module, *_: calls.append(module))
    compensated_start(student, ids(), rows=5)
    wanted = 1 + 2 + 2  # in what order layers are called; for down; what the finished block gives
    assert len(calls) == 2 * wanted + 1  # the first block is run once more to see what it returns


def test_scales_are_those_of_the_rounding_and_skipped_layers_stay() -> None:
    scheme = Scheme(group_size=16, shift=False, skip=("*.o_proj",))
    dense, plain, student = students("llama", scheme)
    compensated_start(student, ids())
    assert all(m.weight_shift is None for m in ternary_layers(student).values())
    for name, module in student.named_modules():
        if not isinstance(module, TernaryLinear):
            for (_, a), (_, b) in zip(
                module.named_parameters(recurse=False),
                dense.get_submodule(name).named_parameters(recurse=False),
                strict=True,
            ):
                assert torch.equal(a, b), name
    assert distance(student, dense) < distance(plain, dense)


def test_another_device_holds_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block goes there and comes back before the next one does, with its calls' tensors."""
    _, here, there = students("llama")
    moves: list[tuple[nn.Module, str]] = []
    to = nn.Module.to

    def spied(module: nn.Module, device: torch.device) -> nn.Module:
        moves.append((module, str(device)))
        return to(module, device)

    monkeypatch.setattr(nn.Module, "to", spied)
    compensated_start(there, ids(), device="cpu:0")
    blocks = decoder_blocks(there)[1]
    assert moves == [(b, where) for b in blocks for where in ("cpu:0", "cpu")]
    compensated_start(here, ids())
    assert states.fingerprint(here) == states.fingerprint(there)


def test_a_call_goes_to_a_device_with_all_that_is_in_it() -> None:
    pair = (torch.ones(2), torch.zeros(2))
    call = Call((torch.ones(3),), {"position_embeddings": pair, "use_cache": False})
    moved = call.to(torch.device("meta"))
    tensors = [moved.hidden, *moved.kwargs["position_embeddings"]]
    assert [t.device.type for t in tensors] == ["meta"] * 3
    assert moved.kwargs["use_cache"] is False


def test_it_is_the_same_again_and_leaves_the_mode() -> None:
    _, one, other = students("llama")
    one.train()
    compensated_start(one, ids())
    compensated_start(other, ids())
    assert one.training
    assert not other.training
    assert states.fingerprint(one) == states.fingerprint(other)
    assert all(p.requires_grad for m in ternary_layers(one).values() for p in m.parameters())


def test_a_weight_of_two_modules_is_only_rounded_and_said() -> None:
    _, plain, student = students("llama")
    blocks = decoder_blocks(student)[1]
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    before = blocks[0].mlp.up_proj.weight.detach().clone()
    said = compensated_start(student, ids())
    assert torch.equal(blocks[0].mlp.up_proj.weight, before)
    assert "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj" in said[-1]


def test_channels_without_input_and_layers_without_calls_are_said() -> None:
    _, plain, student = students("llama")
    block = decoder_blocks(student)[1][0]
    with torch.no_grad():
        block.input_layernorm.weight[5] = 0
    block.mlp.unused = TernaryLinear(36, 4, bias=False, group_size=16, shift=True)
    nn.init.normal_(block.mlp.unused.weight)
    before = block.mlp.unused.weight.detach().clone()
    said = compensated_start(student, ids())
    assert f"{3 + 36} input channels" in said[1]  # of q, k and v; and all of the unused layer
    alone = compensate(before, torch.zeros(36, 36), 16)  # as by plain least squares
    assert torch.equal(block.mlp.unused.codes(), alone.codes)


def test_what_cannot_be_walked_is_refused() -> None:
    _, _, student = students("llama")
    blocks = decoder_blocks(student)[1]
    blocks.append(copy.deepcopy(blocks[0]))  # one that the model never calls
    with pytest.raises(InputError, match="not called one after another"):
        compensated_start(student, ids())
    _, _, student = students("llama")
    first = decoder_blocks(student)[1][0]
    call = nn.Module.__call__
    rename = lambda self, *args, **kwargs: call(self, states=args[0])  # noqa: E731
    first.__class__ = type("Renamed", (type(first),), {"__call__": rename})
    with pytest.raises(InputError, match="not called with hidden_states"):
        compensated_start(student, ids())
    _, _, student = students("llama")
    with torch.no_grad():
        student.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(InputError, match=r"layers\.0\..* not finite"):
        compensated_start(student, ids())
    assert untouched(student)


# Runs


def compensated(source: Path, text: Path, **settings: Any) -> Recipe:
    return checkpoints.recipe(source, text, start="compensated", calibration=6, **settings)


@pytest.mark.parametrize("training", [True, False])
def test_a_resumed_run_goes_on_from_the_same_start(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Stopped in its training, or before the second block of the start: none is made twice."""
    recipe = compensated(source, text, steps=4)
    whole = distill.distill(str(source), tmp_path / "whole", recipe, offline=True)
    made: list[Path] = []
    where = tmp_path / "parts" / (origin.RUN_FILE if training else runs.START)
    began = "untrained" if training else "00000"

    def requested() -> str | None:
        if training:
            return "SIGTERM" if where.is_file() and began in where.read_text() else None
        return "SIGTERM" if (where / f"{began}.safetensors").is_file() else None

    with monkeypatch.context() as stopping:
        stopping.setattr(stop, "requested", requested)
        said = "after step 1" if training else "before block 2 of 2 of the start .SIGTERM."
        with pytest.raises(StoppedError, match=said):
            distill.distill(str(source), tmp_path / "parts", recipe, offline=True)
    blocks = sorted(p.name for p in (tmp_path / "parts" / runs.START).iterdir())
    assert blocks == [f"{i:05d}.safetensors" for i in range(2 if training else 1)]
    start_block = calibrate.start_block
    monkeypatch.setattr(
        calibrate, "start_block", lambda *a, **k: made.append(tmp_path) or start_block(*a, **k)
    )
    parts = distill.distill(str(source), tmp_path / "parts", recipe, offline=True, resume=True)
    one, other = (
        checkpoint.load_tensors(tmp_path / name / origin.STUDENT_FILE)
        for name in ("whole", "parts")
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert parts["student"] == whole["student"]
    assert parts["untrained"] == whole["untrained"]
    assert (
        [n for n in parts["notes"] if n.startswith("Start:")]
        == [n for n in whole["notes"] if n.startswith("Start:")]
        != []
    )
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")  # drift included
    assert not (tmp_path / "parts" / runs.START).exists()
    assert len(made) == (0 if training else 1)


def test_the_time_limit_holds_for_the_start_too(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = compensated(source, text, steps=4)
    with pytest.raises(StoppedError, match="before block 1 of 2 of the start .time limit."):
        distill.distill(str(source), tmp_path / "run", recipe, offline=True, time_limit=1e-6)
    assert distill.distill(str(source), tmp_path / "run", recipe, offline=True)["student"]


def metrics(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_training_reads_on_behind_the_text_of_the_calibration(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []
    drawn = Trainer.draw
    monkeypatch.setattr(Trainer, "draw", lambda self: read.append(drawn(self)) or read[-1])
    recipe = checkpoints.recipe(source, text)
    made = replace(recipe, training=training(text, "compensated"))
    distill.distill(str(source), tmp_path / "first", made, offline=True)
    again = replace(recipe, training=replace(training(text, "closed-form"), data=()))
    said = distill.distill(str(tmp_path / "first"), tmp_path / "second", again, offline=True)
    other = replace(again, training=replace(again.training, sequence_length=8))
    distill.distill(str(tmp_path / "first"), tmp_path / "other", other, offline=True)

    stream = prepare_run(str(source), made, offline=True).corpus.blocks
    whole = [next(stream) for _ in range(6 + 4 * 4)]  # calibration, then 4 steps of 4 blocks
    assert torch.equal(torch.cat(read[:4]), torch.stack(whole[6:]))
    assert "Text: goes on behind the 14 blocks that the model has been trained on." in said["notes"]
    assert f"Text: that of the run, {text} (no --data was given)." in said["notes"]
    assert torch.equal(read[4][0], whole[0][:8])  # of other blocks nothing was read yet
    rates = [
        read_json(tmp_path / name / origin.RUN_FILE)["recipe"]["training"]["lr"]
        for name in ("first", "second")
    ]
    assert rates == [1e-3, 1e-4]  # less where the codes were trained before


def training(text: Path, start: Any) -> Training:
    return Training(steps=2, sequence_length=16, data=(str(text),), start=start, calibration=6)


@pytest.mark.parametrize("steps", [0, 2])
def test_from_a_checkpoint_to_an_artefact(
    steps: int, source: Path, text: Path, tmp_path: Path
) -> None:
    recipe = compensated(source, text, steps=steps)
    report = ternarize(str(source), tmp_path / "out", recipe, offline=True)
    assert report["verify"]["ok"]
    assert any(note.startswith("Start: 14 layers") for note in report["notes"])
    assert report["recipe"]["training"]["start"] == "compensated"
    if steps == 0:
        assert report["student"]["perplexity"] == pytest.approx(
            report["untrained"]["perplexity"], rel=0.01
        )
    plain = checkpoints.recipe(source, text, steps=0)
    rounded = ternarize(str(source), tmp_path / "plain", plain, offline=True)
    assert rounded["untrained"]["perplexity"] != report["untrained"]["perplexity"]
    again = ternarize(str(source), tmp_path / "out", recipe, offline=True)
    assert again["student"] == report["student"]


def test_recipes_without_a_field_have_its_default(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = checkpoints.recipe(source, text)
    old = recipe.to_json()
    del old["training"]["calibration"], old["training"]["rank"]
    assert Recipe.from_json(old) == recipe
    out = tmp_path / "run"
    with monkeypatch.context() as stopping:
        stopping.setattr(stop, "requested", lambda: "SIGTERM")
        with pytest.raises(StoppedError):
            distill.distill(str(source), out, recipe, offline=True)
    record = read_json(out / origin.RUN_FILE)
    for name in ("calibration", "rank"):
        del record["recipe"]["training"][name]
    write_json(out / origin.RUN_FILE, record)
    distill.distill(str(source), out, recipe, offline=True, resume=True)
    with pytest.raises(RecipeError, match="closed-form there, compensated here"):
        distill.distill(str(source), out, compensated(source, text), offline=True)


def test_an_older_artefact_is_still_found_to_be_finished(
    source: Path, text: Path, tmp_path: Path
) -> None:
    recipe = checkpoints.recipe(source, text)
    made = ternarize(str(source), tmp_path / "out", recipe, offline=True)
    manifest = read_json(tmp_path / "out" / MANIFEST)
    del manifest["asked"]["training"]["calibration"]
    asked = {"asked": recipe.to_json(), "keep_dtype": False}
    assert _made(tmp_path / "out", asked)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ternq.ternarize.read_manifest", lambda folder, name: manifest)
        assert _made(tmp_path / "out", asked)
    assert made["verify"]["ok"]


def test_a_ternary_model_has_its_start(source: Path, text: Path, tmp_path: Path) -> None:
    distill.distill(str(source), tmp_path / "run", checkpoints.recipe(source, text), offline=True)
    recipe = compensated(tmp_path / "run", text)
    report = distill.distill(str(tmp_path / "run"), tmp_path / "on", recipe, offline=True)
    assert any("--start is for dense models" in note for note in report["notes"])


def test_there_is_at_least_one_block() -> None:
    with pytest.raises(RecipeError, match="--calibration is 0"):
        Training(calibration=0)
