"""The bootstrap and the sign flips behind :mod:`tstlens.patching.statistics`."""

from __future__ import annotations

from tstlens.data.resampling import bootstrap_t, flip_p_values

__all__ = ["bootstrap_t", "flip_p_values"]
