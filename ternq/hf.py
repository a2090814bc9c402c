"""The door to transformers: any of the models ternq knows, loaded and checked.

What names a model is in `ternq.origin`. Whatever is wrong with it is said, in one sentence, before
any long work begins: transformers itself would fill missing weights with random ones and go on.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ternq import checkpoint
from ternq.errors import InputError, RecipeError, ResourceError, VerificationError
from ternq.formats.gguf_file import Header
from ternq.kernels import choice, rounds_activations
from ternq.linear import packed_layers
from ternq.memory import give_back
from ternq.modeling_ternq import METHOD, PackedLinear
from ternq.origin import (
    BASE_FOLDER,
    RUN_FILE,
    STUDENT_FILE,
    find,
    in_words,
    local_path,
    model_folder,
    place,
    read_run,
    refuse_unfinished,
)
from ternq.outlines import check_structure, config_of, dtype_of, quantized_by, skeleton
from ternq.progress import Event, Progress, ignore
from ternq.publish import MANIFEST, verify_files
from ternq.recipe import Recipe, display_name
from ternq.states import load_state, put_ternary
from ternq.text import first_line, is_offline

Kind = Literal["dense", "packed", "run"]


@dataclass
class Loaded:
    """A model with its tokenizer, and where it came from.

    ``dtype`` is that of the checkpoint's weights on disk, whatever the model was loaded in.
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    kind: Kind
    path: Path | None
    dtype: torch.dtype


def load(
    model: str,
    *,
    dtype: torch.dtype | Callable[[Any], torch.dtype | None] | None = None,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    int8_activations: bool = False,
    progress: Progress = ignore,
) -> Loaded:
    """Load a causal language model of any kind, in evaluation mode.

    ``dtype`` defaults to float32 on the CPU and to the checkpoint's own elsewhere; a function says
    it of the configuration. ``int8_activations``: packed layers round them to 8 bits, not 16.

    Raises:
        InputError: it is missing, damaged, not a causal language model, quantized by another
            program, incomplete, or holds weights that are not finite.
        VerificationError: the same of an artefact of ternq.
    """
    path, offline = place(model, offline)
    progress(Event("load", f"Loading {model}"))
    if path is not None and (path / RUN_FILE).is_file():
        return _load_run(model, path, device)
    where, options = find(model, path)
    ours = path is not None and (path / MANIFEST).is_file()
    trusted = trust_remote_code and not ours  # the code in an artefact is a copy of our own
    options |= {"local_files_only": offline, "trust_remote_code": trusted}
    with _of_artefact(path), in_words(model, offline):
        config = config_of(model, where, options)
        own = getattr(config, "dtype", None)
        if callable(dtype):
            dtype = dtype(config)
        if dtype is None:
            dtype = torch.float32 if device == "cpu" or own is None else own
        loaded, tokenizer = _weights(model, where, options, config, dtype)
        _refuse_not_finite(loaded, model)
    packed = packed_layers(loaded)
    kind: Kind = "packed" if packed else "dense"
    if int8_activations and not packed:
        said = f"Activations of '{model}' are not rounded: it has no packed layers."
        progress(Event("load", said, level="warning"))
    if int8_activations and packed and not rounds_activations(device):
        raise RecipeError(
            f"--int8-activations is of the C kernels, and on {device} products are made by "
            f"{choice(device)}."
        )
    for layer in packed.values() if int8_activations else ():
        layer.act = "int8"
    stored = own if isinstance(own, torch.dtype) and "gguf_file" not in options else torch.float32
    loaded = _to(loaded.eval(), device)
    if packed and torch.device(device).type == "cpu":
        _leave_file(loaded, packed.values())
    return Loaded(loaded, tokenizer, display_name(model), model, kind, path, stored)


def _leave_file(model: Any, packed: Iterable[PackedLinear]) -> None:
    """Copy what is mapped from the model's file, and give the rest of it back.

    Loading maps the file whole: while one tensor lies in it, so do the packed layers, which are
    read no more once they have the form of their kernel.
    """
    own = {id(layer.words) for layer in packed if layer.prepare()}
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in own:
                module._buffers[name] = buffer.clone()  # with new data alone it stays a view
    give_back()


def drawn(
    model: str,
    seed: int,
    *,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
) -> Loaded:
    """A model of the configuration and tokenizer of ``model``, in float32, with new weights.

    They are drawn as the architecture itself initialises them, on the CPU, and depend on ``seed``
    alone. No weights need to be there; those that are there are not read.

    Raises:
        InputError: configuration or tokenizer is missing, damaged, or not of a causal language
            model.
    """
    from transformers import AutoModelForCausalLM

    path = local_path(model)
    offline = offline if path is not None else is_offline(offline)
    progress(Event("load", f"Drawing new weights for the configuration of {model}"))
    base = path if path is None or not (path / RUN_FILE).is_file() else path / BASE_FOLDER
    where, options = find(model, base, weights=False)
    options |= {"local_files_only": offline, "trust_remote_code": trust_remote_code}
    build: Any = AutoModelForCausalLM.from_config
    with in_words(model, offline), torch.random.fork_rng(devices=[]):
        config = config_of(model, where, options)
        stored = dtype_of(config)
        for name in ("quantization_config", "auto_map") if quantized_by(config) else ():
            if hasattr(config, name):
                delattr(config, name)
        tokenizer = _tokenizer(model, where, options)
        torch.manual_seed(seed)
        new = build(config, dtype=torch.float32)
    return Loaded(
        _to(new.eval(), device), tokenizer, display_name(model), model, "dense", path, stored
    )


