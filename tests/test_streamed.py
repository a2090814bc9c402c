"""Block by block from disk: the same numbers as with the whole model in memory, one block held."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor, nn

from ternq import (
    budget,
    calibrate,
    checkpoint,
    cli,
    distill,
    hf,
    runs,
    states,
    stop,
    streamed,
    trackers,
)
from ternq.calibrate import compensated_start, run
from ternq.errors import InputError, RecipeError, ResourceError, StoppedError
from ternq.footprint import Footprint
from ternq.linear import decoder_blocks, prepare, ternary_layers
from ternq.perplexity import block_losses
from ternq.plan import plan
from ternq.recipe import Recipe, Scheme, Training
from ternq.reconstruct import distance, mean_distance, reconstruct
from ternq.ternarize import ternarize
from ternq.walk import Walk, bytes_needed

KINDS = ["llama", "llama-tied-bias", "opt", "gemma", "gpt-neox", "phi", "gpt2"]
SHARDS = {"max_shard_size": "40KB"}

pytestmark = pytest.mark.usefixtures("quick")


def ids(blocks: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(checkpoints.VOCABULARY, (blocks, 20), generator=generator)


# --- the walk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_computes_what_the_loaded_model_does(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sharded = SHARDS if dtype == torch.bfloat16 else {}
    folder = checkpoints.folder(tmp_path / "m", kind, dtype=dtype, **sharded)
    walk = Walk("m", folder)
    model = hf.load(str(folder), dtype=torch.float32, offline=True).model
    assert walk.fingerprint() == states.fingerprint(model)
    calls = walk.calls(ids(), 1)
    hidden = [call.hidden for call in calls[0]]
    for index in range(len(walk.blocks)):
        hidden = calibrate.run(walk.block(index), calibrate.on(calls[index], hidden), nullcontext())
    with torch.no_grad():
        expected = torch.cat([block_losses(model, row[None]) for row in ids()])
    assert torch.allclose(walk.losses(ids(), hidden), expected, rtol=1e-6)


def test_the_head_and_the_text_go_by_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.folder(tmp_path / "m", "gemma")
    whole = losses(Walk("m", folder))
    monkeypatch.setattr("ternq.walk._ROWS", 100)
    monkeypatch.setattr("ternq.walk.TOKENS_AT_ONCE", 7)
    assert torch.allclose(losses(Walk("m", folder)), whole, rtol=1e-6)


def losses(walk: Walk) -> Tensor:
    """Of the activations as they come out of the embedding."""
    return walk.losses(ids(), [call.hidden for call in walk.calls(ids(), 1)[0]])


def damaged(folder: Path, how: str) -> None:
    path = folder / checkpoint.TENSORS
    tensors = checkpoint.load_tensors(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name][0, 0] = float("nan")
    checkpoint.save_tensors(tensors, path)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", r"lacks weights .* model\.layers\.1\.mlp\.up_proj\.weight"),
        ("truncated", r"model\.safetensors is damaged"),
        ("shape", r"holds model\.layers\.1\.mlp\.up_proj\.weight as \[49, 36\]"),
        ("nan", r"has 1 NaN or Inf values in model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    how: str, said: str, text: Path, tmp_path: Path
) -> None:
    folder = checkpoints.folder(tmp_path / "m")
    damaged(folder, how)
    with pytest.raises(InputError, match=said) as error:
        ternarize(str(folder), tmp_path / "out", by_blocks(folder, text), offline=True)
    assert error.value.exit_code == 3
    assert not (tmp_path / "out.run").exists()


# --- reconstruction -------------------------------------------------------------------------------


def test_the_distance_is_direction_and_length() -> None:
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    expected = (1 - cosine).mean() + (a - b).norm() ** 2 / b.norm() ** 2
    assert torch.allclose(distance(a, b), expected, rtol=1e-5)
    assert float(distance(b, b)) == pytest.approx(0, abs=1e-6)


def test_a_block_comes_nearer_and_what_is_skipped_stays() -> None:
    model = checkpoints.model("llama")
    plain = calibrate_targets(model)
    calls, targets = plain
    block = decoder_blocks(model)[1][0]
    prepare(model, Scheme(group_size=16, skip=("*.o_proj",)))
    kept = block.self_attn.o_proj.weight.clone()
    settings = Training(reconstruction_epochs=4)
    before, after, outputs = reconstruct(
        block, calls, targets, settings, seed=0, autocast=nullcontext()
    )
    assert after < 0.8 * before
    assert mean_distance(block, calls, targets, nullcontext()) == after
    assert all(map(torch.equal, outputs, run(block, calls, nullcontext())))
    assert torch.equal(block.self_attn.o_proj.weight, kept)


def test_a_block_that_comes_no_nearer_is_put_back() -> None:
    model = checkpoints.model("llama")
    calls, targets = calibrate_targets(model)
    block = decoder_blocks(model)[1][0]
    prepare(model, Scheme(group_size=16))
    began = [p.detach().clone() for p in block.parameters()]
    expected = run(block, calls, nullcontext())
    settings = Training(reconstruction_epochs=1, reconstruction_lr=100.0)
    before, after, outputs = reconstruct(
        block, calls, targets, settings, seed=0, autocast=nullcontext()
    )
    assert not after < before  # it is no number here
    assert all(map(torch.equal, block.parameters(), began))
    assert all(map(torch.equal, outputs, expected))


def calibrate_targets(model: Any) -> Any:
    from ternq.blocks import Passing, calls_of

    blocks = decoder_blocks(model)[1]
    calls = calls_of(model, blocks, Passing(blocks, blocks[0].forward), torch.split(ids(8), 1))[0]
    return calls, calibrate.run(blocks[0], calls, nullcontext())


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_a_block_that_comes_no_nearer_stays_as_it_was(rate: float) -> None:
    model = checkpoints.model("llama")
    prepare(model, Scheme(group_size=16))
    plain = checkpoints.model("llama")
    prepare(plain, Scheme(group_size=16))
    settings = Training(reconstruction_epochs=0)
    compensated_start(plain, ids(8), rows=1, reconstruction=settings)
    settings = Training(reconstruction_epochs=1, reconstruction_lr=rate)
    said = compensated_start(model, ids(8), rows=1, reconstruction=settings)
    assert any("2 of 2 blocks came no nearer" in s for s in said)
    assert states.fingerprint(model) == states.fingerprint(plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reconstructed_start_is_nearer_than_a_compensated_one(kind: str) -> None:
    ends = []
    for settings in (None, Training(reconstruction_epochs=4)):
        model = checkpoints.model(kind)
        dense = block_outputs(model)
        prepare(model, Scheme(group_size=16))
        said = compensated_start(model, ids(8), rows=1, reconstruction=settings)
        assert any("blocks reconstructed" in s for s in said) == (settings is not None)
        ends.append(float((block_outputs(model) - dense).norm()))
    assert ends[1] < 0.9 * ends[0]


def block_outputs(model: Any) -> Tensor:
    from ternq.blocks import BlockOutputs

    with torch.no_grad(), BlockOutputs(model) as own:
        model(input_ids=ids(8), use_cache=False)
    return own.features[-1]


# --- the whole job --------------------------------------------------------------------------------


def by_blocks(source: Path, text: Path, **settings: Any) -> Recipe:
    usual = {"calibration": 6, "reconstruction_epochs": 2, "block_by_block": True}
    return checkpoints.recipe(source, text, **usual | settings)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "epochs"),
    [
        ("llama", 2),
        ("gpt2", 2),
        pytest.param("llama", 0, marks=slow),
        pytest.param("opt", 2, marks=slow),
    ],
)
def test_it_makes_what_is_made_in_memory(
    kind: str, epochs: int, text: Path, tmp_path: Path
) -> None:
    folder = checkpoints.folder(tmp_path / "m", kind, dtype=torch.bfloat16, **SHARDS)
    recipe = by_blocks(folder, text, reconstruction_epochs=epochs)
    streamed_ = ternarize(str(folder), tmp_path / "a", recipe, offline=True)
    settings = replace(recipe.training, block_by_block=False, start="reconstructed", steps=0)
    whole = replace(recipe, training=settings)
    in_memory = ternarize(str(folder), tmp_path / "b", whole, offline=True)
    one, other = (checkpoint.load_tensors(tmp_path / n / checkpoint.TENSORS) for n in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert streamed_["weights"] == in_memory["weights"]
    assert streamed_["verify"]["ok"]
    assert streamed_["recipe"]["base"] == in_memory["recipe"]["base"]
    near = pytest.approx(in_memory["layers"][str(tmp_path / "b")][0]["error"], rel=1e-3)
    assert streamed_["layers"][str(tmp_path / "a")][0]["error"] == near
    assert not (tmp_path / "a.run").exists()
    assert ternarize(str(folder), tmp_path / "a", recipe, offline=True)["files"]


def test_what_is_measured_is_the_model_itself(source: Path, text: Path, tmp_path: Path) -> None:
    found = ternarize(str(source), tmp_path / "out", by_blocks(source, text), offline=True)
    start = ternarize(
        str(source), tmp_path / "start", checkpoints.recipe(source, text, steps=0), offline=True
    )
    prepared = streamed.prepare_run(str(source), by_blocks(source, text), offline=True)
    held = prepared.corpus.held_out
    assert len(held) == 6 * 16
    rows = held[: len(held) // prepared.length * prepared.length].view(-1, prepared.length)
    model = hf.load(str(source), dtype=torch.float32, offline=True).model
    with torch.no_grad():
        assert found["teacher"]["perplexity"] == pytest.approx(
            float(block_losses(model, rows).mean().exp()), rel=1e-5
        )
        packed = hf.load(str(tmp_path / "start"), dtype=torch.float32, offline=True).model
        assert found["untrained"]["perplexity"] == pytest.approx(
            float(block_losses(packed, rows).mean().exp()), rel=0.02
        )
    assert start["untrained"]["samples"] > found["untrained"]["samples"]


def test_one_block_is_in_memory_at_once(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the blocks before it is alive, though garbage is not looked for."""
    import gc
    import weakref

    alive: list[weakref.ref[nn.Parameter]] = []  # ternary layers keep the weights that they replace
    left: list[int] = []
    real = Walk.block

    def counted(self: Walk, index: int) -> nn.Module:
        left.append(sum(weight() is not None for weight in alive))
        block = real(self, index)
        alive.extend(weakref.ref(p) for p in block.parameters())
        assert all(p.is_meta for p in self.blocks.parameters())
        return block

    monkeypatch.setattr(Walk, "block", counted)
    gc.disable()
    try:
        ternarize(str(source), tmp_path / "out", by_blocks(source, text), offline=True)
    finally:
        gc.enable()
    assert len(left) > 2
    assert left == [0] * len(left)


