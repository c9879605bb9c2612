"""``browse``: from a model and its data to the page of its codes, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstlens.arguments import checked
from tstlens.codebooks.index import CodeIndex
from tstlens.codebooks.notes import CodeNotes
from tstlens.data import TimeSeriesData
from tstlens.model import HookedTST
from tstlens.storage import check_file


@checked
def browse(
    model: HookedTST,
    data: TimeSeriesData,
    path: str | Path,
    *,
    test: TimeSeriesData | None = None,
    notes: CodeNotes | str | Path | None = None,
    title: str | None = None,
    n_windows: int = 9,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write a page on which every code of a model can be looked up, seen and written about.

    Every code has its prototype (mean and spread of its windows in the units of the series), its
    windows on the raw series, the classes that it is active in, the searches that found it with
    precision and recall, the codes like it, and a note of yours. Notes are kept by the browser and
    exported as JSON, which ``notes=`` takes in again. Everything is inside the file.

    Args:
        model: with its codebooks on.
        data: series to index, the training split if ``test`` is the other.
        path: the file to write.
        test: series that the searches' precision and recall are of; without it a half of ``data``
            that the search did not pick on.
        notes: to show, or a file of them.
        title: heading of the page.
        n_windows: windows per code.
        progress: show progress bars.
        **options: of :meth:`CodeIndex.build`.

    Returns:
        The path.

    Raises:
        HookError: no codebook is on the model.
        StorageError: the place is a folder, or cannot be written.

    Example:
        >>> from tstlens import codebooks, load_dataset
        >>> model = codebooks.load("japanese-vowels")  # doctest: +SKIP
        >>> train = load_dataset("JapaneseVowels", split="train")  # doctest: +SKIP
        >>> codebooks.browse(model, train, "codes.html")  # doctest: +SKIP
    """
    check_file(Path(path))
    index = CodeIndex.build(model, data, test=test, progress=progress, **options)
    return index.to_html(path, notes=notes, title=title, n_windows=n_windows)
