"""The hooked model: configuration, front ends, trunk, heads, saving and loading.

``HookedTST`` is put together from small parts, one file each; ``hooked_tst.py`` reads top to
bottom. Imports only from ``tstlens.data``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens.model.cache import TSTActivationCache
    from tstlens.model.config import HookedTSTConfig
    from tstlens.model.folders import describe_checkpoint, list_checkpoints
    from tstlens.model.forecasting import Forecast
    from tstlens.model.hooked_tst import HookedTST
    from tstlens.model.parity import Parity
    from tstlens.model.parts import (
        ConvStemConfig,
        CustomConfig,
        HeadConfig,
        LinearPatchesConfig,
        PerStepConfig,
    )
    from tstlens.model.state import TrunkState
    from tstlens.model.storage import seal_checkpoint

__all__ = [
    "ConvStemConfig",
    "CustomConfig",
    "Forecast",
    "HeadConfig",
    "HookedTST",
    "HookedTSTConfig",
    "LinearPatchesConfig",
    "Parity",
    "PerStepConfig",
    "TSTActivationCache",
    "TrunkState",
    "describe_checkpoint",
    "list_checkpoints",
    "seal_checkpoint",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__)
