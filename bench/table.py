"""The table of evidence: a model as it is, by every baseline, and ternary at rising budgets.

    python bench/table.py MODEL --data TEXT --data-dir DIR --work WORK --results table.jsonl

One row after another is made by ternq's own commands, and its token perplexity is taken on
WikiText-2's test set and on C4 (what of them lies in DIR, laid out as the hub). Rows are kept in a
JSON-lines file by their settings: a stopped table goes on, and what stands there is not measured
again. Models stay in WORK. TEXT is for calibration and training, and must not be what is measured
on, nor Wikipedia; its first documents are held out by ternq, for choosing hyper-parameters.
``--zero-shot piqa,arc_easy`` adds lm-eval's tasks for the rows that stand for others. The table is
printed as Markdown, and written with ``--markdown``.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ternq
from ternq import hf, origin, outlines
from ternq.data import SELF, parse_mix
from ternq.evaluate import evaluate
from ternq.files import sha256
from ternq.perplexity import BLOCK, token_perplexity
from ternq.recipe import NOT_TERNARY, display_name
from ternq.tasks import Job, load_jobs

KEEP = ["--keep-dtype"]  # of a float32 checkpoint: what is not ternary is not rounded
TEXTS = {"wikitext": "WikiText-2", "c4": "C4"}
FULL, W2A16 = "full precision", "GPTQ, 2 bits (W2A16)"
FITTED = "GPTQ, 2 bits (W2A16), fitted grid"
UNTRAINED = "DLT, reconstructed start"
BASELINES = {
    "RTN, 2 bits": ["--method", "rtn", "--bits", "2"],
    "RTN, 3 bits": ["--method", "rtn", "--bits", "3"],
    "RTN, 4 bits": ["--method", "rtn", "--bits", "4"],
    W2A16: ["--method", "gptq", "--bits", "2"],
    FITTED: ["--method", "gptq", "--bits", "2", "--grid", "fit"],
    "GPTQ, 2 bits, shrunk grid": ["--method", "gptq", "--bits", "2", "--grid", "mse"],
    "GPTQ, 3 bits": ["--method", "gptq", "--bits", "3"],
    "GPTQ, 4 bits": ["--method", "gptq", "--bits", "4"],
    "GPTQ, 8 bits": ["--method", "gptq", "--bits", "8"],
    "QuantLM, 3 bits (GPTQ, symmetric)": ["--method", "gptq", "--bits", "3", "--symmetric"],
    "QuantLM, 4 bits (GPTQ, symmetric)": ["--method", "gptq", "--bits", "4", "--symmetric"],
    "BiLLM": ["--method", "billm"],
    "absmean (BitNet b1.58, TriLM)": ["--method", "absmean"],
    "TWN": ["--method", "twn"],
    "PT2-LLM": ["--method", "pt2"],
    "DLT, closed-form start": ["--tokens", "0", "--start", "closed-form"],
    "DLT, compensated start": ["--tokens", "0", "--start", "compensated"],
}


@dataclass(frozen=True)
class Row:
    """A model of the table: the commands that make it (none: the model itself), and where."""

    name: str
    commands: tuple[list[str], ...] = ()
    out: Path | None = None
    tokens: int = 0
    after: "Row | None" = None  # the one whose run it goes on from

    @property
    def key(self) -> list[Any]:
        """The settings that it is known by, whatever the folders are called."""
        return [self.name, [[_short(part) for part in c] for c in self.commands]]


def _short(part: str) -> str:
    return "/".join(Path(part).parts[-2:]) if Path(part).is_absolute() else part


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Every row, the cheap ones first."""
    yield Row(FULL)
    text = [*(part for text in args.data for part in ("--data", text)),
            "--offline", "--json", "-q", "--device", args.device]  # fmt: skip
    usual = [*text, "--calibration", str(args.calibration)]
    group = ["--group-size", str(args.group_size)]
    for name, options in BASELINES.items():
        dense = any(method in options for method in NOT_TERNARY)
        size = [] if "absmean" in options else group
        own = [*usual, *size, *options, *([] if dense else KEEP)]
        out = _place(args, name, own)
        yield Row(name, (["ternarize", args.model, "-o", str(out), *own],), out)
    options = ["--tokens", "0", "--start", "reconstructed",
               "--reconstruction-epochs", str(args.epochs)]  # fmt: skip
    out = _place(args, UNTRAINED, [*usual, *group, *options])
    run = str(out.with_name(out.name + "-run"))  # it keeps the latent weights, for what goes on
    making = ["distill", args.model, "-o", run, *usual, *group, *options]
    packing = ["pack", run, "-o", str(out), "--offline", "--json", "-q", *KEEP]
    untrained = Row(UNTRAINED, (making, packing), out)
    yield untrained
    for tokens in args.budgets:
        options = [*text, *KEEP, "--tokens", str(tokens), *args.training.split()]
        name = f"DLT + OFF, {tokens:,} tokens"
        out = _place(args, name, [run, *options])
        command = ["ternarize", run, "-o", str(out), *options]
        yield Row(name, (command,), out, tokens, untrained)


