"""TriLM from scratch with each of Spectra's two interventions, and its dense counterpart FloatLM.

    python bench/from_scratch.py --out scratch.jsonl --steps 1500 --seeds 0 1 2
    python bench/from_scratch.py --out rates.jsonl --text dev --steps 300 --only both \\
        --lr 1.2e-3 2.4e-3 4.8e-3                      # a search for rates, on the development text

Architecture, tokenizer and texts are the demo's; the training is `ternq distill`'s. "rate": the
peak is lowered after half of the steps; "decay": weight decay ends after two thirds. Rates are
those of Spectra's smallest model (99M parameters) unless others are given; a second peak keeps
their proportion. Bits per byte and perplexity are of the text that --text names. A row that stands
in the file is not run again, and a training that was cut off goes on. Spectra's own ablation (arXiv
2407.12327 v5: 1.1B parameters, 100B tokens) is a mean accuracy over six tasks, in per cent, and
stands beside it.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ternq import data, distill, hf, outlines
from ternq.perplexity import token_perplexity
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe, Scheme, Training
from ternq.text import read_documents

LR, SECOND, FLOAT_LR = 2.4e-3, 1.5e-3, 4.0e-4
RATE, DECAY = "rate", "decay"
VARIANTS: dict[str, set[str]] = {
    "both": {RATE, DECAY},
    "only decay": {DECAY},
    "only rate": {RATE},
    "neither": set(),
    "float": set(),
}
SPECTRA = {"both": 50.2, "only decay": 50.1, "only rate": 49.7, "neither": 49.1}


def recipe(name: str, lr: float, seed: int, args: argparse.Namespace) -> Recipe:
    """The recipe of one run."""
    dense, interventions = name == "float", VARIANTS[name]
    training = Training(
        objective="ce",
        from_scratch=True,
        steps=args.steps,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        weight_decay=args.weight_decay,
        lr=lr,
        lr_second=lr * SECOND / LR if RATE in interventions else None,
        decay_until=2 / 3 if DECAY in interventions else 1.0,
        schedule="cosine" if dense else "linear",
    )
    scheme = Scheme(method="float" if dense else "absmean")
    return Recipe(model=DEMO, scheme=scheme, training=training, seed=seed)


def measured(run: Path, text: str) -> dict[str, float]:
    """Token perplexity and bits per byte of a run on one of the demo's texts."""
    loaded = hf.load(str(run))
    documents = list(read_documents(str(DEMO_FOLDER / f"{text}.jsonl.xz")))
    ids = torch.tensor([i for d in data.encode(documents, loaded.tokenizer) for i in d])
    length = outlines.max_length(loaded.model)
    perplexity = token_perplexity(loaded.model, ids, length)["token_perplexity"]
    size = sum(len(document.encode()) for document in documents)
    return {"perplexity": perplexity, "bits_per_byte": math.log2(perplexity) * len(ids) / size}


def table(rows: list[dict[str, Any]]) -> str:
    """A row of Markdown for every variant and rate: mean over seeds, and the range."""
    lines = ["| | peak rate | seeds | bits per byte | from, to | perplexity | Spectra's accuracy |"]
    lines += ["| --- | ---: | ---: | ---: | --- | ---: | ---: |"]
    for key in dict.fromkeys((r["name"], r["lr"], r["steps"], r["text"]) for r in rows):
        own = [r for r in rows if (r["name"], r["lr"], r["steps"], r["text"]) == key]
        bits = [r["bits_per_byte"] for r in own]
        lines.append(
            f"| {key[0]} | {key[1]:g} | {len(own)} | {mean(bits):.4f} | {min(bits):.4f}, "
            f"{max(bits):.4f} | {mean(r['perplexity'] for r in own):.2f} | "
            f"{SPECTRA.get(key[0], '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--lr", type=float, nargs="*", default=[LR], help="peak rates of TriLM")
    parser.add_argument("--float-lr", type=float, nargs="*", default=[FLOAT_LR])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--text", choices=("heldout", "dev"), default="heldout")
    args = parser.parse_args()
    settings = ("steps", "batch_size", "sequence_length", "weight_decay", "text")
    fixed = {name: getattr(args, name) for name in settings}
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    rows = [json.loads(line) for line in lines]
    asked = [
        {"name": name, "lr": lr, "seed": seed, **fixed}
        for seed in args.seeds
        for name in args.only
        for lr in (args.float_lr if name == "float" else args.lr)
    ]
    for one in asked:
        if any(all(row[key] == value for key, value in one.items()) for row in rows):
            continue
        run = args.out.with_suffix(".run")
        made = recipe(one["name"], one["lr"], one["seed"], args)
        # what is there of another recipe was cut off, and is begun anew; of this one, gone on with
        report = distill.distill(DEMO, run, made, overwrite=True, offline=True)
        row = one | measured(run, args.text)
        row |= {"training": report["training"], "bpw_linear": report["weights"]["bpw_linear"]}
        shutil.rmtree(run)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{one['name']:10} {one['lr']:g} {row['bits_per_byte']:.4f}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
