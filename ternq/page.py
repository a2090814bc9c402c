"""A result as one web page that needs nothing else: no script, and no file from elsewhere.

This module decides what stands on the page, and the template how it is laid out. Names of models,
prompts and generated text are anybody's: the template escapes all that is not `Markup`, and only
the charts, built by an XML writer, are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ternq import panels, report, scores
from ternq.metrics import steps_of
from ternq.shown import Table, duration, names, number, printable, size

Payload = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A value of a model, its standard error, and how it differs from the baseline's."""

    value: str
    error: str = ""
    change: str = ""


def page(payload: Payload, steps: Sequence[Payload] = (), trained: str = "") -> str:
    """The HTML of a command's payload.

    ``steps`` are the values of a training, step by step, and ``trained`` is what it made, where
    that is not plain.
    """
    contents = _contents(payload, steps) | {"trained": trained}
    return _environment().get_template("page.html").render(contents)


def training_of(payload: Payload) -> tuple[str, list[dict[str, Any]]]:
    """Of the first model of a payload whose training is recorded: its name, and the steps."""
    models = payload.get("model") or ()
    measured = [models] if isinstance(models, str) else models
    for place in (payload.get("out"), *measured):
        if place and (steps := steps_of(place)):
            return str(place), steps
    return "", []


def _environment() -> Environment:
    folder = Path(__file__).with_name("templates")
    return Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_final,
    )


def _final(value: Any) -> Any:
    """What goes into the page: foreign text without characters that a page must not hold."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else printable(str(value))


def _contents(payload: Payload, steps: Sequence[Payload]) -> dict[str, Any]:
    """All that the template lays out; every text in it is escaped there."""
    plan = "plan" in payload
    return {
        "command": f"ternq {payload.get('command') or ''}".strip(),
        "subject": _subject(payload),
        "said": _said(payload),
        "figures": [] if plan else list(_figures(payload)),
        "verdict": _verdict(payload),
        "gates": report.gates(payload["gates"]) if payload.get("gates") else None,
        "first": _first(payload),
        "models": [] if plan else _columns(payload),
        "baseline": payload.get("baseline"),
        "tasks": [] if plan else list(_tasks(payload)),
        "tables": [] if plan else list(_more_tables(payload)),
        "quality": panels.numbered(panels.quality(payload), "q"),
        "training": panels.numbered(panels.training(steps), "t"),
        "layers": list(panels.layers(payload)),
        "texts": report.texts(payload),
        "facts": [(name, text) for name, text in report.facts(payload) if name != "layers"],
        "settings": list(_settings(payload)),
        "made": (payload.get("made") or {}).get("command"),
        "recipe": payload.get("recipe") and json.dumps(payload["recipe"], indent=2, default=str),
        "footer": list(_footer(payload)),
    }


# -- the head --------------------------------------------------------------------------------------


def _subject(payload: Payload) -> str:
    model = payload.get("model")
    several = isinstance(model, list | tuple) and len(model) > 1
    return f"{len(model)} models" if several and model else names(model) or "no model"


def _said(payload: Payload) -> str:
    """One sentence under the headline."""
    if "plan" in payload:
        return "What would be done; nothing was."
    if "student" in payload:
        return f"Made ternary, trained back, and measured on {payload['student']['text']}."
    tasks = ", ".join(scores.by_task(payload))
    if not tasks:
        return ""
    several = isinstance(payload.get("model"), list | tuple)
    who = f"{names(payload['model'])}: measured" if several else "Measured"
    baseline = payload.get("baseline")
    return f"{who} on {tasks}" + (f", against {baseline}." if baseline else ".")


def _verdict(payload: Payload) -> dict[str, str] | None:
    """What the gates say; None where the payload knows of none."""
    gates = payload.get("gates")
    if gates is None or "plan" in payload:
        return None
    failed = sum(not gate["passed"] for gate in gates)
    if not gates:
        return {"kind": "none", "text": "No gates were set"}
    every = {1: "The gate", 2: "Both gates"}.get(len(gates), f"All {len(gates)} gates")
    some = f"{failed} of {len(gates)} gates" if failed < len(gates) else every
    kind = "failed" if failed else "passed"
    return {"kind": kind, "text": f"{some if failed else every} {kind}"}


def _figures(payload: Payload) -> Iterator[tuple[str, str, str]]:
    """The few numbers that one wants first: (value, name, remark)."""
    teacher, student = (payload.get(who) or {} for who in ("teacher", "student"))
    if student:
        before = f"{number(teacher.get('perplexity'))} before, in 16 bits"
        remark = before if teacher else "trained from scratch"
        yield number(student.get("perplexity")), "token perplexity", remark
    if closed := report.gap_closed(payload):
        yield f"{closed:.1%}", "of the gap closed", "of the log perplexity that rounding loses"
    models = names(payload.get("model"))
    yield from _first_measured(payload, models)
    weights = payload.get("weights") or (payload.get("models") or {}).get(models) or {}
    if weights.get("bpw_linear") is not None:
        total = weights.get("bpw_total")
        everything = "" if total is None else f"{total:.3f} over all weights"
        yield f"{weights['bpw_linear']:.3f}", "bits per linear weight", everything
    if weights.get("bytes"):
        dense = weights.get("bytes_dense_bf16")
        yield size(weights["bytes"]), "of weights", f"{size(dense)} in bfloat16" if dense else ""


def _first_measured(payload: Payload, model: str) -> Iterator[tuple[str, str, str]]:
    """One perplexity and one accuracy of the model that was measured, beside the baseline's."""
    baseline = payload.get("baseline") or ""
    found = scores.by_task(payload).items() if "teacher" not in payload else ()
    for kind in ("perplexity", "acc"):
        for task, having in found:
            own, base = having.get(model, {}), having.get(baseline, {})
            metric = next((m for m in scores.metrics(own) if kind in m), None)
            if metric:
                remark = f"{baseline}: {number(base[metric])}" if metric in base else ""
                yield number(own[metric]), f"{scores.words(metric)}, {task}", remark
                break


