"""model + prompt -> text, handed out as it is made.

A packed model of Llama's kind is run by `ternq.decoder`, any other by transformers' ``generate``.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ternq.errors import InputError, RecipeError
from ternq.progress import Event, Progress, ignore

if TYPE_CHECKING:
    import torch

    from ternq.hf import Loaded
    from ternq.sampling import Sampling, Text


def generate(
    model: str,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    int8_activations: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: Any = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    write: Callable[[str], object] | None = None,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Continue ``prompt``, or with ``chat`` answer it as the tokenizer's template asks for.

    Temperature 0 takes the likeliest token, else tokens are drawn under ``seed`` (see
    `ternq.sampling.Sampling`); the text ends before a token that ends texts. ``write`` receives it
    piece by piece; ``dtype`` is a torch dtype or None.

    Returns ``model``, ``prompt``, ``text``, ``prompt_tokens``, ``tokens`` and:

    - ``finish``: "end" (the model ended the text), "length" (``max_new_tokens``) or "context";
    - ``engine``: "native" or "transformers", ``note``: why not the first, if the model is packed;
    - ``prefill_tokens_per_second``: up to the first new token, ``decode_tokens_per_second``: after
      it, None without a second one;
    - ``resident_bytes`` of the process, ``parameter_bytes`` of the model's tensors, and
      ``cache_bytes`` of keys and values (None where transformers keeps them);
    - ``threads``, and ``activations`` of the ternary products: "exact" or "int8".

    Raises:
        RecipeError: options that do not fit each other, or a prompt longer than the model reads.
        InputError: no chat template, or a model whose logits are not finite; what loading raises.
    """
    sampling = _sampling(max_new_tokens, temperature, top_k, top_p)
    if system is not None and not chat:
        raise RecipeError("A system message is part of a chat.", "Add --chat.")
    import torch

    from ternq.hf import max_length
    from ternq.sampling import Text

    loaded = _load(model, device, dtype, offline, trust_remote_code, progress)
    ids = _chat(loaded, prompt, system) if chat else _plain(loaded.tokenizer, prompt)
    room = max_length(loaded.model) - len(ids)
    if room < 1:
        raise RecipeError(f"The prompt has {len(ids)} tokens, as many as {model} can read.")
    stream = Stream(Text(loaded.tokenizer), _ends(loaded), write)
    job = Job(loaded, ids, min(max_new_tokens, room), sampling, int8_activations)
    torch.manual_seed(seed)
    engine = _run(job, stream, dtype, progress)
    result = {"model": model, "prompt": prompt, "text": "".join(stream.pieces)}
    length = "length" if max_new_tokens <= room else "context"
    result |= {"finish": "end" if stream.ended else length}
    result |= engine | stream.speed(len(ids)) | _memory(loaded.model)
    progress(Event("generate", summary(result)))
    return result


@dataclass
class Job:
    """What is asked of an engine."""

    loaded: "Loaded"
    ids: list[int]
    count: int
    sampling: "Sampling"
    int8: bool


@dataclass
class Stream:
    """Takes tokens one by one, notes when they come, and hands their text on."""

    text: "Text"
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


def summary(result: dict[str, Any]) -> str:
    """Speed and memory in a line."""
    decode = result["decode_tokens_per_second"]
    parts = [
        f"prompt: {result['prompt_tokens']} tokens, {result['prefill_tokens_per_second']:.1f}/s",
        f"new: {result['tokens']} tokens" + (f", {decode:.1f}/s" if decode else ""),
        f"model {result['parameter_bytes'] / 1e6:.1f} MB",
        f"resident {result['resident_bytes'] / 1e6:.0f} MB",
        f"{result['engine']}, threads: {result['threads']}",
    ]
    ends = {"length": "stopped at --max-new-tokens", "context": "stopped at the model's length"}
    return "; ".join([*parts, *filter(None, [ends.get(result["finish"])])])


# -- the request -----------------------------------------------------------------------------------


def _sampling(count: int, temperature: float, top_k: int, top_p: float) -> "Sampling":
    if count < 1 or not 0 <= temperature < float("inf"):
        raise RecipeError("Generating needs at least one token and a temperature of 0 or more.")
    if top_k < 0 or not 0 < top_p <= 1:
        raise RecipeError("top-k is 0 or more, and top-p lies between 0 and 1.")
    if not temperature and (top_k or top_p < 1):
        raise RecipeError(
            "top-k and top-p choose what is drawn, and temperature 0 draws nothing.",
            "Add --temperature, such as 0.7.",
        )
    from ternq.sampling import Sampling

    return Sampling(temperature, top_k, top_p)


