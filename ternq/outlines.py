"""What a model is by its configuration alone: checked, and built without its weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternq import structure
from ternq.errors import InputError, VerificationError
from ternq.files import read_json
from ternq.modeling_ternq import METHOD, TernqConfig, put_packed
from ternq.origin import BASE_FOLDER, RUN_FILE, find, in_words, place, read_run
from ternq.recipe import Recipe, Scheme


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


def skeleton(folder: Path, packed: TernqConfig | None = None, *, buffers: bool = False) -> Any:
    """The model that ``config.json`` of a folder describes, without memory (on "meta").

    It is dense, or has the packed layers that ``packed`` names. With ``buffers`` these are real, as
    in a model loaded in float32 (transformers computes them as it builds a model).

    Raises:
        InputError: the configuration is damaged, or is not one of a causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with in_words(str(folder), offline=True):
        config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        refuse_others(str(folder), config)
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

    scheme = None
    path, offline = place(model, offline)
    if path is not None and (path / RUN_FILE).is_file():
        scheme = Recipe.from_json(read_run(path)["recipe"]).scheme
        path = path / BASE_FOLDER
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": trust_remote_code}
    where = model if path is None else str(path)
    if path is not None and path.is_file():
        where, file = find(model, path)
        options |= file
    elif path is not None and not (path / "config.json").is_file():
        find(model, path)  # which says so
    with in_words(model, offline):
        config: Any = AutoConfig.from_pretrained(where, **options)
        refuse_others(model, config)
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
    found = read_json(folder / "config.json").get("quantization_config")
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


def config_of(model: str, where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, **options)
    refuse_others(model, config)
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


def refuse_others(model: str, config: Any) -> None:
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
