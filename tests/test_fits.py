"""What fits into less memory: frozen layers, optimizer states in 8 bits, weights in bfloat16.

Gradients are held against the written-out formulas, resumed runs against uninterrupted ones, and
computed bytes against the tensors that are there.
"""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from test_train import batch, close, gradients, random_blocks
from torch import Tensor

from ternq import hf, optimize, rounding, ternary
from ternq.distill import distill
from ternq.errors import RecipeError
from ternq.frozen import Compact, Frozen, FrozenCodes, LowRank, arrange, fold, plain_state
from ternq.linear import TernaryLinear, packed_layers, prepare, ternary_layers
from ternq.pack import pack
from ternq.prepared import prepare_run
from ternq.processes import Crew
from ternq.progress import ignore
from ternq.recipe import Scheme, Ste, Training
from ternq.student import student_of
from ternq.ternarize import ternarize
from ternq.train import Trainer

GROUP = 16
torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
MODES: list[Any] = [
    {"train": "scales"},
    {"train": "low-rank", "rank": 4},
    {"train": "low-rank", "rank": 4, "teacher_dtype": "int8"},
    pytest.param({"optimizer": "adamw-8bit"}, marks=torchao),
    pytest.param({"latent": "bfloat16"}, marks=torchao),
    pytest.param({"latent": "bfloat16", "optimizer": "adamw-8bit"}, marks=torchao),
    pytest.param({"train": "low-rank", "rank": 64, "optimizer": "adamw-8bit"}, marks=torchao),
]

pytestmark = pytest.mark.usefixtures("quick")


def teacher() -> Any:
    """A random model whose weights are large enough for states in 8 bits."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(checkpoints.LLAMA | sizes))
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def trainer(folder: Path, steps: int = 4, **settings: Any) -> Trainer:
    usual: dict[str, Any] = {"batch_size": 4, "sequence_length": 16, "steps": 4, "lr": 1e-2}
    big, training = teacher(), Training(**usual | settings)
    student = copy.deepcopy(big)
    prepare(student, Scheme(group_size=GROUP), training.ste)
    made = Trainer(student, big, random_blocks(), training, steps, folder, ignore)
    made.objective.autocast = torch.autocast("cpu", enabled=False)
    return made


def layer(out: int = 24, in_: int = 40, ste: Ste = "identity", bias: bool = True) -> TernaryLinear:
    torch.manual_seed(1)
    dense = torch.nn.Linear(in_, out, bias=bias)
    return TernaryLinear.from_dense(dense, Scheme(group_size=GROUP), ste)


def low_rank(plain: TernaryLinear, rank: int = 3) -> LowRank:
    """With an adapter that has learned something."""
    made = LowRank(plain, rank, torch.Generator().manual_seed(2))
    torch.nn.init.normal_(made.adapter_b, std=0.7)
    return made


def doubles(**tensors: Tensor) -> dict[str, Tensor]:
    return {k: t.detach().double().requires_grad_() for k, t in tensors.items()}


# Gradients


def spread(values: Tensor, columns: int) -> Tensor:
    """``[out, groups]`` as ``[out, in]``."""
    return values.repeat_interleave(GROUP, 1)[:, :columns]


def test_scales_learn_by_the_formula() -> None:
    made, x = FrozenCodes(layer()), torch.randn(5, 40, requires_grad=True)
    made(x).square().sum().backward()
    v = doubles(x=x, scale=made.weight_scale, shift=made.weight_shift, bias=made.bias)
    weight = spread(v["scale"], 40) * made.weight.double() + spread(v["shift"], 40)
    (v["x"] @ weight.t() + v["bias"]).square().sum().backward()
    own = {"x": x, "scale": made.weight_scale, "shift": made.weight_shift, "bias": made.bias}
    for name, tensor in own.items():
        assert torch.allclose(tensor.grad.double(), v[name].grad, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("ste", ["identity", "ttq"])
def test_an_adapter_learns_by_the_formula(ste: Ste) -> None:
    made, x = low_rank(layer(ste=ste)), torch.randn(5, 40, requires_grad=True)
    made(x).square().sum().backward()
    own = {"a": made.adapter_a, "b": made.adapter_b, "x": x}
    own |= {"scale": made.weight_scale, "shift": made.weight_shift}
    v = doubles(**own)
    change = v["b"] @ v["a"]
    latent = spread(made.step, 40) * made.weight.double() + spread(made.unit, 40) * change
    codes = made.codes().double()
    assert torch.equal(codes, rounding.quantize(latent, GROUP).double())
    weight = spread(v["scale"], 40) * codes + spread(v["shift"], 40)
    through = torch.where(codes != 0, spread(v["scale"], 40), 1) if ste == "ttq" else 1
    weight = weight + (latent - latent.detach()) * torch.as_tensor(through).detach()
    (v["x"] @ weight.t() + made.bias.double()).square().sum().backward()
    for name, tensor in own.items():
        assert torch.allclose(tensor.grad.double(), v[name].grad, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("settings", MODES[:2])
def test_recomputed_blocks_give_the_same_gradients(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = gradients(trainer(tmp_path, **settings), batch())
    again = gradients(trainer(tmp_path, **settings, gradient_checkpointing=True), batch())
    close(plain, again)


# What is held


@pytest.mark.parametrize("make", [FrozenCodes, low_rank])
def test_no_float_weight_waits_for_the_backward_pass(make: Any) -> None:
    made, kept = make(layer()), []
    x = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x).sum()
    assert made.weight.numel() not in [t.numel() for t in kept]
    assert made.weight.dtype == torch.int8
    assert not any(p.numel() == made.weight.numel() for p in made.parameters())


def test_a_base_that_is_held_once_is_so_on_another_device(
    source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module's `to` makes buffers of its own; a clone stands for another device here."""
    asked = checkpoints.recipe(
        source, text, train="low-rank", teacher_dtype="int8", start="closed-form"
    )
    prepared = prepare_run(str(source), asked, offline=True)
    kind = type(prepared.student.model)
    monkeypatch.setattr(kind, "to", lambda self, device: self._apply(torch.clone))
    prepared.settle()
    assert prepared.teacher is not None
    theirs = dict(prepared.teacher.model.named_modules())
    for name, own in ternary_layers(prepared.student.model).items():
        assert own.weight is theirs[name].weight and own.step is theirs[name].step


