"""Quality gates: limits that a script sets, checked against what was measured.

Every gate is evaluated; a value equal to its limit passes, and a value that is missing or not
finite fails, since ``nan > limit`` is false and would let a broken model through.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ternq.compare import comparable
from ternq.errors import RecipeError
from ternq.suites import expand

Kind = Literal["ppl-above", "ppl-ratio-above", "acc-below", "acc-drop-above", "size-above",
               "bpw-above"]  # fmt: skip
Results = Mapping[str, Mapping[str, Any]]
"""One model's part of the results: task -> metric -> value."""

_METRIC = {
    "ppl-above": "token_perplexity",
    "ppl-ratio-above": "token_perplexity",
    "acc-below": "acc",
    "acc-drop-above": "acc",
}
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclass(frozen=True)
class Gate:
    """A limit; ``task`` None means every task that has the metric, ``size-above`` is in bytes."""

    kind: Kind
    limit: float
    task: str | None = None
    metric: str | None = None

    @property
    def name(self) -> str:
        """The flag that set it."""
        return f"fail-if-{self.kind}"


def parse_gates(
    *,
    ppl_above: Sequence[str] = (),
    ppl_ratio_above: Sequence[str] = (),
    acc_below: Sequence[str] = (),
    acc_drop_above: Sequence[str] = (),
    size_above: str | None = None,
    bpw_above: str | float | None = None,
) -> list[Gate]:
    """Read the values of the ``--fail-if-…`` flags: ``[TASK[:METRIC]=]LIMIT``, ``900MB``, ``1.9``.

    Raises `RecipeError` for a limit that is not a finite number, and for ``acc-below`` without a
    task.
    """
    named: list[tuple[Kind, Sequence[str]]] = [
        ("ppl-above", ppl_above),
        ("ppl-ratio-above", ppl_ratio_above),
        ("acc-below", acc_below),
        ("acc-drop-above", acc_drop_above),
    ]
    gates = [_gate(kind, value) for kind, values in named for value in values]
    if size_above is not None:
        gates.append(Gate("size-above", _bytes(size_above)))
    if bpw_above is not None:
        gates.append(Gate("bpw-above", _number("bpw-above", str(bpw_above))))
    for gate in gates:
        _check_range(gate)
    return gates


def _check_range(gate: Gate) -> None:
    """Refuse a limit that no value could miss, or meet: an accuracy in percent, a size below 0."""
    if gate.kind in ("acc-below", "acc-drop-above"):
        if not 0 <= gate.limit <= 1:
            raise RecipeError(
                f"--{gate.name}: {gate.limit:g} is no accuracy.", "It is a fraction from 0 to 1."
            )
    elif not 0 < gate.limit < math.inf:
        raise RecipeError(f"--{gate.name}: {gate.limit:g} is not a finite number above 0.")


def check(
    gates: Sequence[Gate],
    results: Results,
    weights: Mapping[str, Any] | None = None,
    baseline: Results | None = None,
) -> list[dict[str, Any]]:
    """Evaluate every gate on one model: ``[{name, task, value, limit, passed}]``.

    ``weights`` has ``bpw_linear`` and ``bytes``; ``baseline`` has the baseline's results. A gate
    without a task that no task can answer fails, with task and value null.
    """
    return [row for gate in gates for row in _rows(gate, results, weights or {}, baseline or {})]


def judge(gates: Sequence[Gate], name: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every gate on the model ``name`` of an evaluation; its size is that of all its files."""
    known = result.get("models", {}).get(name, {})
    weights = known | {"bytes": known.get("file_bytes")}
    own, base = (result["results"].get(one, {}) for one in (name, result.get("baseline")))
    return [{**row, "model": name} for row in check(gates, own, weights, comparable(own, base))]


def judge_training(
    gates: Sequence[Gate], model: str, result: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every gate on a freshly made artefact, its teacher ``model`` being the baseline."""
    held_out = {
        who: {"held-out": {"token_perplexity": result[who]["perplexity"]}} if who in result else {}
        for who in ("student", "teacher")  # neither, where the report of a finished one is gone
    }
    tasks = result.get("results") or {}
    student = held_out["student"] | tasks.get(str(result.get("out")), {})
    teacher = held_out["teacher"] | tasks.get(model, {})
    size = sum(file["bytes"] for file in result["files"])
    return check(gates, student, result["weights"] | {"bytes": size}, teacher)


def unanswered(gates: Sequence[Gate], tasks: Sequence[str], baseline: bool) -> Iterator[str]:
    """Which gates will fail since what they look at is not measured, in sentences.

    ``tasks`` are those asked for, ``baseline`` whether there is one.
    """
    names = {name.partition(":")[0] for name in expand(tuple(tasks))} | {*tasks, "held-out"}
    for gate in gates:
        if gate.kind in ("ppl-ratio-above", "acc-drop-above") and not baseline:
            yield f"--{gate.name} compares with a --baseline, and none is given: it will fail."
        task = gate.task
        if task and task not in names and not any(task.startswith(f"{name}_") for name in names):
            yield f"--{gate.name} names '{task}', which is not among --tasks: it will fail."


def _rows(
    gate: Gate, results: Results, weights: Mapping[str, Any], baseline: Results
) -> list[dict[str, Any]]:
    if gate.kind in ("size-above", "bpw-above"):
        return [
            _row(gate, None, weights.get("bytes" if gate.kind == "size-above" else "bpw_linear"))
        ]
    metric = gate.metric or _METRIC[gate.kind]
    having = [task for task, values in results.items() if metric in values]
    tasks = having if gate.task is None else [gate.task]
    return [
        _row(gate, task, _value(gate.kind, metric, task, results, baseline)) for task in tasks
    ] or [_row(gate, None, None)]


def _value(kind: Kind, metric: str, task: str, results: Results, baseline: Results) -> float | None:
    own = _finite(results.get(task, {}).get(metric))
    if kind in ("ppl-above", "acc-below"):
        return own
    theirs = _finite(baseline.get(task, {}).get(metric))
    if own is None or theirs is None:
        return None
    if kind == "acc-drop-above":
        return round(theirs - own, 12)  # 0.65 - 0.6 is above 0.05 in binary
    return own / theirs if theirs else None


def _row(gate: Gate, task: str | None, value: Any) -> dict[str, Any]:
    finite = _finite(value)
    good = finite is not None and (
        finite >= gate.limit if gate.kind == "acc-below" else finite <= gate.limit
    )
    shown = task if gate.metric is None or task is None else f"{task}:{gate.metric}"
    return {"name": gate.name, "task": shown, "value": finite, "limit": gate.limit, "passed": good}


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _gate(kind: Kind, text: str) -> Gate:
    name, _, limit = text.rpartition("=")
    task, metric = _task_and_metric(name)
    if kind == "acc-below" and not task:
        raise RecipeError(
            f"--fail-if-acc-below {text} names no task.", "Write TASK=V, as in piqa=0.6."
        )
    return Gate(kind, _number(kind, limit), task or None, metric or None)


def _task_and_metric(name: str) -> tuple[str, str]:
    """What stands before and after the colon; names of files may have colons of their own."""
    task, _, metric = name.rpartition(":")
    if Path(name).exists():
        return name, ""
    if task and Path(task).exists():
        return task, metric
    task, _, metric = name.partition(":")
    return task, metric


def _number(kind: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RecipeError(f"--fail-if-{kind}: '{text}' is not a finite number.")
    return value


def _bytes(text: str) -> float:
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise RecipeError(
            f"--fail-if-size-above: '{text}' is not a size.", "Write it as 900MB or 1.2GB."
        )
    return _number("size-above", found[1]) * unit
