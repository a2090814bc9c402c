"""The door to transformers: any of the models ternq knows, loaded and checked.

A model is a hub id, a folder of safetensors, a ``.gguf`` file, an artefact of ``ternq pack``, a run
of ``ternq distill``, or ``demo``. Whatever is wrong with it is said here, in one sentence, before
any long work begins: transformers itself would fill missing weights with random ones and go on.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ternq import checkpoint, processes, structure
from ternq.errors import InputError, ResourceError, VerificationError
from ternq.formats.gguf_file import Q2_0, Header
from ternq.linear import layer_class, packed_layers
from ternq.modeling_ternq import (
    METHOD,
    Int8,
    Int8Linear,
    TernqConfig,
    features,
    is_linear,
    put_packed,
)
from ternq.progress import Event, Progress, ignore
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe, Scheme, display_name

Kind = Literal["dense", "packed", "run"]
RUN_FILE = "run.json"  # makes a folder a run
REPORT = "report.json"  # what its training measured
STUDENT_FILE = "student.safetensors"  # the trained student of a finished run
BASE_FOLDER = "base"  # configuration and tokenizer of the model a run trains
# what transformers raises for a configuration or file that it cannot make a model of
_REFUSALS: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, RuntimeError, ImportError)
_REFUSALS += (TypeError, AttributeError, AssertionError, MemoryError, LookupError, ArithmeticError)
_REFUSALS += (StrictDataclassError,)


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
    path = local_path(model)
    progress(Event("load", f"Loading {model}"))
    if path is not None and (path / RUN_FILE).is_file():
        return _load_run(model, path, device)
    where, options = _where(model, path)
    ours = path is not None and (path / checkpoint.MANIFEST).is_file()
    trusted = trust_remote_code and not ours  # the code in an artefact is a copy of our own
    options |= {"local_files_only": offline, "trust_remote_code": trusted}
    with _of_artefact(path), _in_words(model, offline):
        config = _config(model, where, options)
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
    for layer in packed.values() if int8_activations else ():
        layer.act = "int8"
    stored = own if isinstance(own, torch.dtype) and "gguf_file" not in options else torch.float32
    return Loaded(
        _to(loaded.eval(), device), tokenizer, display_name(model), model, kind, path, stored
    )


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
    progress(Event("load", f"Drawing new weights for the configuration of {model}"))
    base = path if path is None or not (path / RUN_FILE).is_file() else path / BASE_FOLDER
    where, options = _where(model, base, weights=False)
    options |= {"local_files_only": offline, "trust_remote_code": trust_remote_code}
    build: Any = AutoModelForCausalLM.from_config
    with _in_words(model, offline), torch.random.fork_rng(devices=[]):
        config = _config(model, where, options)
        own = getattr(config, "dtype", None)
        for name in ("quantization_config", "auto_map") if quantized_by(config) else ():
            if hasattr(config, name):
                delattr(config, name)
        tokenizer = _tokenizer(model, where, options)
        torch.manual_seed(seed)
        new = build(config, dtype=torch.float32)
    stored = own if isinstance(own, torch.dtype) else torch.float32
    return Loaded(
        _to(new.eval(), device), tokenizer, display_name(model), model, "dense", path, stored
    )


@contextmanager
def _of_artefact(path: Path | None) -> Iterator[None]:
    """What is wrong with an artefact of ours is a `VerificationError`, with its own exit status."""
    if path is None or not (path / checkpoint.MANIFEST).is_file():
        yield
        return
    checkpoint.verify_files(path)
    try:
        check_structure(path)
        yield
    except InputError as error:
        hint = f"`ternq pack --verify {path}` says more."
        raise VerificationError(error.message, hint) from error


def _to(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        raise ResourceError(f"'{device}' has not enough memory for the model.") from None
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(f"No device '{device}' here: {_first_line(error)}") from None


def local_path(model: str) -> Path | None:
    """The folder or file that ``model`` names, or None if it can only be a hub id.

    Raises:
        InputError: it looks like a path, and nothing is there.
    """
    if model == DEMO and not Path(DEMO, "config.json").exists():
        return DEMO_FOLDER
    path = Path(model).expanduser()
    if path.exists():
        return path
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith((".gguf", "/"))
    if looks_like_path or model.count("/") > 1 or "\\" in model:
        raise InputError(f"There is no file or folder '{model}'.")
    return None


def outline(model: str, *, offline: bool = False) -> tuple[Loaded, Path]:
    """A dense checkpoint without its weights: a skeleton with its tokenizer; and its folder.

    Raises:
        InputError: it is no folder of safetensors, is quantized or ternary, or has no tokenizer.
    """
    path = local_path(model)
    if path is not None and (path / RUN_FILE).is_file():
        raise InputError(f"'{model}' is a run, and its student is ternary already.")
    folder = model_folder(model, path, offline)
    with _in_words(model, offline=True):
        config = _config(model, str(folder), {"local_files_only": True})
        if quantized_by(config) == METHOD:
            raise InputError(f"'{model}' is ternary already.")
        tokenizer = _tokenizer(model, str(folder), {"local_files_only": True})
    own = getattr(config, "dtype", None)
    stored = own if isinstance(own, torch.dtype) else torch.float32
    name = display_name(model)
    return Loaded(skeleton(folder), tokenizer, name, model, "dense", path, stored), folder


def names_in_files(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the model -> name in its files, by transformers' own rules; others are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state = model.state_dict()
    rules: Any = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    found = {
        rename_source_key(name, rules, [], model.base_model_prefix, state)[0]: name
        for name in stored
    }
    return {name: found[name] for name in state if name in found}


def refuse_no_model(model: str, path: Path) -> None:
    """`InputError` where a folder or file is no model, as far as its names tell."""
    if not (path / RUN_FILE).is_file():
        _where(model, path)


def refuse_not_cached(model: str) -> None:
    """`InputError` where the hub's cache has no model of this name."""
    from huggingface_hub import hf_hub_download

    with _in_words(model, offline=True):
        hf_hub_download(model, "config.json", local_files_only=True)


