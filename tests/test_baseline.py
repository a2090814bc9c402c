"""Baselines from a checkpoint to a folder: walked, written, counted, refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from ternq import baseline, cli, corpus, distill, grid, hf, request
from ternq.errors import InputError, RecipeError, ResourceError
from ternq.evaluate import evaluate
from ternq.linear import dense_weight, select
from ternq.plan import plan
from ternq.prepared import Prepared, prepare_run
from ternq.progress import ignore
from ternq.publish import EXPORT_MANIFEST, MANIFEST, read_manifest
from ternq.recipe import BASELINES, PRESETS, Recipe, Scheme, Training, with_rate, with_start
from ternq.report import markdown
from ternq.ternarize import ternarize

GROUP = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 128)


def recipe(source: Path, text: Path, method: str, **scheme: Any) -> Recipe:
    size = Scheme().group_size if method == "absmean" else GROUP
    made = checkpoints.recipe(source, text, steps=0, calibration=8)
    chosen = Scheme(method=method, **{"group_size": size} | scheme)  # type: ignore[arg-type]
    return replace(made, scheme=chosen)


def made(source: Path, text: Path, out: Path, method: str, **scheme: Any) -> dict[str, Any]:
    return ternarize(str(source), out, recipe(source, text, method, **scheme), offline=True)


SLOW = pytest.mark.slow
WHOLE = [m if m in ("gptq", "pt2") else pytest.param(m, marks=SLOW) for m in BASELINES]


@pytest.mark.parametrize("method", WHOLE)
def test_from_a_checkpoint_to_a_folder(
    method: str, source: Path, text: Path, tmp_path: Path
) -> None:
    report = made(source, text, tmp_path / "out", method)
    assert report["training"]["steps"] == 0
    assert report["verify"]["ok"]
    assert report["recipe"]["scheme"]["method"] == method
    untrained = report["untrained"]["perplexity"]
    assert report["student"]["perplexity"] == pytest.approx(untrained, rel=0.01)
    ternary = method in ("absmean", "twn", "pt2")
    assert (tmp_path / "out" / MANIFEST).is_file() == ternary
    assert bool(report["weights"]["coverage"]) == ternary
    if not ternary:
        _is_a_dense_folder(source, tmp_path / "out", report)
    said = markdown({"command": "ternarize", **report})
    assert f"{report['weights']['bpw_linear']:.3f}" in said
    again = made(source, text, tmp_path / "out", method)
    assert again == json.loads(json.dumps(report))
    with pytest.raises(RecipeError, match="another recipe"):
        made(source, text, tmp_path / "out", method, skip=("*.o_proj",))


def _is_a_dense_folder(source: Path, out: Path, report: dict[str, Any]) -> None:
    """Plain transformers load it, a group has few values, and its bits are eval's too."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight
    levels = 8 if report["recipe"]["scheme"]["method"] == "billm" else 4
    assert 1 < max(len(row.unique()) for row in weight[:, :GROUP]) <= levels
    norm = hf.load(str(source)).model.model.norm.weight
    assert torch.equal(model.model.norm.weight, norm.half().float())
    manifest = read_manifest(out, EXPORT_MANIFEST)
    assert manifest["weights"]["bpw_linear"] == report["weights"]["bpw_linear"]
    assert any("as they would be stored" in note for note in report["notes"])
    notes = out.parent / "notes.txt"
    notes.write_text(tiny.text(200))
    found = evaluate([str(out)], tasks=(str(notes),))
    assert found["models"][str(out)]["bpw_linear"] == report["weights"]["bpw_linear"]
    assert next(iter(found["results"][str(out)].values()))["token_perplexity"] > 1


