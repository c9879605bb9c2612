"""Sparse autoencoders with sae-lens: activation streams, training, scores, features.

Needs sae-lens, which asks for TransformerLens below 4: ``pip install 'tstlens[saes]'``. Splicing
itself (``model.add_sae`` and so on) belongs to the model and needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

try:
    import sae_lens  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tstlens.saes needs sae-lens: pip install 'tstlens[saes]' (it asks for TransformerLens "
        "below 4)"
    ) from error

if TYPE_CHECKING:
    from tstlens.saes.browsing import browse
    from tstlens.saes.configs import architectures, training_config
    from tstlens.saes.controls import neuron_dictionary, random_dictionary
    from tstlens.saes.graph import FeatureGraph, feature_graph
    from tstlens.saes.loading import from_linear, list_saes, load
    from tstlens.saes.planted import Recovery, recovery
    from tstlens.saes.reading import ablate_latent, compare, features, steer_latent
    from tstlens.saes.saving import save
    from tstlens.saes.scores import DictionaryScore, Scores
    from tstlens.saes.scoring import score
    from tstlens.saes.stream import ActivationStream
    from tstlens.saes.tensor_stream import TensorStream
    from tstlens.saes.training import fit, train

__all__ = [
    "ActivationStream",
    "DictionaryScore",
    "FeatureGraph",
    "Recovery",
    "Scores",
    "TensorStream",
    "ablate_latent",
    "architectures",
    "browse",
    "compare",
    "feature_graph",
    "features",
    "fit",
    "from_linear",
    "list_saes",
    "load",
    "neuron_dictionary",
    "random_dictionary",
    "recovery",
    "save",
    "score",
    "steer_latent",
    "train",
    "training_config",
]

_HOME = {
    "ActivationStream": "stream",
    "DictionaryScore": "scores",
    "FeatureGraph": "graph",
    "Recovery": "planted",
    "Scores": "scores",
    "TensorStream": "tensor_stream",
    "ablate_latent": "reading",
    "architectures": "configs",
    "browse": "browsing",
    "compare": "reading",
    "feature_graph": "graph",
    "features": "reading",
    "fit": "training",
    "from_linear": "loading",
    "list_saes": "loading",
    "load": "loading",
    "neuron_dictionary": "controls",
    "random_dictionary": "controls",
    "recovery": "planted",
    "save": "saving",
    "score": "scoring",
    "steer_latent": "reading",
    "train": "training",
    "training_config": "configs",
}

# Hidden from type checkers, which would take it to mean that every name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what ``name`` stands for, once: the result is kept as an ordinary attribute."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