def _place(args: argparse.Namespace, name: str, options: list[str]) -> Path:
    said = json.dumps([args.inputs, [_short(part) for part in options]]).encode()
    short = "".join(c if c.isalnum() else "-" for c in name.lower())
    return Path(args.work / f"{short}-{hashlib.sha256(said).hexdigest()[:8]}")


def make(row: Row) -> float:
    """Run the commands of a row, or go on with them; seconds that they took, over all tries."""
    if row.out is None:
        return 0.0
    earlier = make(row.after) if row.after else 0.0
    spent = row.out.with_name(row.out.name + ".seconds")
    before = float(spent.read_text()) if spent.exists() else 0.0
    if not row.out.exists():
        began = time.monotonic()
        for command in row.commands:
            done = subprocess.run([sys.executable, "-m", "ternq", *command],
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
            spent.write_text(str(before + time.monotonic() - began))
            if done.returncode:
                raise RuntimeError(f"{row.name}: {json.loads(done.stdout)['error']}")
    return float(spent.read_text()) + earlier


def perplexities(model: str, jobs: list[Job], args: argparse.Namespace) -> dict[str, Any]:
    """Token perplexity of every text, of all its blocks or the first of them."""
    dtype = getattr(torch, args.dtype)
    loaded = hf.load(model, device=args.device, dtype=dtype, offline=True)
    length = min(BLOCK, outlines.max_length(loaded.model))
    found = {}
    for job in jobs:
        assert job.text is not None, "the token perplexity was asked for"
        ids = job.text.ids(loaded.tokenizer, length)
        whole = len(ids) // length
        ids = ids[: args.blocks * length] if args.blocks else ids
        measured = token_perplexity(loaded.model, ids, length)
        partial = job.text.partial or measured["blocks"] < whole
        found[job.name] = measured | {"partial": partial}
    return found


def weights_of(row: Row) -> dict[str, Any]:
    """What a row weighs, by its manifest; a dense model has 16 bits."""
    if row.out is None:
        return {"bpw_linear": 16.0}
    manifest = next(row.out.glob("ternq*.json"))
    return dict(json.loads(manifest.read_text())["weights"])


def measured(row: Row, jobs: list[Job], args: argparse.Namespace) -> dict[str, Any]:
    """A line of the file."""
    seconds = make(row)
    model = args.model if row.out is None else str(row.out)
    return {
        "kind": "perplexity",
        "name": row.name,
        "key": row.key,
        "inputs": args.inputs,
        "blocks": args.blocks,
        "dtype": args.dtype,
        "results": perplexities(model, jobs, args),
        "bpw_linear": weights_of(row)["bpw_linear"],
        "tokens": row.tokens,
        "minutes": round(seconds / 60, 1),
        "calibration": [args.calibration, 256],
        "data": [_short(text) for text in args.data],
        "version": ternq.__version__,
        "torch": torch.__version__,
    }


def zero_shot(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The same for lm-eval's tasks, each with its metrics and standard errors."""
    make(row)
    model = args.model if row.out is None else str(row.out)
    tasks = tuple(args.zero_shot.split(","))
    found = evaluate([model], tasks=tasks, limit=args.limit, data_dir=args.data_dir,
                     device=args.device, dtype=getattr(torch, args.dtype),
                     offline=True)  # fmt: skip
    return {"kind": "zero-shot", "name": row.name, "key": row.key, "inputs": args.inputs,
            "blocks": [args.zero_shot, args.limit], "dtype": args.dtype,
            "results": found["results"][model]}  # fmt: skip


def kept(args: argparse.Namespace, kind: str, row: Row) -> dict[str, Any] | None:
    """The line of the file that stands for a row."""
    blocks = args.blocks if kind == "perplexity" else [args.zero_shot, args.limit]
    same = {"kind": kind, "key": row.key, "inputs": args.inputs, "blocks": blocks,
            "dtype": args.dtype}  # fmt: skip
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    found = [line for line in map(json.loads, lines) if same.items() <= line.items()]
    return found[-1] if found else None


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown; the ratio is to the first row's."""
    head = ["", "bits a weight", "tokens", "minutes", *(f"{t}, x full" for t in TEXTS.values())]
    text = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    base = next((line["results"] for line in lines if line["name"] == FULL), None)
    for line in lines:
        cells = [line["name"], f"{line['bpw_linear']:.3f}", f"{line['tokens']:,}",
                 f"{line['minutes']:g}"]  # fmt: skip
        for name in TEXTS:
            own = line["results"].get(name)
            if own is None:
                cells.append("–")
                continue
            value = own["token_perplexity"]
            ratio = f", {value / base[name]['token_perplexity']:.2f}" if base else ""
            cut = f" ({own['blocks']} blocks)" if own["partial"] else ""
            cells.append((f"{value:,.2f}" if value < 1e5 else f"{value:.1e}") + ratio + cut)
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    args = _arguments()
    jobs = load_jobs([f"{name}:token_perplexity" for name in TEXTS], args.data_dir, True)
    lines, failed = [], []
    for row in rows(args):
        if args.only and not any(part in row.name for part in args.only):
            continue
        try:
            line = kept(args, "perplexity", row)
            if line is None:
                line = measured(row, jobs, args)
                _append(args.results, line)
            lines.append(line)
            standing = row.name in (FULL, W2A16, FITTED, UNTRAINED) or row.tokens
            if args.zero_shot and standing and kept(args, "zero-shot", row) is None:
                _append(args.results, zero_shot(row, args))
        except RuntimeError as error:
            failed.append(str(error))
            print(error, file=sys.stderr)
            continue
        print(f"{row.name}: {line['results']}", file=sys.stderr, flush=True)
    text = table(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if failed:
        raise SystemExit(f"{len(failed)} rows failed.")


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True,
                        help="Text to learn from: FILE, self; NAME=WEIGHT.")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, required=True, help="What is measured on.")
    parser.add_argument("--work", type=Path, required=True, help="Where models are kept.")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines.")
    parser.add_argument("--markdown", type=Path, help="Where to write the table.")
    parser.add_argument("--only", action="append", help="Rows whose name has this (repeatable).")
    parser.add_argument("--blocks", type=int, help="Of each text, the first so many; partial.")
    parser.add_argument("--calibration", type=int, default=128, help="Blocks of 256 tokens.")
    parser.add_argument("--epochs", type=int, default=5, help="Of the reconstructed start.")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--budgets", type=int, nargs="*", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--training", default="", help="More options of the trained rows.")
    parser.add_argument("--zero-shot", help="Tasks of lm-eval, with commas.")
    parser.add_argument("--limit", type=int, help="Documents of each; partial.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="In which rows are measured.")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    path = origin.local_path(args.model)
    files = sorted(path.glob("*.safetensors")) if path and path.is_dir() else [path]
    hashes = [sha256(file) for file in files if file]
    texts = [name for name, _ in parse_mix(args.data)]
    data = [name if name == SELF else sha256(Path(name)) for name in texts]
    args.inputs = {"model": display_name(args.model), "sha256": hashes, "data": data}
    return args


if __name__ == "__main__":
    main()
