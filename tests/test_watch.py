"""Divergence: what ends a training, what is said of it, and going back to where it was good."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import batch, trainer

from ternq import metrics, snapshots, watch
from ternq.errors import DivergenceError, RecipeError
from ternq.linear import ternary_layers
from ternq.progress import Event
from ternq.recipe import Training
from ternq.train import Trainer
from ternq.watch import Course, Watch


def test_the_start_is_the_mean_of_the_first_losses() -> None:
    course = Course()
    for loss in range(1, 21):
        course.add(float(loss))
    assert course.start == pytest.approx(sum(range(1, 11)) / 10)
    assert course.above == 19  # each is above the mean of those before it


def test_one_loss_below_begins_the_count_anew() -> None:
    course = Course()
    for loss in [1.0] * 10 + [2.0] * 30 + [1.0] + [2.0] * 5:
        course.add(loss)
    assert course.above == 5


def watched(tmp_path: Path, losses: list[float], steps: int = 200) -> Watch:
    found = trainer(tmp_path).watch
    for step, loss in enumerate(losses, 1):
        found.check(step, steps, loss)
    return found


def test_a_loss_above_its_start_for_long_is_lost(tmp_path: Path) -> None:
    assert watched(tmp_path, [1.0] * 10 + [2.0] * 49).state()["good"] is False
    with pytest.raises(DivergenceError, match=r"for 50 steps the loss was above its start of 1.0"):
        watched(tmp_path, [1.0] * 10 + [2.0] * 50)
    watched(tmp_path, [1.0] * 10 + [2.0] * 199, steps=2000)  # a tenth of the steps is long there
    watched(tmp_path, [1.0] * 10 + [1.04] * 300)  # noise


def test_a_long_run_goes_on_counting_after_a_stop(tmp_path: Path) -> None:
    first = watched(tmp_path, [1.0] * 10 + [2.0] * 30)
    second = trainer(tmp_path).watch
    second.go_on(json.loads(json.dumps(first.state())))
    assert second.course == first.course


def collapse(made: Trainer) -> str:
    """Make all codes of a layer zero but one in each row."""
    name, layer = list(ternary_layers(made.student).items())[3]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0] = 1.0
    return name


def test_a_layer_whose_codes_become_one_is_named(tmp_path: Path) -> None:
    made = trainer(tmp_path, lr=0.0)
    name = collapse(made)
    with pytest.raises(DivergenceError, match="the codes of " + name.replace(".", r"\.")) as caught:
        made.run()
    assert caught.value.exit_code == 7
    assert "--skip" in str(caught.value.hint) and "--lr" in str(caught.value.hint)


def test_a_layer_that_was_of_one_code_from_the_start_is_no_divergence(tmp_path: Path) -> None:
    made = trainer(tmp_path, lr=0.0)
    collapse(made)
    made.watch = Watch(made.student)
    made.run()


# Going back


def failing_once(made: Trainer, at: int) -> list[int]:
    """Have the loss be NaN at a step, the first time that it is reached."""
    left, steps = [at], []
    accumulate = made.accumulate

    def broken(ids: torch.Tensor) -> dict[str, float]:
        steps.append(made.step)
        values = accumulate(ids)
        if left and made.step + 1 == left[0]:
            left.clear()
            values["loss"] = float("nan")
        return values

    made.accumulate = broken  # type: ignore[method-assign]
    return steps


def test_a_retreat_goes_back_with_half_the_rate_and_reads_on(tmp_path: Path) -> None:
    events: list[Event] = []
    made = trainer(tmp_path, steps=6, retreats=1, checkpoint_minutes=0.0)
    made.progress = events.append
    made.writer.progress = events.append
    steps = failing_once(made, at=4)
    made.run()
    back = next(b for a, b in zip(steps, steps[1:], strict=False) if b <= a)
    assert steps[: steps.index(3) + 1] == [0, 1, 2, 3] and back in (1, 2, 3)
    assert made.step == 6 and made.retreats == 1
    assert made.read == 4 * len(steps)  # nothing is read twice
    rates = {line["step"]: line["lr"] for line in metrics.steps(tmp_path)}
    whole = trainer(tmp_path / "other", steps=6).settings
    assert rates[6] == pytest.approx(0.5 * whole.peak_lr * (6 - 5) / 5)
    assert "diverged at step 4" in made.said[0] and "1/2 of the rate" in made.said[0]
    assert any(e.level == "warning" and "diverged" in str(e.message) for e in events)
    record = json.loads((snapshots.checkpoints(tmp_path)[-1] / "state.json").read_text())
    assert record["retreats"] == 1 and record["said"] == made.said


def test_a_run_without_checkpoints_goes_back_to_its_start(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=4, retreats=2)
    steps = failing_once(made, at=3)
    made.run()
    assert steps == [0, 1, 2, 0, 1, 2, 3]


def test_when_no_retreat_is_left_it_ends(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=4, retreats=2)
    accumulate = made.accumulate
    made.accumulate = lambda ids: accumulate(ids) | {"loss": float("inf")}  # type: ignore[method-assign]
    with pytest.raises(DivergenceError, match="loss inf"):
        made.run()
    assert made.retreats == 2


def test_what_was_retreated_is_gone_on_with(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=4, retreats=1)
    failing_once(made, at=2)
    made.run()
    again = trainer(tmp_path, steps=4, retreats=1)
    assert again.restore()
    assert (again.step, again.retreats, again.read) == (4, 1, made.read)


def test_the_newest_good_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    made = trainer(tmp_path, keep_checkpoints=1)
    for step, above in enumerate([0, 1, 2, 3], 1):
        made.step, made.watch.course.above = step, above
        made.save()
    names = [p.name for p in snapshots.checkpoints(tmp_path)]
    assert names == ["step-00000001", "step-00000004"]
    assert made.restore(good=True) and made.step == 1
    made.step, made.watch.course.above = 5, 0
    made.save()
    assert [p.name for p in snapshots.checkpoints(tmp_path)] == ["step-00000005"]


def test_a_cached_teacher_has_no_more_text_for_a_retreat() -> None:
    with pytest.raises(RecipeError, match="--retreats"):
        Training(retreats=1, cache_teacher=True)


def test_a_negative_number_of_retreats_is_refused() -> None:
    with pytest.raises(RecipeError, match="--retreats is negative"):
        Training(retreats=-1)


def test_limits_are_said_as_they_are() -> None:
    assert watch.WORSE > 1 and 0.9 < watch.ONE_CODE < 1


def test_codes_are_watched_where_they_are_taken(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.accumulate(batch())
    before = made.watch.codes()
    name = collapse(made)
    values: dict[str, Any] = made.watch.diagnostics(before)
    assert values["flip_share"] > 0
    assert made.watch.collapsed == [name]
