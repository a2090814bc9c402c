"""Command-line options: those of `Scheme` and `Training` from their fields, the shared ones once.

`command` registers a verb with typer: the function states its own options, and names the groups
that it shares with others. Every settings option defaults to None, "not given", so that the value
of a recipe can stay. Rarer ones are left out of ``--help``, so that it fits a screen, and shown by
``--help-all``.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ternq import helptext
from ternq.recipe import LARGEST_SEED, Training, flag

EVERYDAY = ("tokens", "steps", "data", "batch_size", "sequence_length", "lr")
GATES = "Gates (exit status 5 when one fails)"
OUTPUT = "Output"


def option(*names: str, panel: str | None = None, **settings: Any) -> Any:
    """A typer option in a panel of the help."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def command(
    app: typer.Typer,
    name: str,
    *groups: Any,
    call: Callable[..., Any],
    examples: str,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a verb with its own parameters, those of ``groups``, and those of `output`.

    A group is a dataclass of settings, or a function whose parameters are taken over. typer then
    calls ``call(session, name, verb, given)``.
    """

    def register(verb: Callable[..., Any]) -> Callable[..., Any]:
        def body(context: typer.Context, **given: Any) -> Any:
            return call(context.obj, name, verb, given)

        hidden = {"progress", "settings"}
        own = [p for p in _parameters(verb) if p.name not in hidden]
        shared = [p for group in (*groups, output) for p in _group(group)]
        signature = inspect.signature(body)
        context = signature.parameters["context"]
        body.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[context, *own, *shared]
        )
        body.__doc__ = verb.__doc__
        app.command(name, cls=helptext.Command, epilog=examples)(body)
        return verb

    return register


def duration_of(text: str) -> float:
    """Seconds of ``5h``, ``1h30m``, ``90s`` or a plain number of seconds."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"(?:{number}h)?(?:{number}m(?:in)?)?(?:{number}s?)?", text.strip())
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = hours * 3600 + minutes * 60 + seconds
    if not total:
        raise typer.BadParameter(f"'{text}' is not a duration such as 5h, 90m or 1h30m.")
    return total


def bytes_of(text: str) -> int:
    """Bytes of ``24GB`` or ``900MB``, decimal."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])B", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"'{text}' is not a size such as 24GB.")
    return int(float(found[1]) * 1000 ** {"M": 2, "G": 3, "T": 4}[found[2].upper()])


def limit_of(text: str) -> str:
    """A number of documents, or ``all``."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise typer.BadParameter(f"'{text}' is neither a number of documents nor 'all'.")
    return text


def rare(group: Callable[..., None]) -> Callable[..., None]:
    """The same options, shown by ``--help-all`` only."""

    def hidden() -> None: ...

    shown = inspect.signature(group)
    hidden.__signature__ = shown.replace(  # type: ignore[attr-defined]
        parameters=[_hidden(p) for p in shown.parameters.values()]
    )
    return hidden


def _hidden(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)
    info.hidden = True
    return parameter.replace(annotation=Annotated[kind, info])


def _group(group: Any) -> list[inspect.Parameter]:
    return list(_settings(group)) if is_dataclass(group) else _parameters(group)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    return [p.replace(kind=p.KEYWORD_ONLY) for p in found]


def _settings(part: Any) -> Iterator[inspect.Parameter]:
    """One option per field, None when not given; the help tells the field's default."""
    hints = get_type_hints(part)
    for item in fields(part):
        hint = hints[item.name]
        text, _, said = item.metadata["help"].partition(" [default: ")
        advanced = part is Training and item.name not in EVERYDAY
        settings = {
            "panel": "Advanced training" if advanced else part.__doc__,
            "hidden": advanced or item.metadata["hidden"],
            "help": text,
            "metavar": _metavar(hint),
            "show_default": said.rstrip("]") or _shown(item.default),
        }
        name = flag(item.name)
        kind = list[str] | None if hint == tuple[str, ...] else hint | None
        off = item.metadata["off"] or f"--no-{name[2:]}"
        names = f"{name}/{off}" if hint is bool else name
        yield inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[kind, option(names, **settings)],
            default=None,
        )


