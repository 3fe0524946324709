"""Makes transformers' Auto classes know checkpoints of type `moeforge`.

    import moeforge                                                  # registers when transformers' Auto classes are first used
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)

`import moeforge` must answer at once, so it imports neither torch nor transformers: it leaves a note for Python's import system,
which is read when the module of the Auto classes has been imported, by whomever. `moeforge.auto.register()` does it now.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def register() -> None:
    """Register with the Auto classes now."""
    _configs()
    _models()


def _configs() -> None:
    _register("moeforge.model.config")


def _models() -> None:
    _register("moeforge.model.runtime")


def _register(name: str) -> None:
    """Call a module's `register`; one that is being imported, which is how the Auto classes came in, does so at its own end."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        importlib.import_module(name).register()


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _configs,
    "transformers.models.auto.modeling_auto": _models,
}
"""Module -> what to do once it has been imported."""


class _Notes(importlib.abc.MetaPathFinder):
    """Finds nothing itself: hands on what the next finders say, and acts after the module has run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in _AFTER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _AFTER[fullname]()

            spec.loader.exec_module = run_and_register
        return spec


def register_later() -> None:
    """Register as soon as the Auto classes are there; now, if they are."""
    if not any(isinstance(finder, _Notes) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Notes())
    for name, act in _AFTER.items():
        if name in sys.modules:
            act()
