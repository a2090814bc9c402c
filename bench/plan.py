"""How right ``--plan`` is: its memory and time beside those of the run that it plans.

    python bench/plan.py --steps 40 [MODEL ...] [--json FILE]

Each MODEL (a folder, a .gguf file, ``demo``; or a shape, HIDDENxMLPxBLOCKSxVOCABULARY, of which a
Llama with random weights is made) is planned and then made by `ternq ternarize`, in processes of
their own: peak is the largest resident size of the process, time its duration on the wall.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = ["160x416x4x8192", "320x832x8x16384", "448x1216x16x32768", "576x1536x30x49152"]


def main() -> None:
    """Plan and make every model; print a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--data", default=None, help="text; the demo's own if left out")
    parser.add_argument("--json", type=Path)
    given, options = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for model in given.models or ["demo", *SHAPES]:
            rows.append(row(model, given, options, Path(place)))
            print_row(rows[-1])
    found = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found |= {"steps": given.steps, "options": options, "rows": rows}
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def row(model: str, given: argparse.Namespace, options: list[str], place: Path) -> dict[str, Any]:
    """The plan of one model, and what became of it."""
    source = str(made(model, place)) if re.fullmatch(r"\d+x\d+x\d+x\d+", model) else model
    command = ["ternarize", source, "--steps", str(given.steps), *options]
    if source != "demo":
        command += ["--data", given.data or str(demo() / "train.jsonl.xz")]
    out = place / "out"
    plan = run([*command, "-o", str(out), "--plan"])["result"]
    done = run([*command, "-o", str(out)])
    shutil.rmtree(out)
    shutil.rmtree(out.with_name("out.report"))
    measured = {"peak": done["peak"], "seconds": done["seconds"]}
    planned = {"peak": plan["memory"]["peak"], "seconds": plan["seconds"]["total"]}
    training = {"planned": plan["training"]["seconds"]}
    training |= {"measured": done["result"]["training"]["seconds"]}
    parameters = plan["weights"]["parameters"]
    found = {"model": model, "parameters": parameters, "planned": planned, "measured": measured}
    return found | {"training": training, "parts": plan["seconds"]}


def print_row(found: dict[str, Any]) -> None:
    """One line: planned, measured, and by how much the plan is off."""
    parts = [f"{found['model']:24} {found['parameters'] / 1e6:6.1f} M"]
    for key, unit, scale in (("peak", "MB", 1e6), ("seconds", "s", 1.0)):
        a, b = found["planned"][key] / scale, found["measured"][key] / scale
        parts.append(f"{key}: {a:8,.0f} planned, {b:8,.0f} {unit} measured, {a / b - 1:+.1%}")
    print("   ".join(parts), flush=True)


def run(arguments: list[str]) -> dict[str, Any]:
    """A ternq command in a process of its own: its JSON, duration and largest resident size."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "ternq", *arguments, "--json", "-q"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        sys.exit(f"ternq {' '.join(arguments)} ended with status {status}: {text.decode()}")
    return {"result": json.loads(text), "seconds": seconds, "peak": usage.ru_maxrss * 1024}


def demo() -> Path:
    """The folder of the shipped model."""
    from ternq.recipe import DEMO_FOLDER

    return DEMO_FOLDER


def made(shape: str, place: Path) -> Path:
    """A Llama of a shape with random weights and the demo's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    hidden, mlp, blocks, vocabulary = map(int, shape.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    folder = place / shape
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo()).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
