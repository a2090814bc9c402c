"""From the options of a command to what its verb takes: a recipe, a device, names, gates.

Nothing heavy is imported before it is needed: `ternq.cli` imports this for ``--help`` as well.
"""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import ternq
from ternq import processes
from ternq.boundary import Payload, UsageMistake
from ternq.errors import InputError
from ternq.progress import Event, Progress
from ternq.recipe import (
    BASELINES,
    PRESETS,
    Recipe,
    Scheme,
    Training,
    default_recipe,
    merge,
    refuse_preset,
    untrained,
)


def refuse_without_plan(plan: bool, **given: Any) -> None:
    """`UsageMistake` for options of devices that are planned for, without ``--plan``."""
    for name, value in given.items():
        if value is not None and not plan:
            raise UsageMistake(f"--{name} is of what is planned for: it goes with --plan.")


def recipe_of(
    model: str,
    file: Path | None,
    seed: int | None,
    settings: Payload,
    preset: str,
    *,
    rounds: bool = False,
) -> Recipe:
    """The recipe of ``--recipe``, or the default one, with the flags that were given.

    A flag goes before the preset, and that before the recipe. ``rounds``: a baseline's is made to
    have no steps, where none were asked for.
    """
    base = default_recipe(model)
    if file:
        base = replayed(file)
    own, chosen, training = _of(Training, settings), PRESETS.get(preset, {}), base.training
    if own.keys() & {"tokens", "steps"}:
        chosen = {name: value for name, value in chosen.items() if name != "tokens"}
    scheme = merge(base.scheme, _of(Scheme, settings))
    alone = rounds and scheme.method in BASELINES and not file  # the demo's budget is DLT's
    if alone or (chosen | own).keys() & {"tokens", "steps"}:
        training = replace(training, tokens=None, steps=None)
    seed = base.seed if seed is None else seed
    made = Recipe(model=model, scheme=scheme, training=merge(training, chosen | own), seed=seed)
    refuse_preset(made, preset)
    return untrained(made) if rounds else made


def replayed(file: Path) -> Recipe:
    """The recipe in a file of its own, or in what a run or an artefact says of itself."""
    from ternq.files import read_json

    found = read_json(file)
    return Recipe.from_json(found.get("recipe", found))


def seed_of(seed: int | None, file: Path | None) -> int:
    """The seed that was given, or that of ``--recipe``, or 0."""
    if file is not None:
        recipe = replayed(file)
        seed = recipe.seed if seed is None else seed
    return seed or 0


def _of(part: Any, settings: Payload) -> Payload:
    """The settings that are fields of ``part``; typer's lists as tuples, empty ones not given."""
    names = [f.name for f in fields(part)]
    own = {n: settings[n] for n in names if settings.get(n) not in (None, [])}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in own.items()}


def where(device: str | None, settings: Payload) -> Payload:
    """Where to compute, and how a model may be had."""
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    world = {k: settings[k] for k in ("offline", "trust_remote_code")}
    return {"device": processes.device_of(device)} | world


def names_in(texts: Sequence[str] | None) -> tuple[str, ...]:
    """The names in lists with commas."""
    whole = [[text] if Path(text).is_file() else text.split(",") for text in texts or ()]
    return tuple(filter(None, (name.strip() for names in whole for name in names)))


def limit_of(text: str | None) -> Any:
    """A number of documents, ``"all"`` or None."""
    return int(text) if text and text != "all" else text


def provenance() -> Payload:
    """The command and the versions that make an artefact, for its card."""
    packages = ("torch", "transformers", "safetensors")
    versions = {"ternq": ternq.__version__, "Python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in packages}
    return {"command": shlex.join(["ternq", *sys.argv[1:]]), "versions": versions}


def dtype_of(name: str | None) -> Any:
    """torch's type of that name, or None."""
    import torch

    return getattr(torch, name) if name else None


def path_of(out: Path | None) -> Path:
    """Where to write."""
    assert out is not None, "the default has been put in its place"
    return out


def planned(recipe: Recipe, out: Path, world: Payload) -> Payload:
    """What `ternq.plan` says of a recipe."""
    from ternq.plan import plan

    return {"seed": recipe.seed, "plan": True, **plan(recipe.model, recipe, out=out, **world)}


def newest() -> str:
    """The artefact of this folder that was made last."""
    from ternq.publish import newest_artefact

    found = newest_artefact(Path.cwd())
    if found is None:
        raise InputError(
            "No MODEL was named, and there is no artefact in this folder.",
            "ternq ternarize demo makes one.",
        )
    return os.path.relpath(found)


def gates_of(settings: Payload) -> list[Any]:
    """The gates of the ``--fail-if-`` options, checked before the work begins."""
    from ternq.gates import parse_gates

    prefix = "fail_if_"
    own = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    return parse_gates(**{k: v for k, v in own.items() if v is not None})


def warn_of_gates(
    gates: Sequence[Any], tasks: Sequence[str], progress: Progress, baseline: bool = True
) -> None:
    """Say before the work which gates will fail because what they look at is not measured."""
    from ternq.gates import unanswered

    for said in unanswered(gates, tasks, baseline):
        progress(Event("gates", said, level="warning"))


def standard_input() -> str:
    """A prompt from stdin, without the line end that a shell puts behind it."""
    if sys.stdin is None:
        raise InputError("The prompt is to come from stdin, which is closed.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt on stdin is not UTF-8: {error}.") from error
