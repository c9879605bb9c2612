"""``CodeIndex``: every activation of every code over a data set, to look up and to search.

Built in one pass over the series, batch by batch. On disk it is a folder, whole or not there at
all: ``codes.parquet`` has every activation of every code; ``arrays.safetensors`` the series, tables
and what codes are compared with; ``index.json`` the rest, with the SHA-256 of both. The index of
the test split is the folder ``test`` inside.

``browse``: from a model and its data to the page of its codes, in one call.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_matrix, csr_matrix, hstack, vstack
from torch import Tensor

from tstlens import storage
from tstlens.arguments import Count, Positive, Seed, checked
from tstlens.codebooks.book import IndexedBook, code_windows
from tstlens.codebooks.comparing import changed_codes, common_codes, similar_codes
from tstlens.codebooks.notes import CodeNotes
from tstlens.codebooks.search import search_codes
from tstlens.codebooks.search_windows import RESERVED
from tstlens.data import TimeSeriesData
from tstlens.data.scaling import Scaling
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    HookError,
    SeriesShapeError,
    StorageError,
    UnknownHookError,
)
from tstlens.model import HookedTST
from tstlens.model.codes import Book
from tstlens.model.hooking import require_one_pass
from tstlens.points import in_block
from tstlens.results import PagedResult
from tstlens.run import Runs
from tstlens.saes.checks import check_data
from tstlens.saes.reading.activity import Activity, Spans, cells_of, spans_of
from tstlens.saes.reading.result import (
    FEWEST,
    Features,
    property_association,
    window_properties,
)

if TYPE_CHECKING:
    import pandas as pd


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

    search = search_codes
    windows = code_windows
    similar = similar_codes
    changes = changed_codes
    common = common_codes

    @staticmethod
    @checked
    def build(
        model: HookedTST,
        data: TimeSeriesData,
        *,
        test: TimeSeriesData | None = None,
        hooks: str | Sequence[str] | None = None,
        saes: Iterable[Any] | Literal["fit"] = (),
        neurons: bool = True,
        columns: Mapping[str, Any] | None = None,
        test_columns: Mapping[str, Any] | None = None,
        spans: Spans | None = None,
        memory: Positive = 2.0,
        batch_size: Count = 256,
        seed: Seed = 0,
        sae_steps: Count = 1000,
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
        require_one_pass(model, "to index its codes")
        if not model.acts_to_codebooks:
            raise HookError("no codebook is on the model: model.add_codebook(codebook, hook=...)")
        splices = model.code_splices(hooks)
        model.require_on(splices)
        books = {name: splice.dictionary for name, splice in splices.items()}
        labelled = test is not None and data.labels is not None and test.labels is not None
        if test is not None and labelled and data.class_names != test.class_names:
            raise ArgumentError(
                f"expected data and test with the same classes, got {list(data.class_names)} and "
                f"{list(test.class_names)}; give the training set's class_names to the test set"
            )
        if saes == "fit":
            saes = _fitted(model, data, books, sae_steps, seed, progress)
        others = saes if isinstance(saes, dict) else _saes_by_hook(books, saes)
        found: CodeIndex | None = None
        for split, known in ((test, test_columns), (data, columns)):
            if split is not None:
                run = _Run(model, split, list(books), others, neurons, memory)
                run.over(batch_size, progress)
                found = run.index(known, spans, found)
        return found  # type: ignore[return-value]

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder, atomically: ``codes.parquet`` and what belongs to it.

        ``codes.parquet`` has one row per activation of a code and can be read with any Parquet
        reader: hook, group, head, code, series, channel, pos, start, stop, similarity.

        Raises:
            StorageError: the place is a file, holds something else, or cannot be written.
        """
        folder = Path(folder)
        place = folder.resolve()
        storage.check_folder(folder, "the index")
        if place.is_dir() and any(place.iterdir()) and not (place / CONFIG).is_file():
            raise StorageError(
                f"{place} holds something else than an index, and would be replaced as a whole; "
                "choose a folder of its own"
            )
        with storage.staged(folder, "the index", keep=False) as staging:
            _fill(staging, self)
        return folder

    @staticmethod
    @checked
    def load(folder: str | Path) -> CodeIndex:
        """The index that :meth:`save` wrote, checked against its recorded SHA-256 sums.

        Raises:
            StorageError: no index is there.
            CorruptFileError: a file is truncated or altered.
            ConfigVersionError: a newer tstlens wrote it.
        """
        folder = Path(folder)
        storage.recover(folder)
        record = _record(folder)
        for name in (CODES, ARRAYS):
            path = folder / name
            if not storage.regular(path):
                raise CorruptFileError(
                    f"expected {name} in {folder}, found none; save the index again"
                )
            storage.check_digest(path, record["sha256"].get(name), CONFIG, "save the index again")
        with storage.reading(folder, "holds no whole index", "save the index again"):
            return _assembled(folder, record, storage.read_tensors(folder / ARRAYS))

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

    def features(self, *, seed: int = 0) -> Features:
        """All codes as the latents of one dictionary that are on or off, hook point by hook point.

        With the properties of the window that each follows, where there are enough series.

        Args:
            seed: of the halves of the series that pick and confirm a property.
        """
        import pandas as pd

        books = self.books.values()
        values: Any = hstack([book.matrix() for book in books], format="csc")
        observed = np.logical_or.reduce([book.observed for book in books])
        activity = Activity(values, observed, len(self.data), self.n_channels, self.n_pos)
        properties = None
        if len(self.data) >= FEWEST:
            of_windows = window_properties(self.data, activity, self.spans)
            properties = property_association(activity, of_windows, seed=seed)
        return Features(
            activity=activity,
            data=self.data,
            spans=self.spans,
            cells=self.cells,
            directions=np.zeros((activity.n_latents, 1)),
            classes=None,
            properties=properties,
            effects=None,
            monosemanticity=pd.DataFrame(),
            outputs=(),
            hook=", ".join(self.books),
            name="codes",
            made=self.made,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per activation: hook, group, head, code, series, channel, pos, start, stop.

        The last column is ``similarity``. -1 stands for a head or a channel where there is none.
        """
        import pandas as pd

        parts = [
            pd.DataFrame({"hook": book.hook, **_activations(self, book)})
            for book in self.books.values()
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def __len__(self) -> int:
        return sum(book.values.nnz for book in self.books.values())

    def __repr__(self) -> str:
        test = "" if self.test is None else f", test={len(self.test.data)} series"
        return (
            f"CodeIndex({len(self)} activations of {self.n_units} codes at {len(self.books)} hook "
            f"points, {len(self.data)} series{test})"
        )


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
    ) -> None:
        check_data(data)
        self.model, self.data, self.hooks, self.saes = model, data, hooks, saes
        self.memory, self.keep_inputs = memory, neurons
        self.hidden = _hidden(model, hooks) if neurons else []
        self.active: dict[str, list[csr_matrix]] = {hook: [] for hook in hooks}
        self.observed: dict[str, list[np.ndarray]] = {hook: [] for hook in hooks}
        self.dense: dict[str, np.ndarray] = {}
        self.latents: dict[str, list[csr_matrix]] = {hook: [] for hook in saes}
        self.heads: dict[str, int] = {}  # that share one table
        self.n_channels = self.n_pos = 0

    @torch.no_grad()
    def over(self, batch_size: int, progress: bool) -> None:
        """Run all series through the model."""
        inputs = {hook: f"{hook}.hook_sae_input" for hook in self.hooks}
        kept = [*inputs.values(), *self.hidden] if self.keep_inputs or self.saes else []
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "title": "codes"}
        with self.model.watch_codes() as seen:
            for one in Runs(self.model, self.data, hooks=kept, **options).passes():
                for hook, name in inputs.items():
                    self._take(hook, seen[hook], len(one))
                    if hook in self.saes:
                        self.latents[hook].append(self._latents(hook, one.acts[name]))
                for name in kept if self.keep_inputs else ():
                    called = name.removesuffix(".hook_sae_input")
                    self._take_dense(called, one.acts[name], int(one.index[0]))

    def _take(self, hook: str, watched: Any, n_series: int) -> None:
        acts, similar, keep = watched.snap.acts, watched.snap.similarities, watched.keep
        if acts.ndim < 3:
            raise HookError(
                f"codes at {hook} have no positions, so there are no windows to index; give "
                "hooks= without it"
            )
        if acts.ndim == 4:
            self.heads[hook] = acts.shape[2]
        sizes = len(acts) // n_series, acts.shape[1]
        if not self.n_pos:
            self.n_channels, self.n_pos = sizes
        if sizes != (self.n_channels, self.n_pos):
            raise HookError(
                f"codes at {hook} are at {sizes[1]} positions of {sizes[0]} rows per series, those "
                f"at {self.hooks[0]} at {self.n_pos} of {self.n_channels}; index them one by one: "
                "hooks=[...]"
            )
        if keep is None:
            keep = torch.ones(acts.shape[:2], dtype=torch.bool, device=acts.device)
        keep = keep.flatten(2).any(-1) if keep.ndim > 2 else keep
        active = (acts.flatten(2) * keep[..., None]).flatten(0, 1)  # [slot, unit]
        row, unit = active.nonzero().cpu().numpy().T
        values = similar.flatten(2).flatten(0, 1).float().cpu().numpy()[row, unit]
        self.active[hook].append(csr_matrix((values, (row, unit)), shape=active.shape))
        self.observed[hook].append(keep.flatten().cpu().numpy())

    def _take_dense(self, name: str, activation: Tensor, start: int) -> None:
        rows = activation.flatten(2) if activation.ndim > 3 else activation
        if rows.ndim != 3 or rows.shape[1] != self.n_pos:
            raise SeriesShapeError(
                f"expected [row, pos={self.n_pos}, ...] at {name}, got {list(activation.shape)}; "
                "leave neurons out: neurons=False"
            )
        part = rows.flatten(0, 1).float().cpu().numpy()
        per_series = self.n_channels * self.n_pos
        if name not in self.dense:
            shape = len(self.data) * per_series, part.shape[1]
            taken = sum(one.nbytes for one in self.dense.values())
            needed = (taken + 4 * shape[0] * shape[1]) / 2**30
            if needed > self.memory:
                raise ArgumentError(
                    f"neurons of {len(self.dense) + 1} places need {needed:.2g} GiB, more than "
                    f"memory={self.memory:g}; give neurons=False, fewer series or hooks, or a "
                    "larger memory="
                )
            self.dense[name] = np.zeros(shape, dtype=np.float32)
        self.dense[name][start * per_series :][: len(part)] = part

    def _latents(self, hook: str, activation: Tensor) -> csr_matrix:
        sae = self.saes[hook]
        given = activation.flatten(2)  # heads side by side, as a codebook of all heads reads them
        if getattr(sae.cfg, "d_in", None) != given.shape[-1]:
            raise SeriesShapeError(
                f"expected an SAE of width {given.shape[-1]} at {hook}, got "
                f"d_in={getattr(sae.cfg, 'd_in', None)}"
            )
        if getattr(sae, "hook_z_reshaping_mode", False):  # sae-lens joins them itself
            given = given.unflatten(2, (self.model.cfg.n_heads, -1))
        latents = sae.encode(given.to(next(iter(sae.parameters()))))
        return csr_matrix(latents.flatten(0, 1).float().cpu().numpy())

    def index(
        self, columns: Mapping[str, Any] | None, spans: Spans | None, test: CodeIndex | None
    ) -> CodeIndex:
        data, n_time = self.data, self.data.n_time
        cells = spans_of(self.model, self.n_pos, n_time, spans)
        return CodeIndex(
            books={hook: self._book(hook) for hook in self.hooks},
            data=_plain(data),
            spans=cells,
            cells=cells if spans is not None else cells_of(self.model, self.n_pos, n_time),
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
        place = Book.at(self.model, hook)
        codebook = self.model.acts_to_codebooks[hook]
        values: Any = vstack(self.active.pop(hook), format="csc")
        values.sort_indices()
        return IndexedBook(
            values=values,
            observed=np.concatenate(self.observed.pop(hook)),
            n_series=len(self.data),
            n_channels=self.n_channels,
            n_pos=self.n_pos,
            hook=hook,
            n_codes=codebook.n_codes,
            n_groups=codebook.n_groups,
            n_heads=self.heads.get(hook) or place.n_heads,
            shared=place.shared,
            k=codebook.k,
            kind=str(codebook.cfg.similarity),
            table=codebook.table.detach().float().cpu().numpy(),
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
    layers = {found[:2] for hook in hooks if (found := in_block(hook))}
    names = [f"{stack}.{number}.mlp.hook_post" for stack, number in sorted(layers)]
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
    from tstlens.codebooks.scores import fitted_saes

    found: dict[str, Any] = {}
    for hook, book in books.items():
        host = copy.deepcopy(model)
        head = host._spliced[hook].head
        host.reset_saes(hook)
        heads = {} if head is None else {hook: head}
        found |= fitted_saes(host, data, {hook: book}, steps, seed, heads=heads, progress=progress)
    return found


# ---------------------------------------------------------------- on disk

FORMAT, VERSION = "tstlens code index", 1
CODES, ARRAYS, CONFIG, TEST = "codes.parquet", "arrays.safetensors", "index.json", "test"
_GROUP_ROWS = 1_000_000  # activations per row group of the Parquet file
_BOOK = ("hook", "n_codes", "n_groups", "n_heads", "shared", "k", "kind", "n_units")


def _activations(index: CodeIndex, book: IndexedBook) -> dict[str, np.ndarray]:
    """Columns, a row per activation, by unit and slot."""
    spans = np.array(index.spans, dtype=np.int32).reshape(-1, 2)
    named = [(g, -1 if h is None else h, c) for _, g, h, c in book.names()]
    names = np.repeat(np.array(named, dtype=np.int32).reshape(-1, 3), book.support, axis=0)
    series, channel, pos = (one.astype(np.int32) for one in book.places(book.values.indices))
    return {
        **dict(zip(("group", "head", "code"), names.T, strict=True)),
        "series": series,
        "channel": channel if index.n_channels > 1 else np.full_like(channel, -1),
        "pos": pos,
        "start": spans[pos, 0],
        "stop": spans[pos, 1],
        "similarity": book.values.data.astype(np.float32),
    }


def _fill(staging: Path, index: CodeIndex) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kinds = [pa.field(name, pa.int32()) for name in ("group", "head", "code", "series", "channel")]
    kinds += [pa.field(name, pa.int32()) for name in ("pos", "start", "stop")]
    schema = pa.schema([("hook", pa.string()), *kinds, ("similarity", pa.float32())])
    with parquet.ParquetWriter(staging / CODES, schema) as writer:
        for book in index.books.values():
            hook = pa.repeat(pa.scalar(book.hook, pa.string()), book.values.nnz)
            rows = pa.table({"hook": hook, **_activations(index, book)}, schema=schema)
            writer.write_table(rows, row_group_size=_GROUP_ROWS)
    storage.write_tensors(staging / ARRAYS, _arrays(index))
    data = index.data
    record = {
        "format": FORMAT,
        "format_version": VERSION,
        "sha256": {name: storage.digest(staging / name) for name in (CODES, ARRAYS)},
        "books": [{name: getattr(book, name) for name in _BOOK} for book in index.books.values()],
        "spans": [list(span) for span in index.spans],
        "cells": [list(cell) for cell in index.cells],
        "n_channels": index.n_channels,
        "n_pos": index.n_pos,
        "neurons": list(index.neurons),  # in order: the first of equally good rivals is named
        "saes": {name: list(values.shape) for name, values in index.saes.items()},
        "data": {
            "name": data.name,
            "split": data.split,
            "class_names": list(data.class_names),
            "scaling": None if data.scaling is None else asdict(data.scaling),
        },
        "test": index.test is not None,
        "made": index.made,
    }
    plain = json.loads(storage.json_text(record, "an index's made="))
    record = {**plain, "record_sha256": storage.digest_of_json(plain)}
    storage.write_text(staging / CONFIG, storage.json_text(record, CONFIG))
    if index.test is not None:
        (staging / TEST).mkdir()
        _fill(staging / TEST, index.test)


def _arrays(index: CodeIndex) -> dict[str, Tensor]:
    data = index.data
    found: dict[str, Any] = {"series": data.series, "labels": data.labels, "mask": data.mask}
    for hook, book in index.books.items():
        found |= {f"table/{hook}": book.table, f"observed/{hook}": book.observed}
    found |= {f"neurons/{name}": values for name, values in index.neurons.items()}
    found |= {f"columns/{name}": values for name, values in index.columns.items()}
    for name, values in index.saes.items():
        found |= {f"saes/{name}/{part}": getattr(values, part) for part in _SPARSE}
    return {
        name: one if isinstance(one, Tensor) else torch.from_numpy(np.ascontiguousarray(one))
        for name, one in found.items()
        if one is not None
    }


_SPARSE = ("data", "indices", "indptr")


def _record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not storage.regular(path):
        raise StorageError(
            f"expected {CONFIG} in {folder}, found none; is this a folder that index.save wrote?"
        )
    record = storage.read_json(
        path,
        "the record of a code index",
        "save the index again",
        format=FORMAT,
        version=VERSION,
    )
    recorded = record.pop("record_sha256", None)  # None in an index of an older tstlens
    if recorded is not None and recorded != storage.digest_of_json(record):
        raise CorruptFileError(f"{path} was altered; save the index again")
    if not isinstance(record.get("sha256"), dict):
        raise CorruptFileError(f"{path} records no SHA-256; save the index again")
    return record


def _assembled(folder: Path, record: dict[str, Any], arrays: dict[str, Tensor]) -> CodeIndex:
    def part(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): value.numpy()
            for name, value in arrays.items()
            if name.startswith(prefix)
        }

    said = record["data"]
    scale = said["scaling"]
    if scale is not None:
        scale = Scaling(scale["kind"], tuple(scale["mean"]), tuple(scale["std"]))
    data = TimeSeriesData(
        arrays["series"],
        arrays.get("labels"),
        tuple(said["class_names"]),
        mask=arrays.get("mask"),
        name=said["name"],
        split=said["split"],
        scaling=scale,
    )
    sizes = len(data), record["n_channels"], record["n_pos"]
    neurons = part("neurons/")
    saes = {
        name: csc_matrix(tuple(map(part(f"saes/{name}/").get, _SPARSE)), shape=tuple(shape))
        for name, shape in record["saes"].items()
    }
    return CodeIndex(
        books={one["hook"]: _read_book(folder, one, arrays, sizes) for one in record["books"]},
        data=data,
        spans=tuple((a, b) for a, b in record["spans"]),
        cells=tuple((a, b) for a, b in record["cells"]),
        n_channels=sizes[1],
        n_pos=sizes[2],
        neurons={name: neurons[name] for name in record.get("neurons", neurons)},
        saes=saes,
        columns=part("columns/"),
        test=CodeIndex.load(folder / TEST) if record["test"] else None,
        made=record["made"],
    )


def _read_book(
    folder: Path, said: dict[str, Any], arrays: dict[str, Tensor], sizes: tuple[int, int, int]
) -> IndexedBook:
    import pyarrow.parquet as parquet

    n_units, hook = said.pop("n_units"), said["hook"]
    table, observed = arrays[f"table/{hook}"].numpy(), arrays[f"observed/{hook}"].numpy()
    n_tables = (said["n_heads"] or 1) if said["shared"] else 1
    if (said["n_groups"], said["n_codes"]) != table.shape[:2] or not (
        0 <= n_units <= n_tables * table.size and n_tables <= 4096
    ):
        raise ValueError(f"the sizes of {hook} are not those of its table {table.shape}")
    rows = parquet.read_table(folder / CODES, filters=[("hook", "=", hook)])
    names = ("group", "head", "code", "series", "channel", "pos")
    at = {name: rows[name].to_numpy().astype(np.int64) for name in names}
    of = at["head"] * said["n_groups"] + at["group"] if said["shared"] else at["group"]
    slot = (at["series"] * sizes[1] + np.maximum(at["channel"], 0)) * sizes[2] + at["pos"]
    place = (slot, of * said["n_codes"] + at["code"])
    values: Any = csc_matrix((rows["similarity"].to_numpy(), place), shape=(len(observed), n_units))
    values.sort_indices()
    return IndexedBook(values, observed, *sizes, **said, table=table)


@checked
def browse(
    model: HookedTST,
    data: TimeSeriesData,
    path: str | Path,
    *,
    test: TimeSeriesData | None = None,
    notes: CodeNotes | str | Path | None = None,
    title: str | None = None,
    n_windows: Count = 9,
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
    storage.check_file(Path(path))
    index = CodeIndex.build(model, data, test=test, progress=progress, **options)
    return index.to_html(path, notes=notes, title=title, n_windows=n_windows)