def model_folder(model: str, path: Path | None, offline: bool) -> Path:
    """The folder of a dense checkpoint: ``path``, or the hub's files in the local cache.

    Raises:
        InputError: it is no model, or cannot be had.
    """
    if path is not None:
        where, options = _where(model, path)
        if "gguf_file" in options:
            raise InputError(f"'{model}' is a file; a folder of safetensors is wanted here.")
        return Path(where)
    from huggingface_hub import snapshot_download

    with _in_words(model, offline):
        found = snapshot_download(model, allow_patterns=_PATTERNS, local_files_only=offline)
    return Path(found)


def licence(model: str, path: Path | None = None, offline: bool = False) -> str | None:
    """The licence that a model's card names; None if there is no card, or it names none."""
    from huggingface_hub import ModelCard, hf_hub_download
    from yaml import YAMLError

    try:
        if path is None:
            path = Path(hf_hub_download(model, "README.md", local_files_only=offline)).parent
        found = ModelCard.load(path / "README.md").data.get("license")
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def skeleton(folder: Path, packed: TernqConfig | None = None, *, buffers: bool = False) -> Any:
    """The model that ``config.json`` of a folder describes, without memory (on "meta").

    It is dense, or has the packed layers that ``packed`` names. With ``buffers`` these are real, as
    in a model loaded in float32 (transformers computes them as it builds a model).

    Raises:
        InputError: the configuration is damaged, or is not one of a causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with _in_words(str(folder), offline=True):
        config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _refuse_other_models(str(folder), config)
        for name in ("quantization_config", "auto_map"):
            if hasattr(config, name):
                delattr(config, name)
        build: Any = AutoModelForCausalLM.from_config
        with init_empty_weights() if buffers else torch.device("meta"):
            model = build(config, dtype=torch.float32) if buffers else build(config)
        if buffers:
            model.tie_weights()  # which building without weights undoes
        if packed is not None:
            put_packed(model, packed)
        return model


@dataclass(frozen=True)
class Blueprint:
    """A configuration, and the dense float32 model that it describes, with whatever weights.

    ``scheme`` is that of a model that is ternary already; ``by_blocks``: its weights can be read
    block by block.
    """

    config: Any
    scheme: Scheme | None = None
    by_blocks: bool = True

    def __call__(self) -> Any:
        """Build the model."""
        from transformers import AutoModelForCausalLM

        build: Any = AutoModelForCausalLM.from_config
        return build(self.config, dtype=torch.float32)


def blueprint(model: str, *, offline: bool = False, trust_remote_code: bool = False) -> Blueprint:
    """What a model is built like; its weights are not read, and need not be there.

    Raises:
        InputError: there is no such configuration, or it is not one of a causal language model.
    """
    from transformers import AutoConfig

    path, scheme = local_path(model), None
    if path is not None and (path / RUN_FILE).is_file():
        scheme = Recipe.from_json(read_run(path)["recipe"]).scheme
        path = path / BASE_FOLDER
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": trust_remote_code}
    where = model if path is None else str(path)
    if path is not None and path.is_file():
        where, file = _where(model, path)
        options |= file
    elif path is not None and not (path / "config.json").is_file():
        _where(model, path)  # which says so
    with _in_words(model, offline):
        config: Any = AutoConfig.from_pretrained(where, **options)
        _refuse_other_models(model, config)
        if quantized_by(config) == METHOD:
            known = packed_config(path) if path else None
            scheme = Scheme(group_size=known.group_size, shift=known.shift) if known else None
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    return Blueprint(config, scheme, scheme is None and "gguf_file" not in options)


def dtype_of(config: Any) -> torch.dtype:
    """The type that a configuration names for its weights; float32 if it names none."""
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def check_structure(folder: Path) -> None:
    """Refuse an artefact whose configuration, files and tensors do not belong together.

    Raises:
        InputError, VerificationError: see `ternq.structure.check`.
    """
    structure.check(folder, lambda: skeleton(folder, packed_config(folder)))


def packed_config(folder: Path) -> TernqConfig:
    """The checked ``quantization_config`` of an artefact; `VerificationError` if it has none."""
    found = checkpoint.read_json(folder / "config.json").get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        raise VerificationError(f"{folder / 'config.json'} has no quantization_config of ternq.")
    try:
        return TernqConfig(**{str(k): v for k, v in found.items() if k != "quant_method"})
    except (ValueError, TypeError) as error:
        raise VerificationError(f"{folder / 'config.json'}: {error}.") from error


def max_length(model: nn.Module | Blueprint) -> int:
    """Positions the model was made for, as its configuration says; 2048 if it does not."""
    config = model.config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return 2048


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()[:16]


def save_base(loaded: Loaded, folder: Path) -> None:
    """Write configuration, generation settings and tokenizer; no weights."""
    loaded.model.config.save_pretrained(folder)
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md"]
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
    with _in_words(str(file), offline=True):
        AutoConfig.from_pretrained(file.parent, **where).save_pretrained(folder)
        _tokenizer(str(file), str(file.parent), where).save_pretrained(folder)


def copy_base(base: Path, folder: Path) -> None:
    """Copy generation settings and tokenizer from one folder to another, and nothing else."""
    for name in _BASE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def undo_int8(model: nn.Module) -> None:
    """Put plain layers in the place of 8-bit embeddings and output heads; ties stay ties."""
    shared: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Int8):
            continue
        if id(layer.weight) not in shared:
            shared[id(layer.weight)] = nn.Parameter(layer.dequantized())
        weight = shared[id(layer.weight)]
        rows, columns = weight.shape
        plain: Any
        with torch.device("meta"):
            if isinstance(layer, Int8Linear):
                plain = nn.Linear(columns, rows, bias=layer.bias is not None)
                plain.bias = layer.bias
            else:
                plain = nn.Embedding(rows, columns)
        plain.weight = weight
        model.set_submodule(name, plain)


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once, under its first name: tied weights are not repeated."""
    seen: set[tuple[int, Any]] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        here = processes.local(tensor)
        key = (here.data_ptr(), tuple(tensor.shape))
        if here.numel() == 0 or key not in seen:
            state[name] = tensor.detach()
        seen.add(key)
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put a `unique_state` back; names that only tied weights explain may be missing.

    Raises:
        InputError: tensors are missing, unknown or of another shape.
    """
    expected = unique_state(model)
    wrong = [n for n in expected if n not in state or state[n].shape != expected[n].shape]
    wrong += [n for n in state if n not in expected]
    if wrong:
        raise InputError(f"{where} does not fit its configuration: '{wrong[0]}' is wrong.")
    state = {name: processes.placed(tensor, expected[name]) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False)


def _load_run(model: str, path: Path, device: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    build: Any = AutoModelForCausalLM.from_config
    refuse_unfinished(path)
    run = read_run(path)
    recipe = Recipe.from_json(run["recipe"])
    with _in_words(model, offline=True):
        config = AutoConfig.from_pretrained(path / BASE_FOLDER, local_files_only=True)
        loaded = build(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path / BASE_FOLDER, local_files_only=True)
    put_ternary(loaded, run["modules"], recipe)
    load_state(loaded, checkpoint.load_tensors(path / STUDENT_FILE), str(path / STUDENT_FILE))
    stored = getattr(torch, str(run["dtype"]))
    name = display_name(recipe.model)
    kind: Kind = "run" if run["modules"] else "dense"  # of --method float
    return Loaded(_to(loaded.eval(), device), tokenizer, name, model, kind, path, stored)


def refuse_unfinished(run: Path) -> None:
    """`InputError` if a run has no trained student yet."""
    if not (run / STUDENT_FILE).is_file():
        model = read_run(run)["recipe"].get("model", "MODEL")
        raise InputError(
            f"The run '{run}' is not finished.", f"Go on with it: ternq distill {model} -o {run}"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of a run says; `InputError` if it is damaged."""
    record = checkpoint.read_json(folder / RUN_FILE)
    for name, kind in (("recipe", dict), ("modules", list), ("dtype", str)):
        if not isinstance(record.get(name), kind):
            raise InputError(f"{folder / RUN_FILE} is damaged: it holds no {name}.")
    return record


