"""The values of every training step, one JSON line each, in the folder of a run or a report."""

import json
import os
from pathlib import Path
from typing import Any

from ternq.files import renamed, writing
from ternq.publish import report_folder

METRICS = "metrics.jsonl"


def append(folder: Path, values: dict[str, Any]) -> None:
    """Add the line of a step."""
    path = folder / METRICS
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder; none without the file."""
    path = folder / METRICS
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return list(filter(None, map(_row, lines)))


def steps_of(out: str | Path) -> list[dict[str, Any]]:
    """The lines of a run, or those beside what was made of one."""
    folder = Path(os.path.abspath(out))  # noqa: PTH100  # resolve() would follow links
    return steps(report_folder(folder)) or steps(folder)


def drop_later(folder: Path, step: int) -> None:
    """Cut the lines to those up to a step; any that is half written goes too."""
    path = folder / METRICS
    content = path.read_bytes() if path.exists() else b""
    kept = [line for line in content.splitlines(keepends=True) if _is_of(line, step)]
    if (whole := b"".join(kept)) != content:
        with renamed(path) as temporary:
            temporary.write_bytes(whole)


def _row(line: str) -> dict[str, Any] | None:
    """A line's object; None for one that a killed run left half-written."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_of(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
