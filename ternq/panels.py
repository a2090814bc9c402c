"""The charts of a result: quality against size, a training's curves, the layers in order."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ternq import report, scores
from ternq.chart import Chart, Point, Series, lines, scatter, strip
from ternq.shown import names, number

Payload = Mapping[str, Any]

_MOST_PLACES = 300  # of a curve
_DENSE_BITS = 16.0
_RATE = "Learning rate"
_PANELS = {
    "Loss": {"loss": "loss"},
    "Parts of the loss": {"kl": "KL", "ce": "CE", "off": "OFF"},
    _RATE: {"lr": "rate"},
    "Gradient norm": {"gradient_norm": "norm"},
    "Codes that are zero": {"zero_share": "share"},
    "Codes that one step changes": {"flip_share": "share"},
    "Drift from the start": {"scale_drift": "scales", "shift_drift": "shifts"},
}
_COSINE = "Cosine to the teacher, per block"
_NOT_DRAWN = {"step", "seconds"}


@dataclass(frozen=True)
class Panel:
    """A chart under its title, and what it leaves out."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Layers:
    """The ternary layers of a model: charts, a sentence, and rows for the table."""

    model: str
    panels: Sequence[Panel]
    said: str | None
    rows: Sequence[tuple[str, str, str]]


def numbered(found: Iterator[tuple[str, Any]], prefix: str) -> list[Panel]:
    """Charts drawn, each with names of its own on the page."""
    drawn = ((title, draw(f"{prefix}{place}")) for place, (title, draw) in enumerate(found))
    return [_panel(title, chart) for title, chart in drawn if chart is not None]


def _panel(title: str, chart: Chart) -> Panel:
    """The markup is an XML writer's: it has escaped what is not ours."""
    count = chart.left_out
    missing = "missing, not finite or not above zero" if chart.log else "missing or not finite"
    what = f"{count:,} value that is" if count == 1 else f"{count:,} values that are"
    note = f"Left out: {what} {missing}." if count else ""
    return Panel(title, Markup(chart.svg), note)


def quality(payload: Payload) -> Iterator[tuple[str, Any]]:
    """Perplexity and accuracy against bits per weight, a chart per task and metric."""
    bits = _bits(payload)
    tokens = any(
        "token_perplexity" in v for h in _with_untrained(payload).values() for v in h.values()
    )
    for task, having in _with_untrained(payload).items():
        metrics = dict.fromkeys(m for values in having.values() for m in scores.metrics(values))
        for metric in _drawn(metrics, tokens):
            points = [
                Point(model, bits.get(model, math.nan), values[metric],
                      values.get(f"{metric}_stderr"))
                for model, values in having.items()
                if isinstance(values.get(metric), float)
            ]  # fmt: skip
            title = f"{task}, {scores.words(metric)}"
            if len(points) > 1:
                yield title, _scatter(points, title, scores.words(metric))


def _scatter(points: Sequence[Point], title: str, y_title: str) -> Any:
    return lambda ident: scatter(points, title, "bits per weight, all weights", y_title, ident)


def _drawn(metrics: Iterable[str], tokens: bool) -> list[str]:
    """One perplexity of a text and one accuracy of a task: the tables have all of them.

    ``tokens``: token perplexities are known, and the words' are not set beside them.
    """
    found = list(metrics)
    perplexity = "token_perplexity" if tokens else "word_perplexity"
    return [m for m in found if m == perplexity] + [m for m in _SHARES if m in found][:1]


_SHARES = ("acc", "acc_norm", "exact_match")


def _bits(payload: Payload) -> dict[str, float]:
    """Bits per weight of every model that they are known of."""
    models = payload.get("models") or {}
    found = {name: known.get("bpw_total") for name, known in models.items()}
    if "student" in payload and payload.get("weights"):
        packed = payload["weights"]["bpw_total"]
        found |= {names(payload.get("model")): _DENSE_BITS, str(payload.get("out")): packed}
        found |= {_UNTRAINED: packed}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


_UNTRAINED = "only rounded"


def _with_untrained(payload: Payload) -> dict[str, dict[str, Payload]]:
    """Results by task, and the start of the training beside them on the held-out text."""
    found = scores.by_task(payload)
    value = (payload.get("untrained") or {}).get("perplexity")
    if isinstance(value, float) and "held-out" in found:
        found["held-out"] = found["held-out"] | {_UNTRAINED: {"token_perplexity": value}}
    return found


def training(steps: Sequence[Payload]) -> Iterator[tuple[str, Any]]:
    """Curves of all that was recorded, what belongs together in one chart."""
    columns = list(dict.fromkeys(k for row in steps for k in row))
    numeric = [
        n for n in columns if n not in _NOT_DRAWN and any(_is_number(r.get(n)) for r in steps)
    ]
    cosines = {n: f"block {n.rpartition('_')[2]}" for n in numeric if n.startswith("cosine_")}
    panels = {**_PANELS, **({_COSINE: _few(cosines)} if cosines else {})}
    known = {name for panel in panels.values() for name in panel} | set(cosines)
    panels |= {scores.words(name): {name: name} for name in numeric if name not in known}
    for title, panel in panels.items():
        curves = [_series(label, name, steps) for name, label in panel.items() if name in numeric]
        if curves:
            yield title, _lines(curves, title)


def _few(columns: Mapping[str, str]) -> dict[str, str]:
    """At most five of them, evenly chosen, the first and the last among them."""
    every = list(columns.items())
    chosen = {round(i * (len(every) - 1) / 4) for i in range(5)}
    return dict(every[i] for i in sorted(chosen))


def _lines(curves: Sequence[Series], title: str) -> Any:
    log_from = math.inf if title == _RATE else 30
    return lambda ident: lines(curves, title, "step", ident, log_from)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series(label: str, name: str, steps: Sequence[Payload]) -> Series:
    """A column's values; where there are very many, means of neighbours."""
    both = [
        (row["step"], row[name]) for row in steps if _is_number(row.get(name)) and "step" in row
    ]
    width = math.ceil(len(both) / _MOST_PLACES)
    parts = [both[i : i + width] for i in range(0, len(both), max(1, width))]
    means = [
        [math.fsum(column) / len(part) for column in zip(*part, strict=True)] for part in parts
    ]
    return Series(label, [x for x, _ in means], [y for _, y in means])


def layers(payload: Payload) -> Iterator[Layers]:
    """Error and zero share of every layer, model by model."""
    for place, (model, own) in enumerate((payload.get("layers") or {}).items()):
        labels = [str(layer["name"]) for layer in own]
        blocks = [_block(name) for name in labels]
        kinds = {"error": "Relative error to the dense weight", "zero_share": "Codes that are zero"}
        panels = [
            _panel(title, chart)
            for key, title in kinds.items()
            if (chart := strip([layer.get(key) for layer in own], labels, title,
                              f"l{place}{key[0]}", blocks))
        ]  # fmt: skip
        rows = [(str(x["name"]), number(x.get("error")), scores.share(x.get("zero_share")))
                for x in own]  # fmt: skip
        yield Layers(model, panels, report.worst_layer(own), rows)


def _block(name: str) -> str:
    """The number of the decoder block in a layer's name."""
    return next((part for part in name.split(".") if part.isdecimal()), "")
