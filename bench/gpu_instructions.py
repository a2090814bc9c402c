"""What the Triton kernels become for a card: registers, spills, instructions. Needs no card.

    python bench/gpu_instructions.py --json

Triton compiles for sm_80 (A100) and sm_90 (H100) with the tiles that `ternq.kernels.gpu` chooses
for bf16 and 14336 rows; NVIDIA's tools, which come with triton, read the result. Instructions are
those of the longest loop, a thread's, by the weights that it passes.
"""

import argparse
import collections
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ternq.kernels import gpu

TOKENS = (1, 16, 128, 512)


def count(tokens: int, capability: int) -> dict[str, Any]:
    """One kernel as compiled for a card."""
    tile = gpu.gemv_tile(14336) if tokens == 1 else gpu.gemm_tile(14336, tokens, capability >= 90)
    listing, row = _compiled(tile, tokens, capability)
    loop = _loop(listing)
    blocks = tile.across if tokens == 1 else 1
    weights = tile.rows * blocks * gpu.BLOCK / (32 * tile.warps)  # of a thread in one pass
    row |= {"instructions_per_weight": sum(loop.values()) / weights, "tile": str(tile)}
    return row | {"most": dict(loop.most_common(6))}


def _compiled(tile: gpu.Tile, tokens: int, capability: int) -> tuple[str, dict[str, Any]]:
    kernel = gpu._gemv if tokens == 1 else gpu._gemm
    pointers = dict.fromkeys(("x", "bias", "y"), "*bf16")
    pointers |= {"codes": "*i16", "scale": "*fp16", "shift": "*fp16"}
    constants = {"FIELDS": 8, "SHIFT": True, "BIAS": True, "R": tile.rows}
    if tokens == 1:
        constants |= {"tokens": 1, "B": tile.across, "STAGES": tile.stages}
    else:
        constants |= {"N": tile.across, "DOT": triton.language.bfloat16}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    even = {"rows", "columns", "groups", "blocks", *pointers}  # multiples of 16
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in even}
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    found = {"registers": int(registers), "stack_bytes": int(stack)}
    return listing, found | {"shared_bytes": made.metadata.shared}


def _output(*command: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _loop(listing: str) -> collections.Counter[str]:
    """Instructions of the longest loop by name."""
    labels: dict[str, int] = {}
    names: list[str] = []
    best: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line):
            names.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2]) if found[1] == "BRA" else None
            body = names[labels.get(target[0], len(names)) :] if target else []
            best = max(best, body, key=len)
    return collections.Counter(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--capability", nargs="+", type=int, default=(80, 90))
    parser.add_argument("--json", action="store_true", help="print one object")
    asked = parser.parse_args()
    record = {
        f"sm_{capability} {tokens}": count(tokens, capability)
        for capability in asked.capability
        for tokens in asked.tokens
    }
    if asked.json:
        print(json.dumps({"torch": torch.__version__, "triton": triton.__version__} | record))
        return
    for name, row in record.items():
        print(
            f"{name:>9} tokens: {row['instructions_per_weight']:5.2f} instructions a weight, "
            f"{row['registers']} registers, {row['stack_bytes']} bytes spilled, "
            f"{row['shared_bytes']} shared; {row['tile']}"
        )


if __name__ == "__main__":
    main()
