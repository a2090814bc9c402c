"""What each part of the method is worth: one thing changed at a time, on the demo or another model.

    python bench/ablation.py --out ablation.jsonl --seeds 0 1 2
    python bench/ablation.py --out ablation.jsonl --only "lr" "no shift"   # names that begin so
    python bench/ablation.py --out ablation.jsonl --table  # what stands there, of these settings

The judge is the development text, which neither the teacher nor any student was trained on; the
held-out text is left for the result. Variants are made by the demo's settings and one change. What
stands in the file already is not run again. With one seed the text comes in one order, whatever
the variant, so that variants are compared seed by seed.
"""

import argparse
import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from variants import (
    embeddings_learn,
    instead,
    last_feature,
    mean_scale,
    seq,
    seq_codes,
    seq_scale,
    squared_features,
    tequila_forward,
    threshold,
)

from ternq import corpus, data, hf, outlines
from ternq.calibrate import compensated_start
from ternq.corpus import HELD_OUT_TOKENS
from ternq.linear import prepare, ternary_layers
from ternq.perplexity import BLOCK, token_perplexity
from ternq.precision import products
from ternq.progress import ignore
from ternq.recipe import (
    DEMO,
    DEMO_FOLDER,
    Recipe,
    Scheme,
    Training,
    default_recipe,
    display_name,
    with_rate,
)
from ternq.text import read_documents
from ternq.train import Trainer

BASE = "as it is"
DROPPED = "shift dropped at the end"


@dataclass(frozen=True)
class Variant:
    """What is changed: of scheme, training and text, and what takes a function's place."""

    scheme: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    within: Any = nullcontext  # () -> a context
    text: str = "given"  # or the teacher's "own", or "both", a block of each in turn


def _instead(*args: Any, **options: Any) -> Any:
    return partial(instead, *args, **options)


def _trained(**settings: Any) -> Variant:
    return Variant(training=settings)


