"""An SAE to disk, in sae-lens' own format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from tstlens.arguments import checked
from tstlens.model.storage import write_dictionary


@checked
def save(sae: SAE[Any], path: str | Path) -> Path:
    """Write an SAE (or a codebook) to a folder that :func:`load` and sae-lens read.

    As ``sae.save_model(path)``, but its files are replaced as a set or not at all, an SAE in
    training is written as the one for use, and what it is gets recorded: by the model's folder that
    it goes into (``saes/<hook point>``), or in ``sha256.json`` beside it.

    Args:
        sae: what :func:`train` or :func:`load` returned, or any SAE of sae-lens.
        path: the folder; made if missing. An SAE in it is replaced, other files stay.

    Returns:
        The folder.

    Raises:
        StorageError: the place is a file, cannot be written, or holds links or pipes.

    Example:
        >>> import tempfile
        >>> from tstlens import saes
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")
        >>> saes.load(saes.save(sae, tempfile.mkdtemp())).cfg.d_sae == sae.cfg.d_sae
        True
    """
    return save_with(sae, Path(path), {})


def save_with(sae: SAE[Any], folder: Path, texts: Mapping[str, str]) -> Path:
    """:func:`save` with further files of the same set, by name."""
    write = sae.save_inference_model if isinstance(sae, TrainingSAE) else sae.save_model
    write_dictionary(folder, write, texts)
    return folder
