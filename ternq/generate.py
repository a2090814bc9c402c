"""model + prompt -> text, handed out as it is made; then its speed, and the memory it took."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ternq.errors import InputError, RecipeError
from ternq.progress import Event, Progress, ignore

if TYPE_CHECKING:
    from ternq.engines import Job
    from ternq.hf import Loaded
    from ternq.sampling import Sampling


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
    plan: bool = False,
    write: Callable[[str], object] | None = None,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Continue ``prompt``, or with ``chat`` answer it as the tokenizer's template asks for.

    Temperature 0 takes the likeliest token, else tokens are drawn under ``seed`` (see
    `ternq.sampling.Sampling`); the text ends before a token that ends texts. ``write`` receives it
    piece by piece; ``dtype`` is a torch dtype or None. With ``plan`` everything is checked and
    loaded, nothing written, and what it would take returned, see `_planned`.

    Returns ``model``, ``prompt``, ``text``, ``prompt_tokens``, ``tokens`` and:

    - ``finish``: "end" (the model ended the text), "length" (``max_new_tokens``) or "context";
    - ``engine``: "native" or "transformers", ``note``: why not the first, if the model is packed;
    - ``prefill_tokens_per_second``: up to the first new token, ``decode_tokens_per_second``: after
      it, None without a second one;
    - ``resident_bytes`` of the process at the end, ``parameter_bytes`` of the model's tensors, and
      ``cache_bytes`` of keys and values (None where transformers keeps them);
    - ``threads``, and ``activations`` of the ternary products: "exact" or "int8".

    Raises:
        RecipeError: options that do not fit each other, or a prompt longer than the model reads.
        InputError: no chat template, or a model whose logits are not finite; what loading raises.
    """
    sampling = _sampling(max_new_tokens, temperature, top_k, top_p)
    _refuse_no_text(prompt, system or "")
    if system is not None and not chat:
        raise RecipeError("A system message is part of a chat.", "Add --chat.")
    import torch

    from ternq.decoder import load_dtype
    from ternq.engines import Job, Stream, run
    from ternq.hf import load
    from ternq.memory import model_bytes
    from ternq.outlines import max_length
    from ternq.sampling import Text

    loaded = load(
        model,
        device=device,
        dtype=load_dtype if dtype is None and device == "cpu" else dtype,
        offline=offline,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    ids = _chat(loaded, prompt, system) if chat else _plain(loaded.tokenizer, prompt)
    room = max_length(loaded.model) - len(ids)
    if room < 1:
        raise RecipeError(f"The prompt has {len(ids)} tokens, as many as {model} can read.")
    stream = Stream(Text(loaded.tokenizer), _ends(loaded), write)
    job = Job(loaded, ids, min(max_new_tokens, room), sampling, int8_activations)
    if plan:
        return {"model": model, "prompt": prompt} | _planned(job, dtype)
    torch.manual_seed(seed)
    engine = run(job, stream, dtype, progress)
    result = {"model": model, "prompt": prompt, "text": "".join(stream.pieces)}
    length = "length" if max_new_tokens <= room else "context"
    result |= {"finish": "end" if stream.ended else length}
    result |= engine | stream.speed(len(ids)) | {"parameter_bytes": model_bytes(loaded.model)}
    progress(Event("generate", summary(result)))
    return result


def _planned(job: "Job", dtype: Any) -> dict[str, Any]:
    """Which engine would run, on how many tokens at most, and whether memory holds the cache."""
    from ternq.engines import chosen
    from ternq.memory import cache_bytes, free_memory, model_bytes
    from ternq.weights import stored_dtype, weights_summary

    model, engine, notes = job.loaded.model, chosen(job, dtype), []
    held, cache = model_bytes(model), 0
    if engine["engine"] == "native":
        cache = cache_bytes(model, job.context)
    else:
        notes.append("The cache of transformers' generate is not counted.")
    free = free_memory(model.device) + held
    fits = held + cache <= free
    return engine | {
        "plan": True,
        "prompt_tokens": len(job.ids),
        "max_new_tokens": job.count,
        "weights": weights_summary(model, stored_dtype(model.dtype)),
        "memory": {"needed": held + cache, "free": free},
        "notes": [*filter(None, [engine["note"]]), *notes],
        "fits": fits,
        "reason": None if fits else f"The cache takes {cache / 1e9:.1f} GB, more than is free.",
    }


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


def _refuse_no_text(*given: str) -> None:
    """Bytes of a command line that are no UTF-8 come as halves of characters."""
    try:
        "".join(given).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("The prompt is not UTF-8.") from error


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
