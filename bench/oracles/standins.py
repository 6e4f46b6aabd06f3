"""Modules that stand in for what another program imports and never uses here: its page, its model files, its options.

Every name asked of one is an inert object. Where the program's code reads a value, `given` says it.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import MagicMock


class Standin(types.ModuleType):
    """A module with any name in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the modules that `wanted` says; `given` are values in them."""

    def __init__(self, wanted: Callable[[str], bool], given: Mapping[str, Mapping[str, Any]], paths: Mapping[str, str]):
        self.wanted, self.given, self.paths = wanted, given, paths

    def find_spec(self, name, path, target=None):
        if name in self.paths or self.wanted(name):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return (types.ModuleType if spec.name in self.paths else Standin)(spec.name)

    def exec_module(self, module):
        module.__path__ = [self.paths[module.__name__]] if module.__name__ in self.paths else []
        vars(module).update(self.given.get(module.__name__, {}))


def stand_in(wanted: Callable[[str], bool], given: Mapping[str, Mapping[str, Any]], paths: Mapping[str, str]) -> None:
    """From now on, importing a module that `wanted` says gives a stand-in. `paths` are packages that are only a folder,
    so that their own start, which imports much more, does not run."""
    sys.meta_path.insert(0, Finder(wanted, given, paths))