def _metavar(hint: Any) -> str | None:
    choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else ""
    if choices:
        return choices if len(choices) < 40 else "NAME"
    return {int: "N", int | None: "N", float: "X", float | None: "X", bool: None}.get(hint, "NAME")


def _shown(default: Any) -> str | bool:
    if default is None or default == ():
        return False
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, or the shipped 'demo'."),
]
Out = Annotated[
    Path | None,
    option("-o", "--out", metavar="DIR", show_default="MODEL-ternary", help="Where to write."),
]
PackOut = Annotated[
    Path | None,
    option(
        "-o", "--out", metavar="DIR",
        show_default="MODEL-ternary, or MODEL-FORMAT", help="Where to write.",
    ),
]  # fmt: skip
Overwrite = Annotated[bool, option("--overwrite", help="Replace an output that exists.")]
RecipeFile = Annotated[
    Path | None,
    option("--recipe", metavar="FILE", help="Replay a recipe (JSON); flags override it."),
]
SeedFile = Annotated[
    Path | None,
    option("--recipe", metavar="FILE", hidden=True, help="Take the seed of a recipe."),
]
TimeLimit = Annotated[
    float | None,
    option(
        "--time-limit",
        parser=duration_of,
        metavar="5h",
        help="Save and stop then (exit status 75).",
    ),
]
LogWith = Annotated[
    list[str] | None,
    option(
        "--log-with",
        panel="Advanced training",
        metavar="NAME,...",
        hidden=True,
        help="Metrics also to tensorboard or wandb.",
    ),
]
Plan = Annotated[bool, option("--plan", help="Check everything, say what would be done.")]
RarePlan = Annotated[
    bool, option("--plan", hidden=True, help="Check everything, say what would be done.")
]
Memory = Annotated[
    int | None,
    option(
        "--memory",
        parser=bytes_of,
        metavar="24GB",
        hidden=True,
        help="With --plan: plan for a device of so much memory.",
    ),
]
Devices = Annotated[
    int | None,
    option(
        "--devices",
        metavar="N",
        min=1,
        hidden=True,
        help="With --plan: plan for so many, which share the parameters (FSDP 2).",
    ),
]
Documents = Annotated[
    Any,
    option(
        "--limit",
        parser=limit_of,
        metavar="N|all",
        help="Documents per task; N marks results partial.",
    ),
]
DataDir = Annotated[
    Path | None,
    option("--data-dir", metavar="DIR", help="Folder laid out as the hub, instead of it."),
]
Resume = Annotated[
    bool | None,
    option(
        "--resume/--no-resume",
        help="Must go on with a stopped run, or must not.",
    ),
]
Preset = Annotated[
    Literal["auto", "quick", "balanced", "best"],
    option(
        "--preset",
        metavar="NAME",
        help="auto, quick, balanced or best: how much work.",
    ),
]
KeepDtype = Annotated[
    bool, option("--keep-dtype", hidden=True, help="Do not store float32 tensors as bfloat16.")
]
Embeddings = Annotated[
    Literal["keep", "int8"],
    option("--embeddings", metavar="keep|int8", help="Keep embeddings, or store 8 bits."),
]
Teacher = Annotated[
    str | None,
    option("--teacher", metavar="MODEL", hidden=True, help="Learn from another model than MODEL."),
]
Int8Activations = Annotated[
    bool,
    option("--int8-activations", help="Packed layers round activations to 8 bits, not 16."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    option(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16. [float32 on a CPU]",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    option("--device", metavar="NAME", show_default="cuda, else cpu", help="Where to compute."),
]
UnusedSeed = Annotated[
    int | None,
    option("--seed", metavar="N", hidden=True, help="For scripts: packing draws nothing."),
]
UnusedDevice = Annotated[
    str | None,
    option("--device", metavar="NAME", hidden=True, help="For scripts: packing is the CPU's."),
]
UnusedDtype = Annotated[
    str | None,
    option("--dtype", metavar="NAME", hidden=True, help="For scripts: packing is exact."),
]
UnusedRecipe = Annotated[
    Path | None,
    option("--recipe", metavar="FILE", hidden=True, help="For scripts: MODEL has its own."),
]
Seed = Annotated[
    int | None,
    option(
        "--seed",
        metavar="N",
        min=0,
        max=LARGEST_SEED,
        show_default="0",
        help="Of everything random.",
    ),
]


def access(
    offline: Annotated[
        bool,
        option("--offline", envvar="HF_HUB_OFFLINE", show_envvar=False, help="Use no network."),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        option("--trust-remote-code", hidden=True, help="Run Python code that MODEL brings."),
    ] = False,
) -> None:
    """How a model may be had."""


def reports(
    summary_md: Annotated[
        Path | None,
        option("--summary-md", panel=OUTPUT, metavar="FILE", help="Append the report as Markdown."),
    ] = None,
    html: Annotated[
        Path | None,
        option("--html", panel=OUTPUT, metavar="FILE", help="Write the report as a web page."),
    ] = None,
    junit: Annotated[
        Path | None,
        option("--junit", panel=OUTPUT, metavar="FILE", help="Write the gates as JUnit XML."),
    ] = None,
) -> None:
    """Reports in files."""


def output(
    json: Annotated[
        bool, option("--json", panel=OUTPUT, help="One JSON object on stdout.")
    ] = False,
    quiet: Annotated[
        bool, option("-q", "--quiet", panel=OUTPUT, help="Warnings and errors only.")
    ] = False,
    verbose: Annotated[
        bool,
        option("-v", "--verbose", panel=OUTPUT, hidden=True, help="Also what the libraries say."),
    ] = False,
    no_progress: Annotated[
        bool,
        option("--no-progress", panel=OUTPUT, hidden=True, help="Plain lines instead of a bar."),
    ] = False,
    help_all: Annotated[
        bool,
        option(
            "--help-all",
            panel=OUTPUT,
            is_eager=True,
            callback=helptext.reveal,
            help="Every option, also the rarer ones.",
        ),
    ] = False,
) -> None:
    """What every command has."""


def measures(
    tasks: Annotated[
        list[str] | None,
        option(
            "--tasks", panel=OUTPUT, metavar="NAME,...", help="Measure both models; see ternq eval."
        ),
    ] = None,
    limit: Documents = None,
    data_dir: DataDir = None,
) -> None:
    """What is measured of both models, for the card."""


def limits(
    fail_if_ppl_above: Annotated[
        list[str] | None,
        option("--fail-if-ppl-above", panel=GATES, metavar="[TASK=]X", help="Perplexity."),
    ] = None,
    fail_if_ppl_ratio_above: Annotated[
        list[str] | None,
        option(
            "--fail-if-ppl-ratio-above", panel=GATES, metavar="[TASK=]R", help="To the baseline's."
        ),
    ] = None,
    fail_if_size_above: Annotated[
        str | None,
        option("--fail-if-size-above", panel=GATES, metavar="900MB", help="Sum of the files."),
    ] = None,
    fail_if_bpw_above: Annotated[
        str | None,
        option("--fail-if-bpw-above", panel=GATES, metavar="1.9", help="Bits per linear weight."),
    ] = None,
) -> None:
    """Gates of every measurement."""


def accuracies(
    fail_if_acc_below: Annotated[
        list[str] | None,
        option("--fail-if-acc-below", panel=GATES, metavar="TASK=V", help="Accuracy, 0 to 1."),
    ] = None,
    fail_if_acc_drop_above: Annotated[
        list[str] | None,
        option("--fail-if-acc-drop-above", panel=GATES, metavar="[TASK=]V", help="To baseline."),
    ] = None,
) -> None:
    """Gates of tasks that have an accuracy."""
