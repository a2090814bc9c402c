"""The house's own rules: floors, doors, what is public, and documents that tell the truth."""

import ast
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT, STEPS, Demo

import ternq
from ternq import cli

PACKAGE = ROOT / "ternq"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def module_name(path: Path) -> str:
    """``formats.gguf`` for a file of the package; a folder's ``__init__`` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.parent.name != "demo"}
MODULES = sorted(filter(None, FILES))
VERBS = {"distill", "pack", "evaluate", "generate"}


@functools.cache
def imports(module: str) -> set[str]:
    """What a module imports anywhere, functions included, as dotted names."""
    found: set[str] = set()
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of ternq that a module imports."""
    names = {name.removeprefix("ternq.") for name in imports(module) if name.startswith("ternq.")}
    found = {m for m in MODULES for name in names if f"{name}.".startswith(f"{m}.")}
    return {m for m in found if not any(other.startswith(f"{m}.") for other in found)} - {module}


def rows(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of docs/architecture.md."""
    section = ARCHITECTURE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


FLOORS = {name: int(row[0][0]) for row in rows("Floors") for name in names(row[1])}
DOORS = {row[0]: set(names(row[1])) for row in rows("Doors")}


# --- imports --------------------------------------------------------------------------------------


def test_every_module_has_its_floor() -> None:
    assert sorted(FLOORS) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_up(module: str) -> None:
    up = {name for name in own_imports(module) if FLOORS[name] > FLOORS[module]}
    assert not up


def test_imports_have_no_cycles() -> None:
    TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_do_not_import_one_another(verb: str) -> None:
    assert not own_imports(verb) & VERBS


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_enters_by_its_doors_only(library: str) -> None:
    using = {m for m in MODULES if any(name.split(".")[0] == library for name in imports(m))}
    assert using == DOORS[library]


def test_the_ground_knows_no_library_but_torch() -> None:
    known = {*sys.stdlib_module_names, "torch", "ternq"}
    for module in MODULES:
        if FLOORS[module] <= 1:
            assert {name.split(".")[0] for name in imports(module)} <= known | {"rich", "triton"}, (
                module
            )


# --- what is public, and what it costs ------------------------------------------------------------

HEAVY = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "safetensors", "numpy",
         "rich.table"}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "import ternq",
        "import ternq.cli",
        "from ternq.cli import COMMANDS, run; [run([name, '--help']) for name in COMMANDS]",
        "from ternq.cli import run; run([]); run(['ternarize', '--help-all']); run(['--version'])",
        "from ternq.cli import run; run(['--help'])",
    ],
)
def test_help_imports_nothing_heavy(line: str) -> None:
    program = f"import sys\n{line}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stderr.split())


def test_the_public_names_are_these() -> None:
    expected = ["Recipe", "Scheme", "TernqError", "Training", "__version__", "load"]
    assert sorted(ternq.__all__) == expected
    for name in ternq.__all__:
        assert getattr(ternq, name) is not None
    assert set(expected) <= set(dir(ternq))
    with pytest.raises(AttributeError, match="nothing"):
        _ = ternq.nothing


# --- documents ------------------------------------------------------------------------------------


def test_the_page_of_the_command_line_is_fresh() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "docs"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert versions[0] == ternq.__version__


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_functions_that_the_method_names_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## [^\n]*`ternq/(\w+)\.py`\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert {name for name, _ in sections} >= {"ternary", "losses", "train", "perplexity"}
    for module, section in sections:
        source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        cells = [line.split(" | ")[2] for line in section.splitlines() if line.count(" | ") == 3]
        heads = re.findall(r"^### .*: `(\w+)`", section, re.M)
        for function in [*heads, *(name for cell in cells for name in names(cell))]:
            assert f"def {function}(" in source, f"{module}.{function}"


def blocks(kind: str) -> list[str]:
    """The fenced blocks of the README in a language."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


INSTALLS = [block.strip() for block in blocks("bash") if "venv" in block]


def test_the_readme_installs_by_two_commands() -> None:
    demo, tests = INSTALLS
    assert demo.endswith("&& .venv/bin/ternq ternarize demo")
    assert tests.endswith("sh scripts/check")
    assert all("-c constraints.txt" in line for line in INSTALLS)
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


USES = [block for block in blocks("bash") if block.strip() not in INSTALLS]


@pytest.fixture(scope="module")
def folder(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that fills with what the README makes."""
    return shutil.copytree(demo.folder, tmp_path_factory.mktemp("readme") / "folder")


@pytest.mark.parametrize("block", ["ternq ternarize demo", *USES])
def test_the_readmes_commands_run(
    folder: Path, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows the installation first; in this process, since programs take long to start."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TERNQ_DEMO_STEPS", STEPS)
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "ternq"
        assert cli.run(arguments) == 0, line


def test_the_readmes_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec("".join(blocks("python")), {})


def test_the_demo_has_its_parts() -> None:
    folder = PACKAGE / "demo"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000


def test_no_path_of_a_machine_is_in_a_file() -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout")
    machine = re.compile(r"(?<![\w.*}])/(?:work|root|home|Users)/\w")
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            found = machine.search(path.read_bytes().decode("utf-8", errors="ignore"))
            assert not found or path.suffix in (".xz", ".safetensors"), f"{name}: {found}"


def test_every_source_has_a_docstring() -> None:
    for folder in ("ternq", "tests", "bench", "examples"):
        for path in Path(ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name
