"""A result as one web page that needs nothing else: no script, and no file from elsewhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Payload = Mapping[str, Any]


def page(payload: Payload, steps: Sequence[Payload] = ()) -> str:
    """The HTML."""
    return "<!doctype html>"


def steps_of(out: Any) -> list[dict[str, Any]]:
    """The values of every training step of a run, or of what was made of one; none without."""
    if not out:
        return []
    folders = (Path(out).with_name(Path(out).name + ".report"), Path(out))
    found = [folder / "metrics.jsonl" for folder in folders]
    lines = next((p.read_text("utf-8").splitlines() for p in found if p.is_file()), [])
    return [row for line in lines if isinstance(row := json.loads(line), dict)]