@pytest.mark.parametrize(
    ("made", "stage"),
    [
        pytest.param(0, "rounding", marks=slow),
        (1, "training"),
        pytest.param(1, "rounding", marks=slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    made: int, stage: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while a block is rounded, or at the third step of its training."""
    recipe = by_blocks(source, text)
    whole = ternarize(str(source), tmp_path / "whole", recipe, offline=True)
    stages = {"rounding": 3, "training": 1 + 7 + 3}  # of the checks: block, layers, steps
    blocks, polls = tmp_path / "parts.run" / runs.BLOCKS, 0

    def requested() -> str | None:
        nonlocal polls
        polls += len(list(blocks.glob("*"))) == made
        return "SIGTERM" if polls == stages[stage] else None

    monkeypatch.setattr(stop, "requested", requested)
    with pytest.raises(StoppedError, match=rf"before block {made + 1} of 2 \(SIGTERM\)"):
        ternarize(str(source), tmp_path / "parts", recipe, offline=True)
    assert len(list(blocks.glob("*"))) == made
    parts = ternarize(str(source), tmp_path / "parts", recipe, offline=True)
    one, other = (tmp_path / n / checkpoint.TENSORS for n in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()
    for name in ("teacher", "untrained", "student", "weights"):
        assert parts[name] == whole[name]


def test_a_time_limit_stops_it(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match="time limit"):
        ternarize(
            str(source), tmp_path / "out", by_blocks(source, text), time_limit=0, offline=True
        )


def test_what_needs_the_whole_model_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = by_blocks(source, text)
    own = replace(recipe, training=replace(recipe.training, data=("self",)))
    with pytest.raises(RecipeError, match="cannot write its own text"):
        ternarize(str(source), tmp_path / "out", own, offline=True)
    with pytest.raises(RecipeError, match="no student"):
        distill.distill(str(source), tmp_path / "out", recipe, offline=True)
    made = tmp_path / "made"
    ternarize(str(source), made, recipe, offline=True)
    with pytest.raises(InputError, match="ternary already"):
        ternarize(str(made), tmp_path / "again", recipe, offline=True)


def test_what_it_needs_does_not_grow_with_the_blocks() -> None:
    needed = []
    for layers in (2, 4, 32):
        _, options = checkpoints.CONFIGS["llama"]
        import transformers

        config = transformers.LlamaConfig(**options | {"num_hidden_layers": layers})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        needed.append(bytes_needed(model, Training()))
    assert len(set(needed)) == 1
    assert bytes_needed(model, Training(calibration=128)) > needed[0]
    assert ternary_layers(model) == {}


def test_it_is_chosen_where_nothing_else_fits(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = by_blocks(source, text, block_by_block=False)
    out = tmp_path / "out"
    with monkeypatch.context() as small:
        huge = Footprint(10**15, 0, 0)
        small.setattr(budget, "footprint", lambda *shapes: huge)
        small.setattr(budget, "roughly", lambda *shapes: huge)
        with pytest.raises(ResourceError, match="more than is free"):
            distill.distill(str(source), tmp_path / "run", recipe, offline=True)
        with pytest.raises(StoppedError):
            ternarize(str(source), out, recipe, offline=True, time_limit=0)
    found = ternarize(str(source), out, recipe, offline=True)  # as it began, whatever fits now
    assert found["recipe"]["training"]["block_by_block"]
    assert any(note.startswith("Strategy: block by block from disk") for note in found["notes"])
    assert ternarize(str(source), out, recipe, offline=True)["files"] == found["files"]


def test_a_plan_says_how_long_it_takes(source: Path, text: Path, tmp_path: Path) -> None:
    found = plan(str(source), by_blocks(source, text), out=tmp_path / "out")
    training, parts = found["training"], found["seconds"]
    assert training["steps"] == 2 * 6 and training["tokens"] == 2 * 6 * 16
    assert training["tokens_per_second"] == pytest.approx(12 * 16 / training["seconds"])
    assert all(seconds >= 0 for seconds in parts.values())
    assert 0 < training["seconds"] == parts["training"] < parts["total"]
    made = ternarize(str(source), tmp_path / "out", by_blocks(source, text), offline=True)
    assert made["training"]["steps"] == training["steps"]
    assert made["training"]["tokens"] == training["tokens"]
    rounded = plan(
        str(source), by_blocks(source, text, start="compensated"), out=tmp_path / "other"
    )
    assert rounded["training"]["steps"] == 0
    assert rounded["training"]["seconds"] > 0


def test_a_plan_looks_at_the_text(source: Path, text: Path, tmp_path: Path) -> None:
    for data, kind, said in (
        (str(tmp_path / "none.txt"), InputError, "none.txt"),
        ("self", RecipeError, "cannot write its own text"),
    ):
        recipe = by_blocks(source, Path(data))
        with pytest.raises(kind, match=said):
            plan(str(source), recipe, out=tmp_path / "out")
    command = ["distill", str(source), "-o", str(tmp_path / "run"), "--block-by-block", "--plan"]
    assert cli.run([*command, "--data", str(text)]) == 2  # there is no student to train


def test_what_is_not_read_block_by_block_is_said(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "check", lambda names: None)  # it may not be installed
    recipe = by_blocks(source, text, calibration=2, cache_teacher=True)
    found = ternarize(
        str(source), tmp_path / "out", recipe, offline=True, log_with=("tensorboard",), limit=3
    )
    notes = " ".join(found["notes"])
    for name in ("--cache-teacher", "--log-with", "--limit"):
        assert f"{name} changes nothing: " in notes
    assert "--time-limit" not in notes
    assert "32 tokens of calibration are" in notes  # fewer than a layer has inputs


def test_a_plan_without_weights_says_that_no_time_is_known(
    source: Path, text: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (tmp_path / name).write_bytes((source / name).read_bytes())
    found = plan(str(tmp_path), by_blocks(tmp_path, text), out=tmp_path / "out")
    assert found["seconds"] is None
    assert any(note.startswith("Time is not measured: ") for note in found["notes"])


def test_a_result_that_does_not_fit_either_is_measured_as_it_was_made(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "fits", lambda size, device: False)
    found = ternarize(str(source), tmp_path / "out", by_blocks(source, text), offline=True)
    assert any("does not fit here" in note for note in found["notes"])
    assert found["student"]["perplexity"] != found["untrained"]["perplexity"]
    packed = hf.load(str(tmp_path / "out"), dtype=torch.float32, offline=True).model
    held = streamed.prepare_run(str(source), by_blocks(source, text), offline=True).corpus.held_out
    length = found["student"]["length"]
    rows = held[: len(held) // length * length].view(-1, length)
    with torch.no_grad():
        expected = float(block_losses(packed, rows).mean().exp())
    assert found["student"]["perplexity"] == pytest.approx(expected, rel=0.02)
