"""Whole models: tokens a second of ``ternq generate``, transformers and llama.cpp, in one run.

    ternq ternarize model.gguf --tokens 0 --data notes.txt -o packed
    python bench/generate.py packed --llama llama/bin/python --gguf model-TQ2_0.gguf

Each engine loads its model in a process of its own and then waits; in every round each of them in
turn reads a prompt and writes some tokens, so that what disturbs the machine disturbs all alike.
Medians of the rounds are compared. The engines:

- ``native``, ``native-int8``: the decoder of ``ternq generate``, activations of 16 and 8 bits;
- ``transformers``: the same packed model through transformers' ``generate``;
- ``dense``: the same values in dense float32 layers, through transformers' ``generate``;
- ``compiled``, ``dense-compiled``: these two with a static cache and a compiled ``forward``;
- one of llama.cpp for each ``--gguf``, in the Python that ``--llama`` names (llama-cpp-python built
  from its source). Its activations are rounded to 8 bits and its cache is float16.

The text is random ids and the likeliest continuation, whatever it says. Memory is what a process
holds in a round, less what it held when it had read the tokenizer and imported torch and
transformers' code of models; for llama.cpp when it had imported that.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = ("native", "native-int8", "transformers", "dense", "compiled", "dense-compiled")
Round = Callable[[], tuple[float, float]]
"""Reads the prompt and writes the new tokens: the seconds of both."""


def worker(engine: str, model: str, prompt: int, new: int, threads: int) -> None:
    """Answers every line on stdin with a round, as a line of JSON."""
    before, once = (_llama if engine == "llama.cpp" else _ours)(engine, model, prompt, new, threads)
    for _ in sys.stdin:
        read, wrote = once()
        found = {"prefill": prompt / read, "decode": (new - 1) / wrote}
        print(json.dumps(found | {"resident": resident() - before}), flush=True)


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _ours(engine: str, model: str, prompt: int, new: int, threads: int) -> tuple[int, Round]:
    import torch
    from transformers import AutoTokenizer

    from ternq import hf, outlines
    from ternq.decoder import load_dtype
    from ternq.memory import give_back
    from ternq.proof import dense
    from ternq.recipe import DEMO_FOLDER

    torch.set_num_threads(threads)
    outlines.skeleton(DEMO_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(model)
    give_back()
    before = resident()
    del tokenizer
    native = engine.startswith("native")
    loaded = hf.load(model, dtype=load_dtype if native else None, offline=True).model
    vocabulary = loaded.config.vocab_size
    ids = torch.randint(vocabulary, (prompt,), generator=torch.Generator().manual_seed(0))
    if native:
        return before, _native(loaded, ids.tolist(), new, engine == "native-int8")
    if engine.startswith("dense"):
        dense(loaded)
    give_back()
    return before, _transformers(loaded, ids.unsqueeze(0), new, engine.endswith("compiled"))


def _native(model: Any, ids: list[int], new: int, int8: bool) -> Round:
    import torch

    from ternq.decoder import Decoder
    from ternq.sampling import Sampling

    decoder = Decoder(model, len(ids) + new, int8=int8)
    torch.set_num_threads(1)

    def once() -> tuple[float, float]:
        began = time.perf_counter()
        token = Sampling().draw(decoder.logits(ids, 0))
        first = time.perf_counter()
        for i in range(new - 1):
            token = Sampling().draw(decoder.logits([token], len(ids) + i))
        return first - began, time.perf_counter() - first

    return once


def _transformers(model: Any, ids: Any, new: int, compiled: bool) -> Round:
    import torch

    from ternq.efficiency import Times, generated

    model.generation_config = type(model.generation_config)()
    if compiled:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward)

    def once() -> tuple[float, float]:
        times = generated(model, ids, new, Times())
        return times.stamps[1] - times.stamps[0], times.stamps[-1] - times.stamps[1]

    return once


def _llama(engine: str, model: str, prompt: int, new: int, threads: int) -> tuple[int, Round]:
    import llama_cpp
    import numpy as np

    before = resident()
    llama = llama_cpp.Llama(
        model,
        n_ctx=prompt + new,
        n_batch=prompt,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    ids = np.random.default_rng(0).integers(1000, llama.n_vocab(), prompt).tolist()

    def likeliest() -> int:
        pointer = llama_cpp.llama_get_logits(llama.ctx)
        return int(np.argmax(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),))))

    def once() -> tuple[float, float]:
        llama.reset()
        began = time.perf_counter()
        llama.eval(ids)
        token = likeliest()
        first = time.perf_counter()
        for _ in range(new - 1):
            llama.eval([token])
            token = likeliest()
        return first - began, time.perf_counter() - first

    return before, once


def start(engine: str, model: str, python: str, options: argparse.Namespace) -> Any:
    """A worker; its environment has as many threads as are asked for."""
    sizes = [str(n) for n in (options.prompt, options.new, options.threads)]
    return subprocess.Popen(
        [python, "-P", __file__, "--worker", engine, model, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        text=True,
    )


def ask(child: Any) -> dict[str, float]:
    child.stdin.write("\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        sys.exit("an engine ended; its last words stand above")
    found: dict[str, float] = json.loads(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("artefact", nargs="?", help="a packed model")
    parser.add_argument("--engines", default=",".join(OURS), help="of ours, with commas")
    parser.add_argument("--gguf", action="append", default=[], help="a file for llama.cpp")
    parser.add_argument("--llama", default=sys.executable, help="the Python with llama-cpp-python")
    parser.add_argument("--prompt", type=int, default=128, help="tokens that are read")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object, and no table")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        engine, model, *sizes = options.worker
        worker(engine, model, *map(int, sizes))
    elif options.artefact is None:
        parser.error("a packed model is needed")
    else:
        show(measure(options), options)


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Engine -> medians of its rounds."""
    asked = {name: (name, options.artefact, sys.executable) for name in options.engines.split(",")}
    asked |= {Path(f).stem: ("llama.cpp", f, options.llama) for f in options.gguf}
    children = {name: start(*one, options) for name, one in asked.items()}
    for child in children.values():
        ask(child)  # warms up
    rounds = [{n: ask(child) for n, child in children.items()} for _ in range(options.rounds)]
    for child in children.values():
        child.stdin.close()
        child.wait()
    return {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        for name in asked
    }


def show(medians: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    size = sum(f.stat().st_size for f in Path(options.artefact).glob("*.safetensors"))
    about = {"machine": machine(), "threads": options.threads, "rounds": options.rounds}
    if options.json:
        print(json.dumps(about | {"file_bytes": size, "engines": medians}))
        return
    print(
        *(f"{key} {value}" for key, value in about.items()), f"file {size / 1e6:.1f} MB", sep=", "
    )
    print(f"{'':24}{'prompt':>10}{'new':>10}{'memory':>12}")
    for name, found in medians.items():
        memory = f"{found['resident'] / 1e6:.0f} MB"
        print(f"{name:24}{found['prefill']:10.1f}{found['decode']:10.1f}{memory:>12}")


def machine() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
