"""Compiles the C kernels into one shared library that needs nothing but libc.

``hatch_build.py`` does so when the package is installed; ``python ternq/kernels/build.py`` does it
again, for those who change the C. The library knows several instruction sets and chooses among them
when it runs, so it is compiled for the plain architecture. It knows nothing of Python or torch.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "_native.so"  # under this name on every system; the loader does not mind
FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")


def compiler() -> list[str] | None:
    """The C compiler: that of ``CC``, or the first of the usual ones."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def build(library: Path = LIBRARY, flags: tuple[str, ...] = FLAGS) -> str | None:
    """Compile ``library``; returns why it could not be done, None if it was.

    A library that is there already is replaced in one step, or left as it is.
    """
    command = compiler()
    if command is None:
        return "no C compiler was found (CC, cc, gcc, clang)"
    sources = sorted(str(path) for path in (HERE / "csrc").glob("*.c"))
    new = library.with_name(f"{library.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, *flags, "-o", str(new), *sources, "-lm"], capture_output=True, text=True
        )
        if done.returncode or not new.is_file():
            said = done.stderr.strip().splitlines()
            return f"'{shlex.join(command)}' failed" + (f": {said[0]}" if said else "")
        new.replace(library)
    except OSError as error:
        return f"'{shlex.join(command)}' could not be run: {error.strerror}"
    finally:
        new.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    sys.exit(build())
