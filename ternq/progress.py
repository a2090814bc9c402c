"""How long work speaks: it calls ``progress(Event(...))``; the terminal is somebody else's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Event:
    """A step of a stage (``done`` of ``total``, with values to show), or a message."""

    stage: str
    message: str | None = None
    done: int | None = None
    total: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    level: Literal["info", "warning"] = "info"


Progress = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Show nothing."""
