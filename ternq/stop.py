"""Stopping on request: a signal sets a flag, which the training loop polls between two steps.

Before anything polls there is nothing to save, so the command then ends at once; so does a second
Ctrl-C. Only the command line installs the handlers: a library leaves its host's signals alone.
"""

import signal
import sys
import time
from types import FrameType

from ternq import processes
from ternq.errors import InterruptedByUser, StoppedError, TernqError

TIME_LIMIT = "time limit"

_polled = False
_request: str | None = None


class Terminated(BaseException):
    """SIGTERM where nobody polls. Not an ``Exception``, lest a library's handler swallow it."""


def install() -> None:
    """Take over SIGINT and SIGTERM (main thread only), forgetting earlier requests."""
    global _polled, _request
    _polled, _request = False, None
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)


def restore() -> None:
    """Give both signals back to Python, and forget what was asked."""
    global _request
    not_polled()
    _request = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ignore() -> None:
    """The end of the program: what it has said stands, whatever signal still comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def not_polled() -> None:
    """Nobody polls from here on: a signal ends the command at once again."""
    global _polled
    _polled = False


def requested() -> str | None:
    """The signal that asked to stop ("SIGINT" or "SIGTERM"), or None; to be polled every step."""
    global _polled
    _polled = True
    return _request


def pending() -> str | None:
    """The signal that asked to stop, or None; asking does not count as polling."""
    return _request


def ended(reason: str, said: str, hint: str | None = None) -> TernqError:
    """The error of work that a signal, or another ``reason``, has stopped."""
    return (InterruptedByUser if reason == "SIGINT" else StoppedError)(said, hint)


class Check:
    """Raises when work is to stop, on a signal or ``limit`` seconds from now; call it on the way.

    Of several processes all must call it, and stop together.
    """

    def __init__(self, limit: float | None) -> None:
        self._end = None if limit is None else time.monotonic() + limit
        self._where = "Stopped"

    def __call__(self, where: str | None = None) -> None:
        """``where`` the work is, for the message of this call and later ones."""
        self._where = where or self._where
        if reason := self.reason():
            said = f"{self._where} ({reason}); finished blocks are kept."
            raise ended(reason, said, "The same command goes on from there.")

    def reason(self) -> str | None:
        """Why the work is to stop; None if it is not."""
        own = requested()
        if self._end is not None and time.monotonic() >= self._end:
            own = own or TIME_LIMIT
        return processes.agreed(own, False)[0]

    def left(self) -> float | None:
        """Seconds until the limit, at least 0; None where there is none."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _request
    again, _request = _request is not None, signal.Signals(number).name
    if _polled and not again:
        if number == signal.SIGINT:
            sys.stderr.write("\nSaving; press Ctrl-C again to stop at once.\n")
    elif number == signal.SIGTERM:
        raise Terminated
    else:
        raise KeyboardInterrupt