@contextmanager
def _of_artefact(path: Path | None) -> Iterator[None]:
    """What is wrong with an artefact of ours is a `VerificationError`, with its own exit status."""
    if path is None or not (path / MANIFEST).is_file():
        yield
        return
    verify_files(path)
    try:
        check_structure(path)
        yield
    except InputError as error:
        hint = f"`ternq pack --verify {path}` says more."
        raise VerificationError(error.message, hint) from error


def _to(model: Any, device: str) -> Any:
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("'meta' holds no numbers")
        if model.device == torch.device(device):
            return model  # packed layers would go back to the file's form and out of it again
        return model.to(device)
    except torch.OutOfMemoryError:
        raise ResourceError(f"'{device}' has not enough memory for the model.") from None
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(f"No device '{device}' here: {first_line(error)}") from None


def outline(model: str, *, offline: bool = False) -> tuple[Loaded, Path]:
    """A dense checkpoint without its weights: a skeleton with its tokenizer; and its folder.

    Raises:
        InputError: it is no folder of safetensors, is quantized or ternary, or has no tokenizer.
    """
    path = local_path(model)
    if path is not None and (path / RUN_FILE).is_file():
        raise InputError(f"'{model}' is a run, and its student is ternary already.")
    folder = model_folder(model, path, offline)
    with in_words(model, offline=True):
        config = config_of(model, str(folder), {"local_files_only": True})
        if quantized_by(config) == METHOD:
            raise InputError(f"'{model}' is ternary already.")
        tokenizer = _tokenizer(model, str(folder), {"local_files_only": True})
    name, stored = display_name(model), dtype_of(config)
    return Loaded(skeleton(folder), tokenizer, name, model, "dense", path, stored), folder


def save_base(loaded: Loaded, folder: Path) -> None:
    """Write configuration, generation settings and tokenizer; no weights."""
    loaded.model.config.save_pretrained(folder)
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


_BASE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def save_gguf_base(file: Path, folder: Path) -> None:
    """Write configuration and tokenizer of a GGUF file as transformers understands them."""
    from transformers import AutoConfig

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with in_words(str(file), offline=True):
        AutoConfig.from_pretrained(file.parent, **where).save_pretrained(folder)
        _tokenizer(str(file), str(file.parent), where).save_pretrained(folder)


def copy_base(base: Path, folder: Path) -> None:
    """Copy generation settings and tokenizer from one folder to another, and nothing else."""
    for name in _BASE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _load_run(model: str, path: Path, device: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    build: Any = AutoModelForCausalLM.from_config
    refuse_unfinished(path)
    run = read_run(path)
    recipe = Recipe.from_json(run["recipe"])
    with in_words(model, offline=True):
        config = AutoConfig.from_pretrained(path / BASE_FOLDER, local_files_only=True)
        loaded = build(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path / BASE_FOLDER, local_files_only=True)
    put_ternary(loaded, run["modules"], recipe)
    load_state(loaded, checkpoint.load_tensors(path / STUDENT_FILE), str(path / STUDENT_FILE))
    stored = getattr(torch, str(run["dtype"]))
    name = display_name(recipe.model)
    kind: Kind = "run" if run["modules"] else "dense"  # of --method float
    return Loaded(_to(loaded.eval(), device), tokenizer, name, model, kind, path, stored)


def _weights(
    model: str, where: str, options: dict[str, Any], config: Any, dtype: torch.dtype
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    extra = {} if "gguf_file" in options else {"use_safetensors": True, "config": config}
    # transformers looks for an adapter beside the weights, and there it forgets what options say
    extra["adapter_kwargs"] = {"local_files_only": options["local_files_only"]}
    found: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, output_loading_info=True, **extra, **options
    )
    loaded, info = found
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"'{model}' lacks {len(missing)} of the weights that its configuration asks for, "
            f"such as {missing[0]}."
        )
    return loaded, _tokenizer(model, where, options)


def _tokenizer(model: str, where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged file
        raise InputError(
            f"'{model}' has no tokenizer that can be loaded ({first_line(error).rstrip(' :.')}).",
            "Put the model's own tokenizer.json and tokenizer_config.json beside its weights.",
        ) from error
    if "gguf_file" in options:
        _cut_digits(found, Header(Path(where) / options["gguf_file"]))
    return found


def _cut_digits(tokenizer: Any, header: Header) -> None:
    """Cut numbers into digits where a GGUF file says so by name; transformers 5.23 forgets that."""
    from tokenizers import pre_tokenizers

    core = tokenizer.backend_tokenizer
    if header.cuts_digits and isinstance(core.pre_tokenizer, pre_tokenizers.ByteLevel):
        digits = pre_tokenizers.Digits(individual_digits=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, core.pre_tokenizer])


def _refuse_not_finite(model: nn.Module, source: str) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        ends = torch.stack(torch.aminmax(tensor))  # of which one is NaN or Inf if any value is
        if not bool(torch.isfinite(ends).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"'{source}' has {bad} NaN or Inf values in {name}.")
