"""Conversion of source models to :class:`tstlens.HookedTST`: one file per source family.

``convert`` finds the family, ``checking.py`` compares the outputs, and importing this package
registers every family below. Imports only from ``data``, ``training`` and ``model``.
"""

from tstlens.conversion import (
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
from tstlens.conversion.checking import Trial, check_parity
from tstlens.conversion.comparing import Comparison, Difference, Tap, compare
from tstlens.conversion.converting import convert
from tstlens.conversion.registry import Built, Family, families, register

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