def _first(payload: Payload) -> Table | None:
    """The table that belongs before all others: the three models of a training, or a plan."""
    if "plan" in payload or "student" in payload:
        return next(report.tables(payload))
    return None


# -- the comparison --------------------------------------------------------------------------------


def _columns(payload: Payload) -> list[str]:
    """The models, the baseline first."""
    found = dict.fromkeys(m for having in scores.by_task(payload).values() for m in having)
    return sorted(found, key=lambda model: model != payload.get("baseline"))


def _tasks(payload: Payload) -> Iterator[dict[str, Any]]:
    """Every task: how much was measured, and a row per metric with a cell per model."""
    models, against = _columns(payload), scores.against(payload)
    for task, having in scores.by_task(payload).items():
        compared = {model: against.get(model, {}).get(task, {}) for model in models}
        metrics = dict.fromkeys(m for values in having.values() for m in scores.metrics(values))
        rows = [
            (scores.words(metric), [_cell(having.get(m, {}), compared[m], metric) for m in models])
            for metric in metrics
        ]
        rows += [
            (name, [_hidden(compared[model], key) for model in models])
            for key, name in _HIDDEN.items()
            if any(key in values for values in compared.values())
        ]
        yield {"name": task, "extent": scores.extent(having), "rows": rows}


_HIDDEN = {
    "kl_divergence": "KL divergence",
    "top1_agreement": "same top token",
    "flips_lost": "answers lost",
    "flips_won": "answers won",
}


def _cell(values: Payload, compared: Payload, metric: str) -> Cell:
    difference, ratio = (compared.get(f"{metric}_{end}") for end in ("difference", "ratio"))
    changes = [] if difference is None else [scores.signed(difference)]
    changes += [] if ratio is None else [f"×\u2009{number(ratio)}"]
    return Cell(number(values.get(metric)), scores.error(values, metric), ", ".join(changes))


def _hidden(compared: Payload, key: str) -> Cell:
    if compared.get(key) is None:
        return Cell("")
    if key != "kl_divergence":
        return Cell(scores.share(compared[key]))
    return Cell(number(compared[key]), scores.error(compared, key))


def _more_tables(payload: Payload) -> Iterator[Table]:
    wanted = ("Models", "Efficiency")
    yield from (table for table in scores.tables(payload) if table.title in wanted)
    if "student" not in payload and payload.get("weights"):
        yield next(report.tables(payload))


# -- what it was made with -------------------------------------------------------------------------


def _settings(payload: Payload) -> Iterator[Table]:
    """Tables of names and values: the recipe, the settings, the versions, the tasks."""
    recipe = payload.get("recipe") or {}
    for part in ("scheme", "training"):
        if recipe.get(part):
            rows = [(scores.words(k), _setting(v)) for k, v in recipe[part].items()]
            yield Table(f"Recipe: {part}", ("", "value"), rows)
    settings = payload.get("settings") or {}
    plain = {k: v for k, v in settings.items() if k not in ("versions", "tasks")}
    if plain:
        rows = [(scores.words(k), _setting(v)) for k, v in plain.items()]
        yield Table("Settings", ("", "value"), rows)
    if versions := settings.get("versions") or (payload.get("made") or {}).get("versions"):
        yield Table("Versions", ("", "version"), [(k, str(v)) for k, v in versions.items()])
    if tasks := settings.get("tasks"):
        keys = dict.fromkeys(k for known in tasks.values() for k in known)
        rows = [(t, *(_setting(known.get(k)) for k in keys)) for t, known in tasks.items()]
        yield Table("Tasks", ("", *map(scores.words, keys)), rows)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == [] or value == ():
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_setting(v)}" for k, v in value.items())
    return names(value) if isinstance(value, list | tuple | str) else str(value)


def _footer(payload: Payload) -> Iterator[str]:
    if payload.get("version"):
        yield f"ternq {payload['version']}"
    if payload.get("seed") is not None:
        yield f"seed {payload['seed']}"
    seconds = payload.get("duration_s") or payload.get("seconds")
    if isinstance(seconds, int | float):
        yield duration(seconds)
    if payload.get("out"):
        yield f"written to {payload['out']}"
