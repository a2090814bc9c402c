"""The web page: self-contained, well-formed, proof against hostile text, true to the numbers."""

import json
import math
import random
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from conftest import Demo

from ternq import chart, ternarize
from ternq.chart import Axis, Point, Series, free_place, lines, scatter, spread, strip
from ternq.metrics import steps_of
from ternq.page import page, training_of

VOID = {"meta", "br", "hr", "input", "img", "link"}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}\x00\x1b[31m\x85\ud800\u202e"
SEEN = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}\ufffd\ufffd[31m\ufffd\ufffd\ufffd"


def evaluated(a: str = "base", b: str = "small", task: str = "piqa") -> dict[str, Any]:
    """What `ternq eval` returns of two models, the first being the baseline."""
    layers = [{"name": f"layers.{i}.{b}", "zero_share": 0.4 + i / 100, "error": 0.5 - i / 100}
              for i in range(6)]  # fmt: skip
    return {
        "command": "eval",
        "model": [b],
        "version": "0.1.0",
        "seed": 0,
        "duration_s": 61.0,
        "baseline": a,
        "models": {
            a: {"kind": "dense", "parameters": 1000, "bytes": 2000, "bpw_linear": None,
                "bpw_total": 16.0},
            b: {"kind": a, "parameters": 1000, "bytes": 250, "bpw_linear": 1.85,
                "bpw_total": 2.0},
        },
        "results": {
            a: {
                "c4": {"token_perplexity": 10.0, "word_perplexity": 90.0, "samples": 1000,
                       "blocks": 256, "drawn": "gptq256",
                   "partial": True},
                task: {"acc": 0.75, "acc_stderr": 0.0125, "samples": 400, "partial": False},
                "efficiency": {"load_seconds": 0.5, "file_bytes": 2000, "samples": 1,
                               "partial": False},
            },
            b: {
                "c4": {"token_perplexity": 20.0, "word_perplexity": 300.0, "samples": 1000,
                       "blocks": 256, "drawn": "gptq256",
                   "partial": True},
                task: {"acc": 0.5, "acc_stderr": 0.025, "samples": 400, "partial": False},
                "efficiency": {"load_seconds": 0.25, "file_bytes": 250, "samples": 1,
                               "partial": False},
            },
        },
        "comparison": {
            b: {
                "c4": {"token_perplexity_difference": 10.0, "token_perplexity_ratio": 2.0,
                       "kl_divergence": 0.693, "kl_divergence_stderr": 0.01, "kl_tokens": 99,
                       "top1_agreement": 0.8125},
                task: {"acc_difference": -0.25, "flips_lost": 0.3, "flips_won": 0.05},
            }
        },
        "gates": [{"name": "fail-if-acc-below", "task": task, "value": 0.5, "limit": 0.6,
                   "passed": False, "model": b}],
        "notes": [f"A note on {a}."],
        "cached": [[a, task]],
        "texts": [{"prompt": f"\n{a}", "texts": {a: "\none", b: f"two {b}"}}],
        "layers": {b: layers},
        "settings": {"limit": None, "seed": 0, "dtype": "float32", "versions": {"torch": a},
                     "tasks": {task: {"version": 1.0, "num_fewshot": 0, "data": b}}},
    }  # fmt: skip


def ternarized(model: str = "base", out: str = "out", text: str = "some text") -> dict[str, Any]:
    """What `ternq ternarize` returns."""
    results = {
        name: {"held-out": {"token_perplexity": value, "samples": 61, "partial": False}}
        for name, value in ((model, 12.0), (out, 15.0))
    }
    return {
        "command": "ternarize",
        "model": model,
        "out": out,
        "teacher": {"perplexity": 12.0, "text": text},
        "untrained": {"perplexity": 48.0, "text": text},
        "student": {"perplexity": 15.0, "text": text},
        "results": results,
        "weights": {"coverage": 0.8, "bpw_linear": 1.85, "bpw_embeddings": 16.0, "bpw_total": 4.0,
                    "bpw_file": 4.1, "bytes": 2_300_000, "bytes_dense_bf16": 8_000_000,
                    "zero_share": 0.43},
        "training": {"steps": 3, "tokens": 300, "tokens_per_second": 100.0},
        "recipe": {"model": model, "scheme": {"group_size": 128}, "training": {"lr": 0.001,
                   "data": [text]}, "seed": 0},
        "made": {"command": f"ternq ternarize {model}", "versions": {"torch": "2.13.0"}},
        "samples": [{"prompt": model, "teacher": text, "student": out}],
        "dense_layers": [{"name": text, "parameters": 9, "reason": model}],
        "notes": [text],
        "layers": {out: [{"name": text, "zero_share": 0.4, "error": None}]},
    }  # fmt: skip


def recorded(steps: int = 12) -> list[dict[str, Any]]:
    """What `metrics.jsonl` holds; diagnostics in every third step."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "seconds": 0.1 * step, "loss": 3.0 / step, "kl": 1.0 / step,
               "ce": 2.0, "off": 0.1, "cosine_0": 0.9, "cosine_1": 0.8, "lr": 0.001,
               "gradient_norm": 1.0, "something_new": float(step)}  # fmt: skip
        if step % 3 == 0:
            row |= {"flip_share": 0.01, "zero_share": 0.4, "scale_drift": 0.1, "shift_drift": 0.2}
        rows.append(row)
    return rows


class Reader(HTMLParser):
    """Tags in their order with their attributes, and texts; refuses what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


PAGES = {
    "eval": (evaluated, ()),
    "ternarize": (ternarized, recorded()),
    "distill": (lambda *a: {k: v for k, v in ternarized(*a).items() if k != "results"}, ()),
    "nothing": (lambda *a: {}, ()),
}


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAGES)
def test_the_page_needs_nothing_else_and_runs_nothing(kind: str) -> None:
    make, steps = PAGES[kind]
    html = page(make(), steps)
    read = Reader(html)
    assert html.lstrip().startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form", "use"} & {
        tag for tag, _ in read.tags
    }
    for _, attributes in read.tags:
        assert not {"src", "href", "srcset", "style", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = "".join(text for tag, text in read.texts if tag == "style")
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    policies = [a.get("content") for a in read.of("meta") if "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("kind", PAGES)
def test_names_of_elements_are_their_own_and_charts_are_described(kind: str) -> None:
    make, steps = PAGES[kind]
    read = Reader(page(make(), steps))
    names = [a["id"] for _, a in read.tags if "id" in a]
    assert len(set(names)) == len(names)
    for svg in read.of("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= set(names)


@pytest.mark.parametrize("kind", ["eval", "ternarize", "distill"])
def test_hostile_text_changes_no_tag_and_is_read_as_text(kind: str) -> None:
    make, steps = PAGES[kind]
    plain = Reader(page(make("xa", "xb", "xc"), steps))
    html = page(make(f"{HOSTILE}a", f"{HOSTILE}b", f"{HOSTILE}c"), steps)
    hostile = Reader(html)

    def skeleton(read: Reader) -> list[Any]:
        return [(tag, sorted(attributes)) for tag, attributes in read.tags]

    assert skeleton(hostile) == skeleton(plain)
    assert f"{SEEN}a" in "".join(text for _, text in hostile.texts)
    html.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]", html)
    assert "{{7*7}}" in "".join(text for tag, text in hostile.texts if tag == "h1")


def test_metrics_of_hostile_names_are_text_too() -> None:
    steps = [{"step": 1, HOSTILE: 1.0}, {"step": 2, HOSTILE: 2.0}]
    read = Reader(page({"command": "ternarize"}, steps))
    assert (("figcaption", SEEN) in read.texts) and not read.of("img")


# --- what it says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (None, None),
        ([], "No gates were set"),
        ([True], "The gate passed"),
        ([True, True], "Both gates passed"),
        ([True] * 3, "All 3 gates passed"),
        ([False], "The gate failed"),
        ([False, False, False], "All 3 gates failed"),
        ([True, False, False], "2 of 3 gates failed"),
    ],
)
def test_the_headline_has_the_verdict_of_the_gates(
    passed: list[bool] | None, said: str | None
) -> None:
    gate = {"name": "fail-if-ppl-above", "task": None, "value": 1.0, "limit": 2.0}
    payload = {"command": "eval", "model": "m"}
    if passed is not None:
        payload |= {"gates": [{**gate, "passed": good} for good in passed]}  # type: ignore[dict-item]
    read = Reader(page(payload))
    verdicts = [a for a in read.of("p") if "verdict" in str(a.get("class"))]
    assert len(verdicts) == (said is not None)
    if said:
        assert said in "".join(text.strip() for tag, text in read.texts if tag == "p")
    results = [row[3] for row in read.rows if len(row) == 4 and row[0].startswith("fail-if")]
    assert results == ["passed ✓" if good else "failed ✗" for good in passed or []]