def _load(
    model: str, device: str, dtype: Any, offline: bool, trust: bool, progress: Progress
) -> "Loaded":
    """The model; for the native decoder in the type that it is stored in, which takes less memory.

    The decoder computes in float32 all the same.
    """
    from ternq import hf
    from ternq.decoder import ARCHITECTURES

    if dtype is None and device == "cpu":
        with suppress(InputError):  # loading says it, in the words of what the model is
            built = hf.blueprint(model, offline=offline, trust_remote_code=trust)
            kinds = getattr(built.config, "architectures", None) or ()
            if built.scheme is not None and set(kinds) & set(ARCHITECTURES):
                dtype = hf.dtype_of(built)
    return hf.load(
        model,
        device=device,
        dtype=dtype,
        offline=offline,
        trust_remote_code=trust,
        progress=progress,
    )


def _plain(tokenizer: Any, prompt: str) -> list[int]:
    """Ids; an empty prompt becomes the token that begins (or else ends) a text."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ids = [mark for mark in marks if mark is not None][:1]
    if not ids:
        raise RecipeError("The prompt is empty, and this tokenizer has no token to begin with.")
    return ids


def _chat(loaded: "Loaded", prompt: str, system: str | None) -> list[int]:
    """Ids of a conversation of one message, up to where the answer begins."""
    from jinja2 import TemplateError

    if not getattr(loaded.tokenizer, "chat_template", None):
        raise InputError(
            f"The tokenizer of '{loaded.name}' has no chat template.",
            "Leave out --chat: the prompt is then given as it is.",
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        found = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"The chat template of '{loaded.name}' refuses: {error}") from error
    return list(found["input_ids"])


def _ends(loaded: "Loaded") -> set[int]:
    """Tokens that end a text: those of the generation settings, and the tokenizer's."""
    named = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return {token for token in (*found, loaded.tokenizer.eos_token_id) if token is not None}


def _memory(model: Any) -> dict[str, int]:
    from ternq.efficiency import resident, tensor_bytes

    return {"resident_bytes": resident(), "parameter_bytes": tensor_bytes(model)}


# -- the engines -----------------------------------------------------------------------------------


def _run(job: Job, stream: Stream, dtype: Any, progress: Progress) -> dict[str, Any]:
    """Have one of the engines put tokens into the stream; what is to be told of it."""
    import torch

    from ternq.decoder import obstacle

    model = job.loaded.model
    chosen = f"it computes in {dtype}" if dtype not in (None, torch.float32) else None
    why = chosen or obstacle(model, len(job.ids) + job.count)
    if why is None:
        return {"engine": "native", "note": None} | _native(job, stream)
    if job.int8:
        raise RecipeError(f"--int8-activations is for the native decoder, and {why}.")
    if dtype is None and model.device.type == "cpu":
        torch.nn.Module.float(model)  # transformers' own refuses a quantized model
    note = f"Through transformers' generate: {why}." if job.loaded.kind == "packed" else None
    if note:
        progress(Event("generate", note))
    return {"engine": "transformers", "note": note} | _transformers(job, stream)


def _native(job: Job, stream: Stream) -> dict[str, Any]:
    import torch

    from ternq.decoder import Decoder, leave_file

    leave_file(job.loaded.model)
    position, ids = 0, job.ids
    threads = torch.get_num_threads()
    with Decoder(job.loaded.model, len(ids) + job.count, int8=job.int8) as decoder:
        torch.set_num_threads(1)  # torch's threads spin a while after work, on the decoder's cores
        try:
            stream.begin()
            for _ in range(job.count):
                logits = decoder.logits(ids, position)
                position += len(ids)
                token = job.sampling.draw(logits)
                if not math.isfinite(float(logits[token])):
                    raise InputError(f"The logits of '{job.loaded.name}' are not finite.")
                stream.put(token)
                if stream.ended:
                    break
                ids = [token]
        finally:
            torch.set_num_threads(threads)
        stream.end()
        activations = "int8" if job.int8 else "exact"
        return {
            "threads": decoder.threads,
            "activations": activations,
            "cache_bytes": decoder.cache_bytes,
        }


def _transformers(job: Job, stream: Stream) -> dict[str, Any]:
    import torch

    model, sampling = job.loaded.model, job.sampling
    ids = torch.tensor([job.ids], device=model.device)
    ends = sorted(stream.ends)
    model.generation_config = type(model.generation_config)()  # what was asked for holds, no more
    how = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    stream.begin()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.count,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            streamer=_Streamer(stream),
            **({"do_sample": True, **how} if sampling.temperature else {"do_sample": False}),
        )
    stream.end()
    return {"threads": torch.get_num_threads(), "activations": "exact", "cache_bytes": None}


class _Streamer:
    """What transformers hands tokens to, the prompt's first."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._prompt = stream, True

    def put(self, ids: "torch.Tensor") -> None:
        if not self._prompt:
            self._stream.put(int(ids))
        self._prompt = False

    def end(self) -> None:
        """`Stream.end` comes after it."""
