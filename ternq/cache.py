"""Results that were measured once, so that the same measurement again is free.

A result is kept under a hash of everything it depends on: the model's content, the task with its
version and data, the settings, the versions of the libraries. A file says all of that in words, and
is believed only if it says what is asked; a damaged one is measured anew.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternq.errors import TernqError
from ternq.files import read_json, write_json
from ternq.progress import Event, Progress, ignore

SCHEMA = 1


def default_folder() -> Path:
    """``$TERNQ_CACHE``, else ``ternq`` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TERNQ_CACHE") or Path(home) / "ternq").expanduser()


class Cache:
    """Results in a folder; without one, nothing is kept and nothing found."""

    def __init__(self, folder: Path | None, progress: Progress = ignore) -> None:
        self._folder = folder and folder / "results"
        self._progress = progress

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured under ``key``; None if nothing was, or it cannot be read."""
        if self._folder is None:
            return None
        path = self._path(key)
        try:
            found = read_json(path) if path.is_file() else {}
        except (TernqError, OSError):
            return None
        result = found.get("result")
        same = found.get("schema") == SCHEMA and found.get("key") == json.loads(_text(key))
        return result if same and isinstance(result, dict) else None

    def put(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result; where that fails it is said once, and nothing more is kept."""
        if self._folder is None:
            return
        try:
            self._path(key).parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path(key), {"schema": SCHEMA, "key": dict(key), "result": result})
        except (TernqError, OSError) as error:
            self._folder = None
            said = f"results are not kept for another time: {error}"
            self._progress(Event("cache", said, level="warning"))

    def _path(self, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(_text(key).encode("utf-8", errors="surrogatepass")).hexdigest()
        assert self._folder is not None
        return self._folder / digest[:2] / f"{digest}.json"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=False)
