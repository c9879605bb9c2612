"""The source models that convert to :class:`tstlens.HookedTST`: one file per family.

``convert`` finds the family and copies the weights, ``parity.py`` compares the outputs,
``compare`` the activations layer by layer. ``tstlens/family_index.py`` lists the families; each is
imported when a model of it is met.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens.zoo import (
        chronos_2,
        chronos_bolt,
        chronos_t5,
        conv_tst,
        hf_tst,
        itransformer,
        moment,
        mvts,
        patchtst,
        patchtst_original,
        timesfm,
        timesfm_25,
        torch_encoder,
        tsai,
    )
    from tstlens.zoo.comparing import Comparison, Difference, Tap, compare
    from tstlens.zoo.converting import convert
    from tstlens.zoo.parity import Trial, check_parity
    from tstlens.zoo.registry import Built, Family, families, register

__all__ = [
    "Built",
    "Comparison",
    "Difference",
    "Family",
    "Tap",
    "Trial",
    "check_parity",
    "chronos_2",
    "chronos_bolt",
    "chronos_t5",
    "compare",
    "conv_tst",
    "convert",
    "families",
    "hf_tst",
    "itransformer",
    "moment",
    "mvts",
    "patchtst",
    "patchtst_original",
    "register",
    "timesfm",
    "timesfm_25",
    "torch_encoder",
    "tsai",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__)
