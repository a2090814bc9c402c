"""Training: its gradients, its features, its records; and that stopping changes nothing."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ternq import (
    checkpoint,
    corpus,
    distill,
    hf,
    metrics,
    origin,
    schedule,
    snapshots,
    states,
    stop,
)
from ternq.blocks import BlockOutputs
from ternq.errors import DivergenceError, InputError, InterruptedByUser, RecipeError, StoppedError
from ternq.files import read_json
from ternq.linear import prepare, ternary_layers
from ternq.pack import pack
from ternq.prepared import Prepared, prepare_run
from ternq.progress import Event, ignore
from ternq.recipe import Recipe, Scheme, Training
from ternq.train import Trainer, without_dropout

BLOCK = 16

pytestmark = pytest.mark.usefixtures("quick")


def random_blocks(count: int = 64, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(checkpoints.VOCABULARY, (count, BLOCK), generator=generator)
    return cycle(ids)


def trainer(
    folder: Path, kind: str = "llama", scheme: Scheme | None = None, **settings: Any
) -> Trainer:
    """A trainer of four steps on random tokens, in float32."""
    usual: dict[str, Any] = {"batch_size": 4, "sequence_length": BLOCK, "steps": 4, "clip": 0.0}
    training = Training(**usual | settings)
    teacher = checkpoints.model(kind)
    student = copy.deepcopy(teacher)
    prepare(student, scheme or Scheme(group_size=16), training.ste)
    teacher.requires_grad_(False)
    assert training.steps is not None
    made = Trainer(
        student=student,
        teacher=teacher,
        blocks=random_blocks(),
        settings=training,
        steps=training.steps,
        folder=folder,
        progress=ignore,
    )
    made.objective.autocast = torch.autocast("cpu", enabled=False)
    return made


def gradients(made: Trainer, ids: Tensor) -> dict[str, Tensor]:
    made.accumulate(ids)
    named = made.student.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


def batch(blocks: int = 4) -> Tensor:
    stream = random_blocks()
    return torch.stack([next(stream) for _ in range(blocks)])


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=1e-4), name


# Features


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt-neox", "phi", "gemma"])
def test_features_are_the_outputs_of_the_blocks(kind: str) -> None:
    model, ids = checkpoints.model(kind), batch(2)
    with torch.no_grad(), BlockOutputs(model) as outputs:
        given = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    hidden = given.hidden_states  # what goes into each block, and at last what the final norm gives
    assert len(outputs.features) == len(hidden) - 1 == 2
    assert torch.equal(outputs.features[0], hidden[1])
    assert not torch.equal(outputs.features[-1], hidden[-1])
    norms = [m for n, m in model.named_modules() if "norm" in n.lower() or "ln_f" in n]
    assert torch.equal(norms[-1](outputs.features[-1]), hidden[-1])


def test_hooks_leave_with_the_block() -> None:
    model = checkpoints.model("llama")
    with pytest.raises(RuntimeError, match="on the way"), BlockOutputs(model):
        raise RuntimeError("on the way")
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt-neox"])
def test_checkpointed_activations_give_the_same_gradients(kind: str, tmp_path: Path) -> None:
    calls: list[int] = []
    plain = gradients(trainer(tmp_path, kind), batch())
    made = trainer(tmp_path, kind, gradient_checkpointing=True)
    first = next(iter(ternary_layers(made.student).values()))
    first.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(made, batch())
    assert len(calls) == 2  # the backward pass ran the block again
    close(plain, again)


def test_checkpointed_features_are_those_of_the_forward_pass(tmp_path: Path) -> None:
    values = [
        trainer(tmp_path, gradient_checkpointing=on).accumulate(batch()) for on in (False, True)
    ]
    assert [k for k in values[1] if k.startswith("cosine")] == ["cosine_0", "cosine_1"]
    assert values[0] == pytest.approx(values[1])


# Loss and gradients


def reference_loss(made: Trainer, ids: Tensor) -> Tensor:
    """The loss of the method, written out."""
    settings = made.settings
    with BlockOutputs(made.student) as s:
        q = made.student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    with torch.no_grad(), BlockOutputs(made.teacher) as t:
        p = made.teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
    pairs = zip(s.features, t.features, strict=True)
    off = torch.stack([(1 - F.cosine_similarity(a, b, dim=-1)).mean() for a, b in pairs]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    ce = F.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten())
    return settings.off * off + settings.kl * kl + settings.ce * ce


@pytest.mark.parametrize(
    "weights",
    [
        {"off": 1.0, "kl": 0.0, "ce": 0.0},
        {"off": 0.0, "kl": 1.0, "ce": 0.0},
        {"off": 0.0, "kl": 0.0, "ce": 1.0},
        {"off": 2.0, "kl": 0.5, "ce": 0.25},
    ],
)
def test_loss_is_the_one_written_out(weights: dict[str, float], tmp_path: Path) -> None:
    made = trainer(tmp_path, **weights)
    own = gradients(made, batch())
    other = trainer(tmp_path, **weights)
    loss = reference_loss(other, batch())
    loss.backward()
    named = other.student.named_parameters()
    close(own, {n: p.grad for n, p in named if p.grad is not None})
    assert made.objective(batch())[0].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_give_the_gradients_of_the_whole_batch(size: int, tmp_path: Path) -> None:
    whole, parts = trainer(tmp_path), trainer(tmp_path, micro_batch_size=size)
    close(gradients(whole, batch()), gradients(parts, batch()))
    assert parts.accumulate(batch())["loss"] == pytest.approx(whole.accumulate(batch())["loss"])


def test_what_is_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path, "opt", scale_lr=0.5, lr=0.25, weight_decay=0.125)
    trained = {n for n, p in made.student.named_parameters() if p.requires_grad}
    frozen = {n for n, p in made.student.named_parameters() if not p.requires_grad}
    assert frozen == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
    }
    assert {n.rpartition(".")[2] for n in trained} == {
        "weight", "bias", "weight_scale", "weight_shift",
    }  # fmt: skip
    groups = [(g["peak_lr"], g["weight_decay"]) for g in made.optimizer.param_groups]
    assert groups == [(0.25, 0.125), (0.5, 0.0), (0.25, 0.0)]
    count = sum(len(g["params"]) for g in made.optimizer.param_groups)
    assert count == len(trained)


def test_teacher_is_untouched_and_the_loss_falls(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=12, lr=3e-3, clip=1.0)
    made.blocks = cycle(list(batch()))
    before = states.fingerprint(made.teacher)
    made.run()
    assert states.fingerprint(made.teacher) == before
    assert all(p.grad is None for p in made.teacher.parameters())
    assert made.losses[-1] < 0.9 * made.losses[0]


def test_the_teacher_is_not_needed_for_cross_entropy_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, off=0.0, kl=0.0, ce=1.0)
    values = made.accumulate(batch())
    assert values["loss"] == pytest.approx(values["ce"])


def test_skipped_layers_stay_dense(tmp_path: Path) -> None:
    made = trainer(tmp_path, scheme=Scheme(group_size=16, skip=("*.k_proj", "*layers.0.mlp*")))
    names = set(ternary_layers(made.student))
    assert len(names) == 14 - 2 - 3
    assert not any("k_proj" in n or "layers.0.mlp" in n for n in names)
    assert type(made.student.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear


def test_dropout_is_off_in_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, "opt")  # of a configuration with dropout 0.1
    assert made.student.training
    assert made.objective(batch())[0].item() == made.objective(batch())[0].item()


@pytest.mark.parametrize(
    ("kind", "dropouts"),
    [
        ("SeedOss", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
        ("GPTBigCode", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("Starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.1}),
        ("Falcon", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
        ("Bloom", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    ],
)
def test_dropout_is_off_wherever_a_model_keeps_its_share(
    kind: str, dropouts: dict[str, float]
) -> None:
    head = {"head_dim": 8} if kind == "SeedOss" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, **head, **dropouts,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    ids = torch.arange(30).view(2, 15)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)
    stored = model.config.to_dict()
    assert {name: stored[name] for name in dropouts} == dropouts


def test_rate_rises_and_falls() -> None:
    rates = [schedule.rate(step, 20, Training(warmup=0.1)) for step in range(20)]
    assert rates[0] == pytest.approx(1 / 3)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 2
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1


# Records


def test_metrics(tmp_path: Path) -> None:
    events: list[Event] = []
    made = trainer(tmp_path, steps=3, lr=1e-2, ce=0.5)
    made.progress = events.append
    start = {n: m.codes() for n, m in ternary_layers(made.student).items()}
    scales = {n: m.weight_scale.detach().clone() for n, m in ternary_layers(made.student).items()}
    made.run()
    lines = metrics.steps(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [e.done for e in events] == [1, 2, 3]
    for line in lines:
        assert {"seconds", "loss", "kl", "ce", "off", "lr", "gradient_norm"} <= set(line)
        loss = line["kl"] + 0.5 * line["ce"] + made.settings.off * line["off"]
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        cosines = [line[f"cosine_{i}"] for i in range(2)]
        assert 1 - sum(cosines) / 2 == pytest.approx(line["off"], abs=1e-6)
        assert {"flip_share", "zero_share", "scale_drift", "shift_drift"} <= set(line)
        assert 0 <= line["flip_share"] < 1
    assert any(line["flip_share"] > 0 for line in lines)
    layers = ternary_layers(made.student)
    count = sum(c.numel() for c in start.values())
    zeros = sum(int((m.codes() == 0).sum()) for m in layers.values()) / count
    assert lines[-1]["zero_share"] == zeros
    moved = sum(float((layers[n].weight_scale.detach() - s).abs().sum()) for n, s in scales.items())
    drift = moved / sum(float(s.abs().sum()) for s in scales.values())
    assert lines[-1]["scale_drift"] == pytest.approx(drift, rel=1e-4)


def test_diagnostics_are_taken_now_and_then(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=40, batch_size=1, off=0.0)
    made.run()
    lines = metrics.steps(tmp_path)
    assert [line["step"] for line in lines if "zero_share" in line] == [*range(1, 41, 2), 40]


def test_one_flip_is_counted(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = made.watch.codes()
    layer = next(iter(ternary_layers(made.student).values()))
    with torch.no_grad():
        row = layer.weight[0, :16]
        largest = int(row.abs().argmax())
        row[largest] = -row[largest]
    count = sum(m.weight.numel() for m in ternary_layers(made.student).values())
    assert made.watch.diagnostics(before)["flip_share"] == 1 / count


# Stopping and going on


def outcome(folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    student = checkpoint.load_tensors(folder / origin.STUDENT_FILE)
    return student, [line["loss"] for line in metrics.steps(folder)]


def same(
    a: tuple[dict[str, Tensor], list[float]], b: tuple[dict[str, Tensor], list[float]]
) -> None:
    assert a[1] == b[1]
    assert set(a[0]) == set(b[0])
    assert all(torch.equal(a[0][n], b[0][n]) for n in a[0])


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, signal: str = "SIGTERM") -> None:
    """As if a signal came during that step of every run."""
    polled = iter(range(1, 1000))
    monkeypatch.setattr(stop, "requested", lambda: signal if next(polled) % steps == 0 else None)


@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}]
)
def test_resumed_is_uninterrupted_to_the_bit(
    settings: dict[str, Any],
    source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = checkpoints.recipe(source, text, steps=5, **settings)
    whole = distill.distill(str(source), tmp_path / "whole", recipe, offline=True)
    with monkeypatch.context() as stopping:
        stop_after(2, stopping)
        for at in (2, 4):
            with pytest.raises(StoppedError, match=f"after step {at} of 5"):
                distill.distill(str(source), tmp_path / "parts", recipe, offline=True)
            assert snapshots.checkpoints(tmp_path / "parts")[-1].name == f"step-{at:08d}"
            with pytest.raises(InputError, match="not finished"):
                hf.load(str(tmp_path / "parts"))
    parts = distill.distill(str(source), tmp_path / "parts", recipe, offline=True, resume=True)
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    assert parts["student"] == whole["student"]
    assert parts["training"]["loss_first"] == whole["training"]["loss_first"]
    assert not snapshots.checkpoints(tmp_path / "parts")


def test_time_limit_stops_and_the_same_command_goes_on(
    source: Path, text: Path, tmp_path: Path
) -> None:
    recipe = checkpoints.recipe(source, text, steps=2)
    with pytest.raises(StoppedError, match="time limit") as caught:
        distill.distill(str(source), tmp_path / "run", recipe, offline=True, time_limit=0.0)
    assert caught.value.exit_code == 75
    report = distill.distill(str(source), tmp_path / "run", recipe, offline=True)
    whole = distill.distill(str(source), tmp_path / "whole", recipe, offline=True)
    same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    again = distill.distill(str(source), tmp_path / "run", recipe, offline=True)
    assert again["student"] == report["student"] == whole["student"]


def test_ctrl_c_saves(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, monkeypatch, "SIGINT")
    with pytest.raises(InterruptedByUser, match="checkpoint is saved"):
        distill.distill(
            str(source), tmp_path / "run", checkpoints.recipe(source, text), offline=True
        )
    assert len(snapshots.checkpoints(tmp_path / "run")) == 1


def test_killed_while_it_saved(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = checkpoints.recipe(source, text, steps=3)
    distill.distill(str(source), tmp_path / "whole", recipe, offline=True)
    run = tmp_path / "run"
    with monkeypatch.context() as stopping:
        stop_after(1, stopping)
        with pytest.raises(StoppedError):
            distill.distill(str(source), run, recipe, offline=True)
    half = run / snapshots.CHECKPOINTS / "step-00000002.part"  # a second checkpoint, half written,
    half.mkdir()
    (half / "student.safetensors").write_bytes(b"half")
    with (run / metrics.METRICS).open("a") as file:  # and what was said of later steps
        file.write('{"step": 2, "loss": 9.0}\n{"step": 3, "lo')
    distill.distill(str(source), run, recipe, offline=True)
    same(outcome(tmp_path / "whole"), outcome(run))
    assert not list((run / snapshots.CHECKPOINTS).glob("step-*"))


def test_same_seed_same_weights_and_another_seed_others(
    source: Path, text: Path, tmp_path: Path
) -> None:
    recipe = checkpoints.recipe(source, text)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        distill.distill(str(source), tmp_path / name, replace(recipe, seed=seed), offline=True)
    same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))
    assert outcome(tmp_path / "one")[1] != outcome(tmp_path / "other")[1]


def test_a_run_of_another_recipe_is_not_gone_on_with(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = checkpoints.recipe(source, text, steps=3)
    with monkeypatch.context() as stopping:
        stop_after(1, stopping)
        with pytest.raises(StoppedError):
            distill.distill(str(source), tmp_path / "run", recipe, offline=True)
    before = checkpoints.contents(tmp_path / "run")
    others = [
        checkpoints.recipe(source, text, steps=3, lr=0.5),
        checkpoints.recipe(source, text, steps=3, group_size=12),
        replace(recipe, seed=3),
    ]
    for other in others:
        with pytest.raises(RecipeError, match="another recipe"):
            distill.distill(str(source), tmp_path / "run", other, offline=True)
    with pytest.raises(RecipeError, match="holds a run"):
        distill.distill(str(source), tmp_path / "run", recipe, offline=True, resume=False)
    assert checkpoints.contents(tmp_path / "run") == before
    seldom = replace(recipe, training=replace(recipe.training, checkpoint_minutes=1.0))
    distill.distill(str(source), tmp_path / "run", seldom, offline=True)
    distill.distill(str(source), tmp_path / "run", others[0], offline=True, overwrite=True)


# Divergence


def test_divergence_keeps_the_last_checkpoint(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = checkpoints.recipe(source, text, steps=6, lr=1e30, warmup=0.0)
    recipe = replace(recipe, training=replace(recipe.training, checkpoint_minutes=0.0))
    with pytest.raises(DivergenceError, match="diverged at step") as caught:
        distill.distill(str(source), tmp_path / "run", recipe, offline=True)
    assert caught.value.exit_code == 7
    assert len(snapshots.checkpoints(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / origin.STUDENT_FILE).exists()


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    name, layer = next(iter(ternary_layers(made.student).items()))
    before = states.fingerprint(made.student)
    layer.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(DivergenceError, match=name):
        made.one_step()
    assert states.fingerprint(made.student) == before


# From ternary models


def codes(model: Any) -> dict[str, Tensor]:
    return {n: m.numbers().canonical().codes for n, m in ternary_layers(model).items()}


@pytest.fixture(scope="module")
def run(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)
        distill.distill(str(source), out, checkpoints.recipe(source, text), offline=True)
    return out


def start_of(model: Path, recipe: Recipe) -> Prepared:
    return prepare_run(str(model), recipe, offline=True)


def test_training_goes_on_from_a_run_with_its_codes(run: Path, text: Path, tmp_path: Path) -> None:
    trained = codes(hf.load(str(run)).model)
    with pytest.raises(RecipeError, match="ternary already, with --group-size 16"):
        start_of(run, checkpoints.recipe(run, text, group_size=99))
    prepared = start_of(run, checkpoints.recipe(run, text, group_size=128))
    assert prepared.recipe.scheme.group_size == 16  # that of the layers
    started = codes(prepared.student.model)
    assert all(torch.equal(started[n], trained[n]) for n in trained)
    before = checkpoints.contents(run)
    report = distill.distill(str(run), tmp_path / "on", checkpoints.recipe(run, text), offline=True)
    assert checkpoints.contents(run) == before
    assert report["untrained"]["perplexity"] == pytest.approx(
        read_json(run / distill.REPORT)["student"]["perplexity"], rel=1e-4
    )


def test_training_goes_on_from_an_artefact_with_its_codes(
    run: Path, text: Path, tmp_path: Path
) -> None:
    pack(str(run), tmp_path / "packed")
    before = checkpoints.contents(tmp_path / "packed")
    recipe = checkpoints.recipe(tmp_path / "packed", text)
    trained = codes(hf.load(str(run)).model)
    started = codes(start_of(tmp_path / "packed", recipe).student.model)
    assert all(torch.equal(started[n], trained[n]) for n in trained)
    distill.distill(str(tmp_path / "packed"), tmp_path / "on", recipe, offline=True)
    pack(str(tmp_path / "on"), tmp_path / "repacked")
    prepared = start_of(tmp_path / "repacked", checkpoints.recipe("repacked", text))
    assert prepared.teacher.kind == "dense"  # the first of the line
    assert checkpoints.contents(tmp_path / "packed") == before


def test_an_artefact_that_was_saved_again_asks_for_its_teacher(
    run: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    pack(str(run), tmp_path / "packed")
    packed = hf.load(str(tmp_path / "packed"))
    packed.model.save_pretrained(tmp_path / "again")
    packed.tokenizer.save_pretrained(tmp_path / "again")
    assert hf.load(str(tmp_path / "again")).kind == "packed"
    recipe = checkpoints.recipe("again", text)
    with pytest.raises(InputError, match="does not say what it was made from"):
        start_of(tmp_path / "again", recipe)
    options: dict[str, Any] = {"teacher": str(source), "offline": True}
    prepared = prepare_run(str(tmp_path / "again"), recipe, **options)
    assert ternary_layers(prepared.student.model)


def test_a_teacher_of_another_shape_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    model = checkpoints.model("llama")
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "short")
    hf.load(str(source)).tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(RecipeError, match="differ in their blocks"):
        distill.distill(
            str(source),
            tmp_path / "run",
            checkpoints.recipe(source, text),
            teacher=str(tmp_path / "short"),
            offline=True,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("worse", [True, False])
def test_a_loss_that_got_worse_is_said_of_several_steps(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: bool
) -> None:
    """A tenth of them; single ones differ by more than a training changes."""
    append = metrics.append

    def told(folder: Path, values: dict[str, Any]) -> None:
        loss = {1: 1.0, 2: 4.0, 19: 2.0}.get(values["step"], 6.0 if worse else 2.5)
        append(folder, values | {"loss": loss})

    monkeypatch.setattr(metrics, "append", told)
    recipe = checkpoints.recipe(source, text, steps=20)
    report = distill.distill(str(source), tmp_path / "run", recipe, offline=True)
    said = [note for note in report["notes"] if "got worse" in note]
    one = "The loss got worse: 2.5000 at the first 2 steps (mean), 4.0000 at the last."
    assert said == ([one] if worse else [])
