"""Replayed decode steps: with a capture that computes anew, so that a CPU can tell the difference.

It holds the copying of inputs and the choice of what is replayed; CUDA's own part needs a card.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ternq import graphs, hf

replays: list[int] = []


def recompute(run: Callable[[], Any]) -> tuple[Any, graphs.Replay]:
    """As `graphs.capture`: an output with nothing in it, which each replay fills."""
    output = CausalLMOutputWithPast(logits=torch.empty(0))

    def replay() -> None:
        replays.append(1)
        found = run()
        output.logits, output.past_key_values = found.logits, found.past_key_values

    return output, replay


def text(model: Any, **options: Any) -> list[int]:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
    tokens: list[int] = made[0].tolist()
    return tokens


def test_replayed_steps_make_the_same_text(source: Path) -> None:
    model = hf.load(str(source)).model
    plain = text(model)
    for _ in range(2):  # each has a cache, and so a graph, of its own
        replays.clear()
        with graphs.replayed(model, recompute) as options:
            assert text(model, **options) == plain
        assert len(replays) == 7  # of 9 tokens: not the prompt's, not the first step
    assert "forward" not in vars(model)


def test_other_caches_are_left_alone(source: Path) -> None:
    model = hf.load(str(source)).model
    plain = text(model)
    replays.clear()
    with graphs.replayed(model, recompute):
        assert text(model) == plain
    assert not replays


def test_the_model_is_itself_again_after_an_error(source: Path) -> None:
    model = hf.load(str(source)).model
    with pytest.raises(KeyError), graphs.replayed(model, recompute):
        raise KeyError
    assert "forward" not in vars(model)
