"""The command line against its contract, with fake verbs: no model is loaded here."""

import errno
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Demo

import ternq
from ternq import boundary, cli, errors, stop, terminal
from ternq.formats import Options
from ternq.options import duration_of
from ternq.progress import Event
from ternq.recipe import Scheme, Training, default_recipe, flag

COMMON = {
    "schema_version", "command", "status", "exit_code", "error", "version", "seed", "duration_s",
    "model", "out",
}  # fmt: skip
ERRORS = [
    errors.RecipeError,
    errors.InputError,
    errors.ResourceError,
    errors.GateError,
    errors.VerificationError,
    errors.DivergenceError,
    errors.StoppedError,
    errors.InterruptedByUser,
]
RESULT = {
    "model": "demo",
    "teacher": {"perplexity": 10.0, "text": "held out"},
    "untrained": {"perplexity": 900.0, "text": "held out"},
    "student": {"perplexity": 12.5, "text": "held out"},
    "weights": {
        "coverage": 0.8, "bpw_linear": 1.85, "bpw_total": 4.0, "bytes": 5, "bytes_dense_bf16": 20,
        "zero_share": 0.4,
    },
    "files": [{"path": "model.safetensors", "bytes": 2_000_000, "sha256": ""}],
}  # fmt: skip
VERBS = {
    "ternarize": ("ternarize", RESULT),
    "distill": ("distill", RESULT),
    "pack": ("pack", {k: RESULT[k] for k in ("weights", "files")}),
    "eval": ("evaluate", {"results": {"demo": {"wikitext": {"token_perplexity": 12.5}}}}),
    "generate": ("generate", {"model": "demo", "text": "x"}),
}