def put_ternary(model: nn.Module, names: list[str], recipe: Recipe) -> None:
    """Swap empty ternary layers in under the given names, for a state to be loaded."""
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if layer is None or not is_linear(layer):
            raise InputError(f"'{name}' is no linear layer of {type(model).__name__}.")
        in_features, out_features = features(layer)
        new = layer_class(recipe.scheme)(
            in_features,
            out_features,
            bias=getattr(layer, "bias", None) is not None,
            group_size=recipe.scheme.group_size,
            shift=recipe.scheme.shift,
            ste=recipe.training.ste,
        )
        model.set_submodule(name, new)


def _where(model: str, path: Path | None, *, weights: bool = True) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for, and the options that go with it."""
    if path is None:
        return model, {}
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"'{model}' is a file, but not a .gguf file.", "Name the folder it lies in."
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"'{model}' is not a GGUF file: it does not begin with 'GGUF'.")
        if any(entry.type == Q2_0 for entry in Header(path).tensors.values()):
            raise InputError(
                f"'{model}' holds layers of the type Q2_0, which transformers does not read.",
                f"Take it in first: ternq pack {model}",
            )
        return str(path.parent), {"gguf_file": path.name}
    if path == DEMO_FOLDER:
        return str(path), {}
    if not (path / "config.json").is_file():
        raise InputError(
            f"'{model}' is a folder without config.json, so it is no model.",
            "Name a Hugging Face model folder, a .gguf file (the file, not its folder), a hub id, "
            "or 'demo'.",
        )
    if weights and not any(path.glob("*.safetensors")):
        raise InputError(
            f"'{model}' holds no safetensors file.",
            "Weights in pickle files (.bin) are not read: save the model again as safetensors.",
        )
    return str(path), {}


def _config(model: str, where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, **options)
    _refuse_other_models(model, config)
    method = quantized_by(config)
    if method not in (None, METHOD):
        raise InputError(
            f"'{model}' is already quantized ({method}).", "Start from the full-precision model."
        )
    return config


def quantized_by(config: Any) -> str | None:
    """The ``quant_method`` that a configuration names."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    is_plain = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_plain else quantization.quant_method
    return str(getattr(method, "value", method))


