"""The axis vocabulary of tstlens, as jaxtyping aliases.

| axis      | meaning                                                                        |
|-----------|--------------------------------------------------------------------------------|
| batch     | series in a batch                                                              |
| row       | what the trunk calls batch: series, or series x channel (series-major) where   |
|           | every channel goes through the trunk by itself                                 |
| channel   | variables of one series                                                        |
| time      | samples of one series                                                          |
| pos       | token positions of the trunk: one per patch or per time step                   |
| patch_len | samples in one patch                                                           |
| head, d_model, d_head, d_mlp | as in TransformerLens                                       |
| class     | logits of a classifier; ``horizon`` for the steps of a forecast                |
| pair      | clean/corrupted pairs of series                                                |

Annotations are documentation at run time; the tests turn them into checks with jaxtyping's
import hook.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Series = Float[Tensor, "batch channel time"]
Mask = Bool[Tensor, "batch time"]
PairSeries = Float[Tensor, "*pair channel time"]  # one pair may come without the pair axis
PairMask = Bool[Tensor, "pair time"]
Labels = Int[Tensor, " batch"]

Residual = Float[Tensor, "row pos d_model"]
PerHead = Float[Tensor, "row pos head d_head"]
Scores = Float[Tensor, "row head query key"]
Hidden = Float[Tensor, "row pos d_mlp"]
PosMask = Bool[Tensor, "row pos"]

Output = Float[Tensor, "batch *output"]

__all__ = [
    "Hidden",
    "Labels",
    "Mask",
    "Output",
    "PairMask",
    "PairSeries",
    "PerHead",
    "PosMask",
    "Residual",
    "Scores",
    "Series",
]
