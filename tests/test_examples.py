"""The examples, run as their first lines say, on one artefact of the demo model."""

import json

import pytest
from conftest import ROOT, STEPS, Demo

EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.is_file())


def example(name: str) -> str:
    return str(ROOT / "examples" / name)


def test_every_example_is_known_here() -> None:
    """train_demo.py trains for an hour and is not run; test_ci.py runs ci.sh and ci.yml."""
    others = ["ci.sh", "ci.yml", "from_scratch.sh", "load_artefact.py", "python_api.py"]
    assert [*others, "train_demo.py"] == EXAMPLES


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


def test_load_artefact(demo: Demo) -> None:
    assert demo.run("python", example("load_artefact.py")).stdout.startswith("def read_config(")


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
