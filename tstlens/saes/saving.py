"""An SAE to disk, in sae-lens' own format."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from tstlens.arguments import checked
from tstlens.files import write_bytes
from tstlens.model.integrity import owner_of, seal_checkpoint


@checked
def save(sae: SAE[Any], path: str | Path) -> Path:
    """Write an SAE (or a codebook) to a folder that :func:`load` and sae-lens read.

    As ``sae.save_model(path)``, but no file is ever half written, an SAE in training is written as
    the one for use, and a model's folder that it goes into (``saes/<hook point>``) knows it.

    Args:
        sae: what :func:`train` or :func:`load` returned, or any SAE of sae-lens.
        path: the folder; made if missing. An SAE in it is replaced, other files stay.

    Returns:
        The folder.

    Raises:
        StorageError: the place is a file, or cannot be written.

    Example:
        >>> import tempfile
        >>> from tstlens import saes
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")
        >>> saes.load(saes.save(sae, tempfile.mkdtemp())).cfg.d_sae == sae.cfg.d_sae
        True
    """
    folder = Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(sae, TrainingSAE):
            sae.save_inference_model(scratch)
        else:
            sae.save_model(scratch)
        for part in sorted(Path(scratch).iterdir()):
            write_bytes(folder / part.name, part.read_bytes())
    owner = owner_of(folder)
    if owner is not None:
        seal_checkpoint(owner)  # the SAE is among the dictionaries of a model on disk
    return folder
