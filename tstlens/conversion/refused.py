"""Time-series models that are known and not converted, each with the reason."""

from __future__ import annotations

REFUSED = {
    "informer": "Informer draws the keys that its attention looks at at random, in eval mode too, "
    "so it has no fixed attention pattern to hook",
    "autoformer": "Autoformer's autocorrelation moves whole series against each other; it has no "
    "attention over positions to hook",
    "patchtsmixer": "PatchTSMixer mixes by MLPs and has no attention by default",
    "tirex": "TiRex is an xLSTM, not a transformer",
    "temporalfusiontransformer": "the Temporal Fusion Transformer is an LSTM with gated variable "
    "selection around one attention, which the blocks here do not cover",
}


def why_refused(name: str) -> str | None:
    """Why a model of this class or family name is not converted; None where nothing is known."""
    plain = name.rsplit(".", 1)[-1].lower().replace("-", "").replace("_", "")
    found = [reason for start, reason in REFUSED.items() if plain.startswith(start)]
    return found[0] if found else None
