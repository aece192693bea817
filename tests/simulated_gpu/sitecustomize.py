"""Python runs this at its start where simulate.py has put this folder on its path: import kernels.py behind torch."""

import importlib.abc
import importlib.util
import sys


class _BehindTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            import kernels  # noqa: F401

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _BehindTorch())
