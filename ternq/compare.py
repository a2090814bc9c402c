"""Results against those of a baseline: differences, ratios, flips; and what forbids comparing.

Flips (Dutta et al. 2024, arXiv 2407.09141, as quoted by others; original not seen) are the answers
that changed between right and wrong: two models of the same accuracy may differ in many.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ternq.errors import InputError

Results = Mapping[str, Mapping[str, Any]]
"""One model's part of the results: task -> metric -> value."""

_SIZES = ("blocks", "block_length", "tokens")
_SETTINGS = {
    "dtype": "--dtype",
    "limit": "--limit",
    "num_fewshot": "--num-fewshot",
    "max_length": "--max-length",
    "chat": "--apply-chat-template",
    "seed": "--seed",
}
_HASHES = {"data": "other data", "text": "another text"}


def compare(
    own: Results, base: Results, own_answers: Mapping[str, str], base_answers: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Per task ``<metric>_difference`` (own less base), ``<metric>_ratio`` of perplexities, and
    ``flips_lost`` and ``flips_won``: the shares of all answers that only the baseline, and only
    this model, got right."""
    found = {
        task: _metrics(own[task], base[task])
        | _flips(own_answers.get(task), base_answers.get(task))
        for task in own
        if task in base
    }
    return {task: values for task, values in found.items() if values}


def comparable(own: Results, base: Results) -> dict[str, dict[str, Any]]:
    """The baseline's results without token perplexities of other blocks than ``own``'s."""
    return {
        task: {
            metric: value
            for metric, value in values.items()
            if metric != "token_perplexity" or not other_blocks(own.get(task, {}), values)
        }
        for task, values in base.items()
    }


def other_blocks(own: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """How the blocks of two token perplexities differ, in words; empty if they are the same."""
    return [
        f"{name.replace('_', ' ')} {base[name]} against {own[name]}"
        for name in _SIZES
        if name in own and name in base and own[name] != base[name]
    ]


def other_settings(own: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """What two ``settings`` say differently that results depend on, in words."""
    if "c4" not in own.get("tasks", {}):  # of which it takes a part where no limit is given
        own, base = _all_by_default(own), _all_by_default(base)
    found = [
        f"{flag} {_said(base[name])} there, {_said(own.get(name))} here"
        for name, flag in _SETTINGS.items()
        if name in base and base[name] != own.get(name)
    ]
    tasks, theirs = own.get("tasks") or {}, base.get("tasks") or {}
    return found + [line for task in tasks if task in theirs
                    for line in _of_task(task, tasks[task], theirs[task])]  # fmt: skip


def from_file(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The payload of ``ternq eval --json`` as a baseline: ``{results, answers, settings}``.

    It is that of the model that the file names first. Raises `InputError` for another schema.
    """
    if found.get("schema_version") != 1:
        raise InputError(
            f"{name} has schema_version {found.get('schema_version')!r}; this ternq reads 1.",
            "Name a file that `ternq eval --json` of this version wrote.",
        )
    results = found.get("results")
    good = isinstance(results, dict) and all(_is_results(own) for own in results.values())
    if not good or not results:
        raise InputError(f"{name} holds no results of ternq eval --json.")
    named = found.get("model")
    model = named if isinstance(named, str) and named in results else next(iter(results))
    answers, settings = found.get("answers"), found.get("settings")
    own = answers.get(model) if isinstance(answers, dict) else None
    return {
        "results": results[model],
        "answers": {t: a for t, a in own.items() if isinstance(a, str)}
        if isinstance(own, dict)
        else {},
        "settings": settings if isinstance(settings, dict) else None,
    }


def _is_results(own: Any) -> bool:
    return isinstance(own, dict) and all(isinstance(values, dict) for values in own.values())


def _metrics(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, value in own.items():
        other = base.get(metric)
        if metric.endswith("_stderr") or not _is_number(value) or not _is_number(other):
            continue
        if metric == "token_perplexity" and other_blocks(own, base):
            continue
        found[f"{metric}_difference"] = value - other
        if metric.endswith("perplexity") and other:
            found[f"{metric}_ratio"] = value / other
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def _flips(own: str | None, base: str | None) -> dict[str, float]:
    if not own or not base or len(own) != len(base):
        return {}
    pairs = list(zip(base, own, strict=True))
    lost, won = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return {"flips_lost": lost / len(pairs), "flips_won": won / len(pairs)}


def _of_task(task: str, own: Any, base: Any) -> Iterator[str]:
    if not isinstance(base, dict):
        return
    for name in ("version", *_HASHES):
        if name in base and name in own and base[name] != own[name]:
            yield f"{task}: " + _HASHES.get(name, f"version {base[name]} there, {own[name]} here")


def _all_by_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if (k, v) == ("limit", "all") else v for k, v in settings.items()}


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)
