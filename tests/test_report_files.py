"""The files of --summary-md, --html and --junit: when they are written, and that they are whole."""

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree as ET

import pytest
import typer

from ternq import boundary, helptext, options, page, stop
from ternq.errors import InputError, TernqError

GATE = {"name": "fail-if-ppl-above", "task": "t", "value": 9.0, "limit": 5.0, "passed": False}
RESULT = {"results": {"m": {"t": {"token_perplexity": 9.0, "samples": 1, "partial": False}}}}
ALL = ("s.md", "p.html", "j.xml")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Every test in a folder of its own; signals as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(boundary, "_set_environment", lambda verbose, offline: None)
    monkeypatch.setattr(stop, "_request", None)
    monkeypatch.setattr(stop, "_polled", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(line: str, verb: Callable[[], dict[str, Any]]) -> int:
    """The exit status of ``eval m`` with these options, ``verb`` doing the work."""
    app = typer.Typer()

    @app.callback(cls=helptext.Group)
    def _all() -> None: ...

    @options.command(app, "eval", options.reports, call=boundary.call, examples="x")
    def _eval(model: Annotated[str, typer.Argument()], **settings: Any) -> dict[str, Any]:
        """Measure."""
        return verb()

    return boundary.run(app, ("eval",), ["eval", "m", *line.split()])


def done() -> dict[str, Any]:
    return RESULT


def failed_gate() -> dict[str, Any]:
    return {**RESULT, "gates": [GATE]}


def broken() -> dict[str, Any]:
    raise InputError("There is no data.", "Name some.")


def here() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def cases(path: str = "j.xml") -> list[tuple[str | None, list[str]]]:
    found = ET.parse(path).iter("testcase")
    return [(case.get("name"), [child.tag for child in case]) for case in found]


def options_of(names: tuple[str, ...]) -> str:
    return " ".join(f"{flag} {n}" for flag, n in zip(FLAGS, names, strict=True))


FLAGS = ("--summary-md", "--html", "--junit")


@pytest.mark.parametrize(("verb", "status"), [(done, 0), (failed_gate, 5)])
def test_all_three_are_written_also_when_a_gate_fails(verb: Any, status: int) -> None:
    assert run(options_of(ALL), verb) == status
    assert Path("s.md").read_text(encoding="utf-8").startswith("## ternq eval: m")
    html = Path("p.html").read_text(encoding="utf-8")
    assert ("The gate failed" in html) == (status == 5)
    assert html.rstrip().endswith("</html>")
    expected = [("t [m]", ["system-out"])]
    assert cases() == ([("fail-if-ppl-above t", ["failure"])] if status else []) + expected
    assert here() == sorted(ALL)  # and no temporary file


@pytest.mark.parametrize("quiet", ["", "-q", "--json"])
def test_pages_are_replaced_and_the_summary_grows(quiet: str) -> None:
    for _ in range(2):
        assert run(f"{options_of(ALL)} {quiet}", done) == 0
    assert Path("p.html").read_text(encoding="utf-8").count("<html") == 1
    assert Path("s.md").read_text(encoding="utf-8").count("## ternq eval") == 2
    assert len(cases()) == 1


def test_a_command_that_breaks_off_leaves_the_old_page_and_says_why_in_junit() -> None:
    Path("p.html").write_text("before")
    assert run(options_of(ALL), broken) == 3
    assert Path("p.html").read_text() == "before"
    assert cases() == [("ternq eval", ["error"])]
    [error] = ET.parse("j.xml").iter("error")
    assert (error.get("message"), error.get("type")) == ("There is no data.", "InputError")


def test_interrupted_commands_are_errors_too() -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    assert run("--junit j.xml", interrupted) == 130
    assert cases() == [("ternq eval", ["error"])]


@pytest.mark.parametrize("given", ["--junit j.xml", "--junit=j.xml"])
def test_a_command_line_that_is_refused_is_said_in_junit(given: str) -> None:
    assert run(f"{given} --nonsense", done) == 2
    assert cases() == [("ternq eval", ["error"])]


def test_help_writes_nothing() -> None:
    assert run(f"{options_of(ALL)} --help", done) == 0
    assert here() == []


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", ["folder", "file/x", "file/deeper/x", "long" * 100])
def test_where_it_cannot_be_written_nothing_begins(flag: str, name: str) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    assert run(f"{flag} {name}", lambda: pytest.fail("the work began")) == 4
    assert here() == ["file", "folder"]


def test_folders_on_the_way_are_made() -> None:
    assert run(options_of(("a/s.md", "b/c/p.html", "d/j.xml")), done) == 0
    assert all(Path(n).is_file() for n in ("a/s.md", "b/c/p.html", "d/j.xml"))


@pytest.mark.parametrize("names", [("x", "x", "y"), ("x", "y", "x"), ("y", "x", "./x")])
def test_two_reports_are_two_files(names: tuple[str, str, str]) -> None:
    Path("x").write_text("before")
    assert run(options_of(names), done) == 2
    assert Path("x").read_text() == "before"


def test_a_report_that_cannot_be_made_whole_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Path, *args: Any, **settings: Any) -> int:
        with self.open("w") as file:
            file.write("half")
        raise OSError(28, "No space left on device", str(self))

    assert run(options_of(ALL), done) == 0
    before = Path("p.html").read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert run("--html p.html", failed_gate) == 4  # and 4 goes before 5
    assert Path("p.html").read_text(encoding="utf-8") == before
    assert here() == sorted(ALL)


def test_a_mistake_in_the_page_is_in_the_junit_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> str:
        raise TernqError("It cannot be drawn.")

    monkeypatch.setattr(page, "page", failing)
    assert run(options_of(ALL), done) == 1
    assert cases() == [("ternq eval", ["error"]), ("t [m]", ["system-out"])]


def test_a_link_stays_a_link_and_a_device_a_device() -> None:
    Path("real").mkdir()
    Path("p.html").symlink_to("real/p.html")
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("--html p.html --junit pipe", done) == 0
        assert os.read(reader, 1 << 20).startswith(b"<?xml")
    finally:
        os.close(reader)
    assert Path("p.html").is_symlink() and Path("real/p.html").is_file()
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


def test_a_report_that_breaks_is_a_bug_that_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken_page(*_: Any) -> str:
        raise ValueError("a chart without points")

    monkeypatch.setattr(page, "page", broken_page)
    assert run("--html p.html --junit j.xml --json", done) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == RESULT["results"]
    assert found["error"]["type"] == "InternalError"
    assert here() == ["j.xml"]


def test_what_ends_a_command_stands_in_the_summary() -> None:
    assert run("--summary-md s.md", broken) == 3
    said = Path("s.md").read_text(encoding="utf-8")
    assert said == "## ternq eval: m\n\n**error**: There is no data.\n\nName some.\n\n"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder where nothing can be made")
def test_a_folder_that_cannot_be_made_is_said_in_words() -> None:
    assert run("--html /proc/none/p.html", lambda: pytest.fail("the work began")) == 4
