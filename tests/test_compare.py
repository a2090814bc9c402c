"""Comparisons with a baseline, against numbers worked out by hand; what must not be compared."""

from typing import Any

import pytest

from ternq.compare import comparable, compare, from_file, other_settings
from ternq.errors import InputError

BLOCKS = {"blocks": 4, "block_length": 64, "tokens": 256}
BASE: dict[str, Any] = {
    "wikitext": {"token_perplexity": 10.0, "bits_per_byte": 1.0, "samples": 4, **BLOCKS},
    "piqa": {"acc": 0.5, "acc_stderr": 0.1, "samples": 8, "partial": False},
}
OWN: dict[str, Any] = {
    "wikitext": {"token_perplexity": 25.0, "bits_per_byte": 1.5, "samples": 4, **BLOCKS},
    "piqa": {"acc": 0.375, "acc_stderr": 0.2, "samples": 8, "partial": False},
    "sciq": {"acc": 1.0, "samples": 8, "partial": False},
}


def test_differences_ratios_and_flips() -> None:
    found = compare(OWN, BASE, {"piqa": "10010001"}, {"piqa": "11110000"})
    assert found == {
        "wikitext": {
            "token_perplexity_difference": 15.0,
            "token_perplexity_ratio": 2.5,
            "bits_per_byte_difference": 0.5,
        },
        "piqa": {"acc_difference": -0.125, "flips_lost": 2 / 8, "flips_won": 1 / 8},
    }


def test_answers_to_other_questions_are_no_flips() -> None:
    assert "flips_lost" not in compare(OWN, BASE, {"piqa": "101"}, {"piqa": "11"})["piqa"]
    assert "flips_lost" not in compare(OWN, BASE, {}, {"piqa": "11"})["piqa"]


@pytest.mark.parametrize("name", list(BLOCKS))
def test_token_perplexities_of_other_blocks_are_not_compared(name: str) -> None:
    other = {"wikitext": BASE["wikitext"] | {name: 32}}
    assert set(compare(OWN, other, {}, {})["wikitext"]) == {"bits_per_byte_difference"}
    assert "token_perplexity" not in comparable(OWN, other)["wikitext"]
    assert comparable(OWN, BASE) == BASE


SETTINGS: dict[str, Any] = {
    "limit": 100, "num_fewshot": None, "max_length": 2048, "chat": False, "seed": 0,
    "batch_size": 4, "dtype": "float32",
    "tasks": {"piqa": {"version": 1.0, "data": "aa"}, "wikitext": {"text": "bb"}},
}  # fmt: skip


def test_settings_that_results_depend_on_are_named() -> None:
    assert other_settings(SETTINGS, SETTINGS | {"batch_size": 1, "device": "cuda"}) == []
    every = {"limit": None}, {"limit": "all"}
    assert other_settings(SETTINGS | every[0], SETTINGS | every[1]) == []
    c4 = {"tasks": {"c4": {}}}  # of which the first documents are taken where none is given
    assert len(other_settings(SETTINGS | every[0] | c4, SETTINGS | every[1] | c4)) == 1
    tasks = {"piqa": {"version": 2.0, "data": "cc"}, "wikitext": {"text": "dd"}, "sciq": {}}
    assert other_settings(
        SETTINGS, SETTINGS | {"limit": None, "seed": 1, "dtype": "bfloat16", "tasks": tasks}
    ) == [
        "--dtype bfloat16 there, float32 here",
        "--limit not given there, 100 here",
        "--seed 1 there, 0 here",
        "piqa: version 2.0 there, 1.0 here",
        "piqa: other data",
        "wikitext: another text",
    ]


def test_a_file_gives_the_model_it_names_first() -> None:
    file = {
        "schema_version": 1, "command": "eval", "model": ["a", "b"], "settings": SETTINGS,
        "results": {"a": BASE, "b": OWN}, "answers": {"a": {"piqa": "01"}},
    }  # fmt: skip
    found = from_file(file, "base.json")
    assert found == {"results": BASE, "answers": {"piqa": "01"}, "settings": SETTINGS}
    assert from_file(file | {"model": "b"}, "base.json")["results"] == OWN
    del file["settings"], file["answers"]
    assert from_file(file, "base.json") == {"results": BASE, "answers": {}, "settings": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema_version 2; this ternq reads 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"results": {}}, "no results"),
        ({"results": []}, "no results"),
        ({"results": {"a": 5}}, "no results"),
        ({"results": {"a": {"piqa": 0.5}}}, "no results"),
    ],
)
def test_a_file_of_another_schema_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_file({"schema_version": 1, "results": {"a": BASE}} | change, "base.json")
