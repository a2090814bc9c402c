"""The command line: options become arguments, one verb is called, its payload is returned.

What is done with the payload, and with exceptions, is `ternq.boundary`'s. Nothing heavy is imported
before a verb is called.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

import typer

import ternq
from ternq import boundary, helptext, options, processes
from ternq.boundary import Payload, UsageMistake
from ternq.progress import Event, Progress
from ternq.recipe import Scheme, Training, refuse_scratch, refuse_untrained
from ternq.request import (
    dtype_of,
    gates_of,
    limit_of,
    names_in,
    newest,
    path_of,
    planned,
    provenance,
    recipe_of,
    refuse_without_plan,
    replayed,
    seed_of,
    standard_input,
    warn_of_gates,
    where,
)

COMMANDS = ("ternarize", "distill", "pack", "eval", "generate")
GOES_ON = "a run: the command goes on with it if it is of this recipe"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """The console script: run, then end the process with the contract's exit status."""
    if sys.stderr is None:  # closed by whoever started this
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  to the end
    if sys.stdout is None:
        print("error: stdout cannot be written: it is closed.", file=sys.stderr)
        sys.exit(4)
    try:
        status = boundary.run(app, COMMANDS, sys.argv[1:], last=True)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough: end as any Unix program does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with contextlib.suppress(OSError):
            print(f"error: stdout cannot be written: {error.strerror}.", file=sys.stderr)
        status = 4
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return the contract's exit status."""
    return boundary.run(app, COMMANDS, arguments)


# --- commands -------------------------------------------------------------------------------------


