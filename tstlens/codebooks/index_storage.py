"""An index on disk: a folder with Parquet, safetensors and JSON, whole or not there at all.

``codes.parquet`` has every activation of every code; ``arrays.safetensors`` the series, tables and
what codes are compared with; ``index.json`` the rest, with the SHA-256 of both. The index of the
test split is the folder ``test`` inside.

``browse``: from a model and its data to the page of its codes, in one call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tstlens import storage
from tstlens.arguments import checked
from tstlens.codebooks.book import IndexedBook
from tstlens.codebooks.index import CodeIndex
from tstlens.codebooks.notes import CodeNotes
from tstlens.data import TimeSeriesData
from tstlens.data.scaling import Scaling
from tstlens.errors import CorruptFileError, StorageError
from tstlens.model import HookedTST
from tstlens.storage import check_file

FORMAT, VERSION = "tstlens code index", 1
CODES, ARRAYS, CONFIG, TEST = "codes.parquet", "arrays.safetensors", "index.json", "test"
CHUNK = 1_000_000  # activations per row group


def rows_of(index: CodeIndex, book: IndexedBook) -> Iterator[dict[str, np.ndarray]]:
    """Columns of at most a million activations at a time, by unit and slot."""
    spans = np.array(index.spans, dtype=np.int32).reshape(-1, 2)
    named = [book.named(unit) for unit in range(book.n_units)]
    names = np.array([(g, -1 if h is None else h, c) for g, h, c in named], dtype=np.int32)
    for first in range(0, max(len(book.slot), 1), CHUNK):
        at = slice(first, first + CHUNK)
        slot = book.slot[at].astype(np.int64)
        number = np.arange(first, first + len(slot))
        unit = np.searchsorted(book.start, number, side="right") - 1
        row, pos = np.divmod(slot, index.n_pos)
        series, channel = np.divmod(row, index.n_channels)
        if index.n_channels == 1:
            channel = np.full_like(channel, -1)
        yield {
            "group": names[unit, 0],
            "head": names[unit, 1],
            "code": names[unit, 2],
            "series": series.astype(np.int32),
            "channel": channel.astype(np.int32),
            "pos": pos.astype(np.int32),
            "start": spans[pos, 0],
            "stop": spans[pos, 1],
            "similarity": book.similarity[at],
        }


def save_index(index: CodeIndex, folder: Path) -> Path:
    """What :meth:`CodeIndex.save` does."""
    place = folder.resolve()
    storage.check_folder(folder, "the index")
    if place.is_dir() and any(place.iterdir()) and not (place / CONFIG).is_file():
        raise StorageError(
            f"{place} holds something else than an index, and would be replaced as a whole; choose "
            "a folder of its own"
        )
    with storage.staged(folder, "the index", keep=False) as staging:
        _fill(staging, index)
    return folder


def _fill(staging: Path, index: CodeIndex) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kinds = {name: pa.int32() for name in ("group", "head", "code", "series", "channel", "pos")}
    kinds |= {"start": pa.int32(), "stop": pa.int32(), "similarity": pa.float32()}
    schema = pa.schema([("hook", pa.string()), *kinds.items()])
    with parquet.ParquetWriter(staging / CODES, schema) as writer:
        for book in index.books.values():
            for rows in rows_of(index, book):
                hook = pa.array([book.hook] * len(rows["code"]), pa.string())
                columns = [pa.array(rows[name], kind) for name, kind in kinds.items()]
                writer.write_table(pa.Table.from_arrays([hook, *columns], schema=schema))
    storage.write_tensors(staging / ARRAYS, _arrays(index))
    data = index.data
    record = {
        "format": FORMAT,
        "format_version": VERSION,
        "sha256": {name: storage.digest(staging / name) for name in (CODES, ARRAYS)},
        "books": [
            {
                name: getattr(book, name)
                for name in ("hook", "n_codes", "n_groups", "n_heads", "shared", "k", "kind")
            }
            | {"n_units": book.n_units}
            for book in index.books.values()
        ],
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
            "scaling": _plain(data.scaling),
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


def _plain(scaling: Scaling | None) -> Any:
    return None if scaling is None else asdict(scaling)


def _arrays(index: CodeIndex) -> dict[str, torch.Tensor]:
    data = index.data
    found: dict[str, Any] = {"series": data.series, "labels": data.labels, "mask": data.mask}
    for hook, book in index.books.items():
        found[f"table/{hook}"] = torch.from_numpy(book.table)
        found[f"observed/{hook}"] = torch.from_numpy(book.observed)
    for name, values in index.neurons.items():
        found[f"neurons/{name}"] = torch.from_numpy(values)
    for name, values in index.saes.items():
        for part in ("data", "indices", "indptr"):
            found[f"saes/{name}/{part}"] = torch.from_numpy(getattr(values, part))
    for name, values in index.columns.items():
        found[f"columns/{name}"] = torch.from_numpy(np.ascontiguousarray(values))
    return {name: one for name, one in found.items() if one is not None}


def load_index(folder: Path) -> CodeIndex:
    """What :meth:`CodeIndex.load` does."""
    storage.recover(folder)
    record = _record(folder)
    for name in (CODES, ARRAYS):
        path = folder / name
        if not storage.regular(path):
            raise CorruptFileError(f"expected {name} in {folder}, found none; save the index again")
        storage.check_digest(path, record["sha256"].get(name), CONFIG, "save the index again")
    with storage.reading(folder, "holds no whole index", "save the index again"):
        return _assembled(folder, record, storage.read_tensors(folder / ARRAYS))


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


def _assembled(folder: Path, record: dict[str, Any], arrays: dict[str, Any]) -> CodeIndex:
    from scipy.sparse import csc_matrix

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
    sizes = record["n_channels"], record["n_pos"]
    neurons = part("neurons/")
    saes = {}
    for name, shape in record["saes"].items():
        parts = tuple(arrays[f"saes/{name}/{one}"].numpy() for one in ("data", "indices", "indptr"))
        saes[name] = csc_matrix(parts, shape=tuple(shape))
    return CodeIndex(
        books=_books(folder, record, arrays, sizes),
        data=data,
        spans=tuple((a, b) for a, b in record["spans"]),
        cells=tuple((a, b) for a, b in record["cells"]),
        n_channels=sizes[0],
        n_pos=sizes[1],
        neurons={name: neurons[name] for name in record.get("neurons", neurons)},
        saes=saes,
        columns=part("columns/"),
        test=load_index(folder / TEST) if record["test"] else None,
        made=record["made"],
    )


def _books(
    folder: Path, record: dict[str, Any], arrays: dict[str, Any], sizes: tuple[int, int]
) -> dict[str, IndexedBook]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(folder / CODES)
    slots: dict[str, list[np.ndarray]] = {}
    units: dict[str, list[np.ndarray]] = {}
    likeness: dict[str, list[np.ndarray]] = {}
    said = {one["hook"]: one for one in record["books"]}
    for number in range(file.num_row_groups):
        whole = file.read_row_group(number)
        names = whole["hook"].to_numpy()
        for hook in dict.fromkeys(names):
            rows = whole.filter(names == hook)
            group, head, code, series, channel, pos = (
                rows[name].to_numpy().astype(np.int64)
                for name in ("group", "head", "code", "series", "channel", "pos")
            )
            one = said[hook]
            table = head * one["n_groups"] + group if one["shared"] else group
            row = series * sizes[0] + np.maximum(channel, 0)
            slots.setdefault(hook, []).append((row * sizes[1] + pos).astype(np.int32))
            units.setdefault(hook, []).append(table * one["n_codes"] + code)
            likeness.setdefault(hook, []).append(rows["similarity"].to_numpy())
    books = {}
    for hook, one in said.items():
        n_units, table = one.pop("n_units"), arrays[f"table/{hook}"].numpy()
        n_tables = (one["n_heads"] or 1) if one["shared"] else 1
        if (one["n_groups"], one["n_codes"]) != table.shape[:2] or not (
            0 <= n_units <= n_tables * table.size and n_tables <= 4096
        ):
            raise ValueError(f"the sizes of {hook} are not those of its table {table.shape}")
        unit = np.concatenate(units.get(hook, [np.zeros(0, dtype=np.int64)]))
        counts = np.bincount(unit, minlength=n_units)
        books[hook] = IndexedBook(
            **one,
            table=table,
            start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            slot=np.concatenate(slots.get(hook, [np.zeros(0, dtype=np.int32)])),
            similarity=np.concatenate(likeness.get(hook, [np.zeros(0, dtype=np.float32)])),
            observed=arrays[f"observed/{hook}"].numpy(),
        )
    return books


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