FINE = {"group_size": 64, "shift": False}  # as many bits as groups of 128 with a shift
SCALES = {"start": "compensated", "train": "scales"}
RECONSTRUCTED = {"start": "reconstructed", "lr": None}
VARIANTS = {
    BASE: Variant(),
    "no shift": Variant({"shift": False}),
    "group 64": Variant({"group_size": 64}),
    "group 64, no shift": Variant(FINE),
    "group 256": Variant({"group_size": 256}),
    "group: the row": Variant({"group_size": 640}),
    "threshold 0.5": Variant(within=_instead(threshold(0.5))),
    "threshold 0.9": Variant(within=_instead(threshold(0.9))),
    "threshold 0.7, centred": Variant(within=_instead(threshold(0.7, centred=True))),
    "gradient ttq": _trained(ste="ttq"),
    "gradient Tequila": Variant(within=_instead(forward=tequila_forward)),
    "gradient SEQ": Variant({"shift": False}, within=_instead(seq_codes, seq, fit=seq_scale)),
    "gradient SEQ, fitted start": Variant({"shift": False}, within=_instead(threshold(0.7), seq)),
    "features: none": _trained(off=0.0),
    "features: OFF 1": _trained(off=1.0),
    "features: OFF 30": _trained(off=30.0),
    "features: OFF, last block": Variant(within=_instead(features=last_feature)),
    "features: squared error": Variant(within=_instead(features=squared_features)),
    "features: squared error, weight 1": Variant(
        training={"off": 1.0}, within=_instead(features=squared_features)
    ),
    "logits: none": _trained(kl=0.0),
    "logits: KL and CE 0.5": _trained(ce=0.5),
    "logits: CE in place of KL": _trained(kl=0.0, ce=1.0),
    "text alone: CE, no teacher": _trained(kl=0.0, off=0.0, ce=1.0),
    "lr 3e-4": _trained(lr=3e-4),
    "lr 2e-3": _trained(lr=2e-3),
    "lr 4e-3": _trained(lr=4e-3),
    "scale lr 1e-4": _trained(scale_lr=1e-4),
    "scale lr 0": _trained(scale_lr=0.0),
    "scale lr 1e-2": _trained(scale_lr=1e-2),
    "embeddings 1e-4": Variant(within=partial(embeddings_learn, 1e-4)),
    "embeddings 1e-3": Variant(within=partial(embeddings_learn, 1e-3)),
    "first scale: mean |w|": Variant(within=_instead(fit=mean_scale)),
    "start compensated": _trained(start="compensated"),
    "start compensated, low-rank": _trained(start="compensated", train="low-rank"),
    "start compensated, scales": Variant(training=SCALES),
    "start compensated, scales, no shift": Variant({"shift": False}, SCALES),
    "start compensated, scales, features: none": _trained(**SCALES, off=0.0),
    "start compensated, scales, features: squared error": Variant(
        training=SCALES, within=_instead(features=squared_features)
    ),
    "start compensated, scales, logits: none": _trained(**SCALES, kl=0.0),
    "start compensated, scales, KL and CE 0.5": _trained(**SCALES, ce=0.5),
    "start compensated, scales, lr 3e-3": _trained(**SCALES, lr=3e-3),
    "start compensated, scales, embeddings 1e-4": Variant(
        training=SCALES, within=partial(embeddings_learn, 1e-4)
    ),
    "start compensated, no shift": Variant({"shift": False}, {"start": "compensated"}),
    "start compensated, group 64, no shift": Variant(FINE, {"start": "compensated"}),
    "start compensated, group 64, no shift, scales": Variant(FINE, SCALES),
    "start reconstructed": Variant(training=RECONSTRUCTED),
    "start reconstructed, lr 1e-3": Variant(training=RECONSTRUCTED | {"lr": 1e-3}),
    "start reconstructed, scales": Variant(training=RECONSTRUCTED | {"train": "scales"}),
    "text: the teacher's own": Variant(text="own"),
    "start compensated, scales, text: the teacher's own": Variant(training=SCALES, text="own"),
    "start compensated, scales, text: half the teacher's own": Variant(
        training=SCALES, text="both"
    ),
}


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    model: str
    teacher: hf.Loaded
    data: tuple[str, ...]  # the demo has its own
    training: Training
    seed: int
    others: tuple[str, ...] = ()  # texts unlike the training's, to judge by as well

    @functools.cached_property
    def dev(self) -> torch.Tensor:
        """The text to judge by: the demo's own, or what is held out of the training text."""
        if self.data:
            return self._split(self.data)[0].flatten()
        documents = list(read_documents(str(DEMO_FOLDER / "dev.jsonl.xz")))
        ids = [i for d in data.encode(documents, self.teacher.tokenizer) for i in d]
        return torch.tensor(ids)

    def _split(self, texts: tuple[str, ...]) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
        length = self.training.sequence_length
        return data.split_held_out(texts, self.teacher.tokenizer, length,
                                   HELD_OUT_TOKENS // length, seed=self.seed)  # fmt: skip

    def perplexity(self, model: Any, ids: torch.Tensor | None = None) -> float:
        """Of the development text, or of other ids."""
        length = min(BLOCK, outlines.max_length(self.teacher.model))
        ids = self.dev if ids is None else ids
        return float(token_perplexity(model, ids, length)["token_perplexity"])

    def elsewhere(self, model: Any) -> dict[str, float]:
        """Perplexities of the first tokens of each of the other texts."""
        return {"/".join(Path(text).parts[-2:]): self.perplexity(model, self._split((text,))[0])
                for text in self.others}  # fmt: skip

    def blocks(self, training: Training, text: str) -> Iterator[torch.Tensor]:
        """The training text: what is given, or the teacher's own, which needs none, or both."""
        if text == "both":
            pairs = zip(self.blocks(training, "own"), self.blocks(training, "given"), strict=True)
            return chain.from_iterable(pairs)
        if text == "own":
            recipe = Recipe(model=self.model, training=training, seed=self.seed)
            return corpus.corpus(self.teacher, recipe, (data.SELF,), offline=True,
                                 progress=ignore, cache=None).blocks  # fmt: skip
        if self.data:
            return self._split(self.data)[1]
        texts = data.mixed([str(DEMO_FOLDER / "train.jsonl.xz")], seed=self.seed)
        return data.blocks(texts, self.teacher.tokenizer, training.sequence_length)


def run(name: str, setting: Setting) -> dict[str, Any]:
    """Train one variant; perplexities of the development text, and seconds of training."""
    variant, seed = VARIANTS[name], setting.seed
    training = with_rate(replace(setting.training, **variant.training), ternary=False)
    within: AbstractContextManager[None] = variant.within()
    with within, tempfile.TemporaryDirectory() as folder:
        student = copy.deepcopy(setting.teacher.model).requires_grad_(True)
        prepare(student, replace(Scheme(), **variant.scheme), training.ste)
        began, blocks = time.monotonic(), setting.blocks(training, variant.text)
        if training.calibrated:
            ids = torch.stack(list(islice(blocks, training.calibration)))
            compensated_start(student, ids, seed=seed, autocast=products(training, ids.device),
                              reconstruction=training if training.passes else None)  # fmt: skip
        untrained = setting.perplexity(student)
        trainer = Trainer(student=student, teacher=setting.teacher.model, blocks=blocks,
                          settings=training, steps=training.steps or 0, folder=Path(folder),
                          progress=ignore, seed=seed)  # fmt: skip
        if trainer.steps:
            trainer.run()
        trained = setting.perplexity(student) if trainer.steps else untrained
        found: dict[str, Any] = {"untrained": untrained, "student": trained}
        found["seconds"] = round(time.monotonic() - began, 1)
        found |= {"others": setting.elsewhere(student)} if setting.others else {}
        if name == BASE:
            for layer in ternary_layers(student).values():
                layer.weight_shift = None
            found[DROPPED] = setting.perplexity(student)
    return found


def table(lines: list[dict[str, Any]], compared: str) -> str:
    """Markdown: the mean over seeds, and the difference to one variant, seed by seed."""
    names = [*VARIANTS, DROPPED]
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    others: dict[str, list[float]] = {}
    for line in lines:
        found[line["name"]][line["seed"]] = line["student"]
        if "others" in line:
            mean = statistics.geometric_mean(line["others"].values())
            others.setdefault(line["name"], []).append(mean)
        if DROPPED in line:
            found[DROPPED][line["seed"]] = line[DROPPED]
    base = found[compared]
    heads = ["changed", "seeds", "development perplexity", "difference, %", "from, to"]
    heads += ["other texts, geometric mean"] if others else []
    text = ["| " + " | ".join(heads) + " |", "| --- | ---: | ---: | ---: | --- |"]
    text[1] += " ---: |" if others else ""
    for name in names:
        own = found[name]
        if not own:
            continue
        cells = [name.replace("|", "\\|"), str(len(own)), f"{statistics.mean(own.values()):.2f}"]
        off = [100 * (own[seed] / base[seed] - 1) for seed in own if seed in base]
        if name == compared:
            spread = (f"{v:.2f}" for v in (min(own.values()), max(own.values())))
            cells += ["", f"{', '.join(spread)} (perplexity)"]
        elif off:
            cells += [f"{statistics.mean(off):+.1f}", f"{min(off):+.1f}, {max(off):+.1f}"]
        else:
            cells += ["", ""]
        if others:
            cells.append(f"{statistics.mean(others[name]):.2f}" if name in others else "")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run")
    parser.add_argument("--only", nargs="+", default=[""], help="Variants whose names begin so.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--calibration", type=int, default=64, help="Blocks for a start.")
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--data", nargs="+", default=[], help="Text, for another than the demo.")
    parser.add_argument("--others", nargs="+", default=[],
                        help="Texts unlike it, to measure on; want their own --out.")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="Print it, and run nothing.")
    parser.add_argument("--base", default=BASE, help="The variant that others are compared with.")
    args = parser.parse_args()
    about = {"model": display_name(args.model), "steps": args.steps,
             "calibration": args.calibration}  # fmt: skip
    if args.table:
        lines = map(json.loads, args.out.read_text().splitlines())
        print(table([line for line in lines if about.items() <= line.items()], args.base))
        return
    teacher = hf.load(args.model, offline=True)
    teacher.model.requires_grad_(False)
    training = replace(default_recipe(DEMO).training, lr=1e-3, steps=args.steps,
                       calibration=args.calibration)  # fmt: skip
    for seed in args.seeds:
        setting = Setting(args.model, teacher, tuple(args.data), training, seed,
                          tuple(args.others))  # fmt: skip
        full: dict[str, Any] = {"teacher": setting.perplexity(teacher.model)}
        if setting.others:
            full["teacher_others"] = setting.elsewhere(teacher.model)
        for name in VARIANTS:
            key = about | {"seed": seed, "name": name}
            if name.startswith(tuple(args.only)) and not _stands(args.out, key):
                line = key | full | run(name, setting)
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{name:34} {seed} {line['student']:9.3f}  ({line['seconds']} s)", flush=True)


def _stands(path: Path, key: dict[str, Any]) -> bool:
    lines = path.read_text().splitlines() if path.exists() else []
    return any(key.items() <= json.loads(line).items() for line in lines)


if __name__ == "__main__":
    main()
