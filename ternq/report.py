"""What a verb returned, for people: tables and sentences, on a terminal or as Markdown.

`tables` and `sentences` say what there is to say; `show` and `markdown` only lay it out. rich is
imported when something is shown.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, log
from statistics import median
from typing import Any

from ternq import scores
from ternq.shown import Table, duration, names, number, printable, size

Payload = Mapping[str, Any]
_SIZES = ("bits: linears", "embeddings", "file", "size")


def show(payload: Payload, *, stderr: bool = False) -> None:
    """Print the report of a command on stdout, or on stderr."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    for part in render(payload):
        console.print(part)


def show_error(message: str, hint: str | None) -> None:
    """Say on stderr what went wrong, and on the next line what to do."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if hint:
        console.print(Text.assemble(("hint:  ", "cyan"), hint))


def render(payload: Payload) -> Iterator[Any]:
    """The rich renderables of a payload: tables, then sentences."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in tables(payload):
        drawn = RichTable(title=Text(printable(table.title)), box=box.SIMPLE_HEAD)
        drawn.title_justify, drawn.title_style = "left", "bold"
        for place, name in enumerate(table.header):
            drawn.add_column(Text(name), justify="right" if place else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(printable(cell)) for cell in row))
        yield drawn
    for label, text in sentences(payload):
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(width=12, style="dim")
        grid.add_column(overflow="fold")
        grid.add_row(Text(printable(label)), Text(printable(text)))
        yield Padding(grid, (0, 0, 0, 2))


def markdown(payload: Payload) -> str:
    """The same report as Markdown, for a job summary or a file."""
    lines = [f"## ternq {payload.get('command')}: {_escape(names(payload.get('model')))}", ""]
    for table in tables(payload):
        lines += [f"**{_escape(table.title)}**", "", _row(table.header)]
        lines += [_row(["---", *["---:"] * (len(table.header) - 1)])]
        lines += [*(_row(map(_escape, row)) for row in table.rows), ""]
    for label, text in sentences(payload):
        shown = " ".join(text.split())
        lines.append(f"- {_escape(label)}: {_escape(shown)}")
    return "\n".join(lines) + "\n\n"


def markdown_error(payload: Payload, message: str, hint: str | None) -> str:
    """What ended a command before it had a result, as Markdown."""
    parts = (f"**error**: {_escape(message)}", _escape(hint) if hint else "")
    title = f"## ternq {payload.get('command')}: {_escape(names(payload.get('model')))}"
    return "\n\n".join(filter(None, (title, *parts))) + "\n\n"


def tables(payload: Payload) -> Iterator[Table]:
    """What can be compared."""
    if "expected" in payload:
        yield Table("What would be measured", ("", "tokens", "time"), [*_expected_rows(payload)])
        return
    if "plan" in payload:
        yield Table("What would be done", ("", ""), [*_plan_rows(payload)])
        return
    if "student" in payload:
        yield _quality(payload)
    elif "weights" in payload:
        weights = payload["weights"]
        row = (names(payload.get("model")), *_cells(weights, _size(payload)))
        title = "Packed" if payload.get("out") else "Checked"
        yield Table(title, ("", *_SIZES), [row])
    if "results" in payload and "student" not in payload:
        yield from scores.tables(payload)
    if payload.get("gates"):
        yield gates(payload["gates"])


def gates(found: Sequence[Payload]) -> Table:
    """Every gate; of which model, where there are several."""
    several = len({gate.get("model") for gate in found}) > 1
    rows = [
        (
            " ".join(filter(None, (g["name"], g["task"], f"[{g['model']}]" if several else ""))),
            number(g["value"]),
            number(g["limit"]),
            "passed" if g["passed"] else "FAILED",
        )
        for g in found
    ]
    return Table("Gates", ("gate", "value", "limit", ""), rows)


def sentences(payload: Payload) -> Iterator[tuple[str, str]]:
    """(label, sentence) for what is not a number to compare."""
    if payload.get("command") == "generate" and "plan" not in payload:
        return
    yield from facts(payload)
    for sample in payload.get("samples") or ():
        for who in ("teacher", "student"):
            yield who, sample["prompt"] + sample[who]
    if payload.get("out") and "plan" not in payload:
        yield "written to", str(payload["out"])
        if payload.get("command") == "ternarize":
            yield "report", f"{payload['out']}.report/report.html"
        yield "next", _next(payload)


