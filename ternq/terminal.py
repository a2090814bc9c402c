"""Progress for people, on stderr: a live bar on a terminal, a plain line every few seconds off it.

rich is imported when the first bar is drawn, so that ``ternq --help`` does not pay for it.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from ternq.progress import Event
from ternq.shown import duration

SECONDS_BETWEEN_LINES = 5.0


class Quiet:
    """Shows warnings only."""

    def __call__(self, event: Event) -> None:
        if event.level == "warning" and event.message:
            self._say(f"warning: {event.message}")

    def close(self) -> None:
        """Nothing is open."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Lines(Quiet):
    """One plain line per message, at the first and last step of a stage, and every few seconds."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self._seconds = seconds
        self._clock = _Clock()
        self._shown = 0.0

    def __call__(self, event: Event) -> None:
        began = self._clock.tick(event)
        if event.message:
            self._say(f"warning: {event.message}" if event.level == "warning" else event.message)
        elif began or event.done == event.total or time.monotonic() - self._shown >= self._seconds:
            self._shown = time.monotonic()
            left = self._clock.left(event)
            parts = [
                _count(event),
                self._clock.rate(event),
                f"{duration(left)} left" if left else "",
            ]
            self._say(", ".join(filter(None, [event.stage, *parts, _values(event.values)])))


class Bar:
    """A live line for the present stage; every finished stage leaves one plain line above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._clock = _Clock()
        self._last: Event | None = None
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=None, text="")

    def __call__(self, event: Event) -> None:
        if self._last and self._last.stage != event.stage:
            self._finish()
        if event.message:
            style, label = ("yellow", "warning: ") if event.level == "warning" else (None, "")
            self._console.print(label + event.message, style=style, markup=False)
            return
        began = self._clock.tick(event)
        text = self._text(event)
        total, done = event.total, event.done or 0
        if began:
            self._bar.start()
            self._bar.reset(self._task, total=total, description=event.stage, text=text)
        self._bar.update(self._task, total=total, completed=done, text=text, refresh=began)
        self._last = event

    def close(self) -> None:
        """Remove the live line; the stage under way leaves its plain line."""
        self._finish()
        self._bar.stop()

    def _text(self, event: Event) -> str:
        left = self._clock.left(event)
        timing = f"{duration(left)} left" if left else duration(self._clock.elapsed())
        parts = [_count(event), self._clock.rate(event), timing, _values(event.values)]
        text = "  ".join(filter(None, parts))
        room = self._console.width - len(event.stage) - 24
        return text if len(text) <= room else text[: room - 1] + "…"

    def _finish(self) -> None:
        if self._last:
            took = duration(self._clock.elapsed())
            parts = (_count(self._last), took, _values(self._last.values))
            text = "  ".join(filter(None, parts))
            self._console.print(f"  {self._last.stage:24} {text}", style="dim", markup=False)
            self._bar.reset(self._task, total=None, description="", text="")
            self._last = None


class Silent(Quiet):
    """Shows nothing: the main process of several speaks."""

    def __call__(self, event: Event) -> None: ...


def display(*, quiet: bool, plain: bool, silent: bool = False) -> Quiet | Bar:
    """The display that suits the flags and the terminal."""
    if silent:
        return Silent()
    if quiet:
        return Quiet()
    return Lines() if plain or not sys.stderr.isatty() else Bar()


class _Clock:
    """When the present stage began, and from that when it will end."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._start, self._first = time.monotonic(), 0

    def tick(self, event: Event) -> bool:
        """Note the event; whether it begins a stage."""
        if event.message or event.stage == self._stage:
            return False
        self._stage, self._start, self._first = event.stage, time.monotonic(), event.done or 0
        return True

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def left(self, event: Event) -> float | None:
        done = (event.done or 0) - self._first
        if not event.total or done <= 0 or event.done == event.total:
            return None
        return self.elapsed() / done * (event.total - done - self._first)

    def rate(self, event: Event) -> str:
        """What is done in a second."""
        done = (event.done or 0) - self._first
        return f"{done / self.elapsed():.3g}/s" if done > 0 and self.elapsed() > 0 else ""


def _count(event: Event) -> str:
    if event.done is None:
        return ""
    return f"{event.done:,}/{event.total:,}" if event.total else f"{event.done:,}"


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