@app.callback(
    cls=helptext.Group,
    invoke_without_command=True,
    help="Turn a language model into a ternary one: under two bits per weight, trained back.",
    epilog="ternq ternarize demo         a minute or two, no network\nternq ternarize --help",
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


command = partial(options.command, app, call=boundary.call)


@command(
    "ternarize",
    Scheme,
    Training,
    options.access,
    options.rare(options.measures),
    options.rare(options.limits),
    options.rare(options.accuracies),
    options.rare(options.reports),
    examples="ternq ternarize demo\nternq ternarize ./SmolLM2 --data notes.txt --tokens 2000000",
)
def ternarize(
    model: options.Model,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = None,
    time_limit: options.TimeLimit = None,
    log_with: options.LogWith = None,
    plan: options.Plan = False,
    memory: options.Memory = None,
    devices: options.Devices = None,
    recipe: options.RecipeFile = None,
    preset: options.Preset = "auto",
    keep_dtype: options.KeepDtype = False,
    embeddings: options.Embeddings = "keep",
    seed: options.Seed = None,
    device: options.Device = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Make MODEL ternary: initialise, distil, pack, verify, report."""
    refuse_without_plan(plan, memory=memory, devices=devices)
    made = recipe_of(model, recipe, seed, settings, preset, rounds=True)
    gates = gates_of(settings)
    tasks = names_in(settings["tasks"])
    warn_of_gates(gates, tasks, progress)
    world = where(device, settings) | {"progress": progress}
    refuse_scratch(made)
    if plan:
        from ternq.runs import of_artefact
        from ternq.ternarize import check

        place = path_of(out)
        done = check(
            place, made, embeddings=embeddings, keep_dtype=keep_dtype, tasks=tasks,
            limit=limit_of(settings["limit"]), data_dir=settings["data_dir"],
            log_with=names_in(log_with), offline=settings["offline"], overwrite=overwrite,
        )  # fmt: skip
        if done:
            said = f"{place} is finished already with this recipe: the command does nothing"
            progress(Event("plan", said))
        elif not overwrite and (run := of_artefact(place)).exists():
            progress(Event("plan", f"{run} is {GOES_ON}"))
        others: Payload = {"overwrite": overwrite or done, "memory": memory, "devices": devices}
        others |= {"keep_dtype": keep_dtype, "embeddings": embeddings}
        return planned(made, place, world | others)
    from ternq.gates import judge_training
    from ternq.ternarize import ternarize as verb

    result = verb(
        model,
        path_of(out),
        made,
        overwrite=overwrite,
        resume=resume,
        time_limit=time_limit,
        log_with=names_in(log_with),
        keep_dtype=keep_dtype,
        embeddings=embeddings,
        tasks=tasks,
        limit=limit_of(settings["limit"]),
        data_dir=settings["data_dir"],
        made=provenance(),
        **world,
    )
    judged = judge_training(gates, model, result) if processes.is_main() else []
    return {"seed": made.seed, **result, "gates": judged}


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
    log_with: options.LogWith = None,
    plan: options.Plan = False,
    memory: options.Memory = None,
    devices: options.Devices = None,
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
    refuse_without_plan(plan, memory=memory, devices=devices)
    made = recipe_of(model, recipe, seed, settings, preset)
    refuse_untrained(made)
    world = where(device, settings) | {"progress": progress}
    if plan:
        from ternq import trackers
        from ternq.origin import RUN_FILE

        trackers.check(names_in(log_with))
        place = path_of(out)
        begun = not overwrite and (place / RUN_FILE).is_file()
        if begun:
            progress(Event("plan", f"{place} is {GOES_ON}"))
        others: Payload = {"teacher": teacher, "overwrite": overwrite or begun, "by_blocks": False}
        others |= {"memory": memory, "devices": devices}
        return planned(made, place, world | others)
    from ternq.distill import distill as verb

    result = verb(
        model,
        path_of(out),
        made,
        teacher=teacher,
        overwrite=overwrite,
        resume=resume,
        time_limit=time_limit,
        log_with=names_in(log_with),
        **world,
    )
    return {"seed": made.seed, **result}


@command(
    "pack",
    options.access,
    examples="ternq pack run -o packed\nternq pack packed --format gguf -o packed-gguf\n"
    "ternq pack --verify packed",
)
def pack(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A run, an artefact, or any checkpoint that is ternary already.",
        ),
    ] = None,
    out: options.PackOut = None,
    overwrite: options.Overwrite = False,
    verify: Annotated[
        Path | None,
        options.option(
            "--verify",
            metavar="DIR",
            help="Check an artefact; with MODEL, that it is MODEL's. Write nothing.",
        ),
    ] = None,
    format: Annotated[
        Literal["ternq", "dense", "compressed-tensors", "gguf", "mlx"],
        options.option(
            "--format",
            metavar="NAME",
            help="ternq, dense, compressed-tensors, gguf or mlx; see docs/exports.md.",
        ),
    ] = "ternq",
    encoding: Annotated[
        str | None,
        options.option(
            "--encoding",
            metavar="NAME",
            show_default="what fits",
            help="Of gguf: TQ1_0, TQ2_0, Q2_0, Q4_1, Q2_K; of others: float16, float32, bfloat16.",
        ),
    ] = None,
    exact: Annotated[
        bool, options.option("--exact", help="Refuse any rounding, also one of float16.")
    ] = False,
    lossy: Annotated[
        bool,
        options.option("--lossy", help="Allow a format to lose more; the error is measured."),
    ] = False,
    embeddings: options.Embeddings = "keep",
    group_size: Annotated[
        int | None,
        options.option(
            "--group-size",
            metavar="N",
            min=1,
            show_default="the largest that fits",
            help="Of a dense checkpoint that is ternary by value.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        options.option("--skip", metavar="NAME", help="Layers of such a one to leave dense."),
    ] = None,
    keep_dtype: options.KeepDtype = False,
    plan: options.RarePlan = False,
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = None,
    dtype: options.UnusedDtype = None,
    recipe: options.UnusedRecipe = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Pack what is ternary for from_pretrained or another program, and prove it."""
    if model is None and verify is None:
        raise UsageMistake("Name a MODEL to pack, or --verify DIR.", "See ternq pack --help.")
    if recipe is not None:
        replayed(recipe)  # a file that is no recipe is refused here, too
    unused = {"--device": device not in (None, "cpu"), "--dtype": dtype, "--recipe": recipe,
              "--trust-remote-code": settings["trust_remote_code"]}  # fmt: skip
    for name, given in unused.items():
        if given:
            said = "packing computes on the CPU, by what MODEL says of itself, without its code"
            progress(Event("pack", f"{name} changes nothing: {said}"))
    offline = settings["offline"]  # a model's own code cannot be packed, trusted or not
    from ternq.formats import Options
    from ternq.pack import pack as verb
    from ternq.pack import verify as check

    if verify is not None:
        others = {
            "-o": out,
            "--overwrite": overwrite,
            "--format": format != "ternq",
            "--encoding": encoding,
            "--exact": exact,
            "--lossy": lossy,
            "--embeddings": embeddings != "keep",
            "--group-size": group_size,
            "--skip": skip,
            "--keep-dtype": keep_dtype,
            "--plan": plan,
        }
        if beside := next((name for name, given in others.items() if given), None):
            raise UsageMistake(f"--verify writes nothing: {beside} has no meaning beside it.")
        checked = check(verify, model=model, offline=offline, progress=progress)
        return {"model": str(verify), "out": None, **checked}
    return verb(
        cast("str", model),
        path_of(out),
        format=format,
        embeddings=embeddings,
        group_size=group_size,
        skip=tuple(skip or ()),
        options=Options(exact=exact, lossy=lossy, encoding=encoding),
        overwrite=overwrite,
        keep_dtype=keep_dtype,
        offline=offline,
        progress=progress,
        extra={"made": provenance()},
        plan=plan,
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
        list[str] | None,
        options.option(
            "--tasks",
            metavar="NAME,...",
            show_default="wikitext",
            help="wikitext, c4, ptb, lm-eval's, a suite, a text file; NAME:METRIC.",
        ),
    ] = None,
    limit: options.Documents = None,
    num_fewshot: Annotated[
        int | None,
        options.option("--num-fewshot", metavar="N", min=0, help="Examples before each question."),
    ] = None,
    batch_size: Annotated[
        int | None,
        options.option(
            "--batch-size",
            metavar="N",
            min=1,
            show_default="what memory allows",
            help="Texts at once.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        options.option(
            "--max-length", metavar="N", min=2, show_default="2048", help="Tokens of a window."
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool, options.option("--apply-chat-template", help="Ask as in a chat.")
    ] = False,
    data_dir: options.DataDir = None,
    baseline: Annotated[
        str | None,
        options.option(
            "--baseline", metavar="MODEL", help="To compare with; or a .json of its results."
        ),
    ] = None,
    no_cache: Annotated[
        bool, options.option("--no-cache", help="Measure anew what was measured before.")
    ] = False,
    int8_activations: options.Int8Activations = False,
    plan: options.RarePlan = False,
    recipe: options.SeedFile = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Measure models: perplexities and lm-eval tasks."""
    drawn = seed_of(seed, recipe)
    gates = gates_of(settings)
    names = names_in(tasks) or ("wikitext",)
    warn_of_gates(gates, names, progress, baseline is not None)
    models = model or [newest()]
    from ternq.places import refuse_offline

    refuse_offline(names, data_dir, settings["offline"])  # before anything is imported
    from ternq.cache import default_folder
    from ternq.evaluate import evaluate as verb
    from ternq.gates import judge

    result = verb(
        models,
        tasks=names,
        baseline=baseline,
        limit=limit_of(limit),
        num_fewshot=num_fewshot,
        max_length=max_length,
        batch_size=batch_size,
        chat=apply_chat_template,
        data_dir=data_dir,
        int8_activations=int8_activations,
        seed=drawn,
        dtype=dtype_of(dtype),
        cache=None if no_cache else default_folder(),
        samples=settings["html"] is not None,
        plan=plan,
        progress=progress,
        **where(device, settings),
    )
    judged = [] if plan else [row for name in models for row in judge(gates, name, result)]
    shown = models[0] if len(models) == 1 else models
    return {"seed": drawn, **result, "model": shown, "gates": judged}


@command(
    "generate",
    options.access,
    examples='ternq generate demo-ternary "def read(path):"\n'
    'ternq generate chat-ternary "Who are you?" --chat --temperature 0.7',
)
def generate(
    model: options.Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to go on from; - reads it from stdin.")
    ],
    chat: Annotated[
        bool, options.option("--chat", help="Answer PROMPT, by the tokenizer's chat template.")
    ] = False,
    system: Annotated[
        str | None, options.option("--system", metavar="TEXT", help="System message of the chat.")
    ] = None,
    max_new_tokens: Annotated[
        int, options.option("--max-new-tokens", metavar="N", min=1, help="Most tokens to write.")
    ] = 64,
    temperature: Annotated[
        float,
        options.option("--temperature", metavar="X", min=0.0, help="0 takes the likeliest token."),
    ] = 0.0,
    top_k: Annotated[
        int,
        options.option("--top-k", metavar="N", min=0, help="Draw from the N likeliest; 0: all."),
    ] = 0,
    top_p: Annotated[
        float,
        options.option(
            "--top-p", metavar="P", help="Draw from the likeliest that have the probability P."
        ),
    ] = 1.0,
    int8_activations: options.Int8Activations = False,
    plan: options.RarePlan = False,
    recipe: options.SeedFile = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    *,
    progress: Progress,
    **settings: Any,
) -> Payload:
    """Write text after PROMPT, streamed; then tell speed and memory."""
    drawn = seed_of(seed, recipe)
    from ternq.generate import generate as verb

    return verb(
        model,
        standard_input() if prompt == "-" else prompt,
        chat=chat,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        int8_activations=int8_activations,
        seed=drawn,
        dtype=dtype_of(dtype),
        plan=plan,
        write=_write,
        progress=progress,
        **where(device, settings),
    ) | {"seed": drawn}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
