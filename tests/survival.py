"""Kill runs at every sort of moment, go on with them, and compare with one never interrupted.

``python tests/survival.py VERB WAY [COUNT]`` imports everything once and forks a child for every
command line, so that hundreds of runs take minutes. It prints what it did as JSON, and fails at
the first difference. WAY is how a run is disturbed:

- ``kill``: SIGKILL at a random instant, from before the folder exists to after the end;
- ``point``: SIGKILL just before or after the n-th change of the file system, n drawn at random;
- ``full``: from the n-th change on the disk is full, for every n there is;
- ``limit``: no file may be larger than a size (RLIMIT_FSIZE), which stops what safetensors writes;
- ``term``, ``int``: SIGTERM or Ctrl-C at a random instant.
"""

import builtins
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import torch

from ternq import checkpoint, cli, corpus, origin

STEPS = 5
CHANGES = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")
DISTURBED = {  # exit statuses that a disturbed command may have; negative ones are signals
    "kill": {0, -signal.SIGKILL},
    "point": {0, -signal.SIGKILL},
    "full": {0, 4},
    "limit": {0, 4},
    "term": {0, 75, -signal.SIGTERM},
    "int": {0, 130},
}
SECONDS = {"seconds", "tokens_per_second"}  # what two equal runs need not have in common


class Runs:
    """One command line on a tiny model, and what it must come to."""

    def __init__(self, folder: Path, verb: str, start: str = "closed-form") -> None:
        self.folder, self.verb = folder, verb
        self.out = folder / "out"
        self.log = folder / "log"
        model = checkpoints.folder(folder / "model")
        text = checkpoints.text_file(folder / "text.jsonl")
        settings = {
            "steps": STEPS, "data": text, "start": start, "calibration": 4, "group-size": 16,
            "batch-size": 2, "sequence-length": 16, "checkpoint-minutes": 0, "device": "cpu",
        }  # fmt: skip
        options = [f"--{name}={value}" for name, value in settings.items()]
        self.command = [verb, str(model), "-o", str(self.out), "--no-progress", *options]
        self.counts: Counter[str] = Counter()
        began = time.monotonic()
        assert self.begin()() == 0, self.log.read_text()
        self.duration = time.monotonic() - began
        self.expected = self.outcome()
        self.clear()

    def begin(self, before: Callable[[], Any] = lambda: None) -> "Child":
        """The command in a process of its own, which first calls ``before``."""
        self.counts["commands"] += 1
        return Child(self.command, self.log, before)

    def outcome(self) -> dict[str, Any]:
        """What a finished run left: bits of weights, metrics, perplexities."""
        folder = self.out.with_name("out.report") if self.verb == "ternarize" else self.out
        weights = checkpoint.TENSORS if self.verb == "ternarize" else origin.STUDENT_FILE
        report = json.loads((folder / "report.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            "weights": checkpoints.contents(self.out)[weights],
            "metrics": [{k: v for k, v in line.items() if k not in SECONDS} for line in lines],
            "perplexities": [report[who] for who in ("teacher", "untrained", "student")],
            "losses": {k: v for k, v in report["training"].items() if k not in SECONDS},
        }

    def check(self) -> None:
        """Nothing is lost, nothing is left, and the next run begins anew."""
        found = self.outcome()
        for part, value in self.expected.items():
            assert found[part] == value, f"{part}: {found[part]}, not {value}"
        names = {path.name for path in self.folder.iterdir()}
        assert names <= {"model", "text.jsonl", "log", "out", "out.report"}, names
        assert not list(self.out.rglob("*.part")) + list(self.out.rglob(".*")), self.out
        self.counts["finished"] += 1
        self.clear()

    def clear(self) -> None:
        """Remove every output."""
        for path in self.folder.glob("out*"):
            shutil.rmtree(path)

    def disturb(self, way: str, rng: random.Random, count: int) -> None:
        """Disturb so many commands, each run until it is finished."""
        while self.counts[way] < count:
            if self.once(way, rng) == 0:
                self.check()
        while self.begin()() != 0:
            raise AssertionError(self.log.read_text())
        self.check()

    def once(self, way: str, rng: random.Random) -> int:
        """One command, disturbed at a moment drawn at random; its exit status."""
        if way in ("point", "limit"):
            n, after = rng.randrange(25 * STEPS), rng.random() < 0.5
            size = int(10 ** rng.uniform(1, 6))
            before = {"point": lambda: at_change(n, kill, after), "limit": lambda: limit(size)}[way]
            status = self.begin(before)()
        else:
            number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[way]
            status = self.begin()(rng.uniform(0, 1.1 * self.duration), number)
        self.counts[way] += status != 0
        self.counts[f"status {status}"] += 1
        assert status in DISTURBED[way], f"{way}: {status}\n{self.log.read_text()}"
        return status

    def fill(self) -> None:
        """A full disk from every change on in turn; each run then goes on with room."""
        n, status = 0, 4
        while status:
            status = self.begin(lambda at=n: at_change(at, full))()
            assert status in DISTURBED["full"], f"change {n}: {status}\n{self.log.read_text()}"
            self.counts["full"] += status != 0
            if status:
                assert self.begin()() == 0, f"after change {n}\n{self.log.read_text()}"
            self.check()
            n += 1


class Child:
    """A forked process that runs one command line."""

    def __init__(self, command: list[str], log: Path, before: Callable[[], Any]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        status: Any = 99  # of an end that nobody foresaw
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(handle, stream)
            before()
            sys.argv = ["ternq", *command]
            cli.main()
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:  # before or after the command's own handler, as Python has it
            status = 130
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    def __call__(self, seconds: float | None = None, number: int = signal.SIGKILL) -> int:
        """The exit status, after a signal if the process is still there by then."""
        end = time.monotonic() + (seconds or 0.0)
        while seconds is not None and time.monotonic() < end:
            if (status := self._ended()) is not None:
                return status
            time.sleep(0.001)
        if seconds is not None:
            os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _ended(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def kill() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """What a full disk says."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit(size: int) -> None:
    """No file of this process may grow larger; a write that would says so."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def at_change(n: int, act: Callable[[], None], after: bool = False) -> None:
    """Act at the n-th change of the file system; a disk that is full then stays so."""
    seen = iter(range(10**9))
    making = ("mkdir", "replace", "rename") if act is full else CHANGES

    def hooked(function: Any, counts: Callable[..., bool] = lambda *_: True) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            at = next(seen) if counts(*arguments) else -1
            due = at == n or (act is full and at > n)
            if due and not after:
                act()
            result = function(*arguments, **options)
            if due and after:
                act()
            return result

        return call

    def written(path: Any, mode: str = "r", *_: Any) -> bool:
        return not isinstance(path, int) and set(mode) & set("wax+") != set()

    for name in making:
        setattr(os, name, hooked(getattr(os, name)))
    io.open = builtins.open = hooked(io.open, written)
    checkpoint.save_file = hooked(checkpoint.save_file)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder to work in; in memory where that can be, since every checkpoint is synced."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        yield Path(name)


def main(verb: str, way: str, count: str = "25", start: str = "closed-form") -> None:
    """Disturb ``count`` commands and say what came of it."""
    torch.set_num_threads(1)
    corpus.HELD_OUT_TOKENS = 256
    began = time.monotonic()
    with workplace() as folder:
        runs = Runs(folder, verb, start)
        if way == "full":
            runs.fill()
        else:
            runs.disturb(way, random.Random(0), int(count))
    print(json.dumps({**runs.counts, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    main(*sys.argv[1:])
