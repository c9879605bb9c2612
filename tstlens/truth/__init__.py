"""Where the answer is known: planted tasks, models with a known circuit, scores, the suite.

``planted`` makes a task whose deciding samples are known, ``component_task`` a small transformer
whose circuit is known, ``RegimeMachine`` series whose hidden states are. ``truth`` scores every
method of the library on them (``tstlens benchmark``). Nothing else in the library imports this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens.truth.components import (
        ComponentSample,
        ComponentTask,
        PlantedGraph,
        Verification,
        component_names,
        component_task,
    )
    from tstlens.truth.features import PlantedFeatures, planted_features
    from tstlens.truth.figures import draw_truth, planted_series
    from tstlens.truth.programs import Program, Variable
    from tstlens.truth.questions import component_scores, feature_scores, state_scores, where_scores
    from tstlens.truth.regime import RegimeMachine, RegimeSeries
    from tstlens.truth.regime_codebooks import (
        RegimeExperiment,
        RegimeScore,
        fit_regime,
        regime_experiment,
        score_regime,
    )
    from tstlens.truth.sae_recovery import Recovery, recovery
    from tstlens.truth.scores import (
        FeatureScore,
        Score,
        StateScore,
        TruthTable,
        WhereScore,
        score_features,
        score_states,
        score_where,
    )
    from tstlens.truth.suite import QUESTIONS, SETTINGS, Truth, truth
    from tstlens.truth.tasks import BACKGROUNDS, PlantedTask, planted, planted_names
    from tstlens.truth.training import (
        PLANTED_RECIPES,
        NextPatchHead,
        NextPatchScore,
        PlantedRecipe,
        fit_next_patch,
        fit_planted,
        regime_model,
        score_next_patch,
    )

__all__ = [
    "BACKGROUNDS",
    "ComponentSample",
    "ComponentTask",
    "FeatureScore",
    "NextPatchHead",
    "NextPatchScore",
    "PLANTED_RECIPES",
    "PlantedFeatures",
    "PlantedGraph",
    "PlantedRecipe",
    "PlantedTask",
    "Program",
    "QUESTIONS",
    "Recovery",
    "RegimeExperiment",
    "RegimeMachine",
    "RegimeScore",
    "RegimeSeries",
    "SETTINGS",
    "Score",
    "StateScore",
    "Truth",
    "TruthTable",
    "Variable",
    "Verification",
    "WhereScore",
    "component_names",
    "component_scores",
    "component_task",
    "draw_truth",
    "feature_scores",
    "fit_next_patch",
    "fit_planted",
    "fit_regime",
    "planted",
    "planted_features",
    "planted_names",
    "planted_series",
    "recovery",
    "regime_experiment",
    "regime_model",
    "score_features",
    "score_next_patch",
    "score_regime",
    "score_states",
    "score_where",
    "state_scores",
    "truth",
    "where_scores",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__)
