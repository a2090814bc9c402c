"""Memory counted before anything is loaded, against sizes known in closed form and a real step."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers

from ternq import budget, cli, corpus, hf
from ternq import footprint as counting
from ternq.errors import ResourceError
from ternq.footprint import Footprint, footprint
from ternq.optimize import optimizer
from ternq.plan import plan
from ternq.processes import Crew
from ternq.progress import ignore
from ternq.recipe import Recipe, Scheme, Training, untrained
from ternq.student import student_of
from ternq.teacher import cache_bytes
from ternq.train import Trainer
from ternq.walk import bytes_needed
from ternq.watch import Watch

torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
SCHEME = Scheme(group_size=16)
SETTINGS = Training(batch_size=2, sequence_length=16, steps=1)


def of(kind: str, blocks: int = 1) -> Callable[[], Any]:
    """What builds a tiny model of so many blocks."""
    name, options = checkpoints.CONFIGS[kind]
    deeper = {key: blocks for key in ("num_hidden_layers", "n_layer") if key in options}
    config = getattr(transformers, name)(**options | deeper)
    return lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def counted(kind: str = "llama", **settings: Any) -> Footprint:
    return footprint(of(kind), SCHEME, replace(SETTINGS, **settings), "cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out text of a block: tiny models train in less than they are measured in."""
    monkeypatch.setattr(counting, "HELD_OUT_TOKENS", 64)
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 256)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt-neox", "phi", "gemma"])
def test_weights_and_optimizer_are_those_of_the_models(kind: str) -> None:
    teacher = of(kind)()
    student, _ = student_of(teacher, SCHEME, SETTINGS)
    tensors = [*teacher.parameters(), *teacher.buffers(), *student.parameters()]
    tensors += [*student.buffers(), *(t for o in Watch(student).initial.values() for t in o)]
    held = sum(s.nbytes() for s in {t.untyped_storage() for t in tensors})
    found = counted(kind)
    assert found.weights == pytest.approx(held, rel=0.01)
    groups = optimizer(student, SETTINGS).param_groups
    trained = [p.numel() for group in groups for p in group["params"]]
    assert found.optimizer >= 8 * sum(trained)
    assert found.optimizer < 8 * sum(trained) + 1000 * len(trained)


def _bytes(value: Any) -> int:
    """Of a state, or of the pieces of one in 8 bits."""
    pieces = getattr(value, "tensor_attrs", None)
    return sum(getattr(value, n).nbytes for n in pieces) if pieces else value.nbytes


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "scales"},
        {"train": "low-rank", "rank": 64},
        {"train": "low-rank", "rank": 64, "teacher_dtype": "int8"},
        {"teacher_dtype": "bfloat16"},
        pytest.param({"optimizer": "adamw-8bit"}, marks=torchao),
        pytest.param({"latent": "bfloat16"}, marks=torchao),
        pytest.param({"latent": "bfloat16", "optimizer": "adamw-8bit"}, marks=torchao),
    ],
)
def test_counted_are_the_tensors_that_are_there(settings: dict[str, Any], tmp_path: Path) -> None:
    training = replace(SETTINGS, **settings)
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**(checkpoints.LLAMA | sizes))

    def build() -> Any:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    teacher = build()
    student, _ = student_of(teacher, SCHEME, training)
    teacher.requires_grad_(False)
    ids = repeat(torch.zeros(16, dtype=torch.int64))
    made = Trainer(student, teacher, ids, training, 1, tmp_path, ignore, alone=True)
    tensors = [t for m in (student, teacher) for t in (*m.parameters(), *m.buffers())]
    tensors += [t for own in made.watch.initial.values() for t in own]
    held = sum(s.nbytes() for s in {t.untyped_storage() for t in tensors})
    made.one_step()
    states = sum(_bytes(v) for s in made.optimizer.state.values() for v in s.values())
    found = footprint(build, SCHEME, training, "cpu")
    assert found.weights == pytest.approx(held, rel=0.01)
    assert found.optimizer == pytest.approx(states, rel=0.02)


