"""The one boundary around all commands: results out, exceptions to a sentence and an exit status.

`run` alone prints results and keeps stdout to one JSON object under ``--json``; `call` puts signal
handlers and a progress display around a verb. Reports in files are written also when a gate fails;
the JUnit file also when the command does.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import typer

import ternq
from ternq import processes, stop
from ternq.errors import (
    GateError,
    InterruptedByUser,
    RecipeError,
    ResourceError,
    StoppedError,
    TernqError,
    is_memory,
)
from ternq.recipe import display_name

Payload = dict[str, Any]

SCHEMA_VERSION = 1
OWN = (1, 3, 4, 6)  # exit statuses that need not be the main process's: others say theirs too
TOGETHER = ("distill", "ternarize")  # commands that several processes can share
# typer brings its own click, or since 0.26 a copy of it, and exports this child of its usage errors
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


@dataclass
class Session:
    """What is known of one command line, whatever becomes of it."""

    arguments: Sequence[str]
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    command: str | None = None
    payload: Payload = field(default_factory=dict)
    finished: bool = False
    summary_md: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    started: float = field(default_factory=time.monotonic)


class UsageMistake(RecipeError):
    """A command line that cannot be understood."""

    kind = "UsageError"


class InternalError(TernqError):
    """What nobody foresaw: a bug."""


def run(
    app: typer.Typer, commands: Sequence[str], arguments: Sequence[str], *, last: bool = False
) -> int:
    """Run one command line; the result, the message and the returned exit status agree.

    ``last``: the process ends with this command, so no later signal may change the status that
    has been printed.
    """
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    command = next((a for a in ours if a in commands), None)
    session = Session(arguments, json="--json" in ours, command=command)
    session.junit = _named("--junit", ours)  # a command line that is refused is reported too
    error: TernqError | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr) if session.json else contextlib.nullcontext():
            _invoke(app, session)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt, stop.Terminated) as caught:
        error = _in_words(caught)
        if session.verbose:
            traceback.print_exc()
    for report in (_report, _report_junit) if processes.is_main() else ():
        try:
            report(session, error)
        except BrokenPipeError:
            raise
        except Exception as caught:  # what was measured is printed all the same
            error = _worse(error, caught)
    if last:
        stop.ignore()
    return _end(session, error)


def _invoke(app: typer.Typer, session: Session) -> None:
    arguments = list(session.arguments)
    try:
        status = app(arguments, standalone_mode=False, prog_name="ternq", obj=session)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # where a reader is gone typer ends so
            raise left.__context__ from None
        raise
    if status == 130:  # so typer reports a Ctrl-C
        raise KeyboardInterrupt
    plan, failed = session.payload.get("fits"), _failed_gates(session.payload)
    if plan is False:
        raise ResourceError(session.payload.get("reason") or "This does not fit the machine.")
    if failed:
        gates = session.payload["gates"]
        count = f"{len(failed)} of {len(gates)} gates" if len(gates) > 1 else "The gate"
        raise GateError(f"{count} failed: {', '.join(failed)}.")


def _failed_gates(payload: Payload) -> list[str]:
    from ternq.shown import number

    several = len({gate.get("model") for gate in payload.get("gates", ())}) > 1
    keys = ("name", "task", "model") if several else ("name", "task")
    return [
        f"{' '.join(filter(None, map(gate.get, keys)))} "
        f"({number(gate['value'])}, limit {number(gate['limit'])})"
        for gate in payload.get("gates", ())
        if not gate["passed"]
    ]


def _report(session: Session, error: TernqError | None) -> None:
    """Show what the verb returned: in files, on stdout, or under ``--json`` on stderr."""
    from ternq import report

    payload = _shown(session)
    if not session.finished:
        if session.summary_md and error:
            with session.summary_md.open("a", encoding="utf-8") as file:
                file.write(report.markdown_error(payload, error.message, error.hint))
        return
    if session.summary_md:
        with session.summary_md.open("a", encoding="utf-8") as file:
            file.write(report.markdown(payload))
    if session.html:
        from ternq.page import page, training_of

        trained, steps = training_of(payload)
        write_whole(session.html, page(payload, steps, trained))
    if not session.quiet:
        report.show(payload, stderr=session.json)


def _report_junit(session: Session, error: TernqError | None) -> None:
    if session.junit and (session.finished or error):
        from ternq.junit import junit

        write_whole(session.junit, junit(_shown(session), error))


def _shown(session: Session) -> Payload:
    """The payload with what a report says of the command itself."""
    seconds = round(time.monotonic() - session.started, 3)
    known = {"command": session.command, "version": ternq.__version__}
    return known | session.payload | {"duration_s": seconds}


def _worse(error: TernqError | None, caught: BaseException) -> TernqError:
    """The error that ends the command: a report that cannot be written (4) goes before a gate."""
    return _in_words(caught) if error is None or isinstance(error, GateError) else error


def _named(option: str, arguments: Sequence[str]) -> Path | None:
    """The value of an option, read before the command line is understood."""
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == option and equals:
            return Path(value) if value else None
        if word == option:
            return Path(arguments[place + 1]) if place + 1 < len(arguments) else None
    return None


def _end(session: Session, error: TernqError | None) -> int:
    """Say the error in one sentence with its way out, print the JSON, return the exit status."""
    if error and (processes.is_main() or error.exit_code in OWN):
        from ternq import report

        who = "" if processes.is_main() else f"process {processes.rank()}: "
        with contextlib.suppress(OSError):  # a full disk below stderr hides no result
            report.show_error(who + error.message, error.hint)
    if session.json and processes.is_main():
        _print_json(
            json.dumps(_plain(_envelope(session, error)), ensure_ascii=False, allow_nan=False)
        )
    return error.exit_code if error else 0


def _print_json(text: str) -> None:
    """Print JSON in UTF-8, whatever encoding stdout has; what is no character is escaped."""
    line = text.encode("utf-8", errors="backslashreplace") + b"\n"
    if raw := getattr(sys.stdout, "buffer", None):
        sys.stdout.flush()
        raw.write(line)
        raw.flush()
    else:  # a stream of text that stands for it
        print(line.decode(), end="", flush=True)


def _envelope(session: Session, error: TernqError | None) -> Payload:
    """The JSON object of the contract: the common fields first, then the command's own."""
    code = error.exit_code if error else 0
    said = error and {
        "type": error.kind,
        "message": error.message,
        "hint": error.hint,
    }
    fixed: Payload = {
        "schema_version": SCHEMA_VERSION,
        "command": session.command,
        "status": "stopped" if code in (75, 130) else "failed" if code else "ok",
        "exit_code": code,
        "error": said,
        "version": ternq.__version__,
    }
    seconds = round(time.monotonic() - session.started, 3)
    own = {"seed": None, "duration_s": None, "model": None, "out": None, **session.payload}
    if isinstance(own["model"], list) and len(own["model"]) == 1:
        own["model"] = own["model"][0]
    return fixed | {k: v for k, v in own.items() if k not in fixed} | {"duration_s": seconds}


