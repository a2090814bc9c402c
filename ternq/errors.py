"""What can go wrong, one class per exit status of the contract.

TernqError
├── RecipeError        2    options that do not fit each other, the model or an earlier run
├── InputError         3    input missing, damaged, unsupported, or not to be had offline
├── ResourceError      4    not enough memory or disk, or an output that cannot be written
├── GateError          5    a quality gate failed; everything is written and valid
├── VerificationError  6    what was packed is not what was trained, or a ternq artefact is damaged
├── DivergenceError    7    training diverged
├── StoppedError      75    stopped early on request, resumable
└── InterruptedByUser 130   Ctrl-C; a checkpoint was saved if one could be
"""

_LONGEST = 1000  # characters of a message


class TernqError(Exception):
    """Something the user can mend: one sentence (what and where), and a hint (what to do)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = _one_line(message)
        self.hint = hint and _one_line(hint)

    @property
    def kind(self) -> str:
        """What reports call it."""
        return type(self).__name__


def _one_line(text: str) -> str:
    """What a terminal can show as it is, whatever names a damaged file brings into it."""
    plain = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST // 2]} ... {plain[-100:]}"


class RecipeError(TernqError):
    """Options that do not fit each other, the model, or the run they should continue."""

    exit_code = 2


class InputError(TernqError):
    """A model or text that is missing, damaged, unsupported, or not to be had offline."""

    exit_code = 3


class ResourceError(TernqError):
    """Not enough memory, disk or device; or an output that cannot be written."""

    exit_code = 4


class GateError(TernqError):
    """At least one quality gate failed. The results are complete and written."""

    exit_code = 5


class VerificationError(TernqError):
    """A packed artefact that is not what was trained, or is damaged."""

    exit_code = 6


class DivergenceError(TernqError):
    """Training diverged: numbers not finite, a loss that stays above its start, codes all alike."""

    exit_code = 7


class StoppedError(TernqError):
    """Stopped early on request (SIGTERM, time limit); the same command goes on."""

    exit_code = 75


class InterruptedByUser(TernqError):
    """Ctrl-C. The same command goes on from the last checkpoint."""

    exit_code = 130


def is_memory(error: BaseException) -> bool:
    """Whether Python or torch says that memory does not suffice."""
    said = any(words in str(error) for words in ("allocate memory", "out of memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)
