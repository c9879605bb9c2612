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
| tstlens.zoo        | ``convert``, ``families``                                          |
| tstlens.errors     | ``TstlensError``                                                   |

Folders: ``data``, ``training``, ``model``, ``zoo``, ``patching``, ``probing``,
``figures``, ``report``, ``truth``,
``saes`` and ``codebooks`` (the last two need sae-lens); modules: ``errors`` and
``shapes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens import (
        codebooks,
        conversion,  # noqa: F401
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
        truth,
        zoo,
    )
    from tstlens.data import Pairs, TimeSeriesData, load_dataset
    from tstlens.errors import TstlensError
    from tstlens.model import HookedTST, HookedTSTConfig, list_checkpoints
    from tstlens.zoo.converting import convert
    from tstlens.zoo.registry import families

__version__ = "0.1.0"

__all__ = [
    "HookedTST",
    "HookedTSTConfig",
    "Pairs",
    "TimeSeriesData",
    "TstlensError",
    "__version__",
    "codebooks",
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
    "truth",
    "zoo",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__)
