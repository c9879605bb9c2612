"""Sparse autoencoders with sae-lens: activation streams, training, scores, features.

Needs sae-lens, which asks for TransformerLens below 4: ``pip install 'tstlens[saes]'``. Splicing
itself (``model.add_sae`` and so on) belongs to the model and needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

try:
    import sae_lens  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tstlens.saes needs sae-lens: pip install 'tstlens[saes]' (it asks for TransformerLens "
        "below 4)"
    ) from error

if TYPE_CHECKING:
    from tstlens.model.activations import latents
    from tstlens.saes.dictionaries import browse, from_linear, list_saes, load, save
    from tstlens.saes.graph.build import GraphConfig, feature_graph
    from tstlens.saes.graph.result import FeatureGraph
    from tstlens.saes.reading.build import features
    from tstlens.saes.reading.intervention import ablate_latent, steer_latent
    from tstlens.saes.reading.matching import compare
    from tstlens.saes.scoring import (
        DictionaryScore,
        Scores,
        neuron_dictionary,
        random_dictionary,
        score,
    )
    from tstlens.saes.stream import ActivationStream, TensorStream
    from tstlens.saes.training import (
        TrainConfig,
        TrainingHistory,
        architectures,
        fit,
        history,
        train,
        training_config,
    )

__all__ = [
    "ActivationStream",
    "DictionaryScore",
    "FeatureGraph",
    "GraphConfig",
    "Scores",
    "TensorStream",
    "TrainConfig",
    "TrainingHistory",
    "ablate_latent",
    "architectures",
    "browse",
    "compare",
    "feature_graph",
    "features",
    "fit",
    "from_linear",
    "history",
    "latents",
    "list_saes",
    "load",
    "neuron_dictionary",
    "random_dictionary",
    "save",
    "score",
    "steer_latent",
    "train",
    "training_config",
]

# Public elsewhere now; the old name works for one release.
_MOVED = {
    "Recovery": "tstlens.truth",
    "recovery": "tstlens.truth",
}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__, _MOVED)
