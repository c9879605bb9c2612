"""The old name of :mod:`tstlens.zoo`, for one release."""

from __future__ import annotations

from tstlens import zoo
from tstlens.lazy import lazy

__all__: list[str] = []

__getattr__, __dir__ = lazy(__name__, dict.fromkeys(zoo.__all__, "tstlens.zoo"))