def test_bits_are_those_of_codes_scales_and_zeros(source: Path, text: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = checkpoints.model("llama")
    inside = select(model, Scheme(group_size=GROUP)).chosen.values()
    shapes = [tuple(dense_weight(layer).shape) for layer in inside]
    count = sum(math.prod(shape) for shape in shapes)
    groups = sum(rows * math.ceil(columns / GROUP) for rows, columns in shapes)
    everything = sum(p.numel() for p in model.parameters())
    cases: list[tuple[str, dict[str, Any], float]] = [
        ("rtn", {"bits": 3, "symmetric": True}, 3 * count + 16 * groups),
        ("gptq", {"bits": 8}, 8 * count + 32 * groups),
        ("billm", {}, 2 * count + 128 * groups + sum(columns for _, columns in shapes)),
        ("pt2", {}, sum(8 * r * math.ceil(c / 5) for r, c in shapes) + 32 * groups),
    ]
    for method, scheme, bits in cases:
        asked = recipe(source, text, method, **scheme)
        found = plan(str(source), asked, out=tmp_path / "out", memory=10**10, offline=True)
        weights = found["weights"]
        assert weights["bpw_linear"] == pytest.approx(bits / count), method
        whole = bits + 16 * (everything - count)
        assert weights["bpw_total"] == pytest.approx(whole / everything), method


def prepared(source: Path, text: Path, method: str, **scheme: Any) -> Prepared:
    return prepare_run(str(source), recipe(source, text, method, **scheme), offline=True)


OTHERS = ["opt", "gpt2", "phi"]
OTHERS += [pytest.param(k, marks=SLOW) for k in ("gpt-neox", "gemma", "llama-tied-bias")]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str, text: Path, tmp_path: Path) -> None:
    """Eight bits are near the dense model, and every method walks every decoder."""
    source = checkpoints.folder(tmp_path / "model", kind)
    ids = torch.arange(60).view(2, 30)
    for method in ("rtn", "gptq", "pt2", "billm"):
        bits = {"bits": 8} if method in ("rtn", "gptq") else {}
        found = prepared(source, text, method, **bits)
        notes = baseline.rounded(found, ignore)
        assert method == "rtn" or notes[0].startswith(f"Method {method}: ")
        if bits:
            assert found.teacher is not None
            with torch.no_grad():
                one, other = (m.model(ids).logits for m in (found.teacher, found.student))
            assert (one - other).norm() < 0.05 * one.norm()


def test_layers_are_written_as_the_model_holds_them(text: Path, tmp_path: Path) -> None:
    """GPT-2's are [in, out], some of them square."""
    source = checkpoints.folder(tmp_path / "model", "gpt2")
    made(source, text, tmp_path / "out", "rtn", bits=8)
    one, other = hf.load(str(source)).model, hf.load(str(tmp_path / "out")).model
    for name, layer in select(one, Scheme(group_size=GROUP)).chosen.items():
        exact = grid.rtn(dense_weight(layer), 8, False, GROUP).values
        assert torch.equal(dense_weight(other.get_submodule(name)), exact.half().float()), name


def test_gptq_is_nearer_to_the_outputs_than_rtn(source: Path, text: Path) -> None:
    ids = torch.stack([next(prepared(source, text, "rtn").corpus.blocks) for _ in range(8)])
    lost = []
    for method in ("rtn", "gptq"):
        found = prepared(source, text, method, bits=3)
        baseline.rounded(found, ignore)
        assert found.teacher is not None
        with torch.no_grad():
            one, other = (m.model(ids).logits for m in (found.teacher, found.student))
        lost.append(float((one - other).norm() / one.norm()))
    assert lost[1] < 0.8 * lost[0]


def test_a_weight_of_two_layers_is_rounded_once(source: Path, text: Path) -> None:
    found = prepared(source, text, "gptq", bits=4)
    blocks = found.student.model.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    weight = blocks[0].mlp.up_proj.weight.detach().clone()
    notes = baseline.rounded(found, ignore)
    assert torch.equal(blocks[0].mlp.up_proj.weight, grid.rtn(weight, 4, False, GROUP).values)
    assert blocks[1].mlp.up_proj.code_bits == 4 * weight.numel()
    assert any("weights of several modules, only rounded" in note for note in notes)


