"""Gates: limits, boundaries, and what must fail because it was not measured."""

import math

import pytest

from ternq.errors import RecipeError
from ternq.gates import Gate, check, judge_training, parse_gates

RESULTS = {
    "wikitext": {"token_perplexity": 10.0, "word_perplexity": 30.0},
    "c4": {"token_perplexity": 20.0},
    "piqa": {"acc": 0.6, "acc_norm": 0.62},
}
BASELINE = {
    "wikitext": {"token_perplexity": 8.0},
    "c4": {"token_perplexity": 10.0},
    "piqa": {"acc": 0.65},
}
WEIGHTS = {"bpw_linear": 1.85, "bytes": 900_000_000}


def outcome(**flags: object) -> list[tuple[str | None, float | None, bool]]:
    rows = check(parse_gates(**flags), RESULTS, WEIGHTS, BASELINE)  # type: ignore[arg-type]
    return [(row["task"], row["value"], row["passed"]) for row in rows]


def test_flags_are_parsed() -> None:
    assert parse_gates(
        ppl_above=["12", "wikitext=9", "wikitext:word_perplexity=31"],
        acc_below=["piqa=0.5"],
        size_above="900MB",
        bpw_above=1.9,
    ) == [
        Gate("ppl-above", 12.0),
        Gate("ppl-above", 9.0, "wikitext"),
        Gate("ppl-above", 31.0, "wikitext", "word_perplexity"),
        Gate("acc-below", 0.5, "piqa"),
        Gate("size-above", 9e8),
        Gate("bpw-above", 1.9),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        {"ppl_above": ["nan"]},
        {"ppl_above": ["c4=inf"]},
        {"ppl_above": ["c4="]},
        {"acc_below": ["0.5"]},
        {"size_above": "900XB"},
        {"size_above": "MB"},
        {"size_above": "inf"},
        {"bpw_above": "many"},
        {"bpw_above": "-1"},
        {"size_above": "1e308GB"},
        {"size_above": "-5MB"},
        {"ppl_above": ["c4=-5"]},
        {"ppl_ratio_above": ["0"]},
        {"acc_below": ["piqa=60"]},
        {"acc_drop_above": ["5"]},
        {"acc_drop_above": ["-0.1"]},
    ],
)
def test_limits_are_finite_numbers(flags: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_gates(**flags)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_the_boundary_passes() -> None:
    assert outcome(ppl_above=["c4=20"]) == [("c4", 20.0, True)]
    assert outcome(ppl_above=["c4=19.999"]) == [("c4", 20.0, False)]
    assert outcome(acc_below=["piqa=0.6"]) == [("piqa", 0.6, True)]
    assert outcome(acc_below=["piqa=0.601"]) == [("piqa", 0.6, False)]
    assert outcome(acc_drop_above=["0.05"]) == [("piqa", 0.05, True)]
    assert outcome(ppl_ratio_above=["c4=2"]) == [("c4", 2.0, True)]
    assert outcome(size_above="900MB") == [(None, 9e8, True)]
    assert outcome(size_above="0.8999GB") == [(None, 9e8, False)]
    assert outcome(bpw_above="1.85") == [(None, 1.85, True)]


def test_without_a_task_every_task_with_the_metric_must_pass() -> None:
    assert outcome(ppl_above=["15"]) == [("wikitext", 10.0, True), ("c4", 20.0, False)]
    assert outcome(ppl_ratio_above=["1.5"]) == [("wikitext", 1.25, True), ("c4", 2.0, False)]


def test_the_other_metric() -> None:
    assert outcome(ppl_above=["wikitext:word_perplexity=30"]) == [
        ("wikitext:word_perplexity", 30.0, True)
    ]
    assert outcome(acc_below=["piqa:acc_norm=0.7"]) == [("piqa:acc_norm", 0.62, False)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "10", True])
def test_what_is_not_finite_fails(value: object) -> None:
    results = {"c4": {"token_perplexity": value}}
    (row,) = check(parse_gates(ppl_above=["100"]), results)
    assert (row["value"], row["passed"]) == (None, False)
    (row,) = check(parse_gates(ppl_ratio_above=["100"]), RESULTS | results, {}, results)[-1:]
    assert not row["passed"]


def test_what_is_missing_fails() -> None:
    gates = parse_gates(
        ppl_above=["boolq=3"], acc_below=["c4=0.1"], acc_drop_above=["0.1"], size_above="1MB",
        bpw_above="2",
    )  # fmt: skip
    rows = check(gates, {"c4": {"token_perplexity": 3.0}})
    assert [row["passed"] for row in rows] == [False] * 5
    assert [row["value"] for row in rows] == [None] * 5
    assert [row["name"] for row in rows][:2] == ["fail-if-ppl-above", "fail-if-acc-below"]


def test_a_finished_artefact_without_its_report_has_nothing_to_judge() -> None:
    result = {"out": "out", "weights": {"bpw_linear": 1.9}, "files": [{"bytes": 5}]}
    assert judge_training([], "demo", result) == []
    rows = judge_training(parse_gates(ppl_above=["9"], bpw_above="2"), "demo", result)
    assert [(row["value"], row["passed"]) for row in rows] == [(None, False), (1.9, True)]
