"""What people read: the tables and sentences of every command, on a terminal and as Markdown."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from ternq import report
from ternq.shown import duration, number, size

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


COMPARED: dict[str, Any] = {
    "command": "eval",
    "model": ["demo-ternary"],
    "baseline": "demo",
    "models": {
        "demo": {"kind": "dense", "parameters": 3_967_744, "bytes": 7_935_488,
                 "bpw_linear": None, "bpw_total": 16.0},
    },
    "results": {
        "demo": {
            "c4": {"token_perplexity": 10.0, "word_perplexity": 80.0, "samples": 1000,
                   "blocks": 256, "drawn": "gptq256",
                   "partial": True},
            "arc_challenge": {"acc": 0.75, "acc_stderr": 0.0125, "samples": 1172,
                              "partial": False},
        },
        "demo-ternary": {
            "c4": {"token_perplexity": 12.5, "word_perplexity": 100.0, "samples": 1000,
                   "blocks": 256, "drawn": "gptq256",
                   "partial": True},
            "arc_challenge": {"acc": 0.5, "acc_stderr": 0.025, "samples": 1172,
                              "partial": False},
            "efficiency": {"load_seconds": 0.5, "file_bytes": 2_010_000,
                           "resident_bytes": 300_000_000, "parameter_bytes": 1_858_048,
                           "prefill_tokens_per_second": 18_000.4,
                           "decode_tokens_per_second": 212.34, "samples": 1,
                           "partial": False},
        },
    },
    "comparison": {
        "demo-ternary": {
            "c4": {"token_perplexity_difference": 2.5, "token_perplexity_ratio": 1.25,
                   "word_perplexity_difference": 20.0, "word_perplexity_ratio": 1.25,
                   "kl_divergence": 0.25, "kl_divergence_stderr": 0.003, "kl_tokens": 4096,
                   "top1_agreement": 0.8125},
            "arc_challenge": {"acc_difference": -0.25, "flips_lost": 0.3, "flips_won": 0.05},
        }
    },
    "cached": [["demo", "c4"], ["demo", "arc_challenge"], ["demo", "c4"]],
    "layers": {
        "demo-ternary": [
            {"name": "a", "zero_share": 0.4, "error": 0.5},
            {"name": "b", "zero_share": 0.4, "error": 0.625},
            {"name": "c", "zero_share": 0.4, "error": 0.25},
            {"name": "d", "zero_share": 0.4, "error": None},
        ]
    },
    "notes": ["A note."],
}  # fmt: skip


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
        "demo-ternary.report/report.html",
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


def test_against_the_baseline_a_row_per_metric_then_what_averages_hide() -> None:
    found = {table.title: table for table in report.tables(COMPARED)}
    against = found["Against demo: demo-ternary"]
    assert against.header == ("", "value", "baseline", "difference", "ratio")
    assert against.rows == [
        ("c4@gptq256 token perplexity", "12.5", "10", "+2.5", "1.25"),
        ("c4 word perplexity", "100", "80", "+20", "1.25"),
        ("arc_challenge acc", "0.5", "0.75", "−0.25", "–"),
    ]
    assert found["Against demo: demo-ternary, beyond averages"].rows == [
        ("c4@gptq256", "0.25 ± 0.003", "81.25%", "–", "–"),
        ("arc_challenge", "–", "–", "30.00%", "5.00%"),
    ]


def test_efficiency_has_a_table_of_its_own_with_sizes() -> None:
    found = {table.title: table for table in report.tables(COMPARED)}
    assert not any(title.startswith("efficiency") for title in found)
    assert found["Efficiency"].rows == [
        ("demo-ternary", "0.5", "2.01 MB", "300 MB", "1.86 MB", "18,000", "212.3")
    ]
    assert "joules" not in " ".join(found["Efficiency"].header)
    costs = COMPARED["results"]["demo-ternary"]["efficiency"] | {"energy_joules_per_token": 0.5}
    [table] = report.tables({"results": {"m": {"efficiency": costs}}})
    assert table.header[-1] == "joules a token" and table.rows[0][-1] == "0.5"


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        (
            {"samples": 1000, "blocks": 256, "drawn": "gptq256", "partial": True},
            ["c4@gptq256", "c4"],
        ),
        ({"samples": 256, "blocks": 256, "partial": True}, ["c4"]),
        ({"samples": 256, "blocks": 8, "partial": True}, ["c4"]),
        ({"samples": 8, "partial": True}, ["c4"]),
    ],
)
def test_gptq_s_sample_of_c4_has_its_name(counts: dict[str, Any], names: list[str]) -> None:
    values = {"token_perplexity": 9.0, "word_perplexity": 80.0, **counts}
    found = [table.title.split()[0] for table in report.tables({"results": {"m": {"c4": values}}})]
    assert found == names


def test_what_was_cached_and_the_worst_layer_are_a_sentence_each() -> None:
    said = dict(report.sentences(COMPARED))
    assert said["cached"] == "demo on c4, arc_challenge: taken from the results cache"
    assert said["layers"] == (
        "demo-ternary: relative error to the dense weight 0.5 in the median, 0.625 at most (b)"
    )
    assert said["note"] == "A note."


def test_a_comparison_fits_80_columns_and_leaves_the_terminal_alone() -> None:
    payload = COMPARED | {"notes": ["A \x1b[2Jnote."]}
    text = shown(payload)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "A \ufffd[2Jnote." in text
    assert "answers lost" in text
    assert "\x1b" not in report.markdown(payload)


@pytest.mark.parametrize("error", [None, math.nan, math.inf])
def test_an_error_that_is_not_known_is_not_told(error: float | None) -> None:
    [table] = report.tables({"results": {"m": {"t": {"acc": 0.5, "acc_stderr": error}}}})
    assert table.rows == [("m", "0.5")]


def test_gates_of_several_models_name_theirs() -> None:
    gate = {"name": "fail-if-ppl-above", "task": "c4", "value": 2.0, "limit": 3.0, "passed": True}
    both = [{**gate, "model": model} for model in "ab"]
    assert [row[0][-4:] for row in report.gates(both).rows] == [" [a]", " [b]"]
    assert report.gates(both[:1]).rows[0][0] == "fail-if-ppl-above c4"


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
        "seconds": {"training": 7320.0, "loading": 20.0, "total": 7340.0},
        "fits": True,
        "notes": ["Strategy: end to end."],
    }
    text = shown(plan)
    for part in (
        "2 GB of 8 GB free",
        "3 MB of 9 GB free",
        "2 h 02 min of it training",
        "Strategy: end to end.",
    ):
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
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1234567, "1,234,567"), (1.23456, "1.235"), (12345.6, "12,346")],
)
def test_numbers(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_error_and_hint_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_error("It is [bold]broken[/bold].", "Mend it.")
    captured = capsys.readouterr()
    assert captured.err == "error: It is [bold]broken[/bold].\nhint:  Mend it.\n"
    assert captured.out == ""