class Fake:
    """Stands for a verb: notes its arguments, then returns or raises what it was told."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.args, self.options = args, options
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result(options) if callable(self.result) else self.result


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Every test in a folder of its own; signals, environment and warnings as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(boundary, "_set_environment", lambda verbose, offline: None)
    monkeypatch.setattr(stop, "_request", None)  # and so put back: tests of training poll it
    monkeypatch.setattr(stop, "_polled", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """Put a fake in the place of a verb; its module is never imported."""

    def put(name: str, result: Any = None) -> Fake:
        verb, usual = VERBS.get(name, (name, {}))
        stand_in = Fake(usual if result is None else result)
        module = types.ModuleType(f"ternq.{verb}")
        vars(module).update(
            {verb: stand_in, "verify": stand_in, "plan": stand_in, "check": Fake(None)}
        )
        monkeypatch.setitem(sys.modules, f"ternq.{verb}", module)
        monkeypatch.setattr("ternq.places.refuse_offline", lambda *_: None)
        return stand_in

    return put


def run(line: str) -> int:
    """The exit status of a command line."""
    return cli.run(line.split())


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the one JSON object on stdout."""
    status = cli.run([*arguments, "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, lines
    payload = json.loads(lines[0])
    assert set(payload) >= COMMON
    assert payload["exit_code"] == status
    return status, payload


# --- options reach the verb -----------------------------------------------------------------------


def test_ternarize_without_options_is_the_default_recipe(fake: Callable[..., Fake]) -> None:
    verb = fake("ternarize")
    assert cli.run(["ternarize", "demo"]) == 0
    model, out, recipe = verb.args
    assert (model, out) == ("demo", Path("demo-ternary"))
    assert recipe == default_recipe("demo")
    expected = {"overwrite": False, "resume": None, "time_limit": None, "keep_dtype": False,
                "offline": False, "trust_remote_code": False}  # fmt: skip
    assert expected.items() <= verb.options.items()


def test_every_flag_reaches_the_verb(fake: Callable[..., Fake]) -> None:
    verb = fake("ternarize")
    line = (
        "ternarize m -o o --overwrite --no-resume --time-limit 1h30m --keep-dtype --seed 7 "
        "--device cpu --offline --trust-remote-code --preset auto --group-size 64 --no-shift "
        "--skip *.k_proj --skip *.q_proj --steps 3 --data a=2 --data self --ste ttq --lr 0.5 "
        "--gradient-checkpointing"
    )
    assert run(line) == 0
    model, out, recipe = verb.args
    assert (model, out, recipe.seed) == ("m", Path("o"), 7)
    assert recipe.scheme == Scheme(group_size=64, shift=False, skip=("*.k_proj", "*.q_proj"))
    assert recipe.training == Training(
        steps=3, data=("a=2", "self"), ste="ttq", lr=0.5, gradient_checkpointing=True
    )
    expected = {"overwrite": True, "resume": False, "time_limit": 5400.0, "keep_dtype": True,
                "device": "cpu", "offline": True, "trust_remote_code": True}  # fmt: skip
    assert expected.items() <= verb.options.items()


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["distill", "--help-all"]) == 0
    text = capsys.readouterr().out
    for part in (Scheme, Training):
        for name in part.__dataclass_fields__:
            assert flag(name)[2:] in text


def test_flags_override_a_recipe_and_leave_the_rest(
    fake: Callable[..., Fake], tmp_path: Path
) -> None:
    verb = fake("distill")
    recipe = {"model": "m", "seed": 5, "scheme": {"group_size": 32, "shift": False},
              "training": {"tokens": 100, "lr": 0.25}}  # fmt: skip
    Path("r.json").write_text(json.dumps(recipe))
    assert run("distill m --recipe r.json --shift --steps 9") == 0
    made = verb.args[2]
    assert made.scheme == Scheme(group_size=32, shift=True)
    assert (made.training.tokens, made.training.steps, made.training.lr) == (None, 9, 0.25)
    assert made.seed == 5


@pytest.mark.parametrize(
    ("content", "status"),
    [("{", 3), ("[]", 3), ('{"model": "m", "x": 1}', 2),
     ('{"model": "m", "training": {"lr": -1}}', 2)],
)  # fmt: skip
def test_a_bad_recipe_is_refused(fake: Callable[..., Fake], content: str, status: int) -> None:
    fake("distill")
    Path("r.json").write_text(content)
    assert run("distill m --recipe r.json") == status


def test_plan_calls_no_verb_and_exits_4_if_it_cannot_fit(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    verb = fake("ternarize")
    size = {"needed": 2, "free": 1}
    result = {
        "weights": RESULT["weights"] | {"parameters": 10},
        "training": {"steps": 1, "tokens": 1, "tokens_per_second": 1.0, "seconds": 1.0},
        "memory": size, "disk": size, "fits": True, "reason": None,
    }  # fmt: skip
    plan = fake("plan", result)
    assert cli.run(["ternarize", "demo", "--plan"]) == 0
    assert plan.args[0] == "demo" and plan.options["out"] == Path("demo-ternary")
    plan.result = result | {"fits": False, "reason": "1 GB of memory is missing."}
    capsys.readouterr()
    status, payload = run_json(capsys, "ternarize", "demo", "--plan")
    assert (status, payload["error"]["message"]) == (4, "1 GB of memory is missing.")
    assert payload["weights"] and verb.args == ()


def test_pack_and_its_verification(fake: Callable[..., Fake]) -> None:
    verb = fake("pack")
    assert run("pack run -o packed --overwrite --keep-dtype --format ternq") == 0
    assert verb.args == ("run", Path("packed"))
    expected = {"overwrite": True, "keep_dtype": True, "offline": False}
    assert expected.items() <= verb.options.items()
    assert run("pack --verify packed") == 0
    assert verb.args == (Path("packed"),)
    assert run("pack run --verify packed") == 0
    assert verb.options["model"] == "run"
    assert run("pack run --format gguf --encoding Q4_1 --exact") == 0
    assert verb.args == ("run", Path("run-gguf"))
    assert verb.options["options"] == Options(exact=True, encoding="Q4_1")
    verb.args = ()
    assert run("pack run --plan -o packed --seed 3 --device cpu") == 0
    assert verb.args == ("run", Path("packed")) and verb.options["plan"]
    assert run("pack run -o packed --trust-remote-code") == 0
    assert cli.run(["pack", ""]) == 2
    wrong = ("pack", "pack run --format zip", "pack run --group-size 0", "pack --verify x -o y")
    wrong += ("pack --verify x --plan",)
    for line in (*wrong, "pack --verify x --skip y", "pack --verify x --format mlx"):
        assert run(line) == 2


@pytest.mark.parametrize("line", ["eval demo", "generate demo x", "pack run"])
def test_a_recipe_is_taken_by_every_command(
    fake: Callable[..., Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """What of it concerns them is the seed; packing draws nothing, and says so."""
    verb = fake(line.split()[0])
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(replace(default_recipe("demo"), seed=5).to_json()))
    assert run(f"{line} --recipe {file} --dtype float32") == 0
    assert verb.options.get("seed", "none") == (5 if line[0] != "p" else "none")
    said = capsys.readouterr().err
    assert ("--recipe changes nothing" in said) == ("--dtype changes nothing" in said)
    assert ("--recipe changes nothing" in said) == line.startswith("pack")
    assert run(f"{line} --recipe {file} --seed 0") == 0
    assert not verb.options.get("seed")
    file.write_text("[]")
    assert run(f"{line} --recipe {file}") == 3


def test_eval_options(fake: Callable[..., Fake]) -> None:
    verb = fake("eval")
    line = "eval demo --tasks c4,wikitext --limit 5 --num-fewshot 2 --batch-size 3 --data-dir d"
    assert cli.run([*line.split(), "--seed", "4", "--offline", "--dtype", "bfloat16"]) == 0
    assert verb.args == (["demo"],)
    assert str(verb.options.pop("dtype")) == "torch.bfloat16"
    expected = {"tasks": ("c4", "wikitext"), "limit": 5, "num_fewshot": 2, "batch_size": 3,
                "data_dir": Path("d"), "seed": 4, "offline": True}  # fmt: skip
    assert expected.items() <= verb.options.items()
    assert run("eval demo --limit all") == 0
    assert verb.options["limit"] == "all"
    assert run("eval demo --limit 0") == 2


def test_eval_without_a_model_takes_the_newest_artefact(fake: Callable[..., Fake]) -> None:
    verb = fake("eval", {"results": {"b": {}}})
    assert cli.run(["eval"]) == 3
    for place, name in enumerate("ab"):
        Path(name).mkdir()
        Path(name, "ternq.json").touch()
        os.utime(Path(name, "ternq.json"), (place, place))
    assert cli.run(["eval"]) == 0
    assert verb.args == (["b"],)


def test_generate_streams(fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]) -> None:
    def write(options: dict[str, Any]) -> dict[str, Any]:
        options["write"]("once\n")
        return {"model": "demo", "text": "once"}

    verb = fake("generate", write)
    assert run("generate demo hello --max-new-tokens 5 --temperature 0.5") == 0
    assert capsys.readouterr().out == "once\n"
    assert verb.args == ("demo", "hello")
    assert {"max_new_tokens": 5, "temperature": 0.5, "seed": 0}.items() <= verb.options.items()
    status, payload = run_json(capsys, "generate", "demo", "hello")
    assert (status, payload["text"]) == (0, "once")


def test_a_prompt_after_two_dashes_is_no_flag(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    verb = fake("generate")
    assert cli.run(["generate", "demo", "--", "--json"]) == 0
    assert verb.args == ("demo", "--json")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("model", "out"),
    [("demo", "demo-ternary"), ("HuggingFaceTB/SmolLM2", "SmolLM2-ternary"),
     ("a/b.gguf", "b-ternary"), ("some/folder/", "folder-ternary")],
)  # fmt: skip
def test_default_output(model: str, out: str) -> None:
    assert boundary.default_out(model) == Path(out)


@pytest.mark.parametrize(
    ("text", "seconds"), [("5h", 18000), ("1h30m", 5400), ("90s", 90), ("90", 90), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "h", "5x", "-1h", "1m2h", "inf"])
def test_bad_durations(text: str) -> None:
    assert cli.run(["ternarize", "demo", "--time-limit", text]) == 2


# --- JSON, errors and exit status -----------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_json_is_one_object_with_the_common_fields(
    command: str, fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(command)
    extra = ["hello"] if command == "generate" else []
    status, payload = run_json(capsys, command, "demo", *extra)
    assert status == 0
    assert (payload["command"], payload["status"]) == (command, "ok")
    assert (payload["error"], payload["model"]) == (None, "demo")
    assert payload["version"] == ternq.__version__
    assert payload["duration_s"] >= 0


def test_what_libraries_print_does_not_disturb_the_json(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(options: dict[str, Any]) -> dict[str, Any]:
        print("downloading ...")
        options["progress"](Event("train", done=1, total=2, values={"loss": 2.0}))
        return RESULT | {"out": Path("o"), "value": math.nan}

    fake("ternarize", chatty)
    _, payload = run_json(capsys, "ternarize", "demo")
    assert (payload["out"], payload["value"]) == ("o", None)


@pytest.mark.parametrize(
    "line",
    ["bogus", "ternarize", "ternarize demo --nope", "eval demo --seed x", "--json bogus",
     "ternarize demo --steps 1 --tokens 2", "ternarize demo --group-size 0",
     "ternarize demo --ste wrong", "eval demo --fail-if-ppl-above nan",
     "eval demo --fail-if-acc-below 0.5", "ternarize demo --fail-if-size-above 9XB",
     "generate demo hi --temperature -1"],
)  # fmt: skip
def test_usage_errors_are_json_too(
    line: str, fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VERBS:
        assert fake(name).args == ()
    status, payload = run_json(capsys, *line.split())
    assert (status, payload["status"]) == (2, "failed")
    assert payload["error"]["message"]
    assert "\n" not in payload["error"]["message"]


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_has_its_exit_status_and_one_sentence(
    error: type[errors.TernqError],
    fake: Callable[..., Fake],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake("distill", error("What and where.", "What to do."))
    assert cli.run(["distill", "demo"]) == error.exit_code
    captured = capsys.readouterr()
    assert captured.err == "error: What and where.\nhint:  What to do.\n"
    assert captured.out == ""
    status, payload = run_json(capsys, "distill", "demo")
    assert payload["error"] == {
        "type": error.__name__, "message": "What and where.", "hint": "What to do.",
    }  # fmt: skip
    assert payload["status"] == ("stopped" if status in (75, 130) else "failed")
    assert (payload["model"], payload["out"]) == ("demo", "demo-ternary")


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (MemoryError(), 4),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4),
     (RuntimeError("CUDA out of memory."), 4), (OSError(errno.ENOSPC, "full", "f"), 4),
     (PermissionError(errno.EACCES, "no", "f"), 4), (RuntimeError("other"), 1),
     (KeyError("x"), 1)],
)  # fmt: skip
def test_other_exceptions(error: BaseException, status: int, fake: Callable[..., Fake]) -> None:
    fake("distill", error)
    assert cli.run(["distill", "demo"]) == status


def test_a_bug_leaves_its_traceback_in_a_file(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("distill", ZeroDivisionError("oh"))
    status, payload = run_json(capsys, "distill", "demo")
    assert (status, payload["error"]["type"]) == (1, "InternalError")
    log = Path(payload["error"]["hint"].split()[-1])
    assert "ZeroDivisionError: oh" in log.read_text()
    log.unlink()


def test_quiet_prints_errors_only(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("ternarize")
    assert cli.run(["ternarize", "demo", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "status"),
    [("--fail-if-ppl-above 12.5", 0), ("--fail-if-ppl-above 12.4", 5),
     ("--fail-if-ppl-ratio-above 1.25", 0), ("--fail-if-ppl-ratio-above 1.2", 5),
     ("--fail-if-size-above 2MB", 0), ("--fail-if-size-above 1.9MB", 5),
     ("--fail-if-bpw-above 1.85", 0), ("--fail-if-bpw-above 1.8", 5),
     ("--fail-if-ppl-above piqa=50", 5)],
)  # fmt: skip
def test_gates_of_ternarize(
    gate: str, status: int, fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("ternarize")
    found, payload = run_json(capsys, "ternarize", "demo", *gate.split())
    assert found == status
    assert payload["student"] == RESULT["student"]  # the results are there, whatever the gates say
    [row] = payload["gates"]
    assert row["passed"] == (status == 0)
    assert (payload["error"] or {}).get("type") == (None if status == 0 else "GateError")


def test_every_gate_is_evaluated(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("ternarize")
    line = "ternarize demo --fail-if-ppl-above 1 --fail-if-bpw-above 9 --fail-if-size-above 1MB"
    status, payload = run_json(capsys, *line.split())
    assert status == 5
    assert sorted(g["passed"] for g in payload["gates"]) == [False, False, True]


def test_gates_of_ternarize_see_the_tasks_that_were_measured(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"demo": {"piqa": {"acc": 0.75}}, "out": {"piqa": {"acc": 0.6}}}
    fake("ternarize", RESULT | {"out": "out", "results": results})
    line = "ternarize demo --tasks piqa --fail-if-acc-below piqa=0.6 --fail-if-acc-drop-above 0.1"
    status, payload = run_json(capsys, *line.split())
    below, drop = payload["gates"]
    assert (status, below["passed"], drop["passed"]) == (5, True, False)
    assert drop["value"] == pytest.approx(0.15)


def test_the_message_of_a_gate_has_its_numbers(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("ternarize")
    for gates, said in (
        ("--fail-if-bpw-above 1.8", "The gate failed: fail-if-bpw-above (1.85, limit 1.8)."),
        ("--fail-if-bpw-above 1.8 --fail-if-ppl-above 99", "1 of 2 gates failed: fail-if-bpw"),
    ):
        _, payload = run_json(capsys, "ternarize", "demo", *gates.split())
        assert payload["error"]["message"].startswith(said)


def test_a_gate_without_the_baseline_it_compares_with_is_said_first(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("eval", {"results": {"a": {"piqa": {"acc": 0.5}}}})
    assert run("eval a --tasks piqa --fail-if-acc-drop-above 0.1 -q") == 5
    assert "compares with a --baseline, and none is given" in capsys.readouterr().err


def test_tasks_may_be_named_one_by_one(fake: Callable[..., Fake]) -> None:
    verb = fake("eval", {"results": {"a": {}}})
    assert run("eval a --tasks piqa,sciq --tasks c4") == 0
    assert verb.options["tasks"] == ("piqa", "sciq", "c4")


def test_one_model_is_named_as_one_also_when_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    status, payload = run_json(capsys, "eval", "./none", "--tasks", "piqa", "--offline")
    assert (status, payload["model"]) == (3, "./none")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_stdout_is_said_in_words(tmp_path: Path) -> None:
    for option in ("--json", "--help-all"):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "ternq", "eval", "./none", option],
                stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            )  # fmt: skip
        assert done.returncode == 4
        assert "stdout cannot be written" in done.stderr or "no space is left" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_has_read_enough_and_a_closed_stdout(demo: Demo) -> None:
    line = f"{sys.executable} -m ternq generate demo-ternary a --max-new-tokens 200"
    for shell, expected in (
        (f"set -o pipefail; {line} | head -c 5", 141),
        (f"{line} >&-", 4),
    ):
        done = subprocess.run(
            ["bash", "-c", shell], cwd=demo.folder, capture_output=True, text=True
        )
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr and "bug" not in done.stderr


def test_a_gate_on_a_task_that_is_not_measured_is_said_first(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    fake("eval", {"results": {"a": {}}})
    line = "eval a --tasks mmlu,piqa:acc --fail-if-acc-below {}=0.5 --no-progress"
    for task, warned in (("boolq", True), ("mmlu_virology", False), ("piqa", False)):
        assert run(line.format(task)) == 5
        said = f"names '{task}', which is not among --tasks"
        assert (said in capsys.readouterr().err) == warned


def test_eval_compares_with_a_baseline(
    fake: Callable[..., Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(acc: float) -> dict[str, Any]:
        return {"piqa": {"acc": acc, "samples": 10, "partial": False}}

    results = {"a": measured(0.6), "b": measured(0.75)}
    verb = fake("eval", {"results": results, "baseline": "b"})
    line = "eval a --baseline b --fail-if-acc-drop-above piqa=0.1 --fail-if-acc-below piqa=0.6"
    status, payload = run_json(capsys, *line.split())
    assert (verb.args, verb.options["baseline"]) == ((["a"],), "b")
    drop = next(g for g in payload["gates"] if g["name"] == "fail-if-acc-drop-above")
    assert (status, drop["passed"], payload["model"]) == (5, False, "a")
    assert drop["value"] == pytest.approx(0.15)


def test_size_gates_of_eval_are_of_all_files(fake: Callable[..., Fake]) -> None:
    verb = fake("eval", {"results": {"a": {}}, "models": {"a": {"bytes": 9}}})
    assert run("eval a --fail-if-size-above 1kB") == 5  # its files are not known: it fails
    verb.result["models"]["a"] |= {"file_bytes": 1000, "bpw_linear": 1.85}
    assert run("eval a --fail-if-size-above 1kB --fail-if-bpw-above 1.85") == 0
    assert run("eval a --fail-if-size-above 999B") == 5


def test_the_summary_is_appended_and_its_place_checked_first(fake: Callable[..., Fake]) -> None:
    verb = fake("eval")
    Path("s.md").write_text("before\n")
    assert run("eval demo --summary-md s.md") == 0
    assert Path("s.md").read_text().startswith("before\n## ternq eval: demo\n")
    verb.args = ()
    Path("folder").touch()
    assert run("eval demo --summary-md folder/s.md") == 4
    assert verb.args == ()


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["", "-h", "--help", *(f"{c} --help" for c in cli.COMMANDS)])
def test_help_fits_a_screen(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 42
    assert any("Examples:" in text for text in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"ternq {ternq.__version__}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ternq", "nope", "--json"],
        capture_output=True,
        timeout=60,
        text=True,
    )
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 2


# --- stopping and progress ------------------------------------------------------------------------


def test_signals_set_a_flag_once_somebody_polls(capsys: pytest.CaptureFixture[str]) -> None:
    stop.install()
    assert stop.requested() is None
    signal.raise_signal(signal.SIGINT)
    assert stop.requested() == "SIGINT"
    assert "again" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.install()
    assert stop.requested() is None
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested() == "SIGTERM"


def test_signals_end_at_once_what_nobody_can_save(fake: Callable[..., Fake]) -> None:
    fake("distill", lambda options: signal.raise_signal(signal.SIGTERM))
    assert cli.run(["distill", "demo"]) == 75
    fake("distill", lambda options: signal.raise_signal(signal.SIGINT))
    assert cli.run(["distill", "demo"]) == 130


def test_plain_progress_is_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = terminal.Lines(seconds=3600)
    lines(Event("plan", "Budget: 10 tokens"))
    for step in range(1, 11):
        lines(Event("train", done=step, total=10, values={"loss": 2.0}))
    lines(Event("data", "a text ended", level="warning"))
    first, begun, *_, done, last = capsys.readouterr().err.splitlines()
    assert (first, begun) == ("Budget: 10 tokens", "train, 1/10, loss 2")
    assert re.fullmatch(r"train, 10/10, [\d.e+]+/s, loss 2", done)
    assert last == "warning: a text ended"


def test_quiet_progress_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = terminal.Quiet()
    quiet(Event("train", done=1, total=2))
    quiet(Event("plan", "nothing"))
    quiet(Event("data", "a text ended", level="warning"))
    assert capsys.readouterr().err == "warning: a text ended\n"


def test_the_bar_leaves_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    bar = terminal.Bar()
    bar(Event("load", "Loading demo"))
    for step in range(1, 4):
        bar(Event("train", done=step, total=3, values={"loss": 1.5}))
    bar(Event("evaluate", done=1, total=1))
    bar.close()
    text = capsys.readouterr().err
    for part in ("Loading demo", "train", "3/3", "loss 1.5", "evaluate", "1/1"):
        assert part in text


def test_main_ends_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ternq", "nope"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("ternq.cli").main()
    assert end.value.code == 2
