"""What people read: the tables and sentences of every command, on a terminal and as Markdown."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from ternq import report

WEIGHTS = {
    "coverage": 0.8,
    "bpw_linear": 1.85,
    "bpw_embeddings": 16.0,
    "bpw_total": 4.6,
    "bpw_file": 4.7,
    "bytes": 2_300_000,
    "bytes_dense_bf16": 8_000_000,
    "zero_share": 0.43,
    "parameters": 4_000_000,
}
TERNARIZED: dict[str, Any] = {
    "command": "ternarize",
    "model": "demo",
    "out": "demo-ternary",
    "teacher": {"perplexity": 10.0, "text": "held-out modules"},
    "untrained": {"perplexity": 1000.0, "text": "held-out modules"},
    "student": {"perplexity": 20.0, "text": "held-out modules"},
    "weights": WEIGHTS,
    "files": [{"path": "model.safetensors", "bytes": 2_300_000}, {"path": "x", "bytes": 100_000}],
    "training": {"steps": 100, "tokens": 204_800, "tokens_per_second": 3000.0},
    "verify": {"checked": 42, "max_abs_logit_diff": 1.5e-6, "ok": True},
    "dense_layers": [
        {"name": "lm_head", "parameters": 700_000, "reason": "output head"},
        {"name": "norm.1", "parameters": 50, "reason": "not a matrix"},
        {"name": "norm.2", "parameters": 50, "reason": "not a matrix"},
    ],
    "samples": [{"prompt": "def f(", "teacher": "x):", "student": "y[0]):"}],
    "gates": [
        {"name": "fail-if-ppl-above", "task": "held-out", "value": 20.0, "limit": 30.0,
         "passed": True},
        {"name": "fail-if-bpw-above", "task": None, "value": None, "limit": 1.9,
         "passed": False},
    ],
}  # fmt: skip
EVALUATED = {
    "command": "eval",
    "model": ["a", "b"],
    "results": {
        "a": {
            "piqa": {"acc": 0.5, "acc_stderr": 0.011, "samples": 100, "partial": True},
            "wikitext": {"token_perplexity": 29.25, "samples": 140, "partial": False},
        },
        "b": {"wikitext": {"token_perplexity": math.nan, "samples": 140, "partial": False}},
    },
}


def shown(payload: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for part in report.render(payload):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_ternarize_compares_the_three_models() -> None:
    [quality, _] = report.tables(TERNARIZED)
    assert [row[1] for row in quality.rows] == ["10", "1,000", "20"]
    assert [row[2:] for row in quality.rows] == [
        ("16", "16", "16", "8 MB"),
        ("1.850", "16.000", "4.700", "2.4 MB"),
        ("1.850", "16.000", "4.700", "2.4 MB"),
    ]


def test_ternarize_tells_everything_and_fits_80_columns() -> None:
    text = shown(TERNARIZED)
    for part in (
        "80.0% of the parameters",
        "43.0% of",
        "lm_head (700,000 parameters): output head",
        "norm.1 and 1 more (100 parameters)",
        "42 layers",
        "def f(x):",
        "def f(y[0]):",  # brackets of sampled code are not markup
        "demo-ternary",
        "ternq generate demo-ternary",
        "FAILED",
    ):
        assert part in " ".join(text.split()), part
    assert max(map(len, text.splitlines())) <= 80


def test_gap_closed_is_the_share_of_the_log_perplexity() -> None:
    closed = math.log(1000 / 20) / math.log(1000 / 10)
    assert report.gap_closed(TERNARIZED) == pytest.approx(closed)
    assert f"{closed:.1%}" in shown(TERNARIZED)


@pytest.mark.parametrize("untrained", [None, math.inf, math.nan, 5.0])
def test_no_gap_is_claimed_where_none_is_defined(untrained: float | None) -> None:
    broken = TERNARIZED | {"untrained": {"perplexity": untrained, "text": ""}}
    assert report.gap_closed(broken) is None
    assert "gap closed" not in shown(broken)


def test_eval_has_a_table_per_task_and_marks_partial_results() -> None:
    piqa, wikitext = report.tables(EVALUATED)
    assert piqa.title == "piqa (100 samples, PARTIAL)"
    assert piqa.rows == [("a", "0.5 ± 0.011")]
    assert wikitext.rows == [("a", "29.25"), ("b", "nan")]
    assert wikitext.header == ("model", "token perplexity")


def test_markdown_has_the_same_tables_with_marks_escaped() -> None:
    text = report.markdown(EVALUATED | {"model": "a|b"})
    assert text.startswith("## ternq eval: a\\|b\n")
    assert "| model | token perplexity |\n| --- | ---: |\n| a | 29.25 |" in text


def test_plan_sets_needs_beside_what_is_free() -> None:
    plan = {
        "command": "ternarize",
        "plan": True,
        "model": "demo",
        "out": "demo-ternary",
        "weights": WEIGHTS,
        "training": {"steps": 10, "tokens": 100, "tokens_per_second": 5.0, "seconds": 7320.0},
        "memory": {"needed": 2e9, "free": 8e9},
        "disk": {"needed": 3e6, "free": 9e9},
        "fits": True,
        "notes": ["Strategy: end to end."],
    }
    text = shown(plan)
    for part in ("2 GB of 8 GB free", "3 MB of 9 GB free", "2 h 02 min", "Strategy: end to end."):
        assert part in text
    assert "written to" not in text


def test_pack_and_verify() -> None:
    packed = {k: TERNARIZED[k] for k in ("model", "out", "weights", "files", "verify")}
    assert "1.5e-06" in shown(packed | {"command": "pack"})
    checked = packed | {"command": "pack", "out": None}
    checked["verify"] = {"checked": 42, "max_abs_logit_diff": None, "ok": True}
    text = " ".join(shown(checked).split())
    assert "42 layers, to the bit; SHA-256 of every file" in text
    assert "next" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (7_940_552, "7.94 MB"), (2.5e9, "2.5 GB"), (4e12, "4,000 GB")],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert report.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1234567, "1,234,567"), (1.23456, "1.235"), (12345.6, "12,346")],
)
def test_numbers(value: Any, text: str) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_error_and_hint_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_error("It is [bold]broken[/bold].", "Mend it.")
    captured = capsys.readouterr()
    assert captured.err == "error: It is [bold]broken[/bold].\nhint:  Mend it.\n"
    assert captured.out == ""
