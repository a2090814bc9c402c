"""model + prompt -> text, handed out as it is made."""

from collections.abc import Callable
from typing import Any

from ternq.errors import RecipeError
from ternq.progress import Event, Progress, ignore


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: Any = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    write: Callable[[str], object] | None = None,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Continue ``prompt``; temperature 0 takes the likeliest token, else samples under ``seed``.

    ``write`` receives the text piece by piece; ``dtype`` is a torch dtype or None. Returns
    ``{model, prompt, text, tokens}``.
    """
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise RecipeError("Generating needs at least one token and a temperature of 0 or more.")
    import torch

    from ternq.hf import load, max_length

    progress(Event("load", f"Loading {model}"))
    loaded = load(
        model,
        device=device,
        dtype=dtype,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    ids = _encode(loaded.tokenizer, prompt).to(loaded.model.device)
    room = max_length(loaded.model) - ids.shape[1]
    if room < 1:
        raise RecipeError(f"The prompt has {ids.shape[1]} tokens, as many as {model} can read.")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.inference_mode():
        tokens = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=loaded.tokenizer.eos_token_id,
            streamer=_streamer(loaded.tokenizer, write) if write else None,
            **(sampling or {"do_sample": False}),
        )[0, ids.shape[1] :]
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    return {"model": model, "prompt": prompt, "text": text, "tokens": len(tokens)}


def _encode(tokenizer: Any, prompt: str) -> Any:
    """Ids [1, n]; an empty prompt becomes the token that begins (or else ends) a text."""
    import torch

    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ids = [mark for mark in marks if mark is not None][:1]
    if not ids:
        raise RecipeError("The prompt is empty, and this tokenizer has no token to begin with.")
    return torch.tensor([ids])


def _streamer(tokenizer: Any, write: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text + "\n" if stream_end else text)

    return Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)
