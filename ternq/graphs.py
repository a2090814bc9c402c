"""Decode steps of transformers' ``generate`` as one CUDA graph.

A step of a small model is some hundred kernels of a few microseconds, and Python takes longer to
start them than they run. A graph starts them all at once. torch.compile would do that too, and fuse
some, but compiles for longer than one text takes. A graph reads and writes the same memory in every
replay, so it wants a static cache, and its inputs are copied to where they were.
It has never run on a GPU.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], None]


def capture(run: Callable[[], Any]) -> tuple[Any, Replay]:
    """What ``run`` returns, in memory that every replay fills; nothing is computed before that."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay


@contextmanager
def replayed(
    model: Any, capture: Callable[[Callable[[], Any]], tuple[Any, Replay]] = capture
) -> Iterator[dict[str, Any]]:
    """Within, one-token steps of ``model`` are replayed; yields what ``generate`` is to be given.

    For one text at a time, on CUDA. Steps of another shape, and models whose cache keeps numbers in
    Python, run as always.
    """
    plain = model.forward
    model.forward = functools.wraps(plain)(Step(plain, capture))  # generate reads the signature
    try:
        yield {"cache_implementation": "static", "disable_compile": True}
    finally:
        del model.forward


class Step:
    """A model's ``forward`` whose one-token steps are captured once and then replayed.

    The first of them runs as always: it compiles kernels and makes what must exist before.
    """

    def __init__(
        self, forward: Callable[..., Any], capture: Callable[..., tuple[Any, Replay]]
    ) -> None:
        self._forward, self._capture = forward, capture
        self._warm_for: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._output: Any = None
        self._replay: Replay | None = None

    def __call__(self, input_ids: Tensor, **rest: Any) -> Any:
        given = {"input_ids": input_ids, **rest}
        shape = _shape(given)
        if input_ids.shape[1] != 1 or not _static(rest.get("past_key_values")):
            return self._forward(**given)
        if shape != self._warm_for:
            self._warm_for, self._replay = shape, None
            return self._forward(**given)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if self._replay is None:
            self._inputs = {name: value.clone() for name, value in tensors.items()}
            fixed = given | self._inputs
            self._output, self._replay = self._capture(lambda: self._forward(**fixed))
        for name, value in tensors.items():
            self._inputs[name].copy_(value)
        self._replay()
        return self._output


def _shape(given: dict[str, Any]) -> list[Any]:
    """What two calls must have in common to be one graph: all but the numbers in tensors."""
    return [
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in sorted(given.items())
    ]


def _static(cache: Any) -> bool:
    """Whether a cache is of plain static layers, which count their tokens in a tensor."""
    return all(type(layer).__name__ == "StaticLayer" for layer in getattr(cache, "layers", [None]))
