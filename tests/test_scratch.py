"""Models from scratch: TriLM and FloatLM trained, gone on with, packed and loaded."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from ternq import checkpoint, cli, distill, hf, metrics, origin, states, stop
from ternq.errors import InputError, RecipeError, StoppedError
from ternq.formats import Options
from ternq.linear import AbsmeanLinear, decoder_blocks, prepare, settled, ternary_layers
from ternq.optimize import optimizer
from ternq.pack import pack, verify
from ternq.page import page
from ternq.plan import plan
from ternq.prepared import prepare_run
from ternq.recipe import Recipe, Scheme, Training
from ternq.report import markdown
from ternq.ternarize import ternarize

KINDS = ["llama", "llama-tied-bias", "gpt2", "opt", "phi"]

pytestmark = pytest.mark.usefixtures("quick")


def bare(path: Path, kind: str = "llama") -> Path:
    """A folder with configuration and tokenizer, and without weights."""
    checkpoints.folder(path, kind)
    for file in path.glob("*.safetensors"):
        file.unlink()
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare(tmp_path_factory.mktemp("config") / "tiny")


def recipe(model: Path, text: Path, method: str, **training: Any) -> Recipe:
    spectra: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "warmup": 0.0}
    spectra |= {"lr_second": 0.005, "decay_until": 0.667} if method == "absmean" else {}
    settings = {"objective": "ce", "from_scratch": True, "steps": 6} | spectra | training
    made = checkpoints.recipe(model, text, **settings)
    return replace(made, scheme=Scheme(method=method))  # type: ignore[arg-type]


def trained(out: Path, made: Recipe) -> dict[str, Any]:
    return distill.distill(made.model, out, made, offline=True)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def stored(model: Any) -> Any:
    """The dense model with every scale rounded to float16, which is all that packing changes."""
    for name, layer in ternary_layers(model).items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features)
        dense.weight = torch.nn.Parameter(layer.numbers().canonical().dequantized())
        dense.bias = layer.bias
        model.set_submodule(name, dense)
    return model


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trilm_is_trained_packed_and_loaded_the_same(kind: str, text: Path, tmp_path: Path) -> None:
    model = bare(tmp_path / "config", kind)
    report = trained(tmp_path / "run", recipe(model, text, "absmean"))
    assert report["teacher"] is None
    assert report["student"]["perplexity"] < report["untrained"]["perplexity"]
    run = hf.load(str(tmp_path / "run"))
    layers = ternary_layers(run.model)
    assert {type(m) for m in layers.values()} == {AbsmeanLinear}
    widest = max(m.in_features for m in layers.values())
    packed = pack(str(tmp_path / "run"), tmp_path / "packed", keep_dtype=True)
    assert packed["verify"]["ok"]
    assert verify(tmp_path / "packed", str(tmp_path / "run"))["verify"]["ok"]
    loaded = hf.load(str(tmp_path / "packed")).model
    assert loaded.config.quantization_config.group_size == widest
    assert not loaded.config.quantization_config.shift
    assert torch.allclose(logits(loaded), logits(run.model), atol=2e-2)
    assert torch.allclose(logits(loaded), logits(stored(run.model)), atol=1e-5)
    bits = 16 * sum(m.out_features for m in layers.values())  # a scale for every row is stored
    bits += sum(8 * -(-m.in_features // 5) * m.out_features for m in layers.values())
    weights = sum(m.weight.numel() for m in layers.values())
    assert packed["weights"]["bpw_linear"] == pytest.approx(bits / weights)


def test_every_scale_of_a_matrix_is_one_number(config: Path, text: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", recipe(config, text, "absmean"))
    student = checkpoint.load_tensors(tmp_path / "run" / origin.STUDENT_FILE)
    assert not [name for name in student if "scale" in name or "shift" in name]
    pack(str(tmp_path / "run"), tmp_path / "packed")
    packed = checkpoint.TensorFolder(tmp_path / "packed")
    name = "model.layers.1.mlp.up_proj.weight"
    latent = student[name].double()
    gamma = (1e-5 + latent.abs().mean()).half()
    assert set(packed[f"{name}_scale"].flatten().tolist()) == {float(gamma)}


def test_floatlm_is_a_dense_model(config: Path, text: Path, tmp_path: Path) -> None:
    made = recipe(config, text, "float", schedule="cosine")
    report = trained(tmp_path / "run", made)
    assert report["student"]["perplexity"] < report["untrained"]["perplexity"]
    assert report["weights"]["coverage"] == 0
    assert report["weights"]["bpw_linear"] == 16
    run = hf.load(str(tmp_path / "run"))
    assert run.kind == "dense"
    with pytest.raises(InputError, match=r"dense run .*there are no codes to pack"):
        pack(str(tmp_path / "run"), tmp_path / "packed")
    exact = Options(exact=True, encoding="float32")
    dense = pack(str(tmp_path / "run"), tmp_path / "dense", format="dense", options=exact)
    assert dense["weights"]["coverage"] == 0
    loaded = hf.load(str(tmp_path / "dense"))
    assert torch.equal(logits(loaded.model), logits(run.model))
    assert "trained from scratch" in (tmp_path / "dense" / "README.md").read_text()


def test_a_floatlm_run_can_be_made_ternary(config: Path, text: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", recipe(config, text, "float", steps=1))
    made = checkpoints.recipe(tmp_path / "run", text)
    prepared = prepare_run(str(tmp_path / "run"), made, offline=True)
    assert prepared.teacher is not None
    assert ternary_layers(prepared.student.model)


def test_a_trilm_goes_on_from_its_own_text_alone(config: Path, text: Path, tmp_path: Path) -> None:
    made = recipe(config, text, "absmean")
    trained(tmp_path / "run", made)
    run = str(tmp_path / "run")
    with pytest.raises(InputError, match="does not say what it was made from"):
        prepare_run(run, checkpoints.recipe(run, text), offline=True)
    on = checkpoints.recipe(run, text, objective="ce")
    report = distill.distill(run, tmp_path / "on", replace(on, scheme=Scheme()), offline=True)
    assert report["teacher"] is None
    assert report["recipe"]["scheme"]["method"] == "absmean"
    with pytest.raises(InputError, match="nothing to compare it with"):
        ternarize(run, tmp_path / "out", replace(on, scheme=Scheme()), offline=True)


def test_absmean_distils_a_trained_model_too(source: Path, text: Path, tmp_path: Path) -> None:
    made = replace(checkpoints.recipe(source, text), scheme=Scheme(method="absmean"))
    report = distill.distill(str(source), tmp_path / "run", made, offline=True)
    assert report["teacher"]["perplexity"] > 1
    assert "off" in (tmp_path / "run" / metrics.METRICS).read_text()
    latent = hf.load(str(source)).model.model.layers[0].mlp.up_proj.weight
    now = hf.load(str(tmp_path / "run")).model.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(latent, now, atol=0.01)  # it began as the model's weight


@pytest.mark.parametrize(
    ("own", "said"),
    [({"train": "scales"}, "--train scales is for"), ({"scale_lr": 1e-4}, "--scale-lr is of")],
)
def test_what_goes_on_from_absmean_is_absmean(
    source: Path, text: Path, tmp_path: Path, own: dict[str, Any], said: str
) -> None:
    made = replace(checkpoints.recipe(source, text, steps=1), scheme=Scheme(method="absmean"))
    distill.distill(str(source), tmp_path / "run", made, offline=True)
    on = checkpoints.recipe(tmp_path / "run", text, steps=1, **own)
    with pytest.raises(RecipeError, match=said):
        distill.distill(
            str(tmp_path / "run"), tmp_path / "on", replace(on, scheme=Scheme()), offline=True
        )


# --- what learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-tied-bias", "gpt2"])
@pytest.mark.parametrize("method", ["absmean", "float"])
def test_everything_learns_and_only_matrices_of_the_blocks_decay(kind: str, method: str) -> None:
    model = checkpoints.model(kind)
    scheme = Scheme(method=method, group_size=128)  # type: ignore[arg-type]
    settings = Training(objective="ce", from_scratch=True, weight_decay=0.1)
    prepare(model, settled(model, scheme))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = optimizer(model, settings).param_groups
    found = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert set(found) == set(names.values())
    assert all(p.requires_grad for p in model.parameters())
    blocks = decoder_blocks(model)[0] + "."
    for name, parameter in model.named_parameters():
        matrix = name.startswith(blocks) and parameter.ndim == 2
        assert found[name] == (0.1 if matrix else 0.0), name


def test_embeddings_and_head_move(config: Path, text: Path, tmp_path: Path) -> None:
    made = recipe(config, text, "absmean")
    start = hf.drawn(str(config), made.seed).model.state_dict()
    trained(tmp_path / "run", made)
    state = hf.load(str(tmp_path / "run")).model.state_dict()
    same = [name for name in start if torch.equal(start[name], state[name])]
    assert not same


# --- where it begins ------------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone(config: Path, source: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = hf.drawn(str(config), 0)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(7)
    assert states.fingerprint(hf.drawn(str(source), 0).model) == states.fingerprint(first.model)
    assert states.fingerprint(hf.drawn(str(config), 1).model) != states.fingerprint(first.model)
    weight = first.model.model.layers[0].mlp.up_proj.weight.detach()
    assert float(weight.std()) == pytest.approx(checkpoints.SMALL["initializer_range"], rel=0.1)
    with pytest.raises(InputError, match="holds no safetensors"):
        hf.load(str(config))


def test_a_run_and_an_artefact_give_their_configuration(
    config: Path, text: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "run", recipe(config, text, "absmean", steps=1))
    pack(str(tmp_path / "run"), tmp_path / "packed")
    wanted = states.fingerprint(hf.drawn(str(config), 0).model)
    for name in ("run", "packed"):
        drawn = hf.drawn(str(tmp_path / name), 0)
        assert (drawn.kind, states.fingerprint(drawn.model)) == ("dense", wanted)


def test_no_configuration_is_said(tmp_path: Path, config: Path) -> None:
    with pytest.raises(InputError, match=r"without config\.json"):
        hf.drawn(str(tmp_path), 0)
    (tmp_path / "config.json").write_text((config / "config.json").read_text())
    with pytest.raises(InputError, match="no tokenizer"):
        hf.drawn(str(tmp_path), 0)


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["absmean", "float"])
def test_resumed_is_uninterrupted_to_the_bit(
    method: str, config: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before and after the second peak and the end of weight decay."""
    made = recipe(config, text, method)
    whole = trained(tmp_path / "whole", made)
    with monkeypatch.context() as stopping:
        stopping.setattr(stop, "requested", lambda: "SIGTERM")
        for _ in range(5):
            with pytest.raises(StoppedError):
                trained(tmp_path / "parts", made)
    parts = trained(tmp_path / "parts", made)
    one, other = (
        checkpoint.load_tensors(tmp_path / n / origin.STUDENT_FILE) for n in ("whole", "parts")
    )
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert parts["student"] == whole["student"]
    lines = (tmp_path / "parts" / metrics.METRICS).read_text().splitlines()
    assert len({json.loads(line)["step"] for line in lines}) == 6


