"""Logits -> a token, and tokens -> text as it comes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_COLD = 1e-30  # of a temperature; logits divided by less overflow, and the likeliest has it all
_FIRST = 256  # candidates that top-p looks at before it sorts the whole vocabulary


def drawn(chances: Tensor, at: Tensor) -> Tensor:
    """Places ``[..., k]`` drawn with probabilities ``[..., n]``, on the CPU.

    Each is found in the sums of the probabilities by one number ``at`` ``[..., k]``, float64 and
    uniform in [0, 1), which takes a tenth of the time of ``torch.multinomial``.
    """
    sums = chances.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, at * sums[..., -1:]).clamp_(max=chances.shape[-1] - 1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; a temperature of 0 takes the likeliest.

    In this order, as transformers does: logits are divided by ``temperature``; the ``top_k``
    likeliest stay (0: all); of these, the fewest that together have the probability ``top_p``.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def draw(self, logits: Tensor) -> int:
        """A token of float32 logits ``[vocabulary]``, by torch's default generator."""
        if self.temperature < _COLD:
            return int(logits.max(0).indices)  # a third of the time of argmax
        scores, tokens = self.candidates(logits)
        return int(tokens[drawn(scores.softmax(0), torch.rand(1, dtype=torch.float64))])

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled logits and ids of the tokens that can be drawn."""
        scores = logits / self.temperature
        tokens = torch.arange(len(scores))
        if self.top_k and self.top_k < len(scores):
            scores, tokens = scores.topk(self.top_k)
        if self.top_p < 1:
            kept = _nucleus(scores, self.top_p)
            scores, tokens = scores[kept], tokens[kept]
        return scores, tokens


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Places of the likeliest scores that together reach the probability, at least one."""
    total = scores.logsumexp(0)
    for count in (_FIRST, len(scores)):
        best, places = scores.topk(min(count, len(scores)))
        probabilities = (best - total).exp()
        before = probabilities.cumsum(0) - probabilities
        if before[-1] >= top_p:
            break
    return places[: max(1, int((before < top_p).sum()))]


@dataclass
class Text:
    """Text of tokens that come one by one, cut between characters only.

    A token may end inside a character, and what a token reads as can depend on the one before it.
    So two spans are compared: ``shown`` is the last that was handed out, and what follows it comes
    when decoding both ends in a whole character.
    """

    tokenizer: Any
    _ids: list[int] = field(default_factory=list)
    _start: int = 0  # of what was handed out last
    _shown: int = 0  # tokens handed out

    def add(self, token: int) -> str:
        """What the token adds to the text; nothing while a character is incomplete."""
        self._ids.append(token)
        new = self._new()
        return "" if new.endswith("\N{REPLACEMENT CHARACTER}") else self._hand_out(new)

    def end(self) -> str:
        """What was held back."""
        return self._hand_out(self._new())

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _hand_out(self, new: str) -> str:
        if new:
            self._start, self._shown = self._shown, len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
