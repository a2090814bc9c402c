"""What each part of the method is worth, on the demo model: one change at a time.

    python bench/ablation.py --out ablation.jsonl            # every variant, about a minute each
    python bench/ablation.py --out ablation.jsonl --only lr  # those whose name begins with "lr"

The judge is the development text, which neither the teacher nor any student was trained on; the
held-out text is left for the result. A variant that stands in the file already is not run again.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ternq import data, hf, outlines
from ternq.linear import prepare
from ternq.perplexity import token_perplexity
from ternq.progress import ignore
from ternq.recipe import DEMO, DEMO_FOLDER, Scheme, Training
from ternq.train import Trainer

BASE = Training(steps=100, batch_size=8, sequence_length=256, lr=1e-3, off=1.0)

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "lr 3e-4": ({}, {"lr": 3e-4}),
    "lr 2e-3": ({}, {"lr": 2e-3}),
    "lr 4e-3": ({}, {"lr": 4e-3}),
    "scale_lr 1e-4": ({}, {"scale_lr": 1e-4}),
    "scale_lr 0": ({}, {"scale_lr": 0.0}),
    "ste ttq": ({}, {"ste": "ttq"}),
    "no shift": ({"shift": False}, {}),
    "off 0": ({}, {"off": 0.0}),
    "off 4": ({}, {"off": 4.0}),
    "off 10": ({}, {"off": 10.0}),
    "off only": ({}, {"kl": 0.0}),
    "ce 0.5": ({}, {"ce": 0.5}),
    "ce only": ({}, {"kl": 0.0, "off": 0.0, "ce": 1.0}),
    "group 64": ({"group_size": 64}, {}),
    "group 256": ({"group_size": 256}, {}),
    "batch 4 x 200 steps": ({}, {"batch_size": 4, "steps": 200}),
    "batch 4 x 300 steps, off 4": ({}, {"batch_size": 4, "steps": 300, "off": 4.0}),
    "batch 4 x 300 steps, off 10": ({}, {"batch_size": 4, "steps": 300, "off": 10.0}),
}


def run(name: str, teacher: hf.Loaded, dev: torch.Tensor, base: Training, seed: int) -> dict:
    """Train one variant; its perplexity on the development text before and after."""
    scheme, settings = VARIANTS[name]
    training = replace(base, **settings)
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    prepare(student, replace(Scheme(), **scheme), training.ste)
    length = outlines.max_length(student)
    untrained = token_perplexity(student, dev, length)["token_perplexity"]
    texts = data.mixed([str(DEMO_FOLDER / "train.jsonl.xz")], seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            student=student,
            teacher=teacher.model,
            blocks=data.blocks(texts, teacher.tokenizer, training.sequence_length),
            settings=training,
            steps=training.steps or 0,
            folder=Path(folder),
            progress=ignore,
        )
        began = time.monotonic()
        trainer.run()
        seconds = time.monotonic() - began
    after = token_perplexity(student, dev, length)["token_perplexity"]
    return {"name": name, "seed": seed, "untrained": untrained, "student": after,
            "seconds": round(seconds, 1), "steps": training.steps,
            "tokens": training.steps * training.batch_size * training.sequence_length}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a variant")
    parser.add_argument("--only", default="", help="variants whose name begins so")
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--lr", type=float, default=BASE.lr)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(r["name"], r["seed"], r["base_lr"], r["base_steps"]) for r in map(json.loads, lines)}
    teacher = hf.load(DEMO)
    teacher.model.requires_grad_(False)
    documents = list(data.read_documents(str(DEMO_FOLDER / "dev.jsonl.xz")))
    dev = torch.tensor([i for d in data.encode(documents, teacher.tokenizer) for i in d])
    full = token_perplexity(teacher.model, dev, outlines.max_length(teacher.model))[
        "token_perplexity"
    ]
    base = replace(BASE, steps=args.steps, lr=args.lr)
    for name in VARIANTS:
        if not name.startswith(args.only) or (name, args.seed, args.lr, args.steps) in done:
            continue
        record = run(name, teacher, dev, base, args.seed)
        record |= {"teacher": full, "base_lr": args.lr, "base_steps": args.steps}
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name:22} {record['student']:9.3f}  ({record['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
