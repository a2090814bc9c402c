"""The output head of a model: its input instead of its logits, where one can be had for the other.

The logits of a large vocabulary are the largest tensor of a training step. `ternq.losses.head_loss`
makes them chunk by chunk from what goes into the head; here is how a model gives that.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ternq.losses import Head
from ternq.modeling_ternq import DenseHead

_PROBED = 4  # tokens


class HeadInput:
    """While open, ``hidden`` is what last went into the head of a model, ``[..., hidden]``.

    The head is left out: of the logits that the model returns there is one, and it means nothing.
    Its ``forward`` is replaced on the instance, so that hooks, names and parameters stay.
    """

    hidden: Tensor

    def __init__(self, model: Any) -> None:
        self._head: nn.Module = model.get_output_embeddings()

    def __enter__(self) -> "HeadInput":
        vars(self._head)["forward"] = self._keep
        return self

    def _keep(self, input: Tensor) -> Tensor:
        self.hidden = input
        return input[..., :1]  # for what the model does to logits

    def __exit__(self, *_: object) -> None:
        vars(self._head).pop("forward", None)


def head_of(model: Any) -> Head:
    """The output head as it stands, in numbers, with what the model does to its product."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(head.weight, getattr(head, "bias", None), scale, cap)


@torch.no_grad()
def why_whole(model: Any) -> str | None:
    """Why the logits of a model must be had whole, in words; None if `head_of` gives them.

    Looked at on a few tokens: what a model does to logits after the head is not known for all.
    """
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, DenseHead):
        return f"the output head is a {type(head).__name__}"
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        ids = torch.arange(_PROBED, device=head.weight.device).unsqueeze(0) % len(head.weight)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0][0].shape[:2] != ids.shape:
        return "the output head is not called once for all tokens"
    # Without numbers (a plan's model has none) a model whose head gives the logits is trusted.
    without = logits.is_meta or isinstance(logits, FakeTensor)
    if not without and not torch.allclose(head_of(model).bounded(seen[0][1]), logits, rtol=1e-4):
        return "the model changes logits after the head"
    return None