def test_a_model_for_another_device_is_loaded_on_the_host() -> None:
    here, there = (
        footprint(of("llama"), SCHEME, replace(SETTINGS, train="low-rank"), device)
        for device in ("cpu", "cuda")
    )
    assert here.host == 0 and there.loading == 0
    assert here.loading == there.host > sum(p.nbytes for p in of("llama")().parameters())
    whole = footprint(of("llama"), SCHEME, SETTINGS, "cuda")
    assert whole.host == sum(p.nbytes for p in of("llama")().parameters())
    assert whole.loading > 0
    assert not budget.Memory(there, free=2**40, host=there.host - 1).fits
    assert budget.Memory(there, free=2**40, host=there.host).fits


def test_a_start_that_reads_text_is_made_beside_the_models() -> None:
    """On another device block by block, whatever lies in the host's memory."""
    starts = {"closed-form": 0, "compensated": 32, "reconstructed": 32}
    settings = replace(SETTINGS, train="scales", calibration=1000, sequence_length=64)
    found = {}
    for start in starts:
        for device in ("cpu", "cuda"):
            count = footprint(of("llama"), SCHEME, replace(settings, start=start), device)
            found[start, device] = count
            assert count.total >= count.loading + count.start
    assert found["closed-form", "cpu"].start == 0 < found["compensated", "cpu"].start
    for start in ("compensated", "reconstructed"):
        here, there = found[start, "cpu"], found[start, "cuda"]
        assert here.start == there.start and there.loading == 0 < there.host
        assert there.host > found["closed-form", "cuda"].host  # the dense weights twice


def test_of_many_each_has_its_rows_and_shards_of_what_learns() -> None:
    settings = replace(SETTINGS, batch_size=8)
    alone, plain, shared = (
        footprint(of("llama", 3), SCHEME, settings, "cpu", crew)
        for crew in (Crew(), Crew(4), Crew(4, sharded=True))
    )
    quarter = footprint(of("llama", 3), SCHEME, replace(settings, batch_size=2), "cpu")
    assert plain == quarter and plain.step < alone.step
    assert shared.optimizer == plain.optimizer // 4
    model = of("llama", 3)()
    theirs = sum(p.nbytes for p in model.parameters())
    assert theirs < shared.weights < theirs + plain.weights // 4
    assert shared.total < plain.total


