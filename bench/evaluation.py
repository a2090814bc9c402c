"""`ternq eval` against lm-eval's own command: the same numbers, to the last digit, and the time.

    python bench/evaluation.py MODEL --data-dir DATA --tasks piqa --limit 200 --batch-size 8

runs both commands in turn, whole processes, on one model folder, with the same data, batch size,
type of weights and longest window, and prints the shortest and the median wall time of each and the
ratio of the medians. DATA is laid out as the hub; lm-eval runs with it as its working directory,
where the bare ids of datasets resolve to its folders. A ``.gguf`` MODEL is saved as a folder first.

Runs that are not counted come first. They fill the caches of files and datasets, and their scores
are compared: every metric of lm-eval, and standard errors but those that it draws at random; exit
status 1 if one differs. lm-eval runs once for each task there: given several it mixes their texts
in one batch, as ternq does not, and the last digits depend on what shares a batch. Of wikitext the
timed runs take lm-eval's part alone, without ternq's token perplexity. Processor time, of all
threads, is printed beside the wall time; ``--json`` prints one object instead.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 2048  # tokens of a window of ternq's
ALONE = {"wikitext": "wikitext:word_perplexity"}  # lm-eval's part
DRAWN = {"perplexity", "median", "matthews_corrcoef", "f1", "bleu", "chrf", "ter"}
Scores = dict[str, dict[str, float]]


class Seconds(NamedTuple):
    wall: float
    processor: float


class Commands:
    """Both command lines on the same model and data, with caches of their own."""

    def __init__(self, asked: argparse.Namespace, model: Path, scratch: Path) -> None:
        self.asked, self.model, self.scratch = asked, model, scratch
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(scratch / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.length = min(LONGEST, config.get("max_position_embeddings", LONGEST))
        self.common = ["--batch_size", str(asked.batch_size), "--device", asked.device]
        self.common += ["--limit", str(asked.limit)] if asked.limit else []

    def ternq(self, tasks: list[str]) -> tuple[Seconds, Scores]:
        """Seconds and scores of `ternq eval`."""
        command = [sys.executable, "-m", "ternq", "eval", str(self.model), "--json", "-q"]
        command += ["--no-cache", "--offline", "--data-dir", str(self.asked.data_dir)]
        command += ["--tasks", ",".join(tasks), "--dtype", self.asked.dtype]
        command += [part.replace("_", "-") for part in self.common]
        seconds, printed = self._run(command, self.scratch)
        (found,) = json.loads(printed)["results"].values()
        return seconds, found

    def lm_eval(self, tasks: list[str]) -> tuple[Seconds, Scores]:
        """Seconds and scores of `lm_eval`."""
        model = f"pretrained={self.model},dtype={self.asked.dtype},max_length={self.length}"
        out = self.scratch / "lm_eval.json"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model]
        command += ["--tasks", ",".join(tasks), *self.common, "--output_path", str(out)]
        seconds, _ = self._run(command, self.asked.data_dir)
        (written,) = self.scratch.glob("lm_eval_*.json")  # it adds the time to the name
        found = json.loads(written.read_text(encoding="utf-8"))["results"]
        written.unlink()
        return seconds, {task: _plain(values) for task, values in found.items()}

    def _run(self, command: list[str], folder: Path) -> tuple[Seconds, str]:
        began, used = time.monotonic(), _processor_seconds()
        done = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True
        )
        seconds = Seconds(time.monotonic() - began, _processor_seconds() - used)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return seconds, done.stdout


def _processor_seconds() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; numbers only."""
    pairs = {key.removesuffix(",none"): value for key, value in values.items() if "," in key}
    return {key: float(value) for key, value in pairs.items() if isinstance(value, int | float)}


