"""Public names that are imported when they are first used.

A package lists its names once, as imports under ``if TYPE_CHECKING:``, where type checkers and
editors look; ``lazy`` reads them there. So importing a room costs only what is used of it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType


def lazy(
    package: str, moved: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        moved: names that are public elsewhere now, and where. They still work, for one release,
            with a DeprecationWarning.
    """
    module, moved, homes = sys.modules[package], moved or {}, typed_imports(package)

    def getattribute(name: str) -> object:
        if name in moved:
            new = moved[name]
            warnings.warn(
                f"{package}.{name} is {new}.{name} now; the old name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(importlib.import_module(new), name)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, original = homes[name]
        value = importlib.import_module(home)
        if original is not None:
            # A submodule that is called like a name of ours has put itself in its place by now.
            value = getattr(value, original)
        setattr(module, name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(module), *homes})

    # The names also stand in the module's class, and so before what other libraries give to every
    # object: nnsight mounts a ``save`` on ``object``, and ``__getattr__`` would never be asked.
    waiting = {name: _Waiting(name, getattribute) for name in homes}
    module.__class__ = type("Package", (ModuleType,), waiting)
    return getattribute, directory


class _Waiting:
    """A name of a package until it is asked for; the package's own attribute then hides it."""

    def __init__(self, name: str, load: Callable[[str], object]) -> None:
        self.name, self.load = name, load

    def __get__(self, module: object, owner: type) -> object:
        return self if module is None else self.load(self.name)


def typed_imports(package: str) -> dict[str, tuple[str, str | None]]:
    """Names imported for type checkers -> (module, name in it; None for the module itself)."""
    spec = importlib.util.find_spec(package)
    source = getattr(spec and spec.loader, "get_source", lambda _: None)(package)
    homes: dict[str, tuple[str, str | None]] = {}
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom) and statement.module:
                    for alias in statement.names:
                        home = (statement.module, alias.name)
                        if statement.module == package:
                            home = (f"{package}.{alias.name}", None)
                        homes[alias.asname or alias.name] = home
    return homes
