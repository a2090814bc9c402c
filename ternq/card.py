"""The model card of a folder: how to load it first, then what it is, how good, and how it was made.

Only what is known is written: a measurement that was not made is not in the card.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ternq.recipe import BASELINES
from ternq.shown import number
from ternq.source import Source

Facts = Mapping[str, Any]

_LOADING = {
    "ternq": """\
Load it with `import ternq` first (`pip install ternq`); without, pass `trust_remote_code=True`:

```python
import ternq
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}")
```

Without either, loading fails; never pass `ignore_mismatched_sizes=True`, which would replace the
packed layers by random ones. `ternq pack --verify {quoted}` checks every file and every layer.
""",
    "dense": """\
Load it with plain transformers; every weight is there as a {encoding} number:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}")
```
""",
    "compressed-tensors": """\
Load it with transformers after `pip install compressed-tensors`, or `vllm serve {quoted}`:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}")
```
""",
    "gguf": """\
Run it with llama.cpp (`llama-cli -m FILE.gguf -p "Once"`), or `pip install llama-cpp-python`:

```python
from llama_cpp import Llama
print(Llama("{name}/{file}")("Once", max_tokens=32)["choices"][0]["text"])
```
""",
    "mlx": """\
Load it with MLX (`pip install mlx-lm`):

