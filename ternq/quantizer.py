"""ternq as transformers sees it: importing this module registers ``quant_method: "ternq"``.

A folder written by ``ternq pack`` then loads with ``AutoModelForCausalLM.from_pretrained``, and
what was loaded saves again with ``save_pretrained``. ``import ternq`` sees to the import.
Written for the quantizer interface of transformers 5.
"""

from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ternq.linear import PackedLinear, features, is_linear

METHOD = "ternq"
FORMAT_VERSION = 1


class TernqConfig(QuantizationConfigMixin):
    """``quantization_config`` of an artefact: what is needed to read its packed layers.

    Raises:
        ValueError: a format of a later version, or values that no artefact has.
    """

    def __init__(
        self,
        group_size: int = 128,
        shift: bool = True,
        modules: list[str] | None = None,
        codec: str = "base3",
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this is version {format_version} of the ternq format; "
                f"this ternq reads version {FORMAT_VERSION}: install a newer ternq"
            )
        if codec != "base3":
            raise ValueError(f"unknown ternq codec {codec!r}; version 1 has 'base3' alone")
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size is {group_size!r}; it is a whole number, at least 1")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum is closed
        self.group_size, self.shift = group_size, bool(shift)
        self.modules = list(modules or [])
        self.codec, self.format_version = codec, format_version


class TernqQuantizer(HfQuantizer):
    """Swaps in `PackedLinear` before the weights are read."""

    quantization_config: TernqConfig
    requires_calibration = True  # refuses use on the fly: packing is ternq's work

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        modules = dict(model.named_modules())
        for name in config.modules:
            layer = modules.get(name)
            if layer is None or not is_linear(layer):
                raise ValueError(f"quantization_config names '{name}', which is no linear layer")
            in_features, out_features = features(layer)
            with torch.device("meta"):
                packed = PackedLinear(
                    in_features,
                    out_features,
                    bias=getattr(layer, "bias", None) is not None,
                    group_size=config.group_size,
                    shift=config.shift,
                )
            model.set_submodule(name, packed)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """What was loaded may be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes cannot be trained; ``ternq distill`` unpacks them."""
        return False


def register() -> None:
    """Make transformers know ``ternq``; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(TernqConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(TernqQuantizer)


register()