def _in_words(error: BaseException) -> TernqError:
    """Any exception as a `TernqError`; what nobody foresaw leaves its traceback in a file."""
    if isinstance(error, TernqError):
        return error
    if isinstance(error, stop.Terminated):
        return StoppedError("Stopped by SIGTERM.", "The same command goes on, or begins again.")
    if isinstance(error, KeyboardInterrupt):
        return InterruptedByUser("Interrupted.", "The same command goes on, or begins again.")
    if isinstance(error, UsageError):
        return _usage(error)
    if processes.is_lost(error):
        return ResourceError(
            "Another process of this training has ended.", "Its own message says why."
        )
    if is_memory(error):
        return ResourceError(
            "Not enough memory.", "Try a smaller --batch-size or --sequence-length."
        )
    if isinstance(error, OSError):
        from ternq.files import REFUSALS

        if error.errno in REFUSALS:
            return ResourceError(f"{error.filename or 'A file'}: {REFUSALS[error.errno]}.")
    return _bug(error)


def _usage(error: Any) -> TernqError:
    message = " ".join(error.format_message().split())
    path = error.ctx.command_path if error.ctx else "ternq"
    return UsageMistake(message, f"See {path} --help.")


def _bug(error: BaseException) -> TernqError:
    handle, path = tempfile.mkstemp(prefix="ternq-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"ternq {ternq.__version__}, Python {sys.version}\n{sys.argv}\n")
        traceback.print_exception(error, file=file)
    first = str(error).strip().partition("\n")[0]
    return InternalError(
        f"This is a bug in ternq ({type(error).__name__}: {first}).", f"The traceback is in {path}"
    )


def _plain(value: Any) -> Any:
    """JSON's own types: paths become strings, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


_NAMED = ("model", "tasks", "data", "device", "dtype", "teacher", "baseline")


def _refuse_empty(given: Payload, command: str) -> None:
    """`UsageMistake` where a shell's unset variable stands for a name: '' or 'a,,b'."""
    for key in _NAMED:
        names = _names(given, key)
        names = ",".join(names).split(",") if key == "tasks" and names else names
        if not all(name.strip() for name in names):
            what = "MODEL" if key == "model" else f"--{key}"
            raise UsageMistake(f"{what} is empty.", f"See ternq {command} --help.")


def _names(given: Payload, key: str) -> list[str]:
    value = given.get(key)
    return [value] if isinstance(value, str) else list(map(str, value or ()))


def call(session: Session, name: str, verb: Any, given: Payload) -> None:
    """Call a verb between signal handlers and a progress display; keep what it returns."""
    from ternq import terminal

    flags = {key: given.pop(key) for key in ("json", "quiet", "verbose", "no_progress", "help_all")}
    session.command, session.quiet, session.verbose = name, flags["quiet"], flags["verbose"]
    session.summary_md, session.html, session.junit = (
        given.get(key) for key in ("summary_md", "html", "junit")
    )
    _refuse_empty(given, name)
    if "out" in given and given["out"] is None and given["model"] and not given.get("verify"):
        given["out"] = default_out(given["model"], given.get("format"))
    session.payload = {key: given.get(key) for key in ("model", "out", "seed")}
    if name not in TOGETHER:
        processes.refuse_many(f"ternq {name}")
    _check_writable(session, given)
    _set_environment(session.verbose, given.get("offline", False))
    stop.install()
    display = terminal.display(
        quiet=session.quiet, plain=flags["no_progress"], silent=not processes.is_main()
    )
    try:
        with _unheard() if session.json and session.quiet else contextlib.nullcontext():
            result = verb(**given, progress=display)
    finally:
        display.close()
        stop.restore()
    known = session.payload
    session.payload = {
        **known,
        **{k: v for k, v in result.items() if v is not None or k not in known},
    }
    session.finished = True


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """What is written to stdout is dropped: text that is streamed is in the JSON object, too."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield


def default_out(model: str, format: str | None = None) -> Path:
    """``<model name>-ternary`` in the working folder; another format is named instead."""
    kind = "ternary" if format in (None, "ternq") else format
    return Path(f"{display_name(model)}-{kind}")


def _check_writable(session: Session, given: Payload) -> None:
    """Fail before the work, not after it, where a report cannot be written, or would do harm."""
    paths = list(filter(None, (session.summary_md, session.html, session.junit)))
    if len({path.resolve() for path in paths}) < len(paths):
        session.summary_md = session.junit = None
        raise UsageMistake("Two reports name the same file.", "Give each its own.")
    for path in paths:
        if harmed := _harmed(path.resolve(), given):
            session.summary_md = session.html = session.junit = None
            said = f"The report {path} would damage '{harmed}'."
            raise UsageMistake(said, "Write it elsewhere.")
        _make_folder(path)
        if path.is_dir():
            raise ResourceError(f"{path} is a folder.", "Name a file.")
        if path == session.summary_md:
            with path.open("a", encoding="utf-8"):
                pass
        elif _is_plain(path):
            whole = path.resolve()
            with tempfile.NamedTemporaryFile(dir=whole.parent, prefix=f".{whole.name}."):
                pass


def _harmed(report: Path, given: Payload) -> Path | None:
    """The text that a report would replace, or the artefact that would have a file too many."""
    from ternq.data import parse_mix
    from ternq.places import split
    from ternq.publish import manifest_of

    out = given.get("out")
    folders = [Path(name) for name in _names(given, "model")]
    folders = [folder for folder in folders if manifest_of(folder)] + ([out] if out else [])
    files = [Path(name) for name, _ in parse_mix(_names(given, "data"))]
    files += [Path(split(name)[0]) for name in ",".join(_names(given, "tasks")).split(",")]
    found = [folder for folder in folders if report.is_relative_to(folder.resolve())]
    found += [file for file in files if file.is_file() and file.resolve() == report]
    return found[0] if found else None


def _make_folder(path: Path) -> None:
    if not path.parent.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as below /proc, where nothing can be made
            raise ResourceError(f"{path.parent} cannot be made.") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text so that nobody ever sees half of it; a pipe or device is written to as it is."""
    from ternq.files import renamed

    _make_folder(path)
    if not _is_plain(path):
        path.write_text(text, encoding="utf-8")
        return
    with renamed(path.resolve()) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_plain(path: Path) -> bool:
    return path.is_file() or not path.exists()


def _set_environment(verbose: bool, offline: bool) -> None:
    """Keep the libraries as quiet, and as far from the network, as the flags ask."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' GGUF reader asks nobody
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