def test_the_results_stand_beside_the_baseline_s() -> None:
    rows = Reader(page(evaluated())).rows
    start = next(i for i, row in enumerate(rows) if row[:1] == ["metric"])
    assert rows[start : start + 11] == [
        ["metric", "base baseline", "small"],
        ["c4@gptq256 256 samples"],
        ["token perplexity", "10", "20 +10, × 2"],
        ["KL divergence", "", "0.693 ± 0.01"],
        ["same top token", "", "81.25%"],
        ["c4 1,000 samples, PARTIAL"],
        ["word perplexity", "90", "300"],
        ["piqa 400 samples"],
        ["acc", "0.75 ± 0.0125", "0.5 ± 0.025 −0.25"],
        ["answers lost", "", "30.00%"],
        ["answers won", "", "5.00%"],
    ]
    assert ["base", "0.5", "2 kB"] in rows  # the efficiency
    assert ["small", "base", "1,000", "1.850", "2.000", "250 B", "–"] in rows  # the models


def figures(payload: dict[str, Any]) -> list[str]:
    read = Reader(page(payload))
    terms = [" ".join(text.split()) for tag, text in read.texts if tag in ("dt", "dd")]
    return terms[: 3 * len([a for a in read.of("dd") if a.get("class") == "remark"])]


