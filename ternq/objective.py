"""What a student learns from: the loss of one batch, beside its teacher (OFF, divergence, CE).

Student and loss are one module, so that an engine that wraps modules (Accelerate's) has the whole
step inside its ``forward``. The teacher is no part of it: nothing of it is trained or saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ternq.blocks import BlockOutputs
from ternq.head import HeadInput, head_of, why_whole
from ternq.linear import compute_dtype
from ternq.losses import head_loss, logit_loss, off_per_block
from ternq.recipe import Training
from ternq.teacher import CachedTeacher


class Objective(nn.Module):
    """``off * OFF + kl * KL + ce * CE`` of a student on token ids ``[blocks, tokens]``.

    ``whole`` says why logits are held whole; None: they are made in chunks, through the head.
    """

    def __init__(self, student: Any, teacher: Any, settings: Training, autocast: Any) -> None:
        super().__init__()
        self.student = student
        self.settings, self.autocast = settings, autocast
        self.whole = why_whole(student)
        if settings.off or settings.kl:
            self.whole = self.whole or why_whole(teacher)
        self.learn_from(teacher)

    def learn_from(self, teacher: Any) -> None:
        """Have another teacher: a model, or a `CachedTeacher`."""
        self._teacher = (teacher,)  # in a tuple, lest it become a submodule

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, and its terms without a gradient."""
        settings, target = self.settings, None
        others: list[Tensor] = []
        with self.autocast, BlockOutputs(self.student) as own:
            output = self._run(self.student, ids)
            dtype = compute_dtype(output)
        if settings.off or settings.kl:
            target, others = self._ask_teacher(ids)
        loss, kl, ce = self._from_outputs(output, target, ids, dtype)
        terms = {"kl": kl, "ce": ce}
        if settings.off:
            first = len(own.features) - len(others)
            distances = off_per_block(own.features[first:], others)
            loss = loss + settings.off * distances.mean()
            distances = distances.detach()
            terms["off"] = distances.mean()
            terms |= {f"cosine_{i}": 1 - d for i, d in enumerate(distances, first)}
        return loss, {"loss": loss.detach()} | terms

    def _run(self, model: Any, ids: Tensor) -> Tensor:
        """What goes into the head of a model; its logits where they are held whole."""
        if self.whole:
            return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
        with HeadInput(model) as head:
            model(input_ids=ids, use_cache=False)
        return head.hidden

    @torch.no_grad()
    def _ask_teacher(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Its output, and what its blocks put out: of a cached teacher only the last one."""
        (teacher,) = self._teacher
        if isinstance(teacher, CachedTeacher):
            with self.autocast:
                last = teacher.recall(ids)
                return self._run(teacher.model, ids), [last]
        with self.autocast, BlockOutputs(teacher) as others:
            return self._run(teacher, ids), others.features

    def _from_outputs(
        self, output: Tensor, target: Tensor | None, ids: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`head_loss` of inputs of the heads, or `logit_loss` of logits."""
        own = output[:, :-1].flatten(0, 1)
        other = None if target is None else target[:, :-1].flatten(0, 1)
        labels, weights = ids[:, 1:].flatten(), {"kl": self.settings.kl, "ce": self.settings.ce}
        if self.whole:
            return logit_loss(own, other, labels, **weights)
        (teacher,) = self._teacher
        model = teacher.model if isinstance(teacher, CachedTeacher) else teacher
        head = None if target is None else head_of(model)
        return head_loss(own, head_of(self.student), other, head, labels, **weights, dtype=dtype)
