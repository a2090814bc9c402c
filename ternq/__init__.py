"""ternq turns Hugging Face causal language models into ternary (1.58-bit) ones.

The public names are resolved when first used, so that ``import ternq`` and ``ternq --help`` cost no
torch. transformers has no plug-in point for quantizers; so that ``import ternq`` is all it takes
to load an artefact, the import registers ternq as soon as transformers' quantizers are there.

A verb is imported from its module (``from ternq.distill import distill``): a function and a module
of one name in one package would be one or the other, by what was imported first.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "ternq.hf",
    "Recipe": "ternq.recipe",
    "Scheme": "ternq.recipe",
    "Training": "ternq.recipe",
    "TernqError": "ternq.errors",
}
__all__ = ["__version__", *sorted(_PUBLIC)]

_QUANTIZERS = "transformers.quantizers.auto"


class _Registration(MetaPathFinder, Loader):
    """Registers ternq right after transformers' table of quantizers is first imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # it imports torchao wherever that is installed, which warns of kernels nobody here needs
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._loader.exec_module(module)
        importlib.import_module("ternq.modeling_ternq")


if _QUANTIZERS in sys.modules:
    importlib.import_module("ternq.modeling_ternq")
else:
    sys.meta_path.insert(0, _Registration())


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ternq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