def facts(payload: Payload) -> Iterator[tuple[str, str]]:
    """What was trained, made and proved, and the notes."""
    if "plan" not in payload and payload.get("training"):
        yield "trained", _budget(payload["training"])
    if closed := gap_closed(payload):
        text = payload["student"]["text"]
        yield "gap closed", f"{closed:.1%} of the log perplexity that rounding loses, on {text}"
    weights = payload.get("weights")
    if weights and weights["coverage"]:
        ternary = f"{weights['coverage']:.1%} of the parameters"
        zeros = weights.get("zero_share")
        yield "ternary", ternary + (f"; {zeros:.1%} of their codes are zero" if zeros else "")
    for model, layers in (payload.get("layers") or {}).items():
        if said := worst_layer(layers):
            yield "layers", f"{model}: {said}"
    if payload.get("encoding"):
        yield "encoding", str(payload["encoding"])
    if dense := payload.get("dense_layers"):
        yield "left dense", "\n".join(_dense(dense))
    if verify := payload.get("verify"):
        yield "verified", _verified(verify)
    if payload.get("cached"):
        yield "cached", _cached(payload["cached"])
    if payload.get("dtype_note"):
        yield "note", payload["dtype_note"]
    for note in payload.get("notes") or ():
        yield "note", note


def texts(payload: Payload) -> list[Payload]:
    """All samples of text, of an evaluation too: ``{prompt, texts: {WHO: text}}``."""
    both = ("teacher", "student")
    samples = [
        {"prompt": sample["prompt"], "texts": {who: sample[who] for who in both}}
        for sample in payload.get("samples") or ()
    ]
    return [*samples, *(payload.get("texts") or ())]


def worst_layer(layers: Sequence[Payload]) -> str | None:
    """The largest error of a layer to the dense weight; None where none is known."""
    known = [x for x in layers if isinstance(x.get("error"), int | float) and isfinite(x["error"])]
    if not known:
        return None
    worst = max(known, key=lambda layer: layer["error"])
    middle = median(layer["error"] for layer in known)
    return (
        f"relative error to the dense weight {number(middle)} in the median, "
        f"{number(worst['error'])} at most ({worst['name']})"
    )


def _cached(pairs: Sequence[Sequence[str]]) -> str:
    models = dict.fromkeys(model for model, _ in pairs)
    tasks = {m: dict.fromkeys(task for model, task in pairs if model == m) for m in models}
    parts = [f"{model} on {', '.join(own)}" for model, own in tasks.items()]
    return f"{'; '.join(parts)}: taken from the results cache"


def gap_closed(payload: Payload) -> float | None:
    """The share of (log untrained - log teacher) that training won back, where it is defined."""
    measured = [payload.get(who) or {} for who in ("teacher", "untrained", "student")]
    found: list[Any] = [own.get("perplexity") for own in measured]
    if not all(isinstance(p, int | float) and isfinite(p) and p > 0 for p in found):
        return None
    teacher, untrained, student = map(log, found)
    return (untrained - student) / (untrained - teacher) if untrained > teacher else None


def _quality(payload: Payload) -> Table:
    weights = payload["weights"]
    packed = _cells(weights, _size(payload))
    dense = ("16", "16", "16", size(weights["bytes_dense_bf16"]))
    steps = (payload.get("training") or {}).get("steps")
    kind = "ternary" if weights["coverage"] else "dense"
    rows_of = {
        "teacher": ("teacher (bf16)", dense),
        "untrained": ("only rounded" if payload.get("teacher") else "as drawn", packed),
        "student": (f"{kind}, trained" if steps else "the same, packed", packed),
    }
    rows = [
        (label, number(payload[who]["perplexity"]), *cells)
        for who, (label, cells) in rows_of.items()
        if payload.get(who)
    ]
    header = ("", "perplexity", *_SIZES)
    return Table(f"{names(payload.get('model'))}: token perplexity on held-out text", header, rows)


def _cells(weights: Payload, count: float) -> tuple[str, str, str, str]:
    """The columns `_SIZES`."""
    keys = ("bpw_linear", "bpw_embeddings", "bpw_file")
    bits = ["–" if weights.get(key) is None else f"{weights[key]:.3f}" for key in keys]
    return bits[0], bits[1], bits[2], size(count)


