"""Suites: groups of stock tasks under one name, as the papers that we compare with measure them.

A suite's own score is the plain mean of ``acc`` over the tasks that its paper averages.
"""

from dataclasses import dataclass

EFFICIENCY = "efficiency"
"""The task that `ternq.efficiency` measures."""


@dataclass(frozen=True)
class Suite:
    """Tasks in order, those of them whose ``acc`` is averaged, and what is left out and why."""

    tasks: tuple[str, ...]
    averaged: tuple[str, ...]
    left_out: str | None = None


SUITES = {
    # arXiv 2406.07177, as quoted in other papers' tables; original not seen
    "ternaryllm": Suite(
        ("wikitext", "c4", "ptb",
         "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"),
        ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"),
    ),
    # arXiv 2407.12327, section on benchmarks: zero-shot; its average is over the first six
    "spectra": Suite(
        ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande",
         "lambada_openai", "sciq", "logiqa", "mmlu_continuation", "triviaqa",
         "crows_pairs_english", "truthfulqa_mc1", "bigbench_bbq_lite_json_multiple_choice"),
        ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande"),
        "its perplexities on Cosmopedia, Dolma, S2ORC, Wikipedia and RefinedWeb are no tasks of "
        "lm-eval: name a text file of them",
    ),
    # arXiv 2402.16775, as quoted in notes on it; original not seen
    "quant-eval": Suite(
        ("wikitext", "mmlu", "ceval-valid", "gsm8k", "cnn_dailymail_abisee",
         "truthfulqa_mc1", "truthfulqa_mc2", "bbq", EFFICIENCY),
        ("mmlu", "ceval-valid"),
        "FLORES-200, XSum, SNLI and FollowBench are no stock tasks of lm-eval",
    ),
}  # fmt: skip


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks of suites in place of their names; each task once.

    >>> expand(("piqa", "ternaryllm"))[:4]
    ('piqa', 'wikitext', 'c4', 'ptb')
    """
    found = [task for name in names for task in _tasks(name)]
    return tuple(dict.fromkeys(found))


def _tasks(name: str) -> tuple[str, ...]:
    return SUITES[name].tasks if name in SUITES else (name,)
