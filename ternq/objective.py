"""What a student learns from: the loss of one batch, beside its teacher (OFF, divergence, CE).

Student and loss are one module, so that an engine that wraps modules (Accelerate's) has the whole
step inside its ``forward``. The teacher is no part of it: nothing of it is trained or saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ternq.blocks import BlockOutputs
from ternq.losses import logit_loss, off_per_block
from ternq.recipe import Training


class Objective(nn.Module):
    """``off * OFF + kl * KL + ce * CE`` of a student on token ids ``[blocks, tokens]``."""

    def __init__(
        self, student: Any, teacher: Any, settings: Training, autocast: Any = None
    ) -> None:
        super().__init__()
        self.student = student
        self.settings, self.autocast = settings, autocast
        self._teacher = (teacher,)  # in a tuple, lest it become a submodule

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch, and its terms without a gradient."""
        settings, (teacher,) = self.settings, self._teacher
        use_teacher = bool(settings.off or settings.kl)
        with self.autocast, BlockOutputs(self.student) as own:
            logits = self.student(input_ids=ids, use_cache=False).logits
        target = None
        if use_teacher:
            with self.autocast, torch.no_grad(), BlockOutputs(teacher) as others:
                target = teacher(input_ids=ids, use_cache=False).logits
        loss, kl, ce = logit_loss(
            logits[:, :-1].flatten(0, 1),
            None if target is None else target[:, :-1].flatten(0, 1),
            ids[:, 1:].flatten(),
            kl=settings.kl,
            ce=settings.ce,
        )
        terms = {"kl": kl, "ce": ce}
        if settings.off:
            distances = off_per_block(own.features, others.features)
            loss = loss + settings.off * distances.mean()
            distances = distances.detach()
            terms["off"] = distances.mean()
            terms |= {f"cosine_{i}": 1 - d for i, d in enumerate(distances)}
        return loss, {"loss": loss.detach()} | terms
