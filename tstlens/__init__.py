"""tstlens: open up a time-series transformer with the workflows of TransformerLens.

>>> import tstlens
>>> "HookedTST" in dir(tstlens)
True

Every name below is resolved when it is first used, so that ``import tstlens`` costs nothing:
PyTorch, TransformerLens, aeon, pandas and plotly are loaded by what needs them.

| from               | names                                                              |
|--------------------|--------------------------------------------------------------------|
| tstlens.data       | ``load_dataset``, ``TimeSeriesData``, ``Pairs``                    |
| tstlens.model      | ``HookedTST``, ``HookedTSTConfig``, ``list_checkpoints``           |
| tstlens.conversion | ``convert``, ``families``                                          |
| tstlens.errors     | ``TstlensError``                                                   |

Folders: ``data``, ``training``, ``model``, ``conversion``, ``patching``, ``probing``,
``figures``, ``report``, ``saes`` and ``codebooks`` (both need sae-lens); modules: ``errors`` and
``shapes``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tstlens import (
        codebooks,
        conversion,
        data,
        errors,
        figures,
        model,
        patching,
        probing,
        report,
        saes,
        shapes,
        training,
    )
    from tstlens.conversion import convert, families
    from tstlens.data import Pairs, TimeSeriesData, load_dataset
    from tstlens.errors import TstlensError
    from tstlens.model import HookedTST, HookedTSTConfig, list_checkpoints

__version__ = "0.1.0"

__all__ = [
    "HookedTST",
    "HookedTSTConfig",
    "Pairs",
    "TimeSeriesData",
    "TstlensError",
    "__version__",
    "codebooks",
    "conversion",
    "convert",
    "data",
    "errors",
    "families",
    "figures",
    "list_checkpoints",
    "load_dataset",
    "model",
    "patching",
    "probing",
    "report",
    "saes",
    "shapes",
    "training",
]

_MODULES = frozenset(
    {
        "codebooks",
        "conversion",
        "data",
        "errors",
        "figures",
        "model",
        "patching",
        "probing",
        "report",
        "saes",
        "shapes",
        "training",
    }
)
_ALONG = {"HookedTST": "conversion"}  # from_pretrained converts what other libraries wrote
_HOME = {
    "HookedTST": "model",
    "HookedTSTConfig": "model",
    "Pairs": "data",
    "TimeSeriesData": "data",
    "TstlensError": "errors",
    "convert": "conversion",
    "families": "conversion",
    "list_checkpoints": "model",
    "load_dataset": "data",
}


# Hidden from type checkers, which would take it to mean that every name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what ``name`` stands for, once: the result is kept as an ordinary attribute."""
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _ALONG:
            importlib.import_module(f"{__name__}.{_ALONG[name]}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
