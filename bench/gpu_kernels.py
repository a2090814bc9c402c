"""The Triton kernels on a card: against cuBLAS in bf16 and the card's measured bandwidth.

    nohup python bench/gpu_kernels.py --json --time-limit 480 > gpu.json 2> gpu.log &
    python bench/gpu_kernels.py --tune          # tries other tiles; prints the fastest
    python bench/gpu_kernels.py --interpret     # rehearsal on a CPU; times mean nothing

Every product is compared with float64 first. Then, for each shape and number of tokens, a CUDA
graph of ours and one of cuBLAS are replayed in turn, and the median replay is taken. A graph goes
through as many copies of the weight as fill --spread bytes, more than the cache of a card holds, so
that they come from memory as in a model. Figures are microseconds a product; `share` is what was
read and written (weights, input, output) to the bandwidth, which is the best of a long sum and a
long copy. What --time-limit leaves no time to begin is left out.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ["576x1536", "4096x4096", "14336x4096"]
TOKENS = [1, 4, 16, 128, 512]
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of the norm
MOST_LAUNCHES = 512  # in a graph
SECONDS = 0.3  # of replays for one figure


def random_weight(rows: int, columns: int, device: str) -> Any:
    """A packed weight of random codes, as `gpu` reads it."""
    from ternq.kernels import gpu
    from ternq.kernels.packed import PackedWeight
    from ternq.packing import pack_base3

    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8, device=device)
    groups = -(-columns // 128)
    scale = (torch.rand(rows, groups, device=device) * 0.02 + 0.01).half()
    shift = (torch.randn(rows, groups, device=device) * 0.003).half()
    return gpu.convert(PackedWeight.of(pack_base3(codes), scale, shift, columns, 128))


def copies_of(weight: Any, count: int) -> list[Any]:
    """The same numbers in other places."""
    return [weight, *(replace(weight, codes=weight.codes.clone()) for _ in range(count - 1))]


def check(x: Tensor, weight: Any, dense: Tensor) -> float:
    """The largest relative error of both kernels; AssertionError beyond the bound."""
    from ternq.kernels import gpu

    exact = x.double() @ dense.double().T
    worst = 0.0
    for kernel in (gpu.gemm, gpu.gemv) if len(x) == 1 else (gpu.gemm,):
        error = float((kernel(x, weight).double() - exact).norm() / exact.norm())
        assert error < BOUNDS[x.dtype], f"{kernel.__name__} {list(x.shape)}: error {error:.2e}"
        worst = max(worst, error)
    return worst


class Measured:
    """A row of products that is replayed, and the seconds of each replay."""

    def __init__(self, products: list[Callable[[], Tensor]], device: str) -> None:
        self.products, self.device, self.seconds = products, device, []
        products[0]()  # compiles it
        if device == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()

    def run(self) -> None:
        for product in self.products:
            product()

    def replay(self) -> None:
        """One measurement."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            self.seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            self.run()
            self.seconds.append(time.perf_counter() - began)

    def microseconds(self) -> float:
        """Of one product, the median; the first replay warms up."""
        return 1e6 * statistics.median(self.seconds[1:]) / len(self.products)


def in_turn(*rows: Measured) -> list[float]:
    """Microseconds a product of each, measured in turn."""
    began = time.monotonic()
    while len(rows[0].seconds) < 4 or time.monotonic() - began < SECONDS:
        for row in rows:
            row.replay()
    return [row.microseconds() for row in rows]


