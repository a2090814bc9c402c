"""Ternary weights to a packed artefact, proved by `ternq.proof` before it is published.

The file format is specified in docs/format.md. Codes are packed from integers, never from the
output of the straight-through estimator, which leaves the grid in floating point.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import checkpoint, hf, packing
from ternq.errors import InputError, RecipeError, ResourceError, VerificationError
from ternq.hf import Loaded
from ternq.linear import (
    Dense,
    decoder_blocks,
    dense_parts,
    is_linear,
    packed_layers,
    ternary_layers,
)
from ternq.progress import Event, Progress, ignore
from ternq.proof import exported, prove, stored_names, verify
from ternq.weights import stored_dtype, weights_summary

__all__ = ["pack", "stored_dtype", "stored_tensors", "verify"]

CARD = """\
---
library_name: transformers
tags: [ternq, ternary]
---
Load it with `import ternq` (`pip install ternq`), then transformers as usual:

```python
import ternq
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{name}: {coverage:.1%} of the weights are ternary (scale * code{shift}, groups of {group_size}), at
{bpw_linear:.2f} bits each; the whole file has {bpw_total:.2f} bits a weight. `ternq pack --verify`
checks the files. Without ternq, loading fails; do not pass `ignore_mismatched_sizes=True`, which
would replace the packed layers by random ones.
"""


def pack(
    model: str | Loaded,
    out: Path,
    *,
    overwrite: bool = False,
    keep_dtype: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a trained ternary model as a packed artefact at ``out``; returns the contract's fields.

    ``extra`` goes into the manifest. Before the folder gets its name it is loaded again and
    compared to the student: codes, scales, shifts and all other tensors to the bit, and logits.

    Raises:
        InputError: the model is not a ternary one in training.
        RecipeError: ``out`` exists, or is the model itself.
        ResourceError: no room, or no permission.
        VerificationError: what was written is not what was trained; nothing is published.
    """
    checkpoint.check_output(out, overwrite)
    if isinstance(model, str):
        model = hf.load(model, offline=offline, trust_remote_code=trust_remote_code)
    _check_input(model, out)
    dtype = stored_dtype(model.dtype, keep_dtype)
    note = _dtype_note(model.dtype, dtype)
    if note:
        progress(Event("pack", note))
    tensors = stored_tensors(model.model, dtype, progress)
    _check_room(sum(tensor.nbytes for tensor in tensors.values()), out)
    weights = weights_summary(model.model, dtype)
    with checkpoint.staging(out, overwrite) as staged, _evaluating(model.model):
        _write(model, staged, out.name, tensors, weights, dtype)
        verified = prove(model.model, staged, tensors, progress)
        about = {"format": "ternq", "weights": weights, "verify": verified, **_recipe(model)}
        manifest = checkpoint.write_manifest(staged, {**about, **(extra or {})})
    return {
        "out": str(out),
        "format": "ternq",
        "weights": weights,
        "files": manifest["files"],
        "verify": verified,
        "dense_layers": [vars(d) for d in _dense(model.model)],
        "dtype_note": note,
    }


def stored_tensors(
    model: nn.Module, dtype: torch.dtype, progress: Progress = ignore
) -> dict[str, Tensor]:
    """The tensors as the file holds them: layers packed, other parameters in ``dtype``, ties once.

    Raises:
        VerificationError: a value that its type in the file cannot hold.
    """
    layers, parameters = ternary_layers(model), {n for n, _ in model.named_parameters()}
    packed = stored_names(layers)
    tensors = {}
    for name, tensor in hf.unique_state(model).items():
        if name not in packed:
            tensors[name] = _converted(name, tensor, dtype if name in parameters else tensor.dtype)
    for done, (name, layer) in enumerate(layers.items(), 1):
        codes, scale, shift = exported(name, layer)
        tensors[f"{name}.weight"] = packing.pack_base3(codes)
        tensors[f"{name}.weight_scale"] = scale
        if shift is not None:
            tensors[f"{name}.weight_shift"] = shift
        progress(Event("pack", done=done, total=len(layers)))
    return tensors


def _check_input(model: Loaded, out: Path) -> None:
    if packed_layers(model.model):
        raise InputError(
            f"'{model.source}' is packed already.",
            f"`ternq pack --verify {model.source}` checks it.",
        )
    if not ternary_layers(model.model):
        raise InputError(
            f"'{model.source}' is not ternary, so there is nothing to pack.",
            f"Make it ternary first: ternq ternarize {model.source}",
        )
    where = None if model.path is None else model.path.resolve()
    if where is not None and out.resolve() in [where, *where.parents]:
        raise RecipeError(f"{out} holds the model itself.", "Choose another name with -o.")


def _check_room(size: int, out: Path) -> None:
    free = checkpoint.free_disk(out)
    if size > free:
        raise ResourceError(
            f"{out} takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free.",
            "Free some space, or choose another place with -o.",
        )


def _dtype_note(of_model: torch.dtype, stored: torch.dtype) -> str | None:
    if of_model == stored:
        return None
    return (
        f"Tensors that stay dense are {checkpoint.dtype_name(of_model)} in the model and "
        f"{checkpoint.dtype_name(stored)} in the file; --keep-dtype keeps them."
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    new = tensor.to(dtype)
    if bool((tensor.isfinite() & ~new.isfinite()).any()):
        raise VerificationError(
            f"{name} has values that {checkpoint.dtype_name(dtype)} cannot hold.",
            "Start from a float32 or bfloat16 checkpoint.",
        )
    return new


def _write(
    model: Loaded,
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    weights: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Everything but the manifest: configuration, tokenizer, tensors, card."""
    layers = ternary_layers(model.model)
    layer = next(iter(layers.values()))
    hf.save_base(model, folder)
    config = checkpoint.read_json(folder / "config.json")
    config.setdefault("architectures", [type(model.model).__name__])
    config["dtype"] = checkpoint.dtype_name(dtype)
    config["quantization_config"] = {
        "quant_method": "ternq",
        "format_version": checkpoint.FORMAT_VERSION,
        "codec": "base3",
        "group_size": layer.group_size,
        "shift": layer.weight_shift is not None,
        "modules": list(layers),
    }
    checkpoint.write_json(folder / "config.json", config)
    checkpoint.save_sharded(tensors, folder)
    shift = " + shift" if layer.weight_shift is not None else ""
    card = CARD.format(name=name, shift=shift, group_size=layer.group_size, **weights)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _recipe(model: Loaded) -> dict[str, Any]:
    """How a run was made, if the model comes from one."""
    if model.kind != "run" or model.path is None:
        return {}
    run = checkpoint.read_json(model.path / hf.RUN_FILE)
    return {"recipe": run["recipe"]} if "recipe" in run else {}


def _dense(model: nn.Module) -> list[Dense]:
    """What stays dense, and why; a linear layer inside the blocks was skipped."""
    blocks = decoder_blocks(model)[0] + "."
    skipped = {n for n, m in model.named_modules() if is_linear(m) and n.startswith(blocks)}
    return list(dense_parts(model, set(ternary_layers(model)), skipped))
