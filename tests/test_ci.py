"""docs/ci.md: its script and its jobs, executed; with ternq, and with a stub for every status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import tiny
import yaml
from conftest import ROOT, STEPS, Demo

PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "examples" / "ci.sh").read_text(encoding="utf-8")
JOB_FILE = (ROOT / "examples" / "ci.yml").read_text(encoding="utf-8")
INSTALL = "pip install -c constraints.txt ."


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


GITHUB, GITLAB = (yaml.safe_load(block) for block in blocks("yaml"))
JOB: dict[str, Any] = GITHUB["jobs"]["demo"]
Done = subprocess.CompletedProcess[str]


def run(folder: Path, *command: str, **environment: str) -> Done:
    """A program in the folder; programs of its ``bin`` stand before this Python's and others."""
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = os.environ | {
        "PATH": os.pathsep.join(path),
        "TERNQ_DEMO_STEPS": STEPS,
        "HF_DATASETS_CACHE": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",  # faster on texts this short
    }
    for name in ("GITHUB_STEP_SUMMARY", "DATA_DIR", "BASELINE"):
        variables.pop(name, None)
    return subprocess.run(
        command, cwd=folder, env=variables | environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def program(folder: Path, name: str, text: str) -> None:
    """A program of the folder's own, which is found first."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}")
    (folder / "bin" / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as the job finds it: the script, and a text."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "ci.sh").write_text(SCRIPT)
    text = (ROOT / "ternq" / "recipe.py").read_text(encoding="utf-8")
    (tmp_path / "notes.txt").write_text(text[:600])
    return tmp_path


@pytest.fixture
def stubbed(checkout: Path) -> Path:
    """A checkout whose ``ternq`` only notes its options, and fails where it is told to."""
    program(
        checkout,
        "ternq",
        'echo "$@" >> calls\n'
        "if [ $1 = ternarize ]; then mkdir -p demo-ternary; echo weights > demo-ternary/w; fi\n"
        '[ "$1" != "${FAILS:-}" ] || exit "$STATUS"\n',
    )
    return checkout


@pytest.fixture
def trained(checkout: Path, demo: Demo) -> Path:
    """A checkout where ``demo`` has been trained already."""
    for name in ("demo-ternary", "demo-ternary.report"):
        shutil.copytree(demo.folder / name, checkout / name)
    return checkout


def released(folder: Path) -> list[str]:
    """All that lies beside a release, half copies included."""
    return sorted(path.name for path in folder.glob("release/*"))


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_the_files() -> None:
    assert blocks("sh") == [SCRIPT]
    assert blocks("yaml")[0] == JOB_FILE


def test_statuses_are_those_of_the_command_line() -> None:
    table = PAGE.split("### A failed gate")[1].split("\n\n")[1]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    told = {status for row in rows for status in row.split(", ")}
    known = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "cli.md").read_text("utf-8"), re.M)
    assert told == {"0", "5", "6", "75", "130"} and told <= set(known)


def test_the_job_is_safe_to_publish_from() -> None:
    steps = {step.get("name", step.get("uses")): step for step in JOB["steps"]}
    assert steps["Keep the reports"]["if"] == "always()"
    assert steps["Keep the reports"]["with"]["path"] == "reports"
    assert steps["Keep results of evaluations"]["if"] == "always()"
    assert steps["Publish"]["if"].startswith("success() && ")
    assert steps["Publish"]["with"]["path"] == "release/demo-ternary"
    assert list(steps)[-1] == "Publish"
    assert not any(step.get("continue-on-error") for step in steps.values())


def test_both_jobs_install_as_the_readme_does() -> None:
    assert f"```text\n{INSTALL}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert [step["run"] for step in JOB["steps"] if "run" in step] == GITLAB["demo"]["script"]
    assert GITLAB["demo"]["script"][0] == INSTALL
    assert JOB["env"].items() <= GITLAB["demo"]["variables"].items()
    assert (ROOT / JOB["env"]["TEXT"]).is_file()
    assert GITLAB["demo"]["artifacts"]["when"] == "always"
    assert GITLAB["demo"]["artifacts"]["reports"]["junit"] == "reports/junit.xml"


# --- the script, with a stub ----------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_any_shell_will_do(stubbed: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    line = ["busybox", "sh"] if shell == "busybox" else [shell]
    done = run(stubbed, *line, "examples/ci.sh", "a b.txt", "3", "out/v 1", DATA_DIR="hub")
    assert (done.returncode, done.stderr) == (0, "Published: out/v 1\n")
    assert (stubbed / "out" / "v 1" / "w").read_text() == "weights\n"
    first, second, third = (stubbed / "calls").read_text().splitlines()
    assert first == "ternarize demo --json" and second == "pack --verify demo-ternary --json"
    assert third.startswith("eval demo-ternary --tasks a b.txt,piqa --baseline demo ")
    assert "--fail-if-ppl-ratio-above 3 " in third and "--data-dir hub " in third


@pytest.mark.parametrize("fails", ["ternarize", "pack", "eval"])
def test_whatever_fails_keeps_its_status_and_publishes_nothing(stubbed: Path, fails: str) -> None:
    told = {5: "A gate failed", 75: "Stopped", 130: "Stopped"}
    for status in (1, 2, 3, 4, 5, 6, 7, 75, 130):
        done = run(stubbed, "sh", "examples/ci.sh", FAILS=fails, STATUS=str(status))
        assert done.returncode == status
        assert done.stderr.startswith(told.get(status, f"Status {status}, nothing"))
        assert "nothing is published" in done.stderr
    assert released(stubbed) == []
    assert (stubbed / "calls").read_text().splitlines()[-1].startswith(fails)
    assert run(stubbed, "sh", "examples/ci.sh").returncode == 0
    assert released(stubbed) == ["demo-ternary"]


def test_a_release_is_never_replaced(stubbed: Path) -> None:
    (stubbed / "release" / "demo-ternary").mkdir(parents=True)
    done = run(stubbed, "sh", "examples/ci.sh")
    assert done.returncode == 2 and "is there; a release is not replaced" in done.stderr
    assert not (stubbed / "calls").exists()
    assert not list((stubbed / "release" / "demo-ternary").iterdir())


def test_a_copy_that_breaks_off_is_no_release(stubbed: Path) -> None:
    program(stubbed, "cp", 'mkdir -p "$3"; echo half > "$3/half"; exit 1')
    assert run(stubbed, "sh", "examples/ci.sh").returncode == 1
    assert released(stubbed) == ["demo-ternary.part"]
    (stubbed / "bin" / "cp").unlink()
    assert run(stubbed, "sh", "examples/ci.sh").returncode == 0
    assert released(stubbed) == ["demo-ternary"]
    assert [path.name for path in (stubbed / "release" / "demo-ternary").iterdir()] == ["w"]


def test_a_pipe_swallows_the_status(stubbed: Path) -> None:
    """As the page warns; and where the shell has the option, it does not."""
    failing = {"FAILS": "eval", "STATUS": "5"}
    assert run(stubbed, "sh", "-c", "ternq eval | tee log", **failing).returncode == 0
    line = "set -o pipefail; ternq eval | tee log"
    assert run(stubbed, "bash", "-c", line, **failing).returncode == 5


# --- the script, with ternq -----------------------------------------------------------------------


@pytest.mark.slow  # the same job as below, cut short by a gate; statuses are also told by a stub
def test_a_failed_gate_is_reported_and_publishes_nothing(trained: Path) -> None:
    """By the page's own lines for a baseline in a file."""
    (lines,) = blocks("bash")
    done = run(trained, "sh", "-euc", lines, GITHUB_STEP_SUMMARY="page.md")
    assert done.returncode == 5, done.stderr
    assert "A gate failed, nothing is published" in done.stderr
    assert released(trained) == []
    reports = trained / "reports"
    results = json.loads((reports / "results.json").read_text("utf-8"))
    assert results["exit_code"] == 5 and results["error"]["type"] == "GateError"
    assert results["baseline"] == "base.json"
    assert [g["name"] for g in results["gates"] if not g["passed"]] == ["fail-if-ppl-ratio-above"]
    failures = ET.parse(reports / "junit.xml").getroot().iter("failure")
    assert ["ppl-ratio" in (failure.text or "") for failure in failures] == [True]
    assert "fail-if-ppl-ratio-above" in (trained / "page.md").read_text("utf-8")
    assert "<html" in (reports / "report.html").read_text("utf-8")
    assert not (reports / "summary.md").exists()


@pytest.mark.slow  # statuses are told by a stub, damage by test_pack.py
def test_a_broken_artefact_is_status_6_and_publishes_nothing(trained: Path) -> None:
    weights = trained / "demo-ternary" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    done = run(trained, "sh", "examples/ci.sh", "notes.txt", "50")
    assert done.returncode == 6, done.stderr
    assert "Status 6, nothing is published" in done.stderr
    assert released(trained) == []
    assert not (trained / "reports" / "results.json").exists()


# --- the job --------------------------------------------------------------------------------------


def run_job(folder: Path, **changes: str) -> tuple[int, list[str]]:
    """The job's steps in order, with a ``pip`` that only notes its line; actions are not run.

    As GitHub does: ``bash -e``, the job's ``env``, and after a failure only what is ``always()``.
    Returns the first status that is not 0, and the names of the steps that were reached.
    """
    program(folder, "pip", 'echo "pip $*" >> installed')
    environment = JOB["env"] | {"GITHUB_STEP_SUMMARY": str(folder / "step.md")} | changes
    status, reached = 0, []
    for step in JOB["steps"]:
        if status and step.get("if") != "always()":
            continue
        reached.append(step.get("name") or step["uses"])
        if "run" in step:
            done = run(folder, "bash", "-e", "-c", step["run"], **environment)
            status = status or done.returncode
    assert (folder / "installed").read_text() == f"{INSTALL}\n"
    return status, reached


def piqa(root: Path) -> str:
    """A few questions in the hub's layout, whose right answer is the likelier one to any model."""
    rows = [{"goal": tiny.text(4, i), "sol1": "e", "sol2": tiny.text(9, i), "label": 0}
            for i in range(4)]  # fmt: skip
    splits: tiny.Splits = {"validation": ("d/v.jsonl", rows), "train": ("d/t.jsonl", rows[:2])}
    tiny.hub_dataset(root / "hub" / "baber" / "piqa", splits, "default")
    return "hub"


def test_the_job_publishes_what_passes(trained: Path) -> None:
    """With questions too, which the script asks where it is given their data."""
    status, reached = run_job(trained, TEXT="notes.txt", RATIO="50", DATA_DIR=piqa(trained))
    assert status == 0
    assert reached[-4:] == [
        "Quantize, verify, gate", "Keep the reports", "Keep results of evaluations", "Publish"
    ]  # fmt: skip
    for step in JOB["steps"]:
        path = step.get("with", {}).get("path")
        assert not path or any((trained / path).iterdir()), path
    assert released(trained) == ["demo-ternary"]
    for path in (trained / "demo-ternary").iterdir():
        assert (trained / "release" / "demo-ternary" / path.name).read_bytes() == path.read_bytes()
    for name in ("ternarize", "verify", "results"):
        payload = json.loads((trained / "reports" / f"{name}.json").read_text("utf-8"))
        assert (payload["status"], payload["exit_code"]) == ("ok", 0)
    assert {(gate["name"], gate["task"]): gate["passed"] for gate in payload["gates"]} == {
        ("fail-if-ppl-ratio-above", "notes.txt"): True,
        ("fail-if-acc-below", "piqa"): True,
        ("fail-if-size-above", None): True,
        ("fail-if-bpw-above", None): True,
    }
    assert "kl_divergence" in payload["comparison"]["demo-ternary"]["notes.txt"]
    assert "fail-if-bpw-above" in (trained / "step.md").read_text("utf-8")
    junit = ET.parse(trained / "reports" / "junit.xml").getroot()
    assert not list(junit.iter("failure")) and not list(junit.iter("error"))


@pytest.mark.parametrize("fails, status", [("eval", 5), ("pack", 6), ("ternarize", 75)])
def test_the_job_keeps_reports_but_publishes_nothing(
    stubbed: Path, fails: str, status: int
) -> None:
    found, reached = run_job(stubbed, FAILS=fails, STATUS=str(status))
    assert found == status
    assert reached[-2:] == ["Keep the reports", "Keep results of evaluations"]
    assert "Publish" not in reached
    assert released(stubbed) == []
