"""Features of a decoder: what every block puts out, taken by forward hooks.

``output_hidden_states`` would not do: its last entry is taken after the final norm.
"""

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ternq.linear import decoder_blocks


class BlockOutputs:
    """While open, ``features`` holds the output ``[batch, tokens, hidden]`` of every block.

    Gradient checkpointing runs a block again during the backward pass; what a hook sees then is
    not taken, so the features stay those of the forward pass, which carry the gradient (with
    ``use_reentrant=False``, as Hugging Face does by default).
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = decoder_blocks(model)[1]
        self.features: list[Tensor] = []

    def __enter__(self) -> "BlockOutputs":
        self.features = []
        self._handles = [b.register_forward_hook(self._take) for b in self._blocks]
        return self

    def _take(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.features.append(output[0] if isinstance(output, tuple) else output)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
