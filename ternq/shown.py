"""How numbers, sizes, times and foreign text are written, wherever people read them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# what XML 1.0 forbids; DEL and the C1 controls; and what turns the order of the letters after it
_CONTROLS = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
)


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and rows; every column but the first holds numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: Any) -> str:
    """Four significant digits, thousands separated; a dash for nothing."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes in decimal units, as gates read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds for people: 48 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def names(value: Any) -> str:
    """A name, or several with commas between them."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def printable(text: str) -> str:
    """The text with U+FFFD for what XML must not hold, or what misleads a screen."""
    return _CONTROLS.sub("\ufffd", text)
