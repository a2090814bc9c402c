"""Tokens are drawn as transformers draws them, and text comes in whole characters."""

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ternq.sampling import Sampling, Text, drawn


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (1.5, 20, 1.0), (1.0, 0, 0.9), (1.0, 0, 0.01), (0.5, 50, 0.5), (2, 1, 0.5)],
)
def test_candidates_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, spread: float
) -> None:
    """Also where the probability is so flat that more than a few hundred tokens are kept."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * spread
    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    ids = torch.zeros(1, 1, dtype=torch.long)
    expected = LogitsProcessorList(warpers)(ids, logits.unsqueeze(0)).softmax(-1)[0]
    scores, tokens = Sampling(temperature, top_k, top_p).candidates(logits)
    found = torch.zeros(1000).scatter(0, tokens, scores.softmax(0))
    assert torch.allclose(found, expected, atol=1e-6)
    assert int((found > 0).sum()) == int((expected > 0).sum())


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([1.0, -1.0, float("-inf"), 2.0, 0.0])
    torch.manual_seed(0)
    found = torch.tensor([Sampling(0.8).draw(logits) for _ in range(20_000)])
    share = found.bincount(minlength=5) / len(found)
    expected = (logits / 0.8).softmax(0)
    deviation = (expected * (1 - expected) / len(found)).sqrt()
    assert bool(((share - expected).abs() <= 4 * deviation).all())


def test_rows_are_drawn_each_by_its_own_probabilities() -> None:
    chances = torch.tensor([[0.0, 0.25, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 0.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    found = drawn(chances, torch.rand(3, 20_000, dtype=torch.float64, generator=generator))
    share = torch.nn.functional.one_hot(found, 4).float().mean(1)
    expected = chances / chances.sum(1, keepdim=True)
    deviation = (expected * (1 - expected) / found.shape[1]).sqrt()
    assert bool(((share - expected).abs() <= 4 * deviation).all())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampling().draw(torch.tensor([0.0, 3.0, 2.0])) == 1
    for cold in (1e-29, 1e-39, 5e-324):  # divided by these, logits overflow
        assert Sampling(cold, top_k=2).draw(torch.tensor([0.0, 3.0, 2.0])) == 1


def test_a_seed_gives_the_same_tokens() -> None:
    logits = torch.randn(500)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([Sampling(1.0, 0, 0.95).draw(logits) for _ in range(20)])
    assert draws[0] == draws[1] != draws[2]


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    text = Text(tokenizer)
    return [*map(text.add, ids), text.end()]


def test_a_character_of_several_tokens_comes_whole() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("aé東👩‍🚀!")["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 4 + 3 + 4 + 1
    found = pieces(tokenizer, ids)
    assert "".join(found) == "aé東👩‍🚀!"
    assert list(filter(None, found)) == list("aé東👩‍🚀!")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_pieces_make_up_the_text_of_any_tokens(ids: list[int]) -> None:
    """Also of bytes that are no characters, and of tokens without text."""
    tokenizer = tiny.tokenizer()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(tokenizer, ids)) == whole


def test_a_space_that_depends_on_the_token_before_is_kept() -> None:
    """As with SentencePiece, where the first word of a text loses its space."""
    words = {"▁a": 0, "▁cat": 1, "s": 2, "▁.": 3, "<unk>": 4}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert pieces(tokenizer, [0, 1, 2, 3, 1]) == ["a", " cat", "s", " .", " cat", ""]
