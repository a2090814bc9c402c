"""What makes the tokens of a text: `ternq.decoder`, or transformers' ``generate`` for the rest."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ternq.decoder import Decoder, obstacle
from ternq.errors import InputError, RecipeError
from ternq.hf import Loaded
from ternq.kernels import one_thread
from ternq.memory import resident
from ternq.progress import Event, Progress
from ternq.sampling import Sampling, Text


@dataclass
class Job:
    """What is asked of an engine."""

    loaded: Loaded
    ids: list[int]
    count: int
    sampling: Sampling
    int8: bool

    @property
    def context(self) -> int:
        """Positions that are needed at most."""
        return len(self.ids) + self.count


@dataclass
class Stream:
    """Takes tokens one by one, notes when they come, and hands their text on."""

    text: Text
    ends: set[int]
    write: Callable[[str], object] | None
    pieces: list[str] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    ended: bool = False

    def begin(self) -> None:
        """The model is about to read the prompt."""
        self.stamps = [time.perf_counter()]

    def put(self, token: int) -> None:
        """The next token; one that ends texts has no text itself."""
        self.stamps.append(time.perf_counter())
        self.ended = token in self.ends
        if not self.ended:
            self._hand_on(self.text.add(token))

    def end(self) -> None:
        """No more tokens."""
        self._hand_on(self.text.end())
        if self.write:
            self.write("\n")

    def speed(self, prompt: int) -> dict[str, Any]:
        """Tokens, and how many there were in a second."""
        start, first, last = self.stamps[0], self.stamps[1], self.stamps[-1]
        new = len(self.stamps) - 1
        return {
            "prompt_tokens": prompt,
            "tokens": new,
            "prefill_tokens_per_second": prompt / (first - start),
            "decode_tokens_per_second": (new - 1) / (last - first) if new > 1 else None,
        }

    def _hand_on(self, piece: str) -> None:
        self.pieces.append(piece)
        if self.write and piece:
            self.write(piece)


def run(job: Job, stream: Stream, dtype: Any, progress: Progress) -> dict[str, Any]:
    """Have one of the engines put tokens into the stream; what is to be told of it."""
    engine, model = chosen(job, dtype), job.loaded.model
    if engine["engine"] == "native":
        return engine | _native(job, stream)
    if dtype is None and model.device.type == "cpu":
        torch.nn.Module.float(model)  # transformers' own refuses a quantized model
    if engine["note"]:
        progress(Event("generate", engine["note"]))
    return engine | _transformers(job, stream)


def chosen(job: Job, dtype: Any) -> dict[str, Any]:
    """``engine``: which one will run; ``note``: why not the native one, if the model is packed."""
    asked = f"it computes in {dtype}" if dtype not in (None, torch.float32) else None
    why = asked or obstacle(job.loaded.model, job.context)
    if why is None:
        return {"engine": "native", "note": None}
    if job.int8:
        raise RecipeError(f"--int8-activations is for the native decoder, and {why}.")
    note = f"Through transformers' generate: {why}." if job.loaded.kind == "packed" else None
    return {"engine": "transformers", "note": note}


def _native(job: Job, stream: Stream) -> dict[str, Any]:
    position, ids = 0, job.ids
    # torch's threads spin a while after work, on the decoder's cores
    with Decoder(job.loaded.model, job.context, int8=job.int8) as decoder, one_thread():
        stream.begin()
        for _ in range(job.count):
            logits = decoder.logits(ids, position)
            position += len(ids)
            _refuse_not_finite(job, logits)
            token = job.sampling.draw(logits)
            stream.put(token)
            if stream.ended:
                break
            ids = [token]
        stream.end()
        return {
            "threads": decoder.threads,
            "activations": "int8" if job.int8 else "exact",
            "cache_bytes": decoder.cache_bytes,
            "resident_bytes": resident(),
        }


def _refuse_not_finite(job: Job, logits: Tensor) -> None:
    if not math.isfinite(float(logits.amax())):  # which is NaN if any is
        raise InputError(f"The logits of '{job.loaded.name}' are not finite.")


def _transformers(job: Job, stream: Stream) -> dict[str, Any]:
    model, sampling = job.loaded.model, job.sampling
    ids = torch.tensor([job.ids], device=model.device)
    ends = sorted(stream.ends)
    model.generation_config = type(model.generation_config)()  # what was asked for holds, no more
    how = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}

    def finite(ids: Tensor, logits: Tensor) -> Tensor:
        _refuse_not_finite(job, logits)
        return logits

    stream.begin()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.count,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            streamer=_Streamer(stream),
            logits_processor=[finite],
            **({"do_sample": True, **how} if sampling.temperature else {"do_sample": False}),
        )
    stream.end()
    return {
        "threads": torch.get_num_threads(),
        "activations": "exact",
        "cache_bytes": None,
        "resident_bytes": resident(),
    }


class _Streamer:
    """What transformers hands tokens to, the prompt's first."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._prompt = stream, True

    def put(self, ids: Tensor) -> None:
        if not self._prompt:
            self._stream.put(int(ids))
        self._prompt = False

    def end(self) -> None:
        """`Stream.end` comes after it."""
