"""The tables of an evaluation: what was measured, against what, and what it costs."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from ternq.shown import Table, number, size
from ternq.suites import EFFICIENCY

Payload = Mapping[str, Any]
_OF_BLOCKS = ("token_perplexity", "kl_", "top1_", "block", "tokens", "drawn")  # prefixes
_STORED = ("bytes", "file_bytes")
HIDDEN = ("top1_agreement", "flips_lost", "flips_won")
_COSTS = {
    "load_seconds": "load, s",
    "file_bytes": "file",
    "resident_bytes": "resident",
    "parameter_bytes": "weights",
    "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s",
    "native_decode_tokens_per_second": "native decode, tokens/s",
    "energy_joules_per_token": "joules a token",
}


def tables(payload: Payload) -> Iterator[Table]:
    """All there is: models, tasks, the comparison with the baseline, efficiency."""
    if payload.get("models"):
        yield _models(payload["models"])
    yield from _results(payload)
    for model in against(payload):
        yield from _against(payload, model)
    if costs(payload):
        yield _efficiency(costs(payload))


def by_task(payload: Payload) -> dict[str, dict[str, Payload]]:
    """``{TASK: {MODEL: values}}`` without the efficiency, as tables name tasks."""
    found: dict[str, dict[str, Payload]] = {}
    for model, own in (payload.get("results") or {}).items():
        for task, values in own.items():
            if task != EFFICIENCY:
                for name, part in _named(task, values, values).items():
                    found.setdefault(name, {})[model] = part
    return found


def against(payload: Payload) -> dict[str, dict[str, Payload]]:
    """``{MODEL: {TASK: differences}}`` of the models that were compared with the baseline."""
    found: dict[str, dict[str, Payload]] = {}
    for model, own in (payload.get("comparison") or {}).items():
        measured = (payload.get("results") or {}).get(model, {})
        for task, values in own.items():
            if values and task != EFFICIENCY:
                parts = _named(task, values, measured.get(task, {}))
                found.setdefault(model, {}).update(parts)
    return found


def costs(payload: Payload) -> dict[str, Payload]:
    """What `efficiency` measured of each model."""
    results = payload.get("results") or {}
    return {model: own[EFFICIENCY] for model, own in results.items() if EFFICIENCY in own}


def metrics(values: Payload) -> list[str]:
    """The names of what was measured, without standard errors and counts."""
    return [
        key
        for key, value in values.items()
        if isinstance(value, float) and not key.endswith("_stderr")
    ]


def measured(values: Payload, metric: str) -> str:
    """A value with its standard error."""
    return " ".join(filter(None, (number(values.get(metric)), error(values, metric))))


def error(values: Payload, metric: str) -> str:
    """The standard error of a value, where there is one."""
    found = values.get(f"{metric}_stderr")
    return f"± {number(found)}" if isinstance(found, int | float) and isfinite(found) else ""


def extent(having: Mapping[str, Payload]) -> str:
    """How much was measured: samples, and whether they are only a part."""
    first = next(iter(having.values()))
    samples = f"{first['samples']:,} samples" if isinstance(first.get("samples"), int) else ""
    partial = "PARTIAL" if any(v.get("partial") for v in having.values()) else ""
    return ", ".join(filter(None, (samples, partial)))


def cost(key: str, value: Any) -> str:
    """A value of the efficiency, in its unit."""
    return size(value) if key.endswith("_bytes") and value is not None else number(value)


def cost_columns(found: Mapping[str, Payload]) -> dict[str, str]:
    """The efficiency's values that any model has, and their headings."""
    return {key: name for key, name in _COSTS.items() if any(key in v for v in found.values())}


def words(metric: str) -> str:
    """A metric's name for people."""
    return metric.replace("_", " ")


def _named(task: str, values: Payload, result: Payload) -> dict[str, Payload]:
    """A task's values under the names that tables use: blocks drawn from it have one of their own.

    ``drawn`` says how, as in ``gptq256``: a token perplexity of those is no part of another.
    """
    if "drawn" not in result:
        return {task: values}
    sample = {k: v for k, v in values.items() if k.startswith(_OF_BLOCKS)}
    rest = {k: v for k, v in values.items() if k not in sample}
    if "samples" in values:
        sample |= {"samples": result["blocks"], "partial": False}
    parts = {f"{task}@{result['drawn']}": sample, task: rest}
    return {name: part for name, part in parts.items() if set(part) - {"samples", "partial"}}


def _models(models: Mapping[str, Payload]) -> Table:
    rows = [
        (
            name,
            ", by ".join(str(known[key]) for key in ("kind", "kernel") if known.get(key)) or "–",
            number(known.get("parameters")),
            *(_bits(known.get(key)) for key in ("bpw_linear", "bpw_total")),
            *("–" if known.get(key) is None else size(known[key]) for key in _STORED),
        )
        for name, known in models.items()
    ]
    return Table(
        "Models", ("", "kind", "parameters", "bits: linears", "bits: all", "weights", "files"), rows
    )


def _bits(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _results(payload: Payload) -> Iterator[Table]:
    """One table per task: a row per model, a column per metric."""
    for task, having in by_task(payload).items():
        found = dict.fromkeys(m for values in having.values() for m in metrics(values))
        header = ("model", *map(words, found))
        rows = [(model, *(measured(v, m) for m in found)) for model, v in having.items()]
        said = extent(having)
        yield Table(f"{task} ({said})" if said else task, header, rows)


def _against(payload: Payload, model: str) -> Iterator[Table]:
    """Differences and ratios of a model; then what averages hide."""
    baseline = payload.get("baseline") or "baseline"
    tasks, found = by_task(payload), against(payload)[model]
    rows = [
        (
            f"{task} {words(metric)}",
            number(tasks.get(task, {}).get(model, {}).get(metric)),
            number(tasks.get(task, {}).get(baseline, {}).get(metric)),
            signed(values.get(f"{metric}_difference")),
            number(values.get(f"{metric}_ratio")),
        )
        for task, values in found.items()
        for metric in compared(values)
    ]
    title = f"Against {baseline}: {model}"
    if rows:
        yield Table(title, ("", "value", "baseline", "difference", "ratio"), rows)
    hidden = [
        (task, measured(values, "kl_divergence"), *(share(values.get(k)) for k in HIDDEN))
        for task, values in found.items()
        if any(key in values for key in ("kl_divergence", *HIDDEN))
    ]
    if hidden:
        header = ("", "KL divergence", "same top token", "answers lost", "won")
        yield Table(f"{title}, beyond averages", header, hidden)


def compared(values: Payload) -> list[str]:
    """The metrics that have a difference or a ratio."""
    ends = ("_difference", "_ratio")
    return list(dict.fromkeys(k.rpartition("_")[0] for k in values if k.endswith(ends)))


def signed(value: Any) -> str:
    """A difference, with its sign."""
    plus = "+" if isinstance(value, int | float) and value > 0 else ""
    return f"{plus}{number(value)}".replace("-", "−", 1)


def share(value: Any) -> str:
    """A share of one, in percent."""
    return f"{value:.2%}" if isinstance(value, int | float) else "–"


def _efficiency(found: Mapping[str, Payload]) -> Table:
    columns = cost_columns(found)
    rows = [(model, *(cost(k, v.get(k)) for k in columns)) for model, v in found.items()]
    return Table("Efficiency", ("", *columns.values()), rows)
