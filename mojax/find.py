"""A file's name is its name: `find("formats", "nvfp4")` is the module `mojax.formats.nvfp4`."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from mojax.errors import InputError, nearest


def names(room: str) -> tuple[str, ...]:
    """The files of a room (`formats`, `models`, `transforms`, `converters`, `kernels`), `base` excepted."""
    package = importlib.import_module(f"mojax.{room}")
    # what the files of a room have in common
    shared = {"base", "gpu", "hadamard_matrices", "layers", "leaf", "numerics", "product", "rows"}
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in shared))


def find(room: str, name: str) -> ModuleType:
    """The module `mojax.<room>.<name>`; `-` and `_` are the same.

    Raises:
      InputError: no such file; the message lists near names.
    """
    wanted = name.replace("-", "_")
    if wanted not in names(room):
        raise InputError(f"{name!r} is not one of mojax's {room}{nearest(name, names(room))}")
    return importlib.import_module(f"mojax.{room}.{wanted}")