# Frozen layers


def test_an_adapter_starts_where_the_base_is() -> None:
    plain = layer(64, 256)
    made = LowRank(plain, 4, torch.Generator().manual_seed(0))
    base = ternary.dequantize(made.weight, made.step, None, GROUP)
    assert torch.equal(made.latent(), base)
    assert float((base - plain.weight).detach().abs().max()) <= float(made.step.max()) / 2 * 1.001
    assert int((made.codes() != plain.codes()).sum()) < 0.02 * made.weight.numel()


def test_an_adapter_of_full_rank_reaches_any_codes() -> None:
    plain = layer(bias=False)
    made = LowRank(plain, 40, torch.Generator().manual_seed(0))
    wanted = torch.randn(24, 40)
    change = (wanted - made.latent()) / spread(made.unit, 40)
    with torch.no_grad():
        made.adapter_a.copy_(torch.eye(40))
        made.adapter_b.copy_(change)
    assert torch.equal(made.codes(), rounding.quantize(wanted, GROUP))


def pair(training: Training) -> tuple[Any, Any]:
    """A teacher and its student, arranged."""
    big = teacher()
    student, _ = student_of(big, Scheme(group_size=GROUP), training)
    arrange(student, training, teacher=big)
    return student, big


@pytest.mark.parametrize("train", ["all", "low-rank", "scales"])
def test_a_teacher_in_eight_bits_is_near(train: Any) -> None:
    student, big = pair(Training(train=train, teacher_dtype="int8"))
    whole, ids = teacher(), batch()
    kept = {n: m for n, m in big.named_modules() if isinstance(m, Compact)}
    assert set(kept) == set(ternary_layers(student))
    for name, layer in kept.items():
        weight = whole.get_submodule(name).weight
        step = ternary.grouped(weight, GROUP).abs().amax(2, keepdim=True) / 127
        apart = ternary.grouped((layer.values() - weight).abs(), GROUP)
        assert bool((apart <= step / 2 * 1.001).all())
        weight.data = layer.values()
        base = student.get_submodule(name)
        assert (base.weight is layer.weight) == (train == "low-rank")  # held once
    assert torch.equal(big(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_a_teacher_in_bfloat16_has_the_weights_of_one() -> None:
    big = pair(Training(teacher_dtype="bfloat16"))[1]
    rounded = teacher()
    for name, layer in big.named_modules():
        if isinstance(layer, Compact):
            assert layer.weight.dtype == torch.bfloat16
            weight = rounded.get_submodule(name).weight
            weight.data = weight.bfloat16().float()
    assert torch.equal(big(input_ids=batch()).logits, rounded(input_ids=batch()).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(big(input_ids=batch()).logits, rounded(input_ids=batch()).logits)


def test_an_adapter_whose_start_is_not_the_teacher_has_a_base_of_its_own() -> None:
    big, training = teacher(), Training(train="low-rank", teacher_dtype="int8")
    other, _ = student_of(teacher(), Scheme(group_size=GROUP), training)
    arrange(other, training, teacher=big)
    for name, layer in ternary_layers(other).items():
        assert layer.weight is not big.get_submodule(name).weight


def test_arranging_twice_is_arranging_once() -> None:
    training = Training(train="low-rank", teacher_dtype="int8")
    student, big = pair(training)
    before = [*student.modules(), *big.modules()]
    arrange(student, training, seed=1, teacher=big)
    assert all(a is b for a, b in zip(before, [*student.modules(), *big.modules()], strict=True))


def test_nothing_but_a_teacher_is_held_in_less() -> None:
    with pytest.raises(RecipeError, match="--teacher-dtype int8"):
        Training(objective="ce", teacher_dtype="int8")


def test_adapters_come_from_the_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        student = teacher()
        prepare(student, Scheme(group_size=GROUP))
        arrange(student, Training(train="low-rank"), seed)
        made.append([m.adapter_a for m in student.modules() if isinstance(m, LowRank)])
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(made[0], made[2], strict=True))


def test_folded_layers_compute_the_same() -> None:
    model = torch.nn.ModuleDict({"a": low_rank(layer())})
    x, numbers = torch.randn(3, 40), model["a"].numbers()
    before = model["a"](x)
    fold(model)
    after = model["a"]
    assert type(after) is FrozenCodes
    assert torch.equal(after(x), before)
    assert after.numbers().same(numbers)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 1e-40, 65504.0])