def bandwidth(device: str, size: int) -> float:
    """Bytes a second: the best of a sum of ``size`` bytes and a copy of them."""
    data = torch.zeros(size // 4, device=device)
    other = torch.empty_like(data)
    read = Measured([data.sum], device)
    copy = Measured([lambda: other.copy_(data)], device)
    of_read, of_copy = in_turn(read, copy)
    return 1e6 * max(size / of_read, 2 * size / of_copy)


def measure(rows: int, columns: int, asked: argparse.Namespace, left: Callable[[], bool]) -> Any:
    """One shape: for each number of tokens, ours, cuBLAS, and the error."""
    from ternq.kernels import gpu

    device, dtype = asked.device, getattr(torch, asked.dtype)
    weight = random_weight(rows, columns, device)
    dense = gpu.restore(weight).dequantized()
    nbytes = weight.codes.nbytes
    packed = copies_of(weight, _count(asked.spread, nbytes))
    plain = dense.to(dtype)
    matrices = [plain.clone() for _ in range(_count(asked.spread, plain.nbytes))]
    found: dict[str, Any] = {}
    for tokens in asked.tokens:
        if not left():
            break
        x = torch.randn(tokens, columns, device=device, dtype=dtype)
        error = check(x, weight, dense)
        ours = Measured([partial(gpu.matmul, x, w) for w in packed], device)
        cublas = Measured([partial(F.linear, x, w) for w in matrices], device)
        own, other = in_turn(ours, cublas)
        moved = nbytes + x.nbytes + tokens * rows * x.element_size()
        found[str(tokens)] = {
            "ternq": own,
            "cublas": other,
            "ratio": other / own,
            "share": moved / own * 1e6 / asked.bandwidth,
            "weights_per_second": rows * columns / own * 1e6,
            "error": error,
        }
        if asked.tune:
            found[str(tokens)]["tiles"] = tune(x, packed, device, left)
        print(f"{rows}x{columns} {tokens}: {json.dumps(found[str(tokens)])}", file=sys.stderr)
    return found


def _count(spread: int, nbytes: int) -> int:
    return min(MOST_LAUNCHES, max(1, math.ceil(spread / nbytes)))


def tune(x: Tensor, packed: list[Any], device: str, left: Callable[[], bool]) -> list[Any]:
    """The three fastest of many tiles: microseconds, kernel, tile."""
    found = []
    for kernel, tile in tiles(len(x)):
        if not left():
            break
        try:
            run = Measured([partial(kernel, x, w, tile=tile) for w in packed], device)
        except Exception as error:  # a tile that does not fit the card
            print(f"{tile}: {type(error).__name__}", file=sys.stderr)
            continue
        for _ in range(5):
            run.replay()
        found.append((run.microseconds(), kernel.__name__, str(tile)))
    return sorted(found)[:3]


def tiles(tokens: int) -> Iterator[tuple[Any, Any]]:
    """What `tune` tries."""
    from ternq.kernels import gpu

    if tokens == 1:
        for sizes in itertools.product((4, 8, 16, 32), (4, 8), (1, 2, 4), (2, 3)):
            yield gpu.gemv, gpu.Tile(*sizes)
    if tokens <= 16:
        for rows, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)):
            for stages in (3, 4, 5):
                yield gpu.gemm, gpu.Tile(rows, 16, warps, stages)
    else:
        for sizes in itertools.product((64, 128), (64, 128, 256), (4, 8), (3, 4)):
            yield gpu.gemm, gpu.Tile(*sizes)


def overhead() -> dict[str, float]:
    """Microseconds until an eager call returns, for the smallest of products."""
    from ternq.kernels import gpu

    weight = random_weight(256, 256, "cuda")
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    found = {}
    for name, call in {
        "ternq": lambda: gpu.matmul(x, weight),
        "cublas": lambda: F.linear(x, dense),
    }.items():
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(500):
            call()
        found[name] = (time.perf_counter() - began) / 500 * 1e6
        torch.cuda.synchronize()
    return found


def table(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{record['device']}, torch {record['torch']}, triton {record['triton']}, "
        f"{record['dtype']}; bandwidth {record['bandwidth'] / 1e9:,.0f} GB/s. Microseconds.",
        "",
        "| shape | tokens | ternq | cuBLAS | ratio | share of bandwidth |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape, found in record["matmul"].items():
        for tokens, row in found.items():
            lines.append(
                f"| {shape} | {tokens} | {row['ternq']:.1f} | {row['cublas']:.1f} | "
                f"{row['ratio']:.2f} | {row['share']:.0%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--spread", type=int, default=2**28, help="bytes of copies of a weight")
    parser.add_argument("--tune", action="store_true", help="try other tiles")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds")
    parser.add_argument("--json", action="store_true", help="print one object")
    asked = parser.parse_args()
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        asked.shapes, asked.tokens, asked.spread = ["24x256", "20x200"], [1, 5], 1
    import triton

    record: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    asked.device = "cpu" if asked.interpret else "cuda"
    end = time.monotonic() + asked.time_limit
    torch.manual_seed(0)
    asked.bandwidth = bandwidth(asked.device, 2**31 if asked.device == "cuda" else 2**24)
    on_card = asked.device == "cuda"
    record |= {
        "device": torch.cuda.get_device_name() if on_card else platform.processor() or "CPU",
        "dtype": asked.dtype,
        "bandwidth": asked.bandwidth,
        "call_microseconds": overhead() if on_card else None,
        "matmul": {},
    }
    for shape in asked.shapes:
        rows, columns = map(int, shape.split("x"))
        if time.monotonic() < end:
            record["matmul"][shape] = measure(rows, columns, asked, lambda: time.monotonic() < end)
    print(json.dumps(record) if asked.json else table(record))


if __name__ == "__main__":
    main()