def test_the_first_numbers_are_those_one_wants_first() -> None:
    assert figures(evaluated())[:11] == [
        "token perplexity, c4@gptq256", "20", "base: 10",
        "acc, piqa", "0.5", "base: 0.75",
        "bits per linear weight", "1.850", "2.000 over all weights",
        "of weights", "250 B",
    ]  # fmt: skip
    assert figures(ternarized())[:6] == [
        "token perplexity", "15", "12 before, in 16 bits",
        "of the gap closed", "83.9%", "of the log perplexity that rounding loses",
    ]  # fmt: skip
    assert figures(evaluated() | {"model": ["base", "small"]}) == []


def test_settings_recipe_versions_and_the_command_are_told() -> None:
    rows = Reader(page(evaluated())).rows
    for row in (
        ["dtype", "float32"],
        ["torch", "base"],
        ["limit", "–"],
        ["piqa", "1.0", "0", "small"],
    ):
        assert row in rows, row
    read = Reader(page(ternarized()))
    for row in (["group size", "128"], ["lr", "0.001"], ["data", "some text"], ["torch", "2.13.0"]):
        assert row in read.rows, row
    pres = [text.strip() for tag, text in read.texts if tag == "pre"]
    assert "ternq ternarize base" in pres
    assert json.loads(pres[-1]) == ternarized()["recipe"]


def test_samples_keep_their_first_line_break() -> None:
    html = page(evaluated())
    assert '<pre class="prompt">\n\nbase</pre>' in html  # HTML drops the first of the two
    assert "<pre>\n\none</pre>" in html


def test_every_layer_is_in_the_table() -> None:
    rows = Reader(page(evaluated())).rows
    assert ["layers.5.small", "0.45", "45.00%"] in rows
    assert sum(row[0].startswith("layers.") for row in rows if row) == 6


def test_a_plan_is_no_result() -> None:
    plan = {
        "command": "ternarize",
        "plan": True,
        "model": "m",
        "weights": ternarized()["weights"] | {"parameters": 5},
        "training": {"steps": 1, "tokens": 10, "tokens_per_second": 1.0, "seconds": 10.0},
        "memory": {"needed": 1, "free": 2},
        "disk": {"needed": 1, "free": 2},
        "gates": [],
    }
    read = Reader(page(plan))
    assert ["memory", "1 B of 2 B free"] in read.rows
    assert not any("verdict" in str(a.get("class")) for a in read.of("p"))


# --- charts ---------------------------------------------------------------------------------------


def drawn(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in drawn(svg).iter("circle")]


def texts(svg: str) -> list[str]:
    return [str(t.text) for t in drawn(svg).iter("text")]


def test_points_lie_where_their_values_are() -> None:
    made = scatter([Point("a", 2.0, 10.0), Point("b", 4.0, 20.0), Point("c", 3.0, 15.0)],
                   "T", "x", "y", "i")  # fmt: skip
    assert made and not made.log and made.left_out == 0
    (ax, ay), (bx, by), (cx, cy) = circles(made.svg)
    assert ax < cx < bx and by < cy < ay  # high values above
    assert cx == pytest.approx((ax + bx) / 2, abs=0.11)
    assert cy == pytest.approx((ay + by) / 2, abs=0.11)


