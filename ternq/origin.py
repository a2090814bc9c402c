"""What MODEL names, where its files are, and what is wrong with them there, in one sentence.

A model is a hub id, a folder of safetensors, a ``.gguf`` file, an artefact of ``ternq pack``, a run
of ``ternq distill``, or ``demo``.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ternq.errors import InputError
from ternq.files import read_json
from ternq.formats.gguf_file import Q2_0, Header
from ternq.publish import MANIFEST
from ternq.recipe import DEMO, DEMO_FOLDER
from ternq.text import first_line, is_offline

RUN_FILE = "run.json"  # makes a folder a run
REPORT = "report.json"  # what its training measured
STUDENT_FILE = "student.safetensors"  # the trained student of a finished run
BASE_FOLDER = "base"  # configuration and tokenizer of the model a run trains
# what transformers raises for a configuration or file that it cannot make a model of
_REFUSALS: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, RuntimeError, ImportError)
_REFUSALS += (TypeError, AttributeError, AssertionError, MemoryError, LookupError, ArithmeticError)
_REFUSALS += (StrictDataclassError,)


def local_path(model: str) -> Path | None:
    """The folder or file that ``model`` names, or None if it can only be a hub id.

    Raises:
        InputError: it looks like a path, and nothing is there.
    """
    if model == DEMO and not Path(DEMO, "config.json").exists():
        return DEMO_FOLDER
    path = Path(model).expanduser()
    if path.exists():
        return path
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith((".gguf", "/"))
    if looks_like_path or model.count("/") > 1 or "\\" in model:
        raise InputError(f"There is no file or folder '{model}'.")
    return None


def place(model: str, offline: bool = False) -> tuple[Path | None, bool]:
    """As `local_path`; and of an artefact of ternq on the hub, its folder in the hub's cache.

    So it is checked against its manifest, and loaded by our own code, wherever it comes from. With
    it: whether the rest of the model is to be had from that cache alone.
    """
    path = local_path(model)
    if path is not None:
        return path, offline
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = is_offline(offline)
    try:
        hf_hub_download(model, MANIFEST, local_files_only=offline)
    except (OSError, ValueError):  # another model, or none: whoever loads it says so
        return None, offline
    with in_words(model, offline):
        patterns = [*_PATTERNS, "*.py"]
        found = snapshot_download(model, allow_patterns=patterns, local_files_only=offline)
    return Path(found), offline


def refuse_no_model(model: str, path: Path) -> None:
    """`InputError` where a folder or file is no model, as far as its names tell."""
    if not (path / RUN_FILE).is_file():
        find(model, path)


def refuse_not_cached(model: str) -> None:
    """`InputError` where the hub's cache has no model of this name."""
    from huggingface_hub import hf_hub_download

    with in_words(model, offline=True):
        hf_hub_download(model, "config.json", local_files_only=True)


def model_folder(model: str, path: Path | None, offline: bool) -> Path:
    """The folder of a dense checkpoint: ``path``, or the hub's files in the local cache.

    Raises:
        InputError: it is no model, or cannot be had.
    """
    if path is not None:
        where, options = find(model, path)
        if "gguf_file" in options:
            raise InputError(f"'{model}' is a file; a folder of safetensors is wanted here.")
        return Path(where)
    from huggingface_hub import snapshot_download

    offline = is_offline(offline)
    with in_words(model, offline):
        found = snapshot_download(model, allow_patterns=_PATTERNS, local_files_only=offline)
    return Path(found)


def licence(model: str, path: Path | None = None, offline: bool = False) -> str | None:
    """The licence that a model's card names; None if there is no card, or it names none."""
    from huggingface_hub import ModelCard, hf_hub_download
    from yaml import YAMLError

    try:
        if path is None:
            path = Path(hf_hub_download(model, "README.md", local_files_only=offline)).parent
        found = ModelCard.load(path / "README.md").data.get("license")
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md"]


def refuse_unfinished(run: Path) -> None:
    """`InputError` if a run has no trained student yet."""
    if not (run / STUDENT_FILE).is_file():
        model = read_run(run)["recipe"].get("model", "MODEL")
        raise InputError(
            f"The run '{run}' is not finished.", f"Go on with it: ternq distill {model} -o {run}"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of a run says; `InputError` if it is damaged."""
    record = read_json(folder / RUN_FILE)
    for name, kind in (("recipe", dict), ("modules", list), ("dtype", str)):
        if not isinstance(record.get(name), kind):
            raise InputError(f"{folder / RUN_FILE} is damaged: it holds no {name}.")
    return record


def find(model: str, path: Path | None, *, weights: bool = True) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for, and the options that go with it."""
    if path is None:
        return model, {}
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"'{model}' is a file, but not a .gguf file.", "Name the folder it lies in."
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"'{model}' is not a GGUF file: it does not begin with 'GGUF'.")
        if any(entry.type == Q2_0 for entry in Header(path).tensors.values()):
            raise InputError(
                f"'{model}' holds layers of the type Q2_0, which transformers does not read.",
                f"Take it in first: ternq pack {model}",
            )
        return str(path.parent), {"gguf_file": path.name}
    if path == DEMO_FOLDER:
        return str(path), {}
    if not (path / "config.json").is_file():
        raise InputError(
            f"'{model}' is a folder without config.json, so it is no model.",
            "Name a Hugging Face model folder, a .gguf file (the file, not its folder), a hub id, "
            "or 'demo'.",
        )
    if weights and not any(path.glob("*.safetensors")):
        raise InputError(
            f"'{model}' holds no safetensors file.",
            "Weights in pickle files (.bin) are not read: save the model again as safetensors.",
        )
    return str(path), {}


@contextmanager
def in_words(model: str, offline: bool) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into one sentence."""
    from safetensors import SafetensorError

    hush = [logging.getLogger(n) for n in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in hush]
    for logger in hush:
        logger.setLevel(logging.CRITICAL)
    _progress_bars(False)
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"A safetensors file of '{model}' is damaged: {first_line(error)}."
        ) from error
    except InputError:
        raise
    except _REFUSALS as error:
        raise _explained(model, error, offline) from error
    finally:
        for logger, level in zip(hush, levels, strict=True):
            logger.setLevel(level)
        _progress_bars(True)


def _progress_bars(on: bool) -> None:
    from transformers.utils import logging as bars

    switch: Any = bars.enable_progress_bar if on else bars.disable_progress_bar
    switch()


def _explained(model: str, error: BaseException, offline: bool) -> InputError:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and len(chain) < 8:
        chain.append(at)
        at = at.__cause__ or at.__context__
    names = {type(e).__name__ for e in chain}
    if "GatedRepoError" in names:
        return InputError(
            f"'{model}' is gated: its owner asks you to accept terms first.",
            "Accept them on its page, then: hf auth login",
        )
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return InputError(
            f"The hub has no model '{model}' (or it is private).",
            "Check the spelling (owner/name); for a local folder write ./name.",
        )
    remote = local_path(model) is None
    if remote and (offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")):
        return InputError(
            f"'{model}' is not in the local cache, and this is offline.",
            "Name a local folder or .gguf file, or try 'demo'.",
        )
    if remote and isinstance(error, OSError):
        return InputError(
            f"'{model}' could not be fetched: the hub did not answer.",
            "Name a local folder or .gguf file, or try 'demo'.",
        )
    return InputError(f"'{model}' cannot be loaded: {first_line(error)}")