def differences(ternq: Scores, lm_eval: Scores) -> tuple[int, list[str]]:
    """How many numbers were compared, and those that are not equal."""
    compared, found = 0, []
    for task, values in lm_eval.items():
        for metric, theirs in values.items():
            if metric.removesuffix("_stderr") in DRAWN and metric.endswith("_stderr"):
                continue
            ours = ternq.get(task, {}).get(metric, math.nan)
            compared += 1
            if ours != theirs:
                found.append(f"{task} {metric}: ternq {ours!r}, lm-eval {theirs!r}")
    return compared, found


def folder_of(model: str, scratch: Path) -> Path:
    """The model as a folder that both read."""
    from ternq.hf import load
    from ternq.origin import local_path

    path = local_path(model)
    if path is None:
        sys.exit(f"There is no folder '{model}'.")
    if path.suffix != ".gguf":
        return path.resolve()
    loaded = load(str(path), offline=True)
    loaded.model.hf_quantizer = None  # it is dense now, and would not be saved otherwise
    loaded.model.config.__dict__.pop("quantization_config", None)
    loaded.model.save_pretrained(scratch / "model")
    loaded.tokenizer.save_pretrained(scratch / "model")
    return scratch / "model"


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Compare, then time both in turn; who goes first changes."""
    commands = Commands(asked, folder_of(asked.model, scratch), scratch)
    tasks = asked.tasks.split(",")
    _, ours = commands.ternq(tasks)
    theirs: Scores = {}
    for task in tasks:
        theirs |= commands.lm_eval([task])[1]
    compared, unequal = differences(ours, theirs)
    runs = {
        "ternq": lambda: commands.ternq([ALONE.get(task, task) for task in tasks]),
        "lm_eval": lambda: commands.lm_eval(tasks),
    }
    taken: dict[str, list[Seconds]] = {name: [] for name in runs}
    for repeat in range(asked.repeats):
        for name in sorted(runs, reverse=repeat % 2 == 0):
            taken[name].append(runs[name]()[0])
    found = {name: _summary(own) for name, own in taken.items()}
    ratio = found["ternq"]["wall_median"] / found["lm_eval"]["wall_median"]
    return {"compared": compared, "unequal": unequal, **found, "ratio": ratio, "scores": theirs}


def _summary(taken: list[Seconds]) -> dict[str, Any]:
    wall = [seconds.wall for seconds in taken]
    return {
        "wall_min": min(wall),
        "wall_median": statistics.median(wall),
        "wall": wall,
        "processor_median": statistics.median(seconds.processor for seconds in taken),
    }


def about(asked: argparse.Namespace) -> dict[str, Any]:
    """The settings and the machine."""
    import lm_eval
    import torch
    import transformers

    return {
        "model": Path(asked.model).name,
        "tasks": asked.tasks,
        "limit": asked.limit,
        "batch_size": asked.batch_size,
        "dtype": asked.dtype,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": lm_eval.__version__,
    }


def show(settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Settings, times and what differs, for people."""
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print("seconds      minimum   median   processor")
    for name in ("ternq", "lm_eval"):
        own = found[name]
        values = (own["wall_min"], own["wall_median"], own["processor_median"])
        print(f"{name:10} {values[0]:9.2f}{values[1]:9.2f}{values[2]:12.2f}")
    print(f"ratio of the medians {found['ratio']:.3f}")
    print(f"{found['compared']} numbers compared, {len(found['unequal'])} differ")
    for line in found["unequal"]:
        print(line)


def main() -> int:
    """Run, print; 1 if a number differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a folder, or a .gguf file")
    parser.add_argument("--data-dir", type=Path, required=True, help="laid out as the hub")
    parser.add_argument("--tasks", default="piqa,wikitext")
    parser.add_argument("--limit", type=int, help="documents of each task; all without")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asked.repeats = max(1, asked.repeats)
    asked.data_dir = asked.data_dir.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(asked, Path(scratch))
    if asked.json:
        print(json.dumps(about(asked) | found))
    else:
        show(about(asked), found)
    return 1 if found["unequal"] or not found["compared"] else 0


if __name__ == "__main__":
    sys.exit(main())
