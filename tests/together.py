"""What every process does in tests/test_processes.py: the same runs, of a tiny model, together.

    torchrun --standalone --nproc-per-node 2 tests/together.py FOLDER

``FOLDER/one`` is a run that one process stopped halfway.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from test_train import trainer

from ternq import checkpoint, origin, processes, states, stop
from ternq.errors import RecipeError, StoppedError
from ternq.files import write_json
from ternq.frozen import plain_state
from ternq.train import Trainer

SETTINGS: dict[str, Any] = {"batch_size": 6, "micro_batch_size": 2, "clip": 1.0}
KIND = "llama-tied-bias"


def finish(made: Trainer) -> None:
    """Train to the end; the main process keeps the student, as `ternq.distill` does."""
    made.run()
    state = plain_state(made.student, processes.gathered(states.unique_state(made.student)))
    if processes.is_main():
        checkpoint.save_tensors(state, made.folder / origin.STUDENT_FILE)


def weights(made: Trainer) -> int:
    """Bytes that this process holds of teacher and student, each storage once."""
    models = (made.teacher, made.student)
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    tensors += [t for start in made.watch.initial.values() for t in start]
    local = [processes.local(t) for t in tensors]
    return sum(s.nbytes() for s in {t.untyped_storage() for t in local})


def asked_in_the_last(step: int, made: Trainer) -> None:
    """SIGTERM comes to the last process only, in that step."""
    last = processes.rank() == processes.count() - 1
    stop.requested = lambda: "SIGTERM" if last and made.step == step else None


def runs(folder: Path, engine: str) -> None:
    """A whole run; one that is stopped; one that goes on from that of one process."""
    made = trainer(folder / engine, KIND, **SETTINGS)
    sharded = [processes.is_sharded(p) for p in made.student.parameters()]
    assert sharded == [engine == "fsdp"] * len(sharded)
    held = {"weights": weights(made)}
    finish(made)
    moments = [v for s in made.optimizer.state.values() for v in s.values()]
    held["optimizer"] = sum(processes.local(v).nbytes for v in moments)
    write_json(folder / f"{engine}-held-{processes.rank()}", held)
    made = trainer(folder / f"{engine}-stopped", KIND, **SETTINGS)
    polled = stop.requested
    asked_in_the_last(2, made)
    try:
        made.run()
    except StoppedError as error:
        (made.folder / f"said-{processes.rank()}").write_text(error.message)
    stop.requested = polled
    made = trainer(folder / f"{engine}-resumed", KIND, **SETTINGS)
    if processes.is_main():
        shutil.copytree(folder / "one", made.folder, dirs_exist_ok=True)
    processes.gather(None)
    assert made.restore()
    finish(made)


def main() -> None:
    folder = Path(sys.argv[1])
    for engine in ("ddp", "fsdp"):
        for name in (engine, f"{engine}-stopped", f"{engine}-resumed"):
            (folder / name).mkdir(exist_ok=True)
        os.environ["ACCELERATE_USE_FSDP"] = str(engine == "fsdp")
        runs(folder, engine)
        (folder / f"{engine}-scales").mkdir(exist_ok=True)
        finish(trainer(folder / f"{engine}-scales", KIND, **SETTINGS, train="scales"))
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    (folder / "features").mkdir(exist_ok=True)
    finish(trainer(folder / "features", KIND, **SETTINGS, kl=0.0))
    try:
        trainer(folder, batch_size=3)
    except RecipeError as error:
        (folder / f"uneven-{processes.rank()}").write_text(error.message)


if __name__ == "__main__":
    main()
