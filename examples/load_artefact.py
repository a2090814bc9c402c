"""Load a packed ternary model and let it write, with transformers alone.

    python examples/load_artefact.py [FOLDER]

FOLDER is an artefact of ``ternq ternarize`` or ``ternq pack``; by default ``demo-ternary``, which
``ternq ternarize demo`` writes into the working folder.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import ternq  # noqa: F401  so that transformers knows the format

folder = sys.argv[1] if len(sys.argv) > 1 else "demo-ternary"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

prompt = tokenizer("def read_config(path):", return_tensors="pt")
written = model.generate(
    prompt["input_ids"],
    attention_mask=prompt["attention_mask"],
    max_new_tokens=20,
    do_sample=False,
    pad_token_id=tokenizer.eos_token_id,
)
print(tokenizer.decode(written[0], skip_special_tokens=True))