def test_a_wide_range_of_perplexities_has_a_logarithmic_axis() -> None:
    made = scatter([Point(n, 1.0, y) for n, y in (("a", 10.0), ("b", 100.0), ("c", 1000.0))],
                   "T", "x", "y", "i")  # fmt: skip
    assert made and made.log
    (_, a), (_, b), (_, c) = circles(made.svg)
    assert b == pytest.approx((a + c) / 2, abs=0.11)
    assert {"10", "100", "1,000"} <= set(texts(made.svg))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_and_said(bad: float) -> None:
    made = scatter([Point("a", 1.0, 5.0), Point("b", 2.0, bad), Point("c", bad, 1.0)],
                   "T", "x", "y", "i")  # fmt: skip
    assert made and made.left_out == 2 and len(circles(made.svg)) == 1
    assert "nan" not in made.svg and "inf" not in made.svg
    assert scatter([Point("a", 1.0, bad)], "T", "x", "y", "i") is None
    payload = evaluated()
    payload["results"]["small"]["c4"]["token_perplexity"] = bad
    assert "Left out: 1 value that is missing or not finite." in page(payload)
    assert "Left out" not in page(evaluated())


def test_a_model_of_unknown_size_is_left_out_and_said() -> None:
    payload = evaluated()
    payload["models"]["small"]["bpw_total"] = None
    assert page(payload).count("Left out: 1 value") == 2  # of c4 and of piqa


def test_the_whisker_is_the_standard_error() -> None:
    made = scatter([Point("a", 1.0, 0.5, 0.1), Point("b", 2.0, 0.7)], "T", "x", "y", "i")
    assert made
    (whisker,) = [e for e in drawn(made.svg).iter("line") if "whisker" in str(e.get("class"))]
    (_, ay), (_, by) = circles(made.svg)
    tenth = (ay - by) / 2
    assert float(whisker.get("y1", "")) == pytest.approx(ay + tenth, abs=0.2)
    assert float(whisker.get("y2", "")) == pytest.approx(ay - tenth, abs=0.2)


def test_curves_have_all_values_and_are_named_at_their_ends() -> None:
    made = lines([Series("KL", [1, 2, 3], [3.0, 2.0, math.nan]), Series("CE", [1, 3], [1.0, 1.5])],
                 "T", "step", "i")  # fmt: skip
    assert made and made.left_out == 1
    paths = [str(p.get("d")) for p in drawn(made.svg).iter("path")]
    assert [len(re.findall(r"[ML]", p)) for p in paths] == [2, 2]
    assert {"KL", "CE", "step"} <= set(texts(made.svg))
    description = next(drawn(made.svg).iter("desc")).text
    assert "CE: 1 at first, 1.5 at last" in str(description)


def test_layers_are_dots_in_their_order_and_missing_ones_are_counted() -> None:
    made = strip([0.5, None, 0.4], ["l.0.a", "l.0.b", "l.1.a"], "T", "i", ["0", "0", "1"])
    assert made and made.left_out == 1
    (ax, ay), (cx, cy) = circles(made.svg)
    assert cx - ax == pytest.approx(2 * (chart.WIDTH - 12 - 46) / 3, abs=0.11) and ay < cy
    assert {"0", "1"} <= set(texts(made.svg))


def test_training_has_a_chart_for_all_that_was_recorded() -> None:
    read = Reader(page(ternarized(), recorded()))
    titles = [text for tag, text in read.texts if tag == "figcaption"]
    for title in ("Loss", "Parts of the loss", "Learning rate", "Gradient norm",
                  "Codes that are zero", "Codes that one step changes", "Drift from the start",
                  "Cosine to the teacher, per block", "something new"):  # fmt: skip
        assert title in titles
    assert "seconds" not in titles and "step" not in titles


def test_a_long_training_is_drawn_by_means_of_neighbours() -> None:
    rows = [{"step": step, "loss": float(step % 2)} for step in range(10_000)]
    html = page({"command": "ternarize"}, rows)
    (path,) = re.findall(r'<path[^>]* d="([^"]+)"', html)
    assert 200 < path.count("L") < 300
    assert len({point.split()[1] for point in path[1:].split("L")}) == 1  # each the mean of 34


def test_the_start_of_the_training_stands_beside_its_end() -> None:
    html = page(ternarized())
    assert "only rounded: 48 at 4" in html and "base: 12 at 16" in html and "out: 15 at 4" in html