def test_stored_latents_have_the_codes_whatever_the_scale(scale: float) -> None:
    made = FrozenCodes(layer())
    made.weight[0, :GROUP] = 0
    torch.nn.init.constant_(made.weight_scale, scale)
    given = {f"a.{name}": tensor for name, tensor in made.state_dict().items()}
    state = plain_state(torch.nn.ModuleDict({"a": made}), given)
    assert torch.equal(rounding.quantize(state["a.weight"], GROUP), made.weight)
    assert torch.equal(state["a.weight_scale"], made.weight_scale)


@pytest.mark.parametrize("settings", MODES)
def test_what_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(tmp_path, **settings)
    before = {n: t.clone() for n, t in made.student.state_dict().items()}
    codes = made.watch.codes()
    made.run()
    changed = {n for n, t in made.student.state_dict().items() if not torch.equal(t, before[n])}
    parts = {n.rpartition(".")[2] for n in changed}
    if made.settings.train == "all":
        assert parts == {"weight", "weight_scale", "weight_shift"}
        assert "model.norm.weight" in changed
        assert "lm_head.weight" not in changed
    elif made.settings.train == "scales":
        assert parts == {"weight_scale", "weight_shift"}
    else:
        assert parts == {"weight_scale", "weight_shift", "adapter_a", "adapter_b"}
    flipped = sum(int((c != codes[n]).sum()) for n, c in made.watch.codes().items())
    assert bool(flipped) == (made.settings.train != "scales")


