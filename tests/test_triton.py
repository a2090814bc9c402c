"""The Triton kernels, where Triton is: right under its interpreter, and compiled for real cards.

Each in a process of its own: Triton reads TRITON_INTERPRET when it is imported, which torch may
have done here.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: it is in ternq[dev], on Linux"
)


def run(script: str, *arguments: str, cache: Path, interpret: bool = False) -> str:
    """What a script prints."""
    environment = os.environ | {
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, *script.split(), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_kernels_equal_float64(tmp_path: Path) -> None:
    print(
        run("-m pytest -q -p no:cacheprovider tests/interpreted.py", cache=tmp_path, interpret=True)
    )


@pytest.mark.slow
def test_the_kernels_compile_and_spill_nothing(tmp_path: Path) -> None:
    printed = run("bench/gpu_instructions.py", "--tokens", "1", "512", "--json", cache=tmp_path)
    rows = {name: row for name, row in json.loads(printed).items() if name.startswith("sm_")}
    assert len(rows) == 4
    assert not any(row["stack_bytes"] for row in rows.values())


@pytest.mark.slow
def test_the_bench_runs(tmp_path: Path) -> None:
    printed = run("bench/gpu_kernels.py", "--interpret", "--json", cache=tmp_path, interpret=True)
    assert {"1", "5"} == set(json.loads(printed)["matmul"]["24x256"])
