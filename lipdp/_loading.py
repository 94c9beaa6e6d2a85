"""What is imported when: names of lipdp at their first use, registered classes along with Keras.

Keras takes seconds to import, and much of what uses lipdp needs none of it: accounting, help texts.
So `import lipdp` imports no Keras. One thing may not wait for a name to be used: Keras finds the
class of a layer in a saved network by the name under which it is registered. So once Keras has been
imported, by whomever, the modules that register classes are imported as well.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["REGISTERING", "get_attribute", "register_with_keras"]

# The modules that register classes under which Keras saves networks; a test finds them all.
REGISTERING = ("lipdp.bounds.projections", "lipdp.layers", "lipdp.losses", "lipdp.metrics")


def get_attribute(package: types.ModuleType, name: str, homes: Mapping[str, str]) -> Any:
    """A name of `package` that was not there yet: from the module that `homes` says, or a module.

    Raises:
        AttributeError: there is no such name.
    """
    if name in homes:
        value = getattr(importlib.import_module(homes[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{package.__name__}.{name}"):
        value = importlib.import_module(f"{package.__name__}.{name}")
    else:
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
    setattr(package, name, value)
    return value


def register_with_keras() -> None:
    """Has lipdp's classes registered as soon as Keras is there, which may be now."""
    if "keras" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    for name in REGISTERING:
        importlib.import_module(name)


class _Watch(importlib.abc.MetaPathFinder):
    """Waits for Keras, on `sys.meta_path`.

    Often it is a module of lipdp that imports Keras first. Its own import must end before others
    that may need it begin. So the modules of lipdp are watched, too, and classes are registered
    when the outermost import is over.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self._done = threading.Lock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "keras" and fullname.rpartition(".")[0] != "lipdp":
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def execute(self, loader: importlib.abc.Loader, module: types.ModuleType) -> None:
        """Executes a module, and registers lipdp's classes if no import of lipdp is around it."""
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._thread.depth = depth
        # The lock is never released: classes are registered once, by one thread.
        if depth == 0 and "keras" in sys.modules and self._done.acquire(blocking=False):
            sys.meta_path.remove(self)
            _register()


class _Loader(importlib.abc.Loader):
    """A module's loader, which tells the watch; the module itself sees the loader it stands for."""

    def __init__(self, loader: importlib.abc.Loader, watch: _Watch) -> None:
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._watch.execute(self._loader, module)
