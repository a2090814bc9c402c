"""Compiles the C kernels when the package is installed; without a compiler it installs as well."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface[Any]):
    """A wheel with the library is for one platform, but for every Python: nothing links to it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        path = Path(self.root, "ternq", "kernels", "build.py")
        spec = importlib.util.spec_from_file_location("ternq_kernels_build", path)
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        build.LIBRARY.unlink(missing_ok=True)
        failure = build.build()
        if failure is not None:
            self.app.display_warning(f"ternq's CPU kernels were not compiled: {failure}.")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append("ternq/kernels/_native.so")
