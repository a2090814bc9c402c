"""A GGUF file of ternq in a real llama.cpp, against the artefact it was made from.

    python -m venv llama && llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    ternq pack demo-ternary --format gguf -o demo-gguf
    python bench/llama_cpp.py --llama llama/bin/python --text notes.txt \
        demo-ternary=demo-gguf/demo-ternary-Q4_1.gguf

llama.cpp is built from its source and runs in an environment of its own (``--llama``, its Python),
so that it and ternq share no library. For each pair it is asked for three things:

- tokens of some texts: the very ids that the artefact's tokenizer gives;
- the likeliest continuation of some prompts, token by token: the text of ``ternq generate``. Where
  they part, the difference of the two logits there is printed, in ternq's model;
- the perplexity of the same blocks of token ids: within 1 % of ternq's; and the logits after each
  block, whose difference (root mean square) is printed in units of their standard deviation.

llama.cpp rounds activations to 8 bits in its matrix products, ternq computes in float32: logits are
close, not equal. With ``--float32`` llama.cpp gets a copy of each file with the same values in
float32, where it rounds nothing: what is left then is the file's own. Exit status 1 if tokens
differ or a perplexity is off by more.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NEW_TOKENS = 48
TOLERANCE = 0.01  # of the perplexity
TEXTS = (
    "def read_config(path):\n    return json.loads(path.read_text())\n",
    "The year 1969, 384400 km; pi is 3.14159... isn't it?",
    "  two spaces,\ttabs\n\n\nand  lines ",
    "Käse, naïve, 東京, привет, مرحبا, 👩‍🚀!",
    "it's we'll I'D you'RE <|endoftext|> end",
)
PROMPTS = (
    "def read_config(path):",
    "import os\n\nclass Reader:",
    "Once upon a time",
    "The result of the",
)


def worker() -> None:
    """In llama.cpp's Python: a job as JSON on stdin, the answers as JSON on stdout."""
    import llama_cpp
    import numpy as np

    job = json.load(sys.stdin)
    length = max(max(map(len, job["blocks"]), default=0), job["context"])
    model = llama_cpp.Llama(
        job["file"], n_ctx=length, n_batch=length, n_threads=2, logits_all=True, verbose=False
    )
    tokens = [
        model.tokenize(text.encode(), add_bos=True, special=True)
        for text in job["texts"] + job["prompts"]
    ]
    texts = []
    for prompt in tokens[len(job["texts"]) :]:
        model.reset()
        model.eval(prompt)
        made: list[int] = []
        while len(made) < job["new_tokens"]:
            made.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            if made[-1] == model.token_eos():
                break
            model.eval(made[-1:])
        texts.append(made)
    losses, last = [], []
    for block in job["blocks"]:
        model.reset()
        model.eval(block)
        last.append(model.scores[len(block) - 1].tolist())
        logits = model.scores[: len(block) - 1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        likely = logits[np.arange(len(block) - 1), block[1:]]
        losses.append(float(np.mean(np.log(np.exp(logits).sum(1)) - likely)))
    answer = {"version": llama_cpp.__version__, "tokens": tokens, "texts": texts}
    json.dump(answer | {"losses": losses, "last": last}, sys.stdout)


def compare(artefact: str, file: Path, llama: str, text: str, length: int, count: int) -> Any:
    """One pair; returns the row of the table."""
    import torch

    from ternq.hf import load
    from ternq.perplexity import block_losses
    from ternq.proof import dense

    loaded = load(artefact, dtype=torch.float32, offline=True)
    loaded.model.generation_config.max_length = None
    tokenizer, model = loaded.tokenizer, loaded.model
    dense(model)
    ids = tokenizer(text)["input_ids"]
    count = min(count, len(ids) // length)
    blocks = [ids[i * length : (i + 1) * length] for i in range(count)]
    own = {t: tokenizer(t)["input_ids"] for t in TEXTS + PROMPTS}
    job = {
        "file": str(file),
        "texts": TEXTS,
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "blocks": blocks,
        "context": max(map(len, own.values())) + NEW_TOKENS,
    }
    done = subprocess.run(
        [llama, "-P", __file__, "--worker"],  # -P: this file is no module there
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"llama.cpp failed on {file}:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    with torch.inference_mode():
        ours = float(block_losses(model, torch.tensor(blocks)).mean().exp())
        logits = torch.stack([model(torch.tensor([b])).logits[0, -1] for b in blocks])
    difference = (torch.tensor(answer["last"]) - logits).square().mean().sqrt() / logits.std()
    theirs = math.exp(sum(answer["losses"]) / len(answer["losses"]))
    pairs = zip(own.items(), answer["tokens"], strict=True)
    other = [{"text": t, "ternq": a, "llama.cpp": b} for (t, a), b in pairs if a != b]
    parted = [
        part
        for prompt, made in zip(PROMPTS, answer["texts"], strict=True)
        if (part := _parting(model, own[prompt], made)) is not None
    ]
    return {
        "artefact": artefact,
        "file": file.name,
        "bytes": file.stat().st_size,
        "llama_cpp_python": answer["version"],
        "texts": len(own),
        "other_tokens": other,
        "continuations": len(PROMPTS),
        "parted": parted,
        "logit_difference": float(difference),
        "blocks": [count, length],
        "perplexity": ours,
        "perplexity_llama_cpp": theirs,
        "ratio": theirs / ours,
        "ok": not other and abs(theirs / ours - 1) <= TOLERANCE,
    }


def float32_copy(file: Path, folder: Path) -> Path:
    """The same model with every tensor in float32."""
    import gguf

    from ternq.formats.gguf_file import Header
    from ternq.formats.gguf_layers import values

    header = Header(file)
    header.without_data(folder / "header.gguf")
    fields = gguf.GGUFReader(folder / "header.gguf").fields
    writer = gguf.GGUFWriter(folder / file.name, fields["general.architecture"].contents())
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name in header.tensors:
        writer.add_tensor(name, values(header, name).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / file.name


def _parting(model: Any, prompt: list[int], made: list[int]) -> dict[str, Any] | None:
    """Where a continuation leaves the likeliest one of ternq, and by how much that was likelier."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompt])
        ours = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(prompt) :].tolist()
        if ours == made:
            return None
        at = next((i for i, (a, b) in enumerate(zip(ours, made, strict=False)) if a != b), 0)
        logits = model(torch.tensor([prompt + ours[:at]])).logits[0, -1]
    gap = float(logits[ours[at]] - logits[made[at]])
    return {"token": at, "logit_gap": gap, "logit_deviation": float(logits.std())}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("pairs", nargs="*", metavar="ARTEFACT=FILE")
    parser.add_argument("--llama", default=sys.executable, help="the Python with llama-cpp-python")
    parser.add_argument("--text", type=Path, help="text whose perplexity is taken")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--float32", action="store_true", help="no 8-bit activations")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker()
    if not options.pairs or options.text is None:
        parser.error("ARTEFACT=FILE and --text are needed")
    text = options.text.read_text(encoding="utf-8")
    rows = []
    print(f"{'file':32} {'MB':>6} tokens  texts  perplexity  llama.cpp   ratio  logits")
    for pair in options.pairs:
        artefact, _, file = pair.rpartition("=")
        with tempfile.TemporaryDirectory() as folder:
            own = float32_copy(Path(file), Path(folder)) if options.float32 else Path(file)
            row = compare(artefact, own, options.llama, text, options.length, options.blocks)
        rows.append(row)
        alike = f"{row['texts'] - len(row['other_tokens'])}/{row['texts']}"
        same = f"{row['continuations'] - len(row['parted'])}/{row['continuations']}"
        print(
            f"{row['file']:32} {row['bytes'] / 1e6:6.2f} {alike:>6} {same:>6} "
            f"{row['perplexity']:11.4f} {row['perplexity_llama_cpp']:10.4f} {row['ratio']:7.5f} "
            f"{row['logit_difference']:7.4f}",
            flush=True,
        )
        for part in row["parted"]:
            print(f"    parts at token {part['token']}, logits differ by {part['logit_gap']:.3g}")
        for other in row["other_tokens"]:
            print(f"    other tokens: {other['text']!r}")
    result = {"python": platform.python_version(), "machine": platform.machine(), "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