def test_weights_in_bfloat16_are_rounded_at_random(tmp_path: Path) -> None:
    """A step that bfloat16 could not tell from none moves the mean of the weights all the same."""
    pytest.importorskip("torchao")
    weight = torch.nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
    settings = Training(latent="bfloat16")
    adamw = optimize._adamw([{"params": [weight], "lr": 1e-4, "weight_decay": 0.0}], settings)
    weight.grad = -torch.ones_like(weight)
    state = torch.get_rng_state()
    optimize.take_step(adamw, settings, seed=0, step=0, norm=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(weight.detach().float().mean() - 1) == pytest.approx(1e-4, rel=0.1)


# Stopping and going on


@pytest.mark.parametrize("settings", MODES)
def test_a_resumed_run_is_the_same_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = trainer(folders[0], **settings)
    whole.run()
    first = trainer(folders[1], **settings)
    first.time_limit = 0.0
    with pytest.raises(Exception, match="after step 1"):
        first.run()
    second = trainer(folders[1], **settings)
    torch.manual_seed(12345)
    assert second.restore()
    assert second.step == 1
    second.run()
    ends = [
        (made.student.state_dict(), optimize.state_tensors(made.optimizer))
        for made in (whole, second)
    ]
    for one, other in zip(*ends, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name
    if made_8bit := settings.get("optimizer"):
        assert any(n.endswith("exp_avg_sq.codes") for n in ends[0][1]), made_8bit


# Whole commands


@pytest.mark.parametrize("settings", [MODES[0], MODES[1], MODES[4]])
def test_a_finished_run_is_an_ordinary_one(
    settings: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    report = distill(str(source), out, checkpoints.recipe(source, text, **settings))
    loaded = hf.load(str(out))
    layers = ternary_layers(loaded.model)
    assert not any(isinstance(m, Frozen) for m in layers.values())
    assert all(m.weight.dtype == torch.float32 for m in layers.values())
    again = pack(str(out), tmp_path / "packed")
    assert again["verify"]["ok"]
    packed = hf.load(str(tmp_path / "packed"), dtype=torch.float32)
    for name, layer in packed_layers(packed.model).items():
        stored = ternary.TernaryWeight(*layer.unpacked(), layer.group_size)
        assert layers[name].numbers().canonical().same(stored)
    assert report["recipe"]["training"]["train"] == settings.get("train", "all")


@pytest.mark.parametrize("settings", MODES[:2])
def test_ternarize_packs_what_was_trained(
    settings: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = ternarize(str(source), out, checkpoints.recipe(source, text, **settings))
    assert report["verify"]["ok"]
    names = hf.load(str(out)).model.state_dict()
    assert not any(part in name for name in names for part in ("adapter", "step", "unit"))


# Refusals


def test_without_torchao_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for settings, said in [
        (Training(optimizer="adamw-8bit"), "--optimizer adamw-8bit needs the package torchao"),
        (Training(latent="bfloat16"), "--latent bfloat16 needs"),
    ]:
        with pytest.raises(RecipeError, match=said) as caught:
            optimize.refuse(settings, "cpu", Crew())
        assert "pip install" in str(caught.value.hint)
    optimize.refuse(Training(train="scales"), "cpu", Crew())


def test_offloading_is_refused_on_the_cpu(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = checkpoints.recipe(source, text, offload=True)
    with pytest.raises(RecipeError, match="from a GPU to the host; --device is cpu"):
        distill(str(source), tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": "scales", "latent": "bfloat16"}, "freezes them, in one byte each"),
        ({"train": "low-rank", "rank": 0}, "--rank is 0"),
        ({"batch_size": 10**400}, "--batch-size is too large; it is at most 1,000,000,000,000"),
        ({"warmup": 5.0}, "--warmup is 5.0; it is a share, 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Training(**settings)


def test_gradients_on_the_host_are_clipped_there() -> None:
    host = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for parameter, value in zip(host, (3.0, 4.0), strict=True):
        parameter.grad = torch.full((4,), value)
    stand_in = SimpleNamespace(
        stream=SimpleNamespace(synchronize=lambda: None), param_d2h_map=dict(enumerate(host))
    )
    optimize._clip_on_host(stand_in, 1.0, norm=10.0)
    norm = torch.stack([p.grad.norm() for p in host]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-4)
    optimize._clip_on_host(stand_in, 2.0, norm=1.0)
    assert float(torch.stack([p.grad.norm() for p in host]).norm()) == float(norm)