```python
from mlx_lm import generate, load
print(generate(*load("{name}"), "Once"))
```
""",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARY = {"mlx": "mlx", "gguf": "gguf"}


def card(name: str, source: Source, about: Facts, file: str = "") -> str:
    """The text of ``README.md``; ``about`` is what goes into the manifest beside the files.

    ``file`` is the one to load, where it is not the folder.
    """
    base = about.get("base_model") or {}
    loading = _LOADING[about["format"]].format(
        name=name, quoted=shlex.quote(name), encoding=about.get("encoding", ""), file=file
    )
    parts = [_front_matter(about, base), loading, f"# {name}\n", _what(source, about, base)]
    parts += filter(None, (_results(about), _recipe(about), _made(about)))
    return "\n".join(parts)


def _front_matter(about: Facts, base: Facts) -> str:
    lines = [f"library_name: {_LIBRARY.get(about['format'], 'transformers')}"]
    ternary = ", ternary, 1.58-bit" if about["weights"]["coverage"] else ""
    lines += ["pipeline_tag: text-generation", f"tags: [ternq{ternary}]"]
    if _HUB_ID.fullmatch(str(base.get("name"))):
        lines.append(f"base_model: {json.dumps(base['name'])}")
    if base.get("license"):
        lines.append(f"license: {json.dumps(base['license'])}")
    return "\n".join(["---", *lines, "---"])


def _what(source: Source, about: Facts, base: Facts) -> str:
    weights = about["weights"]
    form = "scale * code + shift" if source.shift else "scale * code"
    name = str(base.get("name", "not recorded"))
    rows = [("base model", name if _HUB_ID.fullmatch(name) else name.rpartition("/")[2])]
    rows.append(("licence of the base model", base.get("license") or "not stated by it"))
    if made := _scratch(about):
        rows = [("weights", f"trained from scratch, with the configuration of {made}")]
    if source.modules:
        rows.append(
            (
                "ternary",
                f"{weights['coverage']:.1%} of {weights['parameters']:,} parameters: {form}, code "
                f"in {{-1, 0, +1}}, groups of {source.group_size} columns",
            )
        )
    rows += [
        (label, f"{weights[key]:.3f} bits a weight")
        for label, key in (
            ("ternary layers" if source.modules else "layers, as stored packed", "bpw_linear"),
            ("embeddings and head", "bpw_embeddings"),
            ("whole file", "bpw_file"),
        )
        if weights.get(key) is not None
    ]
    verify = about["verify"]
    what = f"{verify['checked']} layers" if source.modules else "every tensor"
    proof = f"{what} read back and compared with what was written, to the bit"
    if verify.get("reader"):
        proof += f", by {verify['reader']}"
    if verify.get("max_abs_logit_diff") is not None:
        proof += f"; logits differ by at most {verify['max_abs_logit_diff']:.2g}"
    rows.append(("verified", proof))
    for key, label in (("rounded", "rounded"), ("lost", "LOSSY: relative error")):
        if found := verify.get(key):
            layer = max(found, key=lambda n: found[n])
            what = f"{len(found)} layers, the most in {layer}: {found[layer]:.2g}"
            rows.append((label, what + (" of a scale" if key == "rounded" else "")))
    return _table(("", ""), rows)


def _results(about: Facts) -> str | None:
    """A row per task and metric, a column per model: the base model beside the ternary one."""
    results = about.get("results")
    if not results:
        return None
    metrics = dict.fromkeys(
        (task, metric)
        for own in results.values()
        for task, values in own.items()
        for metric, value in values.items()
        if isinstance(value, float) and not metric.endswith("_stderr")
    )
    rows = []
    for task, metric in metrics:
        cells = [_cell(own.get(task, {}), metric) for own in results.values()]
        rows.append((task, metric.replace("_", " "), *cells))
    text = _table(("task", "metric", *map(str, results)), rows)
    held_out = (about.get("student") or {}).get("text")
    note = f"\n`held-out` is {held_out}.\n" if held_out else ""
    return f"## Results\n\n{text}{note}"


def _cell(values: Facts, metric: str) -> str:
    shown = number(values.get(metric))
    error = values.get(f"{metric}_stderr")
    partial = " (partial)" if values.get("partial") else ""
    return f"{shown} ± {number(error)}{partial}" if isinstance(error, float) else shown + partial


def _recipe(about: Facts) -> str | None:
    recipe = about.get("recipe")
    if not recipe:
        return None
    training = recipe["training"]
    steps = training.get("steps")
    size = training["batch_size"] * training["sequence_length"]
    rows = [("method", _method(recipe))]
    if steps is not None:
        length = f"{steps:,} steps, {steps * size:,} tokens, seed {recipe['seed']}"
        rows.append(("training", length))
    rows += [("data", spec) for spec in about.get("data") or training.get("data") or ()]
    hashes = dict(about.get("data_sha256") or {})
    if about.get("text_sha256"):
        hashes["the held-out tokens"] = about["text_sha256"]
    rows += [(f"SHA-256 of {name}", f"`{digest}`") for name, digest in hashes.items()]
    text = _table(("", ""), rows)
    replay = json.dumps(recipe, indent=1, ensure_ascii=False)
    verb = "distill" if training.get("from_scratch") else "ternarize"
    said = f"The recipe, which `ternq {verb} MODEL --recipe FILE` replays from a file:"
    recipe_text = f"{said}\n\n```json\n{replay}\n```\n"
    return f"## How it was trained\n\n{text}\n{recipe_text}"


def _method(recipe: Facts) -> str:
    scheme, training = recipe["scheme"], recipe["training"]
    learned = "scale and shift" if scheme["shift"] else "scale"
    method, form = scheme.get("method", "dlt"), "" if scheme.get("symmetric") else "a"
    grid = f"{scheme.get('bits') or 2} bits, {form}symmetric, grid {scheme.get('grid') or 'minmax'}"
    rule = {
        "absmean": "TriLM (absmean, one scale a matrix)",
        "float": "dense, in floating point",
        "rtn": f"RTN (round to nearest, {grid})",
        "gptq": f"GPTQ ({grid})",
        "twn": "TWN",
        "pt2": "PT2-LLM",
        "billm": "BiLLM",
    }.get(method, f"DLT (learned {learned} of each group)")
    if method in BASELINES and training.get("steps") == 0:
        return f"{rule}, only rounded"
    alone = training.get("objective") == "ce"
    return f"{rule} with {'cross-entropy alone' if alone else 'OFF (feature cosine)'}"


def _scratch(about: Facts) -> str | None:
    """The model whose configuration a model from scratch has; None if it is not from scratch."""
    recipe = about.get("recipe") or {}
    if not (recipe.get("training") or {}).get("from_scratch"):
        return None
    name = str(recipe.get("model"))
    return name if _HUB_ID.fullmatch(name) else name.rpartition("/")[2]


def _made(about: Facts) -> str | None:
    """The commands that made it, the first one first, and the versions of each."""
    made = [*about.get("history", ()), *filter(None, [about.get("made")])]
    if not made:
        return None
    parts = []
    for one in made:
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        command = f"```bash\n{one['command']}\n```\n\n" if one.get("command") else ""
        parts.append(f"{command}With {versions}.\n")
    return "## How it was made\n\n" + "\n".join(parts)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(_lines(header, rows)) + "\n"


def _lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        cells = (" ".join(str(cell).split()).replace("|", "\\|") for cell in row)
        yield "| " + " | ".join(cells) + " |"
