"""Where metrics go beside ``metrics.jsonl``: TensorBoard and Weights & Biases, by Accelerate."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ternq.errors import RecipeError

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
PROJECT = "ternq"
LOGS = "logs"  # their folder in a run's


def check(names: tuple[str, ...]) -> None:
    """`RecipeError` for a tracker that is unknown or not installed."""
    for name in names:
        if name not in PACKAGES:
            raise RecipeError(
                f"--log-with {name}: no such tracker.", f"Known: {', '.join(PACKAGES)}."
            )
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise RecipeError(f"--log-with {name}: it is not installed.", f"pip install {name}")


def begin(accelerator: Any, folder: Path, settings: dict[str, Any]) -> None:
    """Open the trackers of an Accelerator, and tell them the settings of the run ``folder``.

    Every command on a run is a run of its own in Weights & Biases, in the group of that run.

    Raises:
        RecipeError: a tracker will not begin.
    """
    if not accelerator.log_with:
        return
    name = folder.resolve().name
    wandb = {"name": name, "group": name, "dir": str(accelerator.logging_dir)}
    known = {k: _plain(v) for k, v in settings.items() if v is not None}
    try:
        accelerator.init_trackers(PROJECT, known, {"wandb": wandb})
    except Exception as error:  # of a library that only the user has: no login, no network
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"--log-with: {said}", "Mend it, or leave --log-with out.") from error


def end(accelerator: Any) -> None:
    """Close them. (Accelerate's ``end_training`` would end the group of processes as well.)"""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else ", ".join(map(str, value))
