"""Models with codebooks on disk: a model's folder with its codebooks under ``saes/``."""

from __future__ import annotations

from pathlib import Path

import torch

from tstlens.arguments import checked
from tstlens.errors import UnknownCheckpointError
from tstlens.model import HookedTST
from tstlens.model.saving import find_checkpoint
from tstlens.saes.loading import FOLDER, list_saes
from tstlens.saes.loading import load as load_dictionary

SHIPPED = "codebooks"  # folder of a checkpoint that holds it tuned, with codebooks


@checked
def load(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> HookedTST:
    """A model that was fitted together with codebooks, with them on.

    Args:
        name: a shipped checkpoint that has such a model beside it, or a folder that
            ``model.save_pretrained`` wrote while codebooks were on the model.
        device: where to put it.
        dtype: what to cast it to.

    Returns:
        The model in eval mode. ``model.reset_codebooks()`` leaves the tuned weights alone, which
        are not those of the checkpoint.

    Raises:
        UnknownCheckpointError: nothing goes by that name, or no codebooks are there.
        CorruptFileError: weights or tables are truncated or altered.

    Example:
        >>> from tstlens import codebooks
        >>> list(codebooks.load("japanese-vowels").acts_to_codebooks)
        ['blocks.0.hook_normalized_resid_post', 'blocks.1.hook_normalized_resid_post']
    """
    folder = find_checkpoint(name)
    folder = folder / SHIPPED if (folder / SHIPPED).is_dir() else folder
    hooks = list_saes(folder)
    model = HookedTST.from_pretrained(folder, device=device, dtype=dtype)
    books = {hook: load_dictionary(folder / FOLDER / hook, device=device) for hook in hooks}
    books = {hook: book for hook, book in books.items() if hasattr(book, "trace")}
    if not books:
        raise UnknownCheckpointError(
            str(name), [], f"{folder} holds a model without codebooks; fit them: codebooks.fit"
        )
    for hook, book in books.items():
        model.add_codebook(book.to(model.cfg.dtype), hook)
    return model
