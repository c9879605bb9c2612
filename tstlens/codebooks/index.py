"""``CodeIndex``: every activation of every code over a data set, to look up and to search.

Building a :class:`~tstlens.codebooks.CodeIndex`: one pass over the series, batch by batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import Count, Seed, checked
from tstlens.codebooks.book import CodeWindows, IndexedBook, windows_of
from tstlens.codebooks.scores import (
    ChangedCodes,
    CommonCodes,
    SimilarCodes,
    changed_codes,
    common_codes,
    similar_codes,
)
from tstlens.codebooks.search import CodeSearch
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError, SeriesShapeError, UnknownHookError
from tstlens.model import HookedTST
from tstlens.model.hooking import require_one_pass
from tstlens.results import PagedResult
from tstlens.saes.reading.activity import Spans, cells_of, on_device, spans_of

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
        batch_size: Count = 256,
        seed: Seed = 0,
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
                generator; predicates see it as ``window.<name>``. The ``states`` [series, pos]
                of data that have them (:class:`~tstlens.truth.RegimeSeries`) come in as
                ``state`` by themselves.
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
        n: Count = 10,
        n_permutations: int = 200,
        min_samples: int = 8,
        seed: Seed = 0,
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
        n: Count | None = None,
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
        n: Count = 10,
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


RESERVED = frozenset(  # names that windows have already
    name
    for names in (
        ("level", "slope", "curvature", "peak", "trough", "range", "variance", "frequency", "low"),
        ("middle", "high", "values", "distance", "series", "label", "channels", "of", "start"),
        ("stop", "pos"),
    )
    for name in names
)


def build_index(
    model: HookedTST,
    data: TimeSeriesData,
    *,
    test: TimeSeriesData | None,
    hooks: Sequence[str] | None,
    saes: Any,
    neurons: bool,
    columns: Mapping[str, Any] | None,
    test_columns: Mapping[str, Any] | None,
    spans: Spans | None,
    memory: float,
    batch_size: int,
    seed: int,
    sae_steps: int,
    progress: bool,
) -> CodeIndex:
    """What :meth:`CodeIndex.build` does."""
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
    if sae_steps < 1:
        raise ArgumentError(f"sae_steps must be at least 1, got {sae_steps}")
    require_one_pass(model, "to index its codes")
    books = model.acts_to_codebooks
    if hooks is not None:
        names = [hooks] if isinstance(hooks, str) else list(hooks)
        model._code_splices(names)
        books = {name: books[name] for name in names}
    if test is not None and data.labels is not None and test.labels is not None:
        _check_classes(data, test)
    if saes == "fit":
        saes = _fitted(model, data, books, sae_steps, seed, progress)
    others = saes if isinstance(saes, dict) else _saes_by_hook(books, saes)
    made: list[CodeIndex] = []
    for split, known in ((test, test_columns), (data, columns)):
        if split is None:
            continue
        run = _Run(model, split, list(books), others, neurons, memory, spans)
        run.over(batch_size, progress)
        made.append(run.index(known, made[0] if made else None))
    return made[-1]


class _Run:
    """One split, gathered batch by batch."""

    def __init__(
        self,
        model: HookedTST,
        data: TimeSeriesData,
        hooks: list[str],
        saes: dict[str, Any],
        neurons: bool,
        memory: float,
        spans: Spans | None,
    ) -> None:
        if not len(data):
            raise ArgumentError("data: expected at least one series, got none")
        if not hooks:
            raise HookError("no codebook is on the model: model.add_codebook(codebook, hook=...)")
        model._require_on(model._code_splices(hooks))
        self.model, self.data, self.hooks, self.saes = model, data, hooks, saes
        self.memory, self.given_spans = memory, spans
        self.hidden = _hidden(model, hooks) if neurons else []
        self.keep_inputs = neurons
        self.active: dict[str, list[np.ndarray]] = {hook: [] for hook in hooks}
        self.similar: dict[str, list[np.ndarray]] = {hook: [] for hook in hooks}
        self.observed: dict[str, list[np.ndarray]] = {hook: [] for hook in hooks}
        self.dense: dict[str, np.ndarray] = {}
        self.latents: dict[str, list[Any]] = {hook: [] for hook in saes}
        self.axes: dict[str, int] = {}  # heads that share one table
        self.n_channels = self.n_pos = 0

    @torch.no_grad()
    def over(self, batch_size: int, progress: bool) -> None:
        starts = range(0, len(self.data), batch_size)
        inputs = [f"{hook}.hook_sae_input" for hook in self.hooks]
        wanted = [*inputs, *self.hidden] if self.keep_inputs or self.saes else []
        for start in tqdm(starts, desc="codes", disable=not progress, leave=False):
            series, mask = on_device(self.model, self.data[start : start + batch_size])
            with self.model.watch_codes() as seen:
                _, cache = self.model.run_with_cache(series, mask=mask, names_filter=wanted)
            for hook in self.hooks:
                self._take(hook, seen[hook], start, len(series))
            for hook, name in zip(self.hooks, inputs, strict=True):
                if hook in self.saes:
                    self._take_latents(hook, cache[name], start)
                if self.keep_inputs:
                    self._take_dense(hook, cache[name], start)
            for name in self.hidden:
                self._take_dense(name, cache[name], start)

    def _take(self, hook: str, watched: Any, start: int, n_series: int) -> None:
        acts, similar, keep = watched.snap.acts, watched.snap.similarities, watched.keep
        if acts.ndim < 3:
            raise HookError(
                f"codes at {hook} have no positions, so there are no windows to index; give "
                "hooks= without it"
            )
        if acts.ndim == 4:
            self.axes[hook] = acts.shape[2]
        sizes = len(acts) // n_series, acts.shape[1]
        if not self.n_pos:
            self.n_channels, self.n_pos = sizes
        if sizes != (self.n_channels, self.n_pos):
            raise HookError(
                f"codes at {hook} are at {sizes[1]} positions of {sizes[0]} rows per series, those "
                f"at {self.hooks[0]} at {self.n_pos} of {self.n_channels}; index them one by one: "
                "hooks=[...]"
            )
        places = acts.shape[:2]
        if keep is None:
            keep = torch.ones(places, dtype=torch.bool, device=acts.device)
        keep = keep.flatten(2).any(-1) if keep.ndim > 2 else keep
        acts = acts.flatten(2) * keep[..., None]
        at = acts.flatten(0, 1).nonzero()  # [activation, (slot, unit)]
        values = similar.flatten(2).flatten(0, 1)[at[:, 0], at[:, 1]]
        at[:, 0] += start * self.n_channels * self.n_pos
        self.active[hook].append(at.to(torch.int32).cpu().numpy())
        self.similar[hook].append(values.float().cpu().numpy())
        self.observed[hook].append(keep.flatten().cpu().numpy())

    def _slots(self) -> int:
        return len(self.data) * self.n_channels * self.n_pos

    def _rows(self, name: str, activation: Tensor) -> Tensor:
        rows = activation.flatten(2) if activation.ndim > 3 else activation
        if rows.ndim != 3 or rows.shape[1] != self.n_pos:
            raise SeriesShapeError(
                f"expected [row, pos={self.n_pos}, ...] at {name}, got {list(activation.shape)}; "
                "leave neurons out: neurons=False"
            )
        return rows

    def _take_dense(self, name: str, activation: Tensor, start: int) -> None:
        rows = self._rows(name, activation).flatten(0, 1).float().cpu().numpy()
        if name not in self.dense:
            taken = sum(one.nbytes for one in self.dense.values())
            needed = (taken + 4 * self._slots() * rows.shape[1]) / 2**30
            if needed > self.memory:
                raise ArgumentError(
                    f"neurons of {len(self.dense) + 1} places need {needed:.2g} GiB, more than "
                    f"memory={self.memory:g}; give neurons=False, fewer series or hooks, or a "
                    "larger memory="
                )
            self.dense[name] = np.zeros((self._slots(), rows.shape[1]), dtype=np.float32)
        first = start * self.n_channels * self.n_pos
        self.dense[name][first : first + len(rows)] = rows

    def _take_latents(self, hook: str, activation: Tensor, start: int) -> None:
        from scipy.sparse import csr_matrix

        del start
        sae = self.saes[hook]
        weights = next(iter(sae.parameters()))
        given = activation.flatten(2)  # heads side by side, as a codebook of all heads reads them
        if getattr(sae.cfg, "d_in", None) != given.shape[-1]:
            raise SeriesShapeError(
                f"expected an SAE of width {given.shape[-1]} at {hook}, got "
                f"d_in={getattr(sae.cfg, 'd_in', None)}"
            )
        if getattr(sae, "hook_z_reshaping_mode", False):  # sae-lens joins them itself
            given = given.unflatten(2, (self.model.cfg.n_heads, -1))
        latents = sae.encode(given.to(weights)).flatten(0, 1).float().cpu().numpy()
        self.latents[hook].append(csr_matrix(latents))

    def index(self, columns: Mapping[str, Any] | None, test: CodeIndex | None) -> CodeIndex:
        from scipy.sparse import vstack

        spans = spans_of(self.model, self.n_pos, self.data.n_time, self.given_spans)
        given = self.given_spans is not None
        cells = spans if given else cells_of(self.model, self.n_pos, self.data.n_time)
        data = self.data
        return CodeIndex(
            books={hook: self._book(hook) for hook in self.hooks},
            data=_plain(data),
            spans=spans,
            cells=cells,
            n_channels=self.n_channels,
            n_pos=self.n_pos,
            neurons=dict(self.dense),
            saes={hook: vstack(parts, format="csc") for hook, parts in self.latents.items()},
            columns=_columns(data, columns, self.n_pos),
            test=test,
            made={
                "model": self.model.cfg.model_name,
                "data": data.name,
                "split": data.split,
                "n_series": len(data),
            },
        )

    def _book(self, hook: str) -> IndexedBook:
        place = self.model._book(hook)
        codebook = self.model.acts_to_codebooks[hook]
        tables = self.axes.get(hook, 1) * codebook.n_groups
        at = np.concatenate(self.active.pop(hook))
        similar = np.concatenate(self.similar.pop(hook))
        order = np.argsort(at[:, 1], kind="stable")  # slots rise within a unit
        counts = np.bincount(at[:, 1], minlength=tables * codebook.n_codes)
        return IndexedBook(
            hook=hook,
            n_codes=codebook.n_codes,
            n_groups=codebook.n_groups,
            n_heads=self.axes.get(hook) or place.n_heads,
            shared=place.shared,
            k=codebook.k,
            kind=str(codebook.cfg.similarity),
            table=codebook.table.detach().float().cpu().numpy(),
            start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            slot=at[order, 0],
            similarity=similar[order],
            observed=np.concatenate(self.observed.pop(hook)),
        )


def _plain(data: TimeSeriesData) -> TimeSeriesData:
    """The series on the CPU, without what a generator knows of them (which is in the columns)."""
    return TimeSeriesData(
        data.series.cpu(),
        None if data.labels is None else data.labels.cpu(),
        data.class_names,
        mask=None if data.mask is None else data.mask.cpu(),
        name=data.name,
        split=data.split,
        scaling=data.scaling,
    )


def _hidden(model: HookedTST, hooks: list[str]) -> list[str]:
    """Hidden layers of the MLPs in the blocks that have codes, where no codebook stands there."""
    layers = {int(found[1]) for hook in hooks if (found := re.match(r"blocks\.(\d+)\.", hook))}
    names = [f"blocks.{layer}.mlp.hook_post" for layer in sorted(layers)]
    return [name for name in names if name in model.hook_dict and name not in hooks]


def _columns(
    data: TimeSeriesData, given: Mapping[str, Any] | None, n_pos: int
) -> dict[str, np.ndarray]:
    found = dict(given or {})
    states = getattr(data, "states", None)
    if states is not None and states.shape[1] == n_pos:
        found.setdefault("state", states)
    columns = {}
    for name, values in found.items():
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if not str(name).isidentifier() or name in RESERVED:
            raise ArgumentError(
                f"expected columns with a name of their own that can follow a dot, got {name!r}"
            )
        if array.shape != (len(data), n_pos) or array.dtype.kind not in "biuf":
            raise SeriesShapeError(
                f"expected column {name!r} as numbers [series={len(data)}, pos={n_pos}], got "
                f"{array.dtype} {list(array.shape)}"
            )
        columns[name] = array
    return columns


def _check_classes(data: TimeSeriesData, test: TimeSeriesData) -> None:
    if data.class_names != test.class_names:
        raise ArgumentError(
            f"expected data and test with the same classes, got {list(data.class_names)} and "
            f"{list(test.class_names)}; give the training set's class_names to the test set"
        )


def _saes_by_hook(books: Mapping[str, Any], saes: Iterable[Any]) -> dict[str, Any]:
    found = {}
    for sae in saes:
        hook = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "hook_name", None)
        if hook not in books:
            raise ArgumentError(
                f"expected SAEs that read a codebook's hook point ({', '.join(books)}), got one "
                f"of {hook}"
            )
        found[hook] = sae
    return found


def _fitted(
    model: HookedTST,
    data: TimeSeriesData,
    books: Mapping[str, Any],
    steps: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """A TopK SAE per hook point, of the activations that the codebook there reads.

    The other codebooks stay in: behind them activations are not those of the model alone.
    """
    import copy

    from tstlens.codebooks.scores import fitted_saes

    found: dict[str, Any] = {}
    for hook, book in books.items():
        host = copy.deepcopy(model)
        head = host._spliced[hook].head
        host.reset_saes(hook)
        given: dict[str, Any] = {"heads": {} if head is None else {hook: head}}
        found |= fitted_saes(host, data, {hook: book}, steps, seed, progress=progress, **given)
    return found
