"""The command line: options become arguments, one verb is called, the report is shown.

A command is a function that returns its verb's payload. `run` is the one boundary around all of
them: it alone prints results, turns exceptions into a sentence and an exit status, and keeps stdout
to one JSON object under ``--json``. Nothing heavy is imported before a verb is called.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

import typer

import ternq
from ternq import helptext, options, stop
from ternq.errors import (
    GateError,
    InputError,
    InterruptedByUser,
    RecipeError,
    ResourceError,
    TernqError,
)
from ternq.progress import Progress
from ternq.recipe import Recipe, Scheme, Training, merge

Payload = dict[str, Any]

SCHEMA_VERSION = 1
COMMANDS = ("ternarize", "distill", "pack", "eval", "generate")
# typer brings its own click, or since 0.26 a copy of it, and exports this child of its usage errors
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    started: float = field(default_factory=time.monotonic)


class UsageMistake(RecipeError):
    """A command line that cannot be understood."""


class InternalError(TernqError):
    """What nobody foresaw: a bug."""


# --- the boundary ---------------------------------------------------------------------------------


def main() -> NoReturn:
    """The console script: run, then end the process with the contract's exit status."""
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: end as any Unix program does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the result, the message and the returned exit status agree."""
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    command = next((a for a in ours if a in COMMANDS), None)
    session = Session(arguments, json="--json" in ours, command=command)
    error: TernqError | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr) if session.json else contextlib.nullcontext():
            _invoke(session)
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as caught:
        error = _in_words(caught)
        if session.verbose:
            traceback.print_exc()
    try:
        _report(session)
    except OSError as caught:
        error = error or _in_words(caught)
    return _end(session, error)


def _invoke(session: Session) -> None:
    arguments = list(session.arguments)
    status = app(arguments, standalone_mode=False, prog_name="ternq", obj=session)
    if status == 130:  # so typer reports a Ctrl-C
        raise KeyboardInterrupt
    plan, failed = session.payload.get("fits"), _failed_gates(session.payload)
    if plan is False:
        raise ResourceError(session.payload.get("reason") or "This does not fit the machine.")
    if failed:
        count = f"{len(failed)} of {len(session.payload['gates'])} gates"
        raise GateError(f"{count} failed: {', '.join(failed)}.")


def _failed_gates(payload: Payload) -> list[str]:
    return [
        " ".join(filter(None, (gate["name"], gate["task"])))
        for gate in payload.get("gates", ())
        if not gate["passed"]
    ]


def _report(session: Session) -> None:
    """Show what the verb returned: on stdout, or under ``--json`` on stderr; and as Markdown."""
    if not session.finished:
        return
    from ternq import report

    payload = {"command": session.command, **session.payload}
    if session.summary_md:
        with session.summary_md.open("a", encoding="utf-8") as file:
            file.write(report.markdown(payload))
    if not session.quiet:
        report.show(payload, stderr=session.json)


def _end(session: Session, error: TernqError | None) -> int:
    """Say the error in one sentence with its way out, print the JSON, return the exit status."""
    if error:
        from ternq import report

        report.show_error(error.message, error.hint)
    if session.json:
        text = json.dumps(_plain(_envelope(session, error)), ensure_ascii=False, allow_nan=False)
        print(text, flush=True)
    return error.exit_code if error else 0


def _envelope(session: Session, error: TernqError | None) -> Payload:
    """The JSON object of the contract: the common fields first, then the command's own."""
    code = error.exit_code if error else 0
    said = error and {
        "type": type(error).__name__.replace("UsageMistake", "UsageError"),
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
    return fixed | {k: v for k, v in own.items() if k not in fixed} | {"duration_s": seconds}


def _in_words(error: BaseException) -> TernqError:
    """Any exception as a `TernqError`; what nobody foresaw leaves its traceback in a file."""
    if isinstance(error, TernqError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedByUser("Interrupted.", "The same command goes on, or begins again.")
    if isinstance(error, UsageError):
        return _usage(error)
    if _is_memory(error):
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


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    asked = "can't allocate memory" in text or "out of memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and asked)


def _plain(value: Any) -> Any:
    """JSON's own types: paths become strings, numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


# --- around a verb --------------------------------------------------------------------------------


def _call(session: Session, name: str, verb: Any, given: Payload) -> None:
    """Call a verb between signal handlers and a progress display; keep what it returns."""
    from ternq import terminal

    flags = {key: given.pop(key) for key in ("json", "quiet", "verbose", "no_progress", "help_all")}
    session.command, session.quiet, session.verbose = name, flags["quiet"], flags["verbose"]
    session.summary_md = given.pop("summary_md", None)
    if "out" in given and given["out"] is None and given["model"]:
        given["out"] = default_out(given["model"])
    session.payload = {key: given.get(key) for key in ("model", "out", "seed")}
    _check_appendable(session.summary_md)
    _set_environment(session.verbose, given.get("offline", False))
    stop.install()
    display = terminal.display(quiet=session.quiet, plain=flags["no_progress"])
    try:
        result = verb(**given, progress=display)
    finally:
        display.close()
    known = session.payload
    session.payload = {
        **known,
        **{k: v for k, v in result.items() if v is not None or k not in known},
    }
    session.finished = True


def default_out(model: str) -> Path:
    """``<model name>-ternary`` in the working folder."""
    path = Path(model)
    name = (path.resolve() if path.exists() else path).name
    return Path(f"{name.removesuffix('.gguf')}-ternary")


def _check_appendable(path: Path | None) -> None:
    """Fail before the work, not after it, where the report cannot be written."""
    if path:
        with path.open("a", encoding="utf-8"):
            pass


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
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


# --- commands -------------------------------------------------------------------------------------


@app.callback(
    cls=helptext.Group,
    invoke_without_command=True,
    help="Turn a language model into a ternary one: under two bits per weight, trained back.",
    epilog="ternq ternarize demo         three minutes, no network\nternq ternarize --help",
)
def _ternq(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    if version:
        typer.echo(f"ternq {ternq.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


command = partial(options.command, app, call=_call)


@command(
    "ternarize",
    Scheme,
    Training,
    options.access,
    options.rare(options.limits),
    options.rare(options.reports),
    examples="ternq ternarize demo\nternq ternarize ./SmolLM2 --data notes.txt --tokens 2000000",
)
def ternarize(
    model: options.Model,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = None,
    time_limit: options.TimeLimit = None,
    plan: options.Plan = False,
    recipe: options.RecipeFile = None,
    preset: options.Preset = "auto",
    keep_dtype: options.KeepDtype = False,
    seed: options.Seed = None,
    device: options.Device = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Make MODEL ternary: initialise, distil, pack, verify, report."""
    made = _recipe(model, recipe, seed, settings)
    gates = _gates(settings)
    world = _world(device, settings) | {"progress": progress}
    if plan:
        return _plan(made, _path(out), world)
    from ternq.ternarize import ternarize as verb

    result = verb(
        model,
        _path(out),
        made,
        overwrite=overwrite,
        resume=resume,
        time_limit=time_limit,
        keep_dtype=keep_dtype,
        **world,
    )
    return {"seed": made.seed, **result, "gates": _judged_training(gates, result)}


@command(
    "distill",
    Scheme,
    Training,
    options.access,
    options.rare(options.reports),
    examples="ternq distill demo -o run --time-limit 1h\nternq pack run -o packed",
)
def distill(
    model: options.Model,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = None,
    time_limit: options.TimeLimit = None,
    plan: options.Plan = False,
    recipe: options.RecipeFile = None,
    teacher: options.Teacher = None,
    preset: options.Preset = "auto",
    seed: options.Seed = None,
    device: options.Device = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Train a ternary student of MODEL, or go on where it stopped."""
    made = _recipe(model, recipe, seed, settings)
    world = _world(device, settings) | {"progress": progress}
    if plan:
        return _plan(made, _path(out), world)
    from ternq.distill import distill as verb

    result = verb(
        model,
        _path(out),
        made,
        teacher=teacher,
        overwrite=overwrite,
        resume=resume,
        time_limit=time_limit,
        **world,
    )
    return {"seed": made.seed, **result}


@command(
    "pack",
    options.access,
    examples="ternq pack run -o packed\nternq pack --verify packed",
)
def pack(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A run of ternq distill.")
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    verify: Annotated[
        Path | None,
        options.option("--verify", metavar="DIR", help="Check an artefact; write nothing."),
    ] = None,
    format: Annotated[
        Literal["ternq"],
        options.option("--format", metavar="ternq", help="Five codes in a byte, safetensors."),
    ] = "ternq",
    keep_dtype: options.KeepDtype = False,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Pack a trained run for from_pretrained, and prove it."""
    if (model is None) == (verify is None):
        raise UsageMistake("Name either a MODEL to pack or --verify DIR.", "See ternq pack --help.")
    from ternq.pack import pack as verb
    from ternq.pack import verify as check

    if verify is not None:
        return {"model": str(verify), **check(verify, progress=progress)}
    return verb(
        cast("str", model),
        _path(out),
        overwrite=overwrite,
        keep_dtype=keep_dtype,
        progress=progress,
        **settings,
    )


@command(
    "eval",
    options.access,
    options.limits,
    options.accuracies,
    options.reports,
    examples="ternq eval demo-ternary --tasks notes.txt\n"
    "ternq eval demo-ternary --tasks piqa --fail-if-acc-below piqa=0.6",
)
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="As for ternarize. [the artefact made last here]"
        ),
    ] = None,
    tasks: Annotated[
        str,
        options.option(
            "--tasks",
            metavar="NAME,...",
            help="wikitext, c4, any lm-eval task, a text file; NAME:METRIC.",
        ),
    ] = "wikitext",
    limit: Annotated[
        Any,
        options.option(
            "--limit",
            parser=options.limit_of,
            metavar="N|all",
            help="Documents per task; N marks results partial.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        options.option("--num-fewshot", metavar="N", help="Examples before each question."),
    ] = None,
    batch_size: Annotated[
        int | None,
        options.option(
            "--batch-size", metavar="N", show_default="what memory allows", help="Texts at once."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        options.option(
            "--data-dir", metavar="DIR", help="Folder laid out as the hub, instead of it."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        options.option(
            "--baseline", metavar="MODEL", help="To compare with; or a .json of its results."
        ),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Measure models: perplexities and lm-eval tasks."""
    gates = _gates(settings)
    models = model or [_newest()]
    stored = _stored_results(baseline) if baseline and baseline.endswith(".json") else None
    also = [baseline] if baseline and stored is None and baseline not in models else []
    from ternq.evaluate import evaluate as verb

    result = verb(
        [*models, *also],
        tasks=tuple(filter(None, (name.strip() for name in tasks.split(",")))),
        limit=int(limit) if limit and limit != "all" else limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        data_dir=data_dir,
        seed=seed or 0,
        dtype=_dtype(dtype),
        progress=progress,
        **_world(device, settings),
    )
    reference = stored or (result["results"][baseline] if baseline else None)
    judged = [row for name in models for row in _judged(gates, name, result, reference)]
    shown = models[0] if len(models) == 1 else models
    return {"seed": seed or 0, **result, "model": shown, "gates": judged}


@command(
    "generate",
    options.access,
    examples='ternq generate demo-ternary "def read(path):"',
)
def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    max_new_tokens: Annotated[
        int, options.option("--max-new-tokens", metavar="N", min=1, help="Most tokens to write.")
    ] = 64,
    temperature: Annotated[
        float,
        options.option("--temperature", metavar="X", min=0.0, help="0 takes the likeliest token."),
    ] = 0.0,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Write text after PROMPT, streamed."""
    from ternq.generate import generate as verb

    return verb(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed or 0,
        dtype=_dtype(dtype),
        write=_write,
        progress=progress,
        **_world(device, settings),
    ) | {"seed": seed or 0}


# --- what commands share --------------------------------------------------------------------------


def _recipe(model: str, file: Path | None, seed: int | None, settings: Payload) -> Recipe:
    """The recipe of ``--recipe``, or the default one, with the flags that were given."""
    base = Recipe(model=model)
    if file:
        from ternq.files import read_json

        found = read_json(file)
        base = Recipe.from_json(found.get("recipe", found))
    training = base.training
    if settings.get("tokens") is not None or settings.get("steps") is not None:
        training = replace(training, tokens=None, steps=None)
    return Recipe(
        model=model,
        scheme=merge(base.scheme, _of(Scheme, settings)),
        training=merge(training, _of(Training, settings)),
        seed=base.seed if seed is None else seed,
    )


def _of(part: Any, settings: Payload) -> Payload:
    """The settings that are fields of ``part``; typer's lists as tuples, empty ones not given."""
    names = [f.name for f in fields(part)]
    own = {n: settings[n] for n in names if settings.get(n) not in (None, [])}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in own.items()}


def _world(device: str | None, settings: Payload) -> Payload:
    """Where to compute, and how a model may be had."""
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device} | {k: settings[k] for k in ("offline", "trust_remote_code")}


def _dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, name) if name else None


def _path(out: Path | None) -> Path:
    assert out is not None, "_call has put the default in its place"
    return out


def _plan(recipe: Recipe, out: Path, world: Payload) -> Payload:
    from ternq.plan import plan

    return {"seed": recipe.seed, "plan": True, **plan(recipe.model, recipe, out=out, **world)}


def _newest() -> str:
    from ternq.publish import newest_artefact

    found = newest_artefact(Path.cwd())
    if found is None:
        raise InputError(
            "No MODEL was named, and there is no artefact in this folder.",
            "ternq ternarize demo makes one.",
        )
    return os.path.relpath(found)


def _stored_results(file: str) -> Payload:
    """The results of the first model in a file that ``ternq eval --json`` printed."""
    from ternq.files import read_json

    results = read_json(Path(file)).get("results")
    first = next(iter(results.values()), None) if isinstance(results, dict) else None
    if not isinstance(first, dict):
        raise InputError(f"{file} holds no results of ternq eval --json.")
    return first


def _gates(settings: Payload) -> list[Any]:
    """The gates of the ``--fail-if-`` options, checked before the work begins."""
    from ternq.gates import parse_gates

    prefix = "fail_if_"
    given = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix) and v}
    return parse_gates(**given)


def _judged(gates: list[Any], name: str, result: Payload, baseline: Any) -> list[Payload]:
    """Every gate on one model of an evaluation; its size is that of the artefact's files."""
    from ternq.gates import check
    from ternq.publish import MANIFEST, read_manifest

    folder = Path(name)
    weights = {}
    if gates and (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        weights = manifest.get("weights", {}) | {"bytes": _size(manifest["files"])}
    rows = check(gates, result["results"][name], weights, baseline)
    return [{**row, "model": name} for row in rows]


def _judged_training(gates: list[Any], result: Payload) -> list[Payload]:
    """Every gate on a freshly made artefact, its teacher being the baseline."""
    from ternq.gates import check

    student, teacher = (
        {"held-out": {"token_perplexity": result[who]["perplexity"]}}
        for who in ("student", "teacher")
    )
    weights = result["weights"] | {"bytes": _size(result["files"])}
    return check(gates, student, weights, teacher)


def _size(files: Sequence[Mapping[str, Any]]) -> int:
    return sum(file["bytes"] for file in files)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