@pytest.mark.parametrize("seed", range(40))
def test_labels_meet_neither_one_another_nor_a_point(seed: int) -> None:
    draw = random.Random(seed)
    points = [
        (draw.uniform(60, 320), draw.uniform(20, 180), "n" * draw.randint(3, 20))
        for _ in range(draw.randint(1, 6))
    ]
    taken = [chart.Box(x - 5, y - 5, 10, 10) for x, y, _ in points]
    labels = []
    for x, y, name in points:
        if box := free_place(x, y, name, [*taken, *labels]):
            labels.append(box)
    assert labels
    assert not any(a.meets(b) for a, b in combinations(labels, 2))
    assert not any(a.meets(b) for a in labels for b in taken)
    assert all(box.x >= 46 and box.x + box.width <= chart.WIDTH for box in labels)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([10.0, 50.0], [10.0, 50.0]),
        ([50.0, 50.0, 50.0], [50.0, 60.0, 70.0]),
        ([98.0, 99.0], [90.0, 100.0]),
        ([5.0, 40.0, 38.0], [5.0, 48.0, 38.0]),
    ],
)
def test_names_of_curves_are_moved_apart(heights: list[float], expected: list[float]) -> None:
    assert spread(heights, 10.0, 0.0, 100.0) == expected


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (0.43, 0.436, False, [0.43, 0.432, 0.434, 0.436]),
        (-1.0, 1.0, False, [-1, -0.5, 0, 0.5, 1]),
        (1.0, 1e6, True, [1, 100, 10_000, 1_000_000]),
        (12.0, 60.0, True, [15, 20, 30, 50]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: Sequence[float]) -> None:
    assert Axis(low, high, 0, 100, log).ticks() == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e300, -3.0, 1.0])
def test_one_value_alone_can_be_drawn(value: float) -> None:
    for made in (
        scatter([Point("a", 1.0, value)], "T", "x", "y", "i"),
        lines([Series("a", [1], [value])], "T", "step", "i"),
        strip([value], ["a"], "T", "i", [""]),
    ):
        assert made and "nan" not in made.svg


# --- where it is written --------------------------------------------------------------------------


def test_steps_are_read_beside_the_artefact_or_in_the_run(tmp_path: Path) -> None:
    assert steps_of(tmp_path / "out") == [] and steps_of("/") == [] and steps_of("\0") == []
    run, beside = tmp_path / "out", tmp_path / "out.report"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert steps_of(run) == [{"step": 1}]
    beside.mkdir()
    (beside / "metrics.jsonl").write_text('{"step": 7}\n')
    assert steps_of(str(run)) == [{"step": 7}]


def test_an_evaluation_shows_the_training_of_the_first_model_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "c"):
        (tmp_path / f"{name}.report").mkdir()
        (tmp_path / f"{name}.report" / "metrics.jsonl").write_text(f'{{"step": 1, "{name}": 2}}\n')
    monkeypatch.chdir(tmp_path)
    assert training_of({"model": ["a", "b", "c"]}) == ("b", [{"step": 1, "b": 2}])
    assert training_of({"model": "a"}) == training_of({}) == ("", [])
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert training_of({"model": "."})[1] == [{"step": 1, "c": 2}]
    assert "Of b." in page({"model": ["a", "b"]}, recorded(), "b")


def test_the_pages_of_a_training_lie_beside_its_records(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = tmp_path / "out.report"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in recorded()))
    ternarize.write_pages(out, ternarized(out=str(out)))
    assert (folder / "report.html").read_text(encoding="utf-8") == page(
        ternarized(out=str(out)), recorded()
    )
    assert "| teacher (bf16) | 12 |" in (folder / "report.md").read_text(encoding="utf-8")
    assert {p.name for p in folder.iterdir()} == {"metrics.jsonl", "report.html", "report.md"}


def test_ternarize_writes_its_pages_and_compares_its_layers(demo: Demo) -> None:
    folder = demo.folder / "demo-ternary.report"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (layers,) = report["layers"].values()
    assert len(layers) == report["verify"]["checked"]
    assert all(0.3 < layer["error"] < 0.6 for layer in layers)
    assert "## ternq ternarize: demo" in (folder / "report.md").read_text(encoding="utf-8")
    read = Reader((folder / "report.html").read_text(encoding="utf-8"))
    titles = [text for tag, text in read.texts if tag == "figcaption"]
    assert {"Loss", "held-out, token perplexity", "Relative error to the dense weight"} <= {*titles}
