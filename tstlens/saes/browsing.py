"""``browse``: from a model, an SAE and data to the page of its latents, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.model import HookedTST
from tstlens.saes.reading import features
from tstlens.storage import check_file


@checked
def browse(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    path: str | Path,
    *,
    title: str | None = None,
    n_windows: int = 9,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write a page on which every latent of an SAE can be looked up, sorted, searched and seen.

    Every latent has its strongest windows on the raw series, the classes it is active in, the
    properties that it follows, what its removal does to the output and the latents like it.
    Everything is inside the file. To work with the numbers as well, call :func:`features` and its
    ``to_html``: this does both and keeps the page alone. What can mislead is what can mislead in
    :func:`features`.

    Args:
        model: the model that the SAE was trained on.
        sae: as for :func:`features`.
        data: series to read it on, held out from its training where there are enough.
        path: the file to write; its folder is made if missing.
        title: heading of the page.
        n_windows: strongest windows per latent.
        seed: of shuffles, splits and samples.
        progress: show progress bars.
        **options: of :func:`features`.

    Returns:
        The path.

    Raises:
        ArgumentError, SeriesShapeError: as :func:`features`.
        StorageError: the place is a folder, or cannot be written.

    Example:
        >>> from tstlens import HookedTST, load_dataset, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")  # doctest: +SKIP
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")  # doctest: +SKIP
        >>> test = load_dataset("JapaneseVowels", split="test")  # doctest: +SKIP
        >>> saes.browse(model, sae, test, "features.html")  # doctest: +SKIP
    """
    check_file(Path(path))
    found = features(model, sae, data, seed=seed, progress=progress, **options)
    return found.to_html(path, title=title, n_windows=n_windows, seed=seed)