def test_a_finished_run_replays_from_its_report(config: Path, text: Path, tmp_path: Path) -> None:
    report = trained(tmp_path / "run", recipe(config, text, "absmean"))
    again = trained(tmp_path / "again", Recipe.from_json(report["recipe"]))
    assert again["student"] == report["student"]


# --- what is said and refused ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["absmean", "float"])
def test_reports_do_not_speak_of_a_teacher(
    method: str, config: Path, text: Path, tmp_path: Path
) -> None:
    report = trained(tmp_path / "run", recipe(config, text, method, steps=1))
    payload = {"command": "distill", "out": "run", "seed": 0, **report}
    said = markdown(payload)
    assert "as drawn" in said
    assert ("ternary, trained" if method == "absmean" else "dense, trained") in said
    assert "teacher" not in said
    assert "trained from scratch" in page(payload, [])


def test_a_plan_needs_no_teacher(config: Path, text: Path, tmp_path: Path) -> None:
    found = plan(str(config), recipe(config, text, "absmean"), out=tmp_path / "out", offline=True)
    assert found["training"]["steps"] == 6
    assert not (tmp_path / "out").exists()


SCRATCH = {"objective": "ce", "from_scratch": True}


@pytest.mark.parametrize(
    ("scheme", "training", "teacher", "said"),
    [
        ({}, {"from_scratch": True}, None, "--from-scratch has no teacher"),
        ({}, SCRATCH, "demo", "it has no --teacher"),
        ({"method": "float"}, {"objective": "ce"}, None, "there is a dense model already"),
        ({"method": "float", "skip": ("*q_proj",)}, SCRATCH, None, "--skip has no meaning"),
        ({}, SCRATCH | {"start": "compensated"}, None, "not --from-scratch"),
        ({"method": "absmean"}, {"start": "compensated"}, None, "not --method absmean"),
        ({"method": "absmean"}, {"ste": "ttq"}, None, "--ste is of --method dlt"),
        ({"method": "absmean"}, SCRATCH | {"scale_lr": 1.0}, None, "--scale-lr is of --method"),
        ({"method": "absmean", "group_size": 5}, SCRATCH, None, "--group-size 5 asks for more"),
    ],
)
def test_contradictions_are_refused(
    scheme: dict[str, Any],
    training: dict[str, Any],
    teacher: str | None,
    said: str,
    source: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    made = replace(checkpoints.recipe(source, text, **training), scheme=Scheme(**scheme))
    with pytest.raises(RecipeError, match=said):
        distill.distill(str(source), tmp_path / "run", made, teacher=teacher, offline=True)
    assert not (tmp_path / "run").exists()


def test_a_text_has_to_be_named(config: Path, text: Path, tmp_path: Path) -> None:
    made = recipe(config, text, "absmean")
    for data in ((), ("self",)):
        silent = replace(made, training=replace(made.training, data=data))
        with pytest.raises(InputError, match="no teacher to write the text"):
            trained(tmp_path / "run", silent)


def test_ternarize_is_for_trained_models(config: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a model from scratch is ternq distill's"):
        ternarize(str(config), tmp_path / "out", recipe(config, text, "absmean"), offline=True)
    command = ["ternarize", str(config), "--from-scratch", "--objective", "ce", "--plan"]
    assert cli.run(command) == 2


def test_a_teacher_may_teach_a_student_from_scratch(
    config: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    made = checkpoints.recipe(config, text, from_scratch=True)
    report = distill.distill(str(config), tmp_path / "run", made, teacher=str(source), offline=True)
    assert report["teacher"]["perplexity"] > 1


def test_a_recipe_that_is_older_than_these_settings_is_read() -> None:
    old = copy.deepcopy(Recipe(model="m").to_json())
    del old["scheme"]["method"], old["training"]["objective"], old["training"]["from_scratch"]
    assert Recipe.from_json(old) == Recipe(model="m")
