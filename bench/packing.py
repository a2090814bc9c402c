"""How fast packing goes, and in how much memory: a synthetic sharded model of several gigabytes.

    python bench/packing.py --layers 16 --folder /a/folder/with/room

writes a bfloat16 checkpoint of Llama's shape that is ternary by value (random codes, one scale per
matrix), packs it with `ternq pack`, checks it with `ternq pack --verify`, and prints the rate in
megabytes of bfloat16 weights a second and the largest resident size of each process, beside the
bound (twice the largest tensor plus 1 GB) and what the same disk gives (reading the same files,
their pages dropped from the cache first, and writing). ``--json`` prints one object instead.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ternq.writer import TensorWriter

VOCABULARY, SHARD = 32_000, 10**9


def shapes(hidden: int, mlp: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model."""
    kv = hidden // 4
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for block in (f"model.layers.{i}." for i in range(layers)):
        found[f"{block}self_attn.q_proj.weight"] = (hidden, hidden)
        found[f"{block}self_attn.k_proj.weight"] = (kv, hidden)
        found[f"{block}self_attn.v_proj.weight"] = (kv, hidden)
        found[f"{block}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{block}mlp.gate_proj.weight"] = (mlp, hidden)
        found[f"{block}mlp.up_proj.weight"] = (mlp, hidden)
        found[f"{block}mlp.down_proj.weight"] = (hidden, mlp)
        found[f"{block}input_layernorm.weight"] = (hidden,)
        found[f"{block}post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def make(folder: Path, hidden: int, mlp: int, layers: int) -> tuple[int, int]:
    """Write the checkpoint; returns all its bytes and those of its largest tensor."""
    from ternq.recipe import DEMO_FOLDER

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layout = {name: (torch.bfloat16, shape) for name, shape in shapes(hidden, mlp, layers).items()}
    random = torch.Generator().manual_seed(0)
    with TensorWriter(folder, layout, SHARD) as writer:
        for number, (name, (_, shape)) in enumerate(layout.items()):
            codes = torch.randint(-1, 2, shape, generator=random, dtype=torch.int8)
            scale = torch.tensor(0.01 + 0.0001 * number).bfloat16()
            writer.write(name, codes.bfloat16() * scale)
    sizes = [2 * torch.Size(shape).numel() for _, shape in layout.values()]
    return sum(sizes), max(sizes)


def run(*arguments: str) -> tuple[float, int, dict[str, Any]]:
    """Seconds, largest resident bytes and result of one `ternq` command."""
    program = (
        "import resource, sys; from ternq.cli import run; status = run(sys.argv[1:]); "
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "print(peak, file=sys.stderr); sys.exit(status)"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", program, *arguments, "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, int(done.stderr.split()[-1]) * 1024, json.loads(done.stdout)


def disk(folder: Path) -> tuple[float, float]:
    """Bytes a second of reading the files of a folder with a cold cache, and of writing 1 GB."""
    size, began = 0, 0.0
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(2**24):
                size += len(chunk)
    reading = size / (time.monotonic() - began)
    block = os.urandom(2**24)
    began = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder) as temporary:
        for _ in range(60):
            temporary.write(block)
        os.fsync(temporary.fileno())
    return reading, 60 * len(block) / (time.monotonic() - began)


def main() -> None:
    """Make, pack, verify, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "packed"
        size, largest = make(model, asked.hidden, asked.mlp, asked.layers)
        reading, writing = disk(model)
        packing, peak, result = run("pack", str(model), "-o", str(out))
        checking, checked_peak, _ = run("pack", "--verify", str(out))
    found = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model_bytes": size,
        "largest_tensor_bytes": largest,
        "bpw_linear": result["weights"]["bpw_linear"],
        "pack_seconds": packing,
        "pack_bytes_per_second": size / packing,
        "pack_peak_bytes": peak,
        "bound_bytes": 2 * largest + 10**9,
        "verify_seconds": checking,
        "verify_peak_bytes": checked_peak,
        "disk_read_bytes_per_second": reading,
        "disk_write_bytes_per_second": writing,
    }
    if asked.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        number = value / 1e6 if name.endswith(("bytes", "per_second")) else value
        unit = "MB/s" if name.endswith("per_second") else "MB" if number is not value else ""
        print(f"{name:28} {number if isinstance(number, str) else f'{number:,.2f}'} {unit}")


if __name__ == "__main__":
    main()