def test_what_is_unusual_is_said(source: Path, text: Path) -> None:
    short = recipe(source, text, "gptq")
    short = replace(short, training=replace(short.training, calibration=2))
    found = prepare_run(str(source), short, offline=True)
    with torch.no_grad():
        found.student.model.model.layers[0].input_layernorm.weight[5] = 0
    notes = " ".join(baseline.rounded(found, ignore))
    assert "32 tokens of calibration are 18 fewer than the widest layer has inputs (50)" in notes
    assert "--calibration 4 would be enough" in notes
    assert "3 input channels of layers were 0" in notes
    huge = found.student.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        huge.weight[0, 0], huge.code_bits = 1e9, 0
    with pytest.raises(InputError, match=r"rounding of .*up_proj failed: a scale is too large"):
        baseline._without_inputs("up_proj", huge, found.recipe.scheme)


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "rtn", "--tokens", "100"], "only rounds: there is nothing for --tokens"),
        (["--method", "absmean", "--steps", "3"], "nothing for --steps to train"),
        (["--method", "twn", "--bits", "2"], "--bits is of --method rtn and gptq, not of twn"),
        (["--method", "pt2", "--grid", "fit"], "--grid is of --method rtn and gptq, not of pt2"),
        (["--symmetric"], "--symmetric is of --method rtn and gptq, not of dlt"),
        (["--method", "gptq", "--bits", "5"], "--bits is 5; it is 2, 3, 4 or 8"),
        (["--method", "pt2", "--no-shift"], "pt2 has a shift"),
        (["--method", "gptq", "--preset", "best"], "with --method gptq there is no such choice"),
        (["--method", "gptq", "--start", "compensated"], "not --method gptq"),
        (["--method", "gptq", "--block-by-block"], "--block-by-block is of --method dlt"),
        (["--method", "gptq", "--group-size", "1000"], "larger than the longest row"),
        (["--method", "billm", "--embeddings", "int8"], "writes a dense folder"),
        (["--method", "rtn", "--keep-dtype"], "--keep-dtype is of a packed model"),
    ],
)
def test_contradictions_are_refused(
    options: list[str],
    said: str,
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["ternarize", str(source), "-o", str(tmp_path / "out"), "--data", str(text)]
    assert cli.run([*command, "--offline", "--json", *options]) == 2
    assert said in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_what_rounding_does_not_read_is_said(source: Path, text: Path, tmp_path: Path) -> None:
    asked = recipe(source, text, "rtn")
    found = ternarize(str(source), tmp_path / "out", asked, offline=True, time_limit=60.0)
    assert "--time-limit changes nothing: a baseline is made in one piece." in found["notes"]


def test_distil_trains_and_does_not_round(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only rounds: there is nothing to train"):
        distill.distill(str(source), tmp_path / "run", recipe(source, text, "gptq"), offline=True)


def asked(preset: str = "auto", rounds: bool = True, **given: Any) -> Recipe:
    """What the command line makes of options, for the demo."""
    return request.recipe_of("demo", None, None, given, preset, rounds=rounds)


def test_no_steps_are_asked_for_of_the_demo() -> None:
    """Its own recipe names some, for DLT."""
    assert asked(method="gptq").training.steps == 0
    assert asked(method="gptq").only_rounds
    assert asked(method="absmean", rounds=False).training.steps == asked().training.steps == 300


def test_a_plan_says_what_rounding_costs(source: Path, text: Path, tmp_path: Path) -> None:
    found = plan(str(source), recipe(source, text, "gptq"), out=tmp_path / "out", offline=True)
    nothing = {"steps": 0, "tokens": 0, "tokens_per_second": None, "seconds": None}
    assert found["training"] == nothing
    assert found["seconds"]["start"] > 0
    assert any("rounded without training" in note for note in found["notes"])
    said = markdown({"command": "ternarize", "plan": True, **found})
    assert "the start" in said
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_said(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="more than is free"):
        plan(
            str(source), recipe(source, text, "rtn"), out=tmp_path / "x", memory=1000, offline=True
        )


# --- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_set_of_options(preset: str) -> None:
    found = vars(asked(preset).training)
    assert {name: found[name] for name in PRESETS[preset]} == PRESETS[preset]
    assert found["steps"] is None
    assert asked(preset).training.peak_lr == 1e-3


@pytest.mark.parametrize(
    "start, ternary, train, rate",
    [("closed-form", False, "all", 1e-3), ("compensated", False, "all", 1e-3),
     (None, False, "all", 1e-4), ("reconstructed", False, "scales", 1e-3),
     (None, True, "all", 1e-4), (None, True, "scales", 1e-3)],
)  # fmt: skip
def test_the_rate_follows_the_start(start: Any, ternary: bool, train: Any, rate: float) -> None:
    """Of codes that fit, and move: a tenth."""
    recipe = Recipe(model="m", training=Training(start=start, train=train))
    begun = with_start(recipe, ternary)
    assert begun.start == (start or ("closed-form" if ternary else "reconstructed"))
    assert with_rate(begun, ternary).lr == rate
    assert with_rate(replace(begun, lr=0.5), ternary).lr == 0.5


@pytest.mark.parametrize("scheme", [Scheme(method="gptq"), Scheme(method="absmean")])
def test_other_methods_have_no_start_of_dlt(scheme: Scheme) -> None:
    assert with_start(Recipe(model="m", scheme=scheme), False).start == "closed-form"
    scratch = Training(from_scratch=True)
    assert with_start(Recipe(model="m", training=scratch), False).start == "closed-form"


def test_options_go_before_a_preset() -> None:
    found = asked("best", steps=3, calibration=5).training
    assert (found.steps, found.tokens, found.calibration) == (3, None, 5)
    assert found.start == "reconstructed"
    assert asked("quick", tokens=7).training.tokens == 7


@pytest.mark.parametrize("start", ["compensated", "reconstructed"])
def test_a_plan_says_what_a_start_costs(
    start: Any, source: Path, text: Path, tmp_path: Path
) -> None:
    made = checkpoints.recipe(source, text, start=start)
    found = plan(str(source), made, out=tmp_path / "out", offline=True)
    assert found["seconds"]["total"] > found["seconds"]["start"] > 0
