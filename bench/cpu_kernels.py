"""How fast the CPU kernels are, beside dense torch, llama.cpp's TQ2_0 and the memory's bandwidth.

    python bench/kernels.py --ggml /a/folder/with/libggml-cpu.so

multiplies one token, then batches of 128, with matrices of three shapes that have scale and shift
per group of 128. Everything runs in one process and in turns, so that what disturbs the machine
disturbs all alike; medians of the turns are compared. Before each product another copy of the
matrix is taken, of so many that together they do not fit into a cache, as in a model. Likewise one
token with the table of an output head, as it is stored.

TQ2_0 is ggml's own function for a row, called from a few lines of C for one row after another in
as many threads; ggml is found in an installed ``llama-cpp-python``, or where ``--ggml`` says, else
null stands in its place. (It has one scale for 256 columns and no shift.) ``--isa avx2`` keeps both
ternq and torch to AVX2. ``--json`` prints one object: weights a second, ``matvec`` by shape.
"""

import argparse
import ctypes
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

SHAPES = ((576, 1536), (4096, 4096), (14336, 4096))
HEAD = (49152, 576)  # SmolLM2-135M's
GROUP = 128
SHIM = """
#include <stddef.h>
#include <stdint.h>
#include <pthread.h>
typedef void (*dot_t)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef void (*team_t)(void (*)(void *), void *, unsigned, unsigned);
typedef struct {
    dot_t dot; const char *w, *x; float *y;
    int64_t rows, columns, n, row_bytes, x_bytes, share, next;
} task_t;
static void rows(void *given) {
    task_t *t = given;
    for (;;) {
        int64_t first = __atomic_fetch_add(&t->next, t->share, __ATOMIC_RELAXED);
        if (first >= t->rows) return;
        int64_t last = first + t->share < t->rows ? first + t->share : t->rows;
        for (int64_t r = first; r < last; r++)
            for (int64_t i = 0; i < t->n; i++)
                t->dot((int)t->columns, t->y + i * t->rows + r, 0, t->w + r * t->row_bytes, 0,
                       t->x + i * t->x_bytes, 0, 1);
    }
}
void ggml_rows(dot_t dot, team_t team, const char *w, const char *x, float *y, int64_t rows_,
               int64_t columns, int64_t n, int64_t row_bytes, int64_t x_bytes, int threads) {
    task_t t = {dot, w, x, y, rows_, columns, n, row_bytes, x_bytes, rows_ / (8 * threads) + 1, 0};
    if (threads > 1) team(rows, &t, threads, 0); else rows(&t);
}
typedef struct { const uint64_t *p; int64_t words, next; uint64_t sum; } read_t;
static void read_part(void *given) {
    read_t *t = given;
    uint64_t s[16] = {0}, all = 0;
    for (;;) {
        int64_t first = __atomic_fetch_add(&t->next, 1 << 16, __ATOMIC_RELAXED);
        if (first >= t->words) break;
        for (int64_t i = first; i < first + (1 << 16); i += 16)
            for (int k = 0; k < 16; k++) s[k] ^= t->p[i + k];
    }
    for (int k = 0; k < 16; k++) all ^= s[k];
    __atomic_fetch_xor(&t->sum, all, __ATOMIC_RELAXED);
}
uint64_t read_all(team_t team, const uint64_t *p, int64_t words, int threads) {
    read_t t = {p, words, 0, 0};
    if (threads > 1) team(read_part, &t, threads, 0); else read_part(&t);
    return t.sum;
}
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--isa", choices=("avx2", "avx512", "neon", "portable"))
    parser.add_argument("--ggml", type=Path, help="folder of libggml-cpu.so and libggml-base.so")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--burst", type=float, default=0.03, help="seconds a turn")
    parser.add_argument(
        "--copies", type=float, default=256e6, help="bytes that copies take at least"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


args = arguments()
os.environ["OMP_NUM_THREADS"] = str(args.threads)
if args.isa:
    os.environ["TERNQ_ISA"] = args.isa
if args.isa == "avx2":
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"

import torch  # noqa: E402  reads the environment
from torch import Tensor  # noqa: E402

from ternq.kernels import PackedWeight, native  # noqa: E402
from ternq.kernels.build import compiler  # noqa: E402
from ternq.packing import pack_base3  # noqa: E402

Job = Callable[[], Any]


def shim() -> Any:
    """The lines above, compiled; None without a compiler or OpenMP."""
    command, team = compiler(), getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if command is None or team is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "shim.c"), Path(folder, "shim.so")
        source.write_text(SHIM)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        if subprocess.run([*command, *flags, str(source)]).returncode:
            return None
        made = ctypes.CDLL(str(library))
    p, i = ctypes.c_void_p, ctypes.c_int64
    made.ggml_rows.argtypes = [p, p, p, p, p, i, i, i, i, i, ctypes.c_int]
    made.ggml_rows.restype = None
    made.read_all.argtypes, made.read_all.restype = [p, p, i, ctypes.c_int], ctypes.c_uint64
    made.team = ctypes.cast(team, p)
    return made


def ggml() -> Any:
    """llama.cpp's library of CPU kernels; None where there is none."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = args.ggml
    if folder is None and spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "lib"
    if folder is None or not Path(folder, "libggml-cpu.so").is_file():
        return None
    ctypes.CDLL(str(Path(folder, "libggml-base.so")), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(str(Path(folder, "libggml-cpu.so")))
    found.ggml_cpu_init()
    p, i = ctypes.c_void_p, ctypes.c_int64
    for name in ("quantize_row_tq2_0", "quantize_row_q8_K"):
        getattr(found, name).argtypes = [p, p, i]
    return found


def rotated(one: Tensor) -> list[Tensor]:
    """Copies of a matrix that together fit into no cache."""
    number = max(1, -(-int(args.copies) // one.nbytes))
    return [one, *(one.clone() for _ in range(number - 1))]


def rotating(one: Tensor) -> Callable[[], Tensor]:
    """Another copy with every call."""
    copies = itertools.cycle(rotated(one))
    return lambda: next(copies)


def tq2_0(library: Any, rows_of: Any, weight: Tensor, x: Tensor) -> Job:
    """llama.cpp's product: activations rounded to Q8_K, then row by row."""
    (rows, columns), n = weight.shape, len(x)
    row_bytes, x_bytes = rows * columns * 66 // 256 // rows, columns // 256 * 292
    packed = torch.empty(rows * row_bytes, dtype=torch.uint8)
    for row in range(rows):
        at = packed.data_ptr() + row * row_bytes
        library.quantize_row_tq2_0(weight[row].data_ptr(), at, columns)
    copy, rounded = rotating(packed), torch.empty(n * x_bytes, dtype=torch.uint8)
    y = torch.empty(n, rows)
    dot = ctypes.cast(library.ggml_vec_dot_tq2_0_q8_K, ctypes.c_void_p)

    def run() -> None:
        for token in range(n):
            at = rounded.data_ptr() + token * x_bytes
            library.quantize_row_q8_K(x[token].data_ptr(), at, columns)
        pointers = copy().data_ptr(), rounded.data_ptr(), y.data_ptr()
        sizes = rows, columns, n, row_bytes, x_bytes
        rows_of.ggml_rows(dot, rows_of.team, *pointers, *sizes, args.threads)

    run()
    codes = weight / weight.abs().max()
    wanted = (x @ codes.T).double() * float(weight.abs().max())
    assert (y.double() - wanted).norm() < 0.05 * wanted.norm()
    return run


def jobs(rows: int, columns: int, n: int, library: Any, rows_of: Any) -> dict[str, Job | None]:
    """What is timed for a shape: name -> one product."""
    kernel, why = native.load()
    if kernel is None:
        sys.exit(f"no kernels: {why}")
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    groups = (rows, -(-columns // GROUP))
    scale, shift = (torch.rand(groups) + 0.1).half(), (torch.randn(groups) * 0.1).half()
    form = kernel.convert(PackedWeight.of(pack_base3(codes), scale, shift, columns, GROUP))
    copies = itertools.cycle([replace(form, codes=words) for words in rotated(form.codes)])
    x = torch.randn(n, columns)

    def ours(act: Any) -> Job:
        return lambda: kernel.matmul(x, next(copies), None, act)

    dense, dense16 = rotating(kernel.dense(form)), rotating(kernel.dense(form, torch.bfloat16))
    x16 = x.bfloat16()
    theirs = None
    if library is not None and rows_of is not None:
        theirs = tq2_0(library, rows_of, codes.float() * 0.02, x)
    return {
        "int8": ours("int8"),
        "exact": ours("exact"),
        "torch_float32": lambda: torch.nn.functional.linear(x, dense()),
        "torch_bfloat16": lambda: torch.nn.functional.linear(x16, dense16()),
        "tq2_0": theirs,
    }


def head_jobs(rows: int, columns: int) -> dict[str, Job | None]:
    """What is timed for an output head: ours by the type of its table, and torch's."""
    kernel, _ = native.load()
    assert kernel is not None
    torch.manual_seed(0)
    x, table = torch.randn(1, columns), torch.randn(rows, columns)
    scale = (table.abs().amax(1) / 127).half()
    codes = (table / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    tables = {"float32": table, "bfloat16": table.bfloat16(), "int8": codes}
    turns = {name: rotating(stored) for name, stored in tables.items()}

    def ours(name: str) -> Job:
        factor = scale if name == "int8" else None
        return lambda: kernel.table_product(x, turns[name](), factor)

    def opened() -> Tensor:
        weight = turns["int8"]().float().mul_(scale.float()[:, None])
        return torch.nn.functional.linear(x, weight)

    return {name: ours(name) for name in tables} | {
        "torch_float32": lambda: torch.nn.functional.linear(x, turns["float32"]()),
        "torch_bfloat16": lambda: torch.nn.functional.linear(x.bfloat16(), turns["bfloat16"]()),
        "torch_int8": opened,
    }


def burst(job: Job) -> float:
    """Seconds a call, over a short time."""
    count, start = 0, time.perf_counter()
    while True:
        job()
        count += 1
        if (spent := time.perf_counter() - start) > args.burst:
            return spent / count


def measure(named: dict[str, Job | None]) -> dict[str, float | None]:
    """Median seconds a call, in turns."""
    times: dict[str, list[float]] = {name: [] for name, job in named.items() if job}
    order = random.Random(0)
    for turn in range(args.rounds + 1):
        names = list(times)
        order.shuffle(names)  # nobody always finds the caches as the same neighbour left them
        for name in names:
            if (job := named[name]) is not None:
                spent = burst(job)
                times[name] += [spent] if turn else []  # the first turn warms up
    return {n: statistics.median(times[n]) if n in times else None for n in named}


def bandwidth(rows_of: Any) -> float | None:
    """Bytes a second that all threads read together from much memory; the best of the turns."""
    if rows_of is None:
        return None
    words = int(args.copies) // 8 // 2**16 * 2**16
    data = torch.ones(words, dtype=torch.int64)
    best = min(
        burst(lambda: rows_of.read_all(rows_of.team, data.data_ptr(), words, args.threads))
        for _ in range(args.rounds)
    )
    return 8 * words / best


def conversion() -> float:
    """Packed bytes a second from the file's form to that in memory."""
    kernel, _ = native.load()
    assert kernel is not None
    codes = torch.randint(0, 243, (4096, 820), dtype=torch.uint8)
    scale = torch.ones(4096, 32).half()
    packed = PackedWeight.of(codes, scale, scale, 4096, GROUP)
    kernel.convert(packed)
    return codes.nbytes / statistics.median(burst(lambda: kernel.convert(packed)) for _ in range(5))


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    kernel, _ = native.load()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "isa": kernel.isa if kernel else None,
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    library, rows_of = ggml(), shim()
    result: dict[str, Any] = {"machine": machine(), "bandwidth": bandwidth(rows_of)}
    result["conversion"] = conversion()
    for kind, n in (("matvec", 1), ("batch128", 128)):
        result[kind] = {}
        for rows, columns in SHAPES:
            seconds = measure(jobs(rows, columns, n, library, rows_of))
            rates = {k: s and rows * columns * n / s for k, s in seconds.items()}
            result[kind][f"{rows}x{columns}"] = rates
    rows, columns = HEAD
    seconds = measure(head_jobs(rows, columns))
    result["head"] = {
        f"{rows}x{columns}": {k: s and rows * columns / s for k, s in seconds.items()}
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    read, converted = result["bandwidth"], result["conversion"]
    print(f"memory is read at {read / 1e9:.1f} GB/s" if read else "no bandwidth measured")
    print(f"packed bytes are converted at {converted / 1e6:.0f} MB/s")
    bits = 2 + 32 / GROUP
    for kind in ("matvec", "batch128", "head"):
        for shape, rates in result[kind].items():
            print(f"\n{kind} {shape}: 1e9 weights a second (times torch float32, times TQ2_0)")
            for name, rate in rates.items():
                if rate is None:
                    continue
                ratios = [
                    rate / other for other in (rates["torch_float32"], rates.get("tq2_0")) if other
                ]
                line = f"  {name:15} {rate / 1e9:8.1f}   " + "  ".join(f"{r:6.2f}" for r in ratios)
                if kind == "matvec" and read and name in ("int8", "exact"):
                    line += f"   {rate * bits / 8 / read:5.0%} of the bandwidth"
                print(line)


main()
