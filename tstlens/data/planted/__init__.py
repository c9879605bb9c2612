"""Tasks whose deciding samples are known, and scores against known answers.

`planted` makes a task by name; `score_where` scores an attribution against its mask,
`score_states` codes against the states of a `RegimeMachine`, `score_features` activations
against planted features.
"""

from __future__ import annotations

from tstlens.data.planted.background import BACKGROUNDS
from tstlens.data.planted.features import PlantedFeatures, planted_features
from tstlens.data.planted.matching import FeatureScore, StateScore, score_features, score_states
from tstlens.data.planted.scoring import WhereScore, score_where
from tstlens.data.planted.table import Score, TruthTable
from tstlens.data.planted.task import PlantedTask, planted, planted_names

__all__ = [
    "BACKGROUNDS",
    "FeatureScore",
    "PlantedFeatures",
    "PlantedTask",
    "Score",
    "StateScore",
    "TruthTable",
    "WhereScore",
    "planted",
    "planted_features",
    "planted_names",
    "score_features",
    "score_states",
    "score_where",
]
