"""Rate and weight decay as closed forms of the step; settings that make no sense together."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ternq.errors import RecipeError
from ternq.optimize import set_rate
from ternq.recipe import Method, Recipe, Scheme, Training, idle, with_rate, with_start
from ternq.schedule import decays, rate

STEPS = 1200
SPECTRA = Training(
    lr=2.4e-3, lr_second=1.5e-3, decay_until=2 / 3, warmup=0.0, weight_decay=0.1, scale_lr=1.0
)


def test_linear_decay_in_two_stages() -> None:
    """Linear from 1 to 0; from the half on as if it had come from the second peak."""
    rates = [SPECTRA.lr * rate(step, STEPS, SPECTRA) for step in range(STEPS)]
    left = [(STEPS - step) / (STEPS - 1) for step in range(STEPS)]
    assert rates[1:600] == pytest.approx([2.4e-3 * x for x in left[1:600]])
    assert rates[600:] == pytest.approx([1.5e-3 * x for x in left[600:]])
    assert rates[600] / rates[599] == pytest.approx(1.5 / 2.4 * 600 / 601)


def test_without_a_second_peak_nothing_jumps() -> None:
    settings = Training(warmup=0.1)
    rates = [rate(step, STEPS, settings) for step in range(STEPS)]
    assert rates[:120] == pytest.approx([(step + 1) / 121 for step in range(120)])
    assert rates[120:] == pytest.approx([(STEPS - step) / 1080 for step in range(120, STEPS)])


def test_cosine() -> None:
    settings = Training(schedule="cosine", warmup=0.25)
    at = {step: rate(step, STEPS, settings) for step in (299, 300, 525, 750, 1200)}
    assert at == pytest.approx({299: 300 / 301, 300: 1, 525: (2 + 2**0.5) / 4, 750: 0.5, 1200: 0})
    for step in range(300, STEPS):
        whole = 0.5 * (1 + math.cos(math.pi * (step - 300) / 900))
        assert rate(step, STEPS, settings) == pytest.approx(whole, abs=1e-12)


def test_weight_decay_ends() -> None:
    assert [decays(step, STEPS, SPECTRA) for step in (0, 799, 800, 1199)] == [
        True,
        True,
        False,
        False,
    ]
    assert all(decays(step, 7, Training()) for step in range(7))
    assert not any(decays(step, 7, Training(decay_until=0.0)) for step in range(7))


def test_every_group_gets_rate_and_decay() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "lr": p, "peak_lr": p, "first_decay": d}
        for p, d in ((2.4e-3, 0.1), (1.0, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    found = {}
    for step in (300, 900, 300):  # a run that goes on from an earlier step gets its decay back
        assert set_rate(optimizer, step, STEPS, SPECTRA) == optimizer.param_groups[0]["lr"]
        found[step] = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found[300] == [
        (pytest.approx(2.4e-3 * 900 / 1199), 0.1),
        (pytest.approx(900 / 1199), 0.0),
    ]
    second = 1.5 / 2.4 * 300 / 1199
    assert found[900] == [(pytest.approx(2.4e-3 * second), 0.0), (pytest.approx(second), 0.0)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay_until": 1.5}, "--decay-until is 1.5"),
        ({"decay_until": math.nan}, "--decay-until is nan"),
        ({"lr_second": -1.0}, "--lr-second is -1"),
        ({"lr": 0.0, "lr_second": 1.0}, "--lr-second is a second peak"),
        ({"objective": "ce", "off": 3.0}, "--off 3 is a term of the teacher"),
        ({"objective": "ce", "kl": 0.5}, "--kl 0.5 is a term of the teacher"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Training(**settings)  # type: ignore[arg-type]


def test_cross_entropy_alone() -> None:
    alone = Training(objective="ce")
    assert (alone.off, alone.kl, alone.ce) == (0, 0, 1)
    assert Training(objective="ce", ce=0.5).ce == 0.5


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("dlt", {}, []),
        ("dlt", {"rank": 8}, ["--rank 8"]),
        ("dlt", {"rank": 8, "train": "low-rank"}, []),
        ("dlt", {"calibration": 8}, []),
        ("dlt", {"calibration": 8, "start": "closed-form"}, ["--calibration 8"]),
        ("dlt", {"reconstruction_lr": 0.1, "start": "compensated"}, ["--reconstruction-lr 0.1"]),
        ("dlt", {"reconstruction_epochs": 0, "off": 3.0}, []),
        ("dlt", {"tokens": 0, "off": 3.0, "lr": 1e-4}, ["--off 3.0"]),
        ("dlt", {"block_by_block": True, "cache_teacher": True}, ["--cache-teacher"]),
        (
            "dlt",
            {"block_by_block": True, "tokens": 5, "batch_size": 2},
            ["--batch-size 2", "--tokens 5"],
        ),
        ("dlt", {"train": "scales", "scale_lr": 1e-3, "lr": 1e-2, "ste": "ttq"}, ["--lr 0.01"]),
        ("dlt", {"train": "scales", "start": "compensated", "ste": "ttq"}, ["--ste ttq"]),
        ("dlt", {"objective": "ce", "tokens": 0}, []),
        ("dlt", {"decay_until": 0.5}, ["--decay-until 0.5"]),
        ("dlt", {"decay_until": 0.5, "weight_decay": 0.1}, []),
        ("rtn", {"steps": 0, "calibration": 8, "ste": "ttq"}, ["--calibration 8", "--ste ttq"]),
        ("gptq", {"steps": 0, "calibration": 8, "start": "compensated"}, ["--start compensated"]),
    ],
)
def test_settings_that_nothing_reads_are_named(
    method: Method, settings: dict[str, Any], named: list[str]
) -> None:
    asked = Recipe(model="m", scheme=Scheme(method=method), training=Training(**settings))
    training = with_rate(with_start(asked, ternary=False), ternary=False)
    said = idle(replace(asked, training=training))
    assert sorted(line.partition(" changes nothing: ")[0] for line in said) == named