def _refuse_other_models(model: str, config: Any) -> None:
    """`InputError` for a configuration that is not one of a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "auto_map" not in vars(
        config
    ):
        raise InputError(f"'{model}' ({config.model_type}) is not a causal language model.")
    if architectures and not known & set(architectures) and not hasattr(config, "auto_map"):
        raise InputError(f"'{model}' is a {architectures[0]}, not a causal language model.")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"'{model}' is an encoder-decoder, not a causal language model.")


def _weights(
    model: str, where: str, options: dict[str, Any], config: Any, dtype: torch.dtype
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    extra = {} if "gguf_file" in options else {"use_safetensors": True, "config": config}
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
            f"'{model}' has no tokenizer that can be loaded ({_first_line(error).rstrip(' :.')}).",
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


@contextmanager
def _in_words(model: str, offline: bool) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into one sentence."""
    from safetensors import SafetensorError

    hush = [logging.getLogger(n) for n in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in hush]
    for logger in hush:
        logger.setLevel(logging.CRITICAL)
    _progress_bars(False)
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"A safetensors file of '{model}' is damaged: {_first_line(error)}."
        ) from error
    except InputError:
        raise
    except _REFUSALS as error:
        raise _explained(model, error, offline) from error
    finally:
        for logger, level in zip(hush, levels, strict=True):
            logger.setLevel(level)
        _progress_bars(True)


def _progress_bars(on: bool) -> None:
    from transformers.utils import logging as bars

    switch: Any = bars.enable_progress_bar if on else bars.disable_progress_bar
    switch()


def _explained(model: str, error: BaseException, offline: bool) -> InputError:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and len(chain) < 8:
        chain.append(at)
        at = at.__cause__ or at.__context__
    names = {type(e).__name__ for e in chain}
    if "GatedRepoError" in names:
        return InputError(
            f"'{model}' is gated: its owner asks you to accept terms first.",
            "Accept them on its page, then: hf auth login",
        )
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return InputError(
            f"The hub has no model '{model}' (or it is private).",
            "Check the spelling (owner/name); for a local folder write ./name.",
        )
    remote = local_path(model) is None
    if remote and (offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")):
        return InputError(
            f"'{model}' is not in the local cache, and this is offline.",
            "Name a local folder or .gguf file, or try 'demo'.",
        )
    if remote and isinstance(error, OSError):
        return InputError(
            f"'{model}' could not be fetched: the hub did not answer.",
            "Name a local folder or .gguf file, or try 'demo'.",
        )
    return InputError(f"'{model}' cannot be loaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
