"""``CodeIndex``: every activation of every code over a data set, to look up and to search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from tstlens.arguments import checked
from tstlens.codebooks.comparing import (
    ChangedCodes,
    CommonCodes,
    SimilarCodes,
    changed_codes,
    common_codes,
    similar_codes,
)
from tstlens.codebooks.index_book import IndexedBook
from tstlens.codebooks.index_windows import CodeWindows, windows_of
from tstlens.codebooks.search_result import CodeSearch
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, UnknownHookError
from tstlens.results import PagedResult
from tstlens.saes.reading.windows import Spans

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.model import HookedTST


@dataclass(frozen=True, eq=False, repr=False)
class CodeIndex(PagedResult):
    """Where every code of a model's codebooks is active in a data set.

    It holds the series too, and what was measured beside the codes, so that it can be saved, loaded
    and searched without the model.

    Args:
        books: hook point -> its activations.
        data: the series.
        spans: (first, one past last) sample that every position was embedded from.
        cells: the samples that figures draw a position at; they tile time.
        n_channels: rows of the trunk per series: 1, or the channels where each is read by itself.
        n_pos: positions.
        neurons: place -> [slot, neuron], activations to compare codes with.
        saes: place -> [slot, latent], sparse, likewise.
        columns: name -> [series, pos], what is known of positions, such as a true state.
        test: the index of the split that searches report on, or None.
        made: model, data, split.
    """

    books: dict[str, IndexedBook]
    data: TimeSeriesData
    spans: Spans
    cells: Spans
    n_channels: int
    n_pos: int
    neurons: dict[str, Float[np.ndarray, "slot neuron"]] = field(default_factory=dict)
    saes: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    test: CodeIndex | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    @checked
    def build(
        model: HookedTST,
        data: TimeSeriesData,
        *,
        test: TimeSeriesData | None = None,
        hooks: Sequence[str] | None = None,
        saes: Iterable[Any] | Literal["fit"] = (),
        neurons: bool = True,
        columns: Mapping[str, Any] | None = None,
        test_columns: Mapping[str, Any] | None = None,
        spans: Spans | None = None,
        memory: float = 2.0,
        batch_size: int = 256,
        seed: int = 0,
        sae_steps: int = 1000,
        progress: bool = True,
    ) -> CodeIndex:
        """Run series through a model with codebooks and keep where every code is active.

        Padding and bypassed positions are left out. Codes take 8 bytes per activation; neurons,
        which are dense, take most of the memory.

        Args:
            model: with codebooks in, switched on.
            data: the series, the training split if ``test`` is the other.
            test: series that searches report on, with the same classes.
            hooks: of which codebooks; None for all.
            saes: SAEs that read the same hook points, to compare codes with; ``"fit"`` trains a
                TopK SAE per hook point on the activations that the codebook there reads (the other
                codebooks stay in), with as many latents and as many active as the codebook.
            neurons: keep, to compare codes with, every dimension of the activation that a codebook
                reads and every hidden neuron of the MLP in its block.
            columns: name -> [series, pos], what is known of every position, such as the state of a
                generator; predicates see it as ``window.<name>``. The states of a
                :class:`~tstlens.data.RegimeSeries` come in as ``state`` by themselves.
            test_columns: the same of ``test``.
            spans: (first, one past last) sample of every position, for front ends of your own.
            memory: GiB that neurons of one split may take.
            batch_size: series per forward pass.
            seed: of SAEs that are fitted.
            sae_steps: training steps of each of them.
            progress: show progress bars.

        Raises:
            HookError: no codebook is on the model, one is switched off or has no positions.
            UnknownHookError: no codebook at one of ``hooks``.
            ArgumentError: no series, columns that do not fit, more memory needed than allowed, or
                a trunk that holds mirrored series too.

        Example:
            >>> from tstlens import HookedTST, codebooks, load_dataset
            >>> model = HookedTST.from_pretrained("italy-power-demand")
            >>> train = load_dataset("ItalyPowerDemand", split="train")
            >>> config = codebooks.CodebookConfig(n_codes=16)
            >>> for book in codebooks.start(model, train, ["blocks.0.hook_mlp_out"],
            ...                             config).values():
            ...     model.add_codebook(book)
            >>> index = codebooks.CodeIndex.build(model, train, progress=False)
            >>> len(index.search(label=1, n_permutations=100)) > 0
            True
        """
        from tstlens.codebooks.index_build import build_index

        return build_index(
            model,
            data,
            test=test,
            hooks=hooks,
            saes=saes,
            neurons=neurons,
            columns=columns,
            test_columns=test_columns,
            spans=spans,
            memory=memory,
            batch_size=batch_size,
            seed=seed,
            sae_steps=sae_steps,
            progress=progress,
        )

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder, atomically: ``codes.parquet`` and what belongs to it.

        ``codes.parquet`` has one row per activation of a code and can be read with any Parquet
        reader: hook, group, head, code, series, channel, pos, start, stop, similarity.

        Raises:
            StorageError: the place is a file, holds something else, or cannot be written.
        """
        from tstlens.codebooks.index_storage import save_index

        return save_index(self, Path(folder))

    @staticmethod
    @checked
    def load(folder: str | Path) -> CodeIndex:
        """The index that :meth:`save` wrote, checked against its recorded SHA-256 sums.

        Raises:
            StorageError: no index is there.
            CorruptFileError: a file is truncated or altered.
            ConfigVersionError: a newer tstlens wrote it.
        """
        from tstlens.codebooks.index_storage import load_index

        return load_index(Path(folder))

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points with codes."""
        return tuple(self.books)

    @property
    def n_units(self) -> int:
        """Codes at all hook points, counted once per table and head."""
        return sum(book.n_units for book in self.books.values())

    @checked
    def book(self, hook: str) -> IndexedBook:
        """The activations at one hook point.

        Raises:
            UnknownHookError: nothing of that hook point is in the index.
        """
        if hook not in self.books:
            raise UnknownHookError(hook, self.books, "Only these are in the index")
        return self.books[hook]

    @checked
    def search(
        self,
        predicate: Callable[[Any], Any] | None = None,
        *,
        label: int | str | None = None,
        mask: Any | None = None,
        test: CodeIndex | Literal["split"] | None = None,
        test_mask: Any | None = None,
        hooks: str | Sequence[str] | None = None,
        unit: Literal["position", "series"] = "position",
        min_recall: float = 0.02,
        min_support: int = 10,
        n: int = 10,
        n_permutations: int = 200,
        min_samples: int = 8,
        seed: int = 0,
    ) -> CodeSearch:
        """Codes that are active where something holds, by precision.

        One of ``predicate`` (a function of windows to bool: ``lambda w: w.slope > 0.1``), ``label``
        (a class, index or name) and ``mask`` (bool [series, pos]) says what is looked for. Codes
        are picked on this index and reported on other series, beside the most precise neuron, the
        SAE latent and shuffled series.

        Args, returns and what can mislead: :func:`tstlens.codebooks.search.search_codes`.

        Example:
            >>> index.search(label="3", n=5)  # doctest: +SKIP
        """
        from tstlens.codebooks.search import search_codes

        return search_codes(
            self,
            predicate,
            label=label,
            mask=mask,
            test=test,
            test_mask=test_mask,
            hooks=hooks,
            unit=unit,
            min_recall=min_recall,
            min_support=min_support,
            n=n,
            n_permutations=n_permutations,
            min_samples=min_samples,
            seed=seed,
        )

    @checked
    def windows(
        self,
        hook: str,
        code: int,
        *,
        group: int | None = None,
        head: int | None = None,
        n: int | None = None,
        per_series: int | None = None,
    ) -> CodeWindows:
        """The raw windows at which a code is active, most similar first.

        Args:
            hook: hook point of the code.
            code: its number.
            group: its group, where there are several.
            head: its head, where heads have tables of their own or share one.
            n: so many; None for all.
            per_series: at most so many of one series (and channel): neighbouring positions see
                nearly the same samples.

        Raises:
            UnknownHookError: no such hook point in the index.
            ArgumentError: no such code, or a group or head that has to be said.
        """
        for name, value in (("n", n), ("per_series", per_series)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ArgumentError(f"expected {name} of at least 1, got {value!r}")
        book = self.book(hook)
        unit, sizes = book.unit(code, group, head), (self.n_channels, self.n_pos)
        return windows_of(book, self.data, self.spans, sizes, unit, n, per_series)

    @checked
    def similar(
        self,
        hook: str,
        code: int,
        *,
        group: int | None = None,
        head: int | None = None,
        by: Literal["overlap", "cosine"] = "overlap",
        n: int = 10,
    ) -> SimilarCodes:
        """Codes like one code; see :func:`similar_codes`."""
        unit = self.book(hook).unit(code, group, head)
        return similar_codes(self.books, hook, unit, by=by, n=n)

    @checked
    def changes(self, series: int, other: int) -> ChangedCodes:
        """Codes that differ between two series; see :func:`changed_codes`."""
        return changed_codes(self, series, other)

    @checked
    def common(
        self,
        series: Sequence[int] | None = None,
        *,
        label: int | str | None = None,
        at_least: float = 1.0,
    ) -> CommonCodes:
        """Codes that the series of a set share; see :func:`common_codes`."""
        return common_codes(self, series, label=label, at_least=at_least)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per activation: hook, group, head, code, series, channel, pos, start, stop.

        The last column is ``similarity``. -1 stands for a head or a channel where there is none.
        """
        import pandas as pd

        from tstlens.codebooks.index_storage import rows_of

        parts = [
            pd.DataFrame({"hook": book.hook, **rows})
            for book in self.books.values()
            for rows in rows_of(self, book)
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def __len__(self) -> int:
        return sum(len(book.slot) for book in self.books.values())

    def __repr__(self) -> str:
        test = "" if self.test is None else f", test={len(self.test.data)} series"
        return (
            f"CodeIndex({len(self)} activations of {self.n_units} codes at {len(self.books)} hook "
            f"points, {len(self.data)} series{test})"
        )