def test_strategies_count_on_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one device is too small for all of it, several that share the parameters may do."""
    given: Any = (of("llama"), SCHEME, replace(SETTINGS, batch_size=8), "cpu")
    alone = budget.choose(*given, 2**40)[1].needed
    many = budget.choose(*given, 2**40, crew=Crew(8, sharded=True))[1].needed
    assert many < alone
    chosen, _, why = budget.choose(*given, many, crew=Crew(8, sharded=True))
    assert chosen.train == "all" and "on each of 8 devices, which share the parameters" in why
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    assert budget.choose(*given, many)[1].needed == many


def test_what_does_not_learn_is_held_once() -> None:
    teacher = of("opt")()
    student, _ = student_of(teacher, SCHEME, SETTINGS)
    mine, theirs = (dict(m.named_parameters()) for m in (student, teacher))
    shared = {n for n in mine if n in theirs and mine[n] is theirs[n]}
    assert shared == {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"}


@pytest.mark.slow
def test_more_blocks_are_as_those_that_were_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "EXACT", 99)
    exact = footprint(of("llama", 20), SCHEME, SETTINGS, "cpu")
    monkeypatch.setattr(counting, "EXACT", 12)
    found = footprint(of("llama", 20), SCHEME, SETTINGS, "cpu")
    for name, value in vars(exact).items():
        if name == "rough":
            assert value is None
            continue
        # the peak may move from the losses to a block as a model gets deeper
        assert vars(found)[name] == pytest.approx(value, rel=0.02), name


def test_a_step_takes_more_with_larger_batches_and_less_when_it_recomputes() -> None:
    whole, parts = counted(batch_size=8), counted(batch_size=8, micro_batch_size=1)
    again = counted(batch_size=8, gradient_checkpointing=True)
    assert parts.step < whole.step
    assert again.step < whole.step
    assert whole.weights == parts.weights == again.weights


def test_what_a_step_takes_holds_its_gradients_and_activations() -> None:
    found = counted("llama", off=0.0, kl=0.0, ce=1.0)
    logits = 4 * 2 * 16 * checkpoints.VOCABULARY
    student, _ = student_of(of("llama")(), SCHEME, SETTINGS)
    groups = optimizer(student, SETTINGS).param_groups
    trained = sum(p.numel() for group in groups for p in group["params"])
    assert found.step > 4 * trained  # gradients
    assert found.step < 20 * trained + 40 * logits


def test_nothing_of_the_world_changes() -> None:
    state = torch.get_rng_state()
    model = of("llama")()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.set_rng_state(state)
    counted()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_optimizer_on_the_host_is_counted_there() -> None:
    whole, moved = (
        footprint(of("llama"), SCHEME, replace(SETTINGS, offload=offload), "cuda")
        for offload in (False, True)
    )
    assert moved.optimizer == 0 and moved.step == whole.step
    assert moved.host == pytest.approx(2 * whole.optimizer, rel=0.01)  # two moments, two copies


@pytest.mark.parametrize("own", [{}, {"optimizer": "adamw-8bit"}, {"latent": "bfloat16"}])
def test_a_probe_teaches_nothing(tmp_path: Path, own: dict[str, Any]) -> None:
    teacher, settings = of("llama")(), replace(SETTINGS, **own)
    student, _ = student_of(teacher, SCHEME, settings)
    teacher.requires_grad_(False)
    trainer = Trainer(
        student=student, teacher=teacher, blocks=repeat(torch.zeros(16, dtype=torch.int64)),
        settings=settings, steps=1, folder=tmp_path, progress=ignore,
    )  # fmt: skip
    before = {n: t.clone() for n, t in student.state_dict().items()}
    assert budget.probe(trainer) > 0
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())
    assert not trainer.optimizer.state
    assert all(p.grad is None for p in student.parameters())
    rates = [float(g["lr"]) for g in trainer.optimizer.param_groups]
    assert rates == pytest.approx([SETTINGS.peak_lr] * 3)


# Strategies


def tried(by_blocks: bool = False, **settings: Any) -> list[tuple[Any, ...]]:
    chosen = replace(SETTINGS, batch_size=6, **settings)
    return [
        (s.train, s.micro_batch_size, s.gradient_checkpointing, s.teacher_dtype, s.block_by_block)
        for family in budget.families(SCHEME, chosen, by_blocks, Crew())
        for s, _ in family
    ]


def test_strategies_and_their_order() -> None:
    whole, eight = "float32", "int8"
    sizes = [(None, False), (3, False), (1, False), (1, True)]
    sizes = [*((*size, whole) for size in sizes), (1, True, eight)]
    everything = [(train, *s, False) for train in ("all", "low-rank", "scales") for s in sizes]
    assert tried() == everything
    last = [("all", None, False, whole, True)]
    assert tried(by_blocks=True) == [*everything, *last]
    assert tried(by_blocks=True, block_by_block=True) == last
    assert tried(by_blocks=True, train="scales") == [("scales", *s, False) for s in sizes]
    assert tried(micro_batch_size=2, gradient_checkpointing=True, train="scales") == [
        ("scales", 2, True, dtype, False) for dtype in (whole, eight)
    ]


def test_what_goes_with_neither_shards_nor_another_method_is_not_tried() -> None:
    shards, absmean = Crew(8, sharded=True), Scheme(method="absmean")
    trains = [f[0][0].train for f in budget.families(SCHEME, SETTINGS, False, shards)]
    assert trains == ["all", "scales"]
    trains = [f[0][0].train for f in budget.families(absmean, SETTINGS, True, Crew())]
    assert trains == ["all"]


@pytest.mark.parametrize(
    ("size", "sizes"), [(12, [12, 6, 3, 1]), (7, [7, 1]), (10**12 - 11, [10**12 - 11, 1])]
)
def test_micro_batches_are_the_largest_that_share_a_batch(size: int, sizes: list[int]) -> None:
    settings = replace(SETTINGS, batch_size=size, train="scales")
    (family,) = budget.families(SCHEME, settings, False, Crew())
    tried = [s.micro_batch_size or size for s, _ in family if not s.gradient_checkpointing]
    assert tried == sizes


def test_each_takes_less_than_the_one_before_it() -> None:
    (family, *_) = budget.families(SCHEME, replace(SETTINGS, batch_size=6), False, Crew())
    needed = [footprint(of("llama"), SCHEME, s, "cpu").total for s, _ in family]
    assert needed == sorted(needed, reverse=True)


def test_the_first_strategy_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, batch_size=6)
    tried = [s for family in budget.families(SCHEME, settings, False, Crew()) for s in family]
    sizes = {s: 10**9 - 10**6 * n for n, (s, _) in enumerate(tried)}
    monkeypatch.setattr(
        budget, "footprint", lambda b, scheme, s, device, crew: Footprint(sizes[s], 0, 0)
    )
    monkeypatch.setattr(budget, "MARGIN", 1.0)
    for chosen, how in tried:
        found, memory, why = budget.choose(of("llama"), SCHEME, settings, "cpu", sizes[chosen])
        assert found == chosen and why.startswith(how) and memory.needed == sizes[chosen]
    with pytest.raises(ResourceError, match="needs about 1.0 GB of memory, 0.0 GB more"):
        budget.choose(of("llama"), SCHEME, settings, "cpu", min(sizes.values()) - 1)


@pytest.mark.parametrize(
    "crew, bounds",
    [(Crew(), {17, 2, 1, 0}), pytest.param(Crew(2, True), {9, 2, 0}, marks=pytest.mark.slow)],
)
def test_the_bound_lies_below_the_count_of_every_strategy(crew: Crew, bounds: set[int]) -> None:
    read = replace(SETTINGS, start="compensated")
    starts = (budget.families(SCHEME, start, True, crew) for start in (SETTINGS, read))
    tried = [family[-1][0] for families in starts for family in families]
    weights = budget._block_weights(of("llama"))
    least = {s: budget._floor(s, crew) for s in tried}
    for s, bound in least.items():
        assert bound * weights <= budget._counted(of("llama"), SCHEME, s, "cpu", crew).total
    assert set(least.values()) == bounds


def test_what_cannot_fit_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By that bound; one is counted, to say its need."""
    weights = budget._block_weights(of("llama"))
    counted: list[Training] = []
    monkeypatch.setattr(
        budget,
        "footprint",
        lambda b, scheme, s, d, crew: counted.append(s) or Footprint(1, 0, 0),
    )
    budget.choose(of("llama"), SCHEME, SETTINGS, "cpu", weights)
    assert {s.train for s in counted} == {"low-rank"}
    counted.clear()
    with pytest.raises(ResourceError, match="more than is free"):
        budget.choose(of("llama"), SCHEME, SETTINGS, "cpu", 0)
    assert [s.train for s in counted] == ["scales"]


