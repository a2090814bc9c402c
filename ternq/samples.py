"""Short texts that a model writes, so that a report shows what numbers cannot."""

import torch

from ternq.hf import Loaded
from ternq.recipe import DEMO

PROMPTS = {
    DEMO: ("def read_config(path):\n", 'class Stack:\n    """'),
    "": ("The capital of France", "Once upon a time"),
}
TOKENS = 40


@torch.no_grad()
def continued(loaded: Loaded, prompt: str) -> str:
    """The likeliest text after a prompt."""
    loaded.model.eval()
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.model.device)
    new = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )
    return str(loaded.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