def _size(payload: Payload) -> int:
    files = payload.get("files")
    return sum(f["bytes"] for f in files) if files else payload["weights"]["bytes"]


def _dense(layers: Sequence[Payload]) -> Iterator[str]:
    """Layers left dense, those of one reason together."""
    for reason in dict.fromkeys(layer["reason"] for layer in layers):
        own = [layer for layer in layers if layer["reason"] == reason]
        count = sum(layer["parameters"] for layer in own)
        name = own[0]["name"] + (f" and {len(own) - 1} more" if len(own) > 1 else "")
        yield f"{name} ({count:,} parameters): {reason}"


def _verified(verify: Payload) -> str:
    """What was proved, and what was lost on the way."""
    parts = [f"{verify['checked']} layers, to the bit"] if verify["checked"] else []
    if verify.get("reader"):
        parts.append(f"read back by {verify['reader']}")
    if verify.get("max_abs_logit_diff") is not None:
        parts.append(f"logits differ by at most {verify['max_abs_logit_diff']:.2g}")
    for key, text in _LOSSES.items():
        if found := verify.get(key):
            name = max(found, key=lambda n: found[n])
            parts.append(f"{text.format(found[name])} ({name}; {len(found)} in all)")
    return "; ".join([*parts, "SHA-256 of every file"])


_LOSSES = {
    "rounded": "largest rounding {:.2g} of a scale",
    "lost": "LOSSY: relative error up to {:.2g}",
    "int8_error": "8-bit rows have a relative error of {:.2g}",
}


def _next(payload: Payload) -> str:
    out = shlex.quote(str(payload["out"]))
    out = f"./{out}" if out.startswith("-") else out
    if payload.get("command") == "distill":
        ternary = payload["weights"]["coverage"]
        return f"ternq pack {out}" + ("" if ternary else " --format dense")
    if payload.get("format", "ternq") != "ternq":
        return f"{out}/README.md says how to load it"
    return f'ternq generate {out} "Once"'


def _plan_rows(payload: Payload) -> Iterator[tuple[str, str]]:
    """What a ``plan`` found, each beside what this machine has."""
    weights = payload["weights"]
    yield "parameters", number(weights["parameters"])
    yield "of them ternary", f"{weights['coverage']:.1%}"
    if "bpw_linear" in weights:
        yield "bits per weight of linears", f"{weights['bpw_linear']:.3f}"
        yield "bits per weight of all", f"{weights['bpw_total']:.3f}"
    yield "artefact", size(weights["bytes"])
    if "engine" in payload:
        yield "engine", payload["engine"]
        yield "tokens", f"{payload['prompt_tokens']} read, {payload['max_new_tokens']} new at most"
    if "training" in payload:
        yield "training", _budget(payload["training"])
    if payload.get("seconds"):
        parts = payload["seconds"]
        said = duration(parts["total"])
        if "training" in parts:
            said += f", {duration(parts['training'])} of it training"
        said += f", {duration(parts['start'])} the start" if parts.get("start") else ""
        said += f", {duration(parts['writing'])} writing text" if parts.get("writing") else ""
        yield "time", said
    for kind in ("memory", "disk"):
        if kind not in payload:
            continue
        needed, free = (size(payload[kind][key]) for key in ("needed", "free"))
        yield kind, f"{needed} of {free} free"


def _expected_rows(payload: Payload) -> Iterator[tuple[str, str, str]]:
    """What each model would read, and how long that would take."""
    for model, parts in payload["expected"].items():
        for part in parts:
            took = "measured before" if part["kept"] else duration(part["seconds"])
            yield f"{model} {part['task']} ({part['what']})", number(part["tokens"]), took
    yield "in all", "", duration(payload["seconds"]["total"])


def _budget(training: Payload) -> str:
    if training["steps"] is None:
        return "as many tokens as a short probe will say"
    if not training["steps"]:
        return "nothing: this is the start of training alone"
    known = training["tokens_per_second"]
    rate = f"{known:,.0f} a second" if known else "time not measured"
    return f"{training['tokens']:,} tokens in {training['steps']:,} steps, {rate}"


def _row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    text = printable(text).replace("\n", " ")
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, "\\" + mark)
    return text