def test_where_there_is_plenty_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "footprint", lambda *shapes: pytest.fail("counted"))
    settings = replace(SETTINGS, batch_size=6)
    given = (of("llama"), SCHEME, settings, "cpu", 10**10)
    chosen, memory, why = budget.choose(*given, exact=False)
    assert chosen == settings and memory.fits
    assert why == "end to end, micro batches of 6: 10.0 GB are free, which is more than enough"


def test_the_rough_estimate_is_above_the_count() -> None:
    for kind in ("llama", "opt", "gpt2"):
        rough = counting.roughly(of(kind), SETTINGS, "").total
        assert budget.PLENTY * rough > counted(kind).total


def test_plenty_counts_the_text_of_a_start() -> None:
    """Its activations, which may be more than all that training takes."""
    read = replace(SETTINGS, start="compensated", calibration=2**16)
    rough = counting.roughly(of("llama"), read, "").total
    with torch.device("meta"):
        assert rough > bytes_needed(of("llama")(), read)
    assert rough > 10 * counting.roughly(of("llama"), SETTINGS, "").total


def test_the_widest_layer_of_gpt2_is_seen_too() -> None:
    """Its linear layers are stored transposed; an MLP of 800 columns has the widest Hessian."""
    config = transformers.GPT2Config(n_embd=200, n_layer=1, n_head=2, vocab_size=50)
    with torch.device("meta"):
        needed = bytes_needed(transformers.GPT2LMHeadModel(config), SETTINGS)
    assert needed > 36 * 800**2


