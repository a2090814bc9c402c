"""``python bench/kernels.py``: the CPU kernels beside torch and TQ2_0; the work is `cpu_kernels`'s.

It must be importable: transformers, when another program of this folder imports it, takes this file
for the package `kernels` and looks for its version.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("cpu_kernels.py")), run_name="__main__")