def test_block_by_block_is_the_last() -> None:
    with torch.device("meta"):
        alone = round(budget.MARGIN * bytes_needed(of("llama")(), SETTINGS))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as small:
        small.setattr(budget, "footprint", lambda *shapes: Footprint(10**15, 0, 0))
        ask = (of("llama"), SCHEME, SETTINGS, "cpu")
        chosen, _, why = budget.choose(*ask, alone, by_blocks=True)
        assert chosen.block_by_block and why.startswith("block by block from disk")
        with pytest.raises(ResourceError):
            budget.choose(*ask, alone - 1, by_blocks=True)


def test_a_model_that_cannot_be_counted_is_estimated_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*args: Any) -> Footprint:
        raise RuntimeError("no such operator\nand a long explanation")

    exact = counted()
    monkeypatch.setattr(counting, "_counted", refuses)
    rough = counted()
    assert rough.rough == "no such operator"
    assert rough.total > 0.5 * exact.total
    _, _, why = budget.choose(of("llama"), SCHEME, SETTINGS, "cpu", 10**9)
    assert why.endswith("(estimated from shapes: no such operator)")


# Plans


def planned(source: Path, text: Path, **options: Any) -> dict[str, Any]:
    made = checkpoints.recipe(source, text)
    return plan(str(source), made, out=source.parent / "out", offline=True, **options)


def test_a_plan_needs_no_weights_and_no_device(source: Path, text: Path, tmp_path: Path) -> None:
    whole = planned(source, text)
    assert whole["seconds"]["total"] == pytest.approx(
        sum(v for k, v in whole["seconds"].items() if k != "total")
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    found = planned(bare, text, memory=10**9, device="cuda")
    assert found["memory"]["free"] == 10**9
    assert found["seconds"] is None and found["training"]["tokens_per_second"] is None
    for key in ("bpw_linear", "coverage", "parameters", "bytes"):
        assert found["weights"][key] == whole["weights"][key]


def test_a_plan_counts_the_text_that_the_teacher_writes(source: Path, text: Path) -> None:
    made, out = checkpoints.recipe(source, text), source.parent / "out"
    mix = replace(made, training=replace(made.training, data=(str(text), "self")))
    given, mixed = (plan(str(source), r, out=out, offline=True)["seconds"] for r in (made, mix))
    assert given["writing"] == 0 < mixed["writing"] < mixed["total"]


def test_a_plan_knows_the_disk(source: Path, text: Path) -> None:
    """Checkpoints have whole states however many share them; a cache is of the longest budget."""

    def disk(made: Recipe, **options: Any) -> int:
        found = plan(str(source), made, out=Path("nothing"), offline=True, memory=2**40, **options)
        return int(found["disk"]["needed"])

    made = checkpoints.recipe(source, text, batch_size=4)
    assert disk(made, devices=4) == pytest.approx(disk(made), rel=0.01)
    open_ = replace(made.training, steps=None, tokens=None, cache_teacher=True)
    assert disk(replace(made, training=open_)) > cache_bytes(budget.MOST_TOKENS, 36)
    rounded = Recipe(model=str(source), scheme=Scheme(method="rtn", bits=2, group_size=16))
    parameters = hf.load(str(source)).model.num_parameters()
    assert disk(untrained(rounded)) == 2 * parameters  # a dense folder, in bfloat16


def test_a_plan_that_cannot_fit_says_what_is_missing(source: Path, text: Path) -> None:
    with pytest.raises(ResourceError, match="more than is free"):
        planned(source, text, memory=1000)


def test_memory_goes_with_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--memory", "24GB"], ["--devices", "8"]):
        assert cli.run(["ternarize", "demo", *option]) == 2
        assert "--plan" in capsys.readouterr().err
