"""Activations as rows, and as an endless, shuffled, seeded stream that feeds sae-lens' trainers.

A row's *place* says where it comes from: (series, channel, pos, head), see
:meth:`tstlens.run.Pass.rows`.

On disk activations are safetensors shards and an index. Every shard holds the rows of a random part
of the series, so reading a few shards and shuffling them mixes well. Files are put into their place
whole, the index after each shard: a harvest that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from tstlens import storage
from tstlens.arguments import Count, Positive, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, CorruptFileError, StorageError
from tstlens.model import HookedTST
from tstlens.points import select
from tstlens.run import Heads, Runs
from tstlens.shapes import Mask, Series

Rows = dict[str, Tensor]  # hook name -> [row, width]


class ActivationRows:
    """Calls give the activations of some of the series, as rows, and where they come from.

    Args:
        model: runs no further than the hooks need; see :class:`tstlens.run.Runs`.
        series: [batch, channel, time], or data with their mask.
        hooks: hook names.
        mask: [batch, time], True where observed.
        head: of q, k, v, z and result: ``"joined"`` makes one row of all heads, ``"each"`` one row
            per head, a number takes that head.
        positions: of the trunk: None for all, a number, several, or a slice; negative ones count
            from the end.

    Raises:
        UnknownHookError, HookError: a hook point that does not exist, does not fire, or has no
            feature axis.
        ArgumentError: ``head="each"`` with several hooks, or a head or position that is not there.
    """

    def __init__(
        self,
        model: HookedTST,
        series: Series | TimeSeriesData,
        hooks: Sequence[str],
        mask: Mask | None = None,
        head: Heads = "joined",
        positions: Any = None,
    ) -> None:
        if isinstance(series, TimeSeriesData):
            if mask is not None:
                raise ArgumentError("data bring their own mask; leave out mask=")
            series, mask = series.series, series.mask
        model.check_series(series, mask)
        if not hooks or len(set(hooks)) != len(hooks):
            raise ArgumentError(f"expected one or more different hook names, got {list(hooks)}")
        self.runs = Runs(model, series, mask, hooks)
        for name in hooks:
            model.require_features(name)
        if head == "each" and len(hooks) > 1:
            raise ArgumentError(
                "with head='each' rows of several hooks would not belong together; stream one hook"
            )
        if head not in ("joined", "each") and not 0 <= int(head) < model.cfg.n_heads:
            raise ArgumentError(f"expected a head in 0..{model.cfg.n_heads - 1}, got {head}")
        self.hooks, self.positions = tuple(hooks), positions
        self.head: Heads = head

    def __len__(self) -> int:
        return len(self.runs)

    def __call__(self, index: Tensor) -> tuple[Rows, Tensor]:
        """Rows of the series at ``index``, and their places, int [row, 4]."""
        one = self.runs.at(index)
        found = {name: one.rows(name, self.head) for name in self.hooks}
        if len({len(rows) for rows, _ in found.values()}) > 1:
            raise ArgumentError(
                f"expected hooks with the same positions, got {[*map(_shape, one.acts.values())]} "
                f"at {list(self.hooks)}; stream them one by one"
            )
        places = found[self.hooks[-1]][1]
        rows = {name: rows for name, (rows, _) in found.items()}
        if self.positions is None:
            return rows, places
        if not len(places) or places[0, 2] < 0:
            raise ArgumentError(f"positions were given, but {self.hooks[-1]} has none")
        chosen = select(self.positions, one.acts[self.hooks[-1]].shape[1], "positions")
        kept = torch.isin(places[:, 2], torch.tensor(chosen, device=places.device))
        return {name: part[kept] for name, part in rows.items()}, places[kept]


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


INDEX = "index.json"
PLACES = "places"
_VERSION = 1
_AGAIN = "delete this file and harvest again: the other shards are kept"


@dataclass(frozen=True)
class Shards:
    """Activations that lie in a folder.

    Args:
        folder: where.
        rows: rows of each shard.
        names: file names.
        digests: SHA-256 of each file.
        hooks: hook names.
    """

    folder: Path
    names: tuple[str, ...]
    rows: tuple[int, ...]
    digests: tuple[str, ...]
    hooks: tuple[str, ...]

    def read(self, which: Sequence[int], checked: set[int]) -> tuple[Rows, Tensor]:
        """Rows and places of some shards; shards not in ``checked`` have their SHA-256 compared.

        Raises:
            CorruptFileError: a shard is missing, truncated or altered; the message names it.
        """
        total, filled = sum(self.rows[number] for number in which), 0
        together: Rows = {}
        for number in which:
            path, n = self.folder / self.names[number], self.rows[number]
            if number not in checked:
                storage.check_digest(path, self.digests[number], "the index", _AGAIN)
                checked.add(number)
            whole = storage.reading(path, "is no shard that can be read", _AGAIN)
            with whole, safe_open(path, framework="pt") as mapped:
                for name in (*self.hooks, PLACES):
                    part = mapped.get_tensor(name)
                    if name not in together:
                        shape = (total, *part.shape[1:])
                        together[name] = torch.empty(shape, dtype=part.dtype)
                    together[name][filled : filled + n] = part
            filled += n
        return together, together.pop(PLACES)


def harvest_to_disk(
    source: ActivationRows,
    folder: str | Path,
    *,
    shard_mb: float = 32.0,
    series_per_pass: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Shards:
    """Write the activations of all series to a folder, or go on with a harvest found there.

    Args:
        source: model, series and hooks.
        folder: where to; made if missing.
        shard_mb: size of a shard in MiB, about.
        series_per_pass: series per forward pass.
        seed: of the order in which series are spread over shards.
        progress: show a bar.

    Returns:
        The shards, checked to be all there.

    Raises:
        StorageError: the folder holds activations of something else, or cannot be written.
    """
    with storage.claimed(Path(folder)):
        return _harvest(source, Path(folder), shard_mb, series_per_pass, seed, progress)


def _harvest(
    source: ActivationRows,
    folder: Path,
    shard_mb: float,
    series_per_pass: int,
    seed: int,
    progress: bool,
) -> Shards:
    made = fingerprint(source, seed)
    index: dict[str, Any] = _read_index(folder) or {}
    if not index:
        probe, _ = source(torch.arange(min(len(source), series_per_pass)))
        size = sum(t.numel() * t.element_size() for t in probe.values())
        per_series = max(1, size // min(len(source), series_per_pass))
        per_shard = max(1, min(len(source), int(shard_mb * 2**20 / per_series)))
        unwritten: list[Any] = [None] * -(-len(source) // per_shard)
        index = {
            "format_version": _VERSION,
            "made": made,
            "series_per_shard": per_shard,
            "shards": unwritten,
        }
        _write_index(folder, index)
    if index["made"] != made:
        changed = [key for key in made if made[key] != index["made"].get(key)]
        raise StorageError(
            f"{folder} holds activations of another harvest (different: {', '.join(changed)}); "
            "choose another folder, or delete this one"
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    parts = order.split(index["series_per_shard"])
    if len(parts) != len(index["shards"]):
        raise CorruptFileError(f"{folder / INDEX} lists other shards than it says; delete {folder}")
    with tqdm(total=len(parts), desc="harvest", unit="shard", disable=not progress) as bar:
        for number, part in enumerate(parts):
            known = index["shards"][number]
            if known is None or not storage.regular(folder / Path(known["file"]).name):
                index["shards"][number] = _write_shard(
                    source, folder, number, part, series_per_pass
                )
                _write_index(folder, index)
            bar.update()
    entries = index["shards"]
    return Shards(
        folder,
        tuple(entry["file"] for entry in entries),
        tuple(entry["rows"] for entry in entries),
        tuple(entry["sha256"] for entry in entries),
        source.hooks,
    )


def _write_shard(
    source: ActivationRows, folder: Path, number: int, part: Tensor, series_per_pass: int
) -> dict[str, Any]:
    found = [source(index) for index in part.split(series_per_pass)]
    tensors = {
        hook: torch.cat([rows[hook] for rows, _ in found]).cpu().contiguous()
        for hook in source.hooks
    }
    tensors[PLACES] = torch.cat([places for _, places in found]).to("cpu", torch.int32)
    name = f"shard-{number:05d}.safetensors"
    content = storage.tensors_as_bytes(tensors)
    storage.write_bytes(folder / name, content)
    digest = hashlib.sha256(content).hexdigest()
    return {"file": name, "rows": len(tensors[PLACES]), "sha256": digest}


def fingerprint(source: ActivationRows, seed: int) -> dict[str, Any]:
    """What the activations depend on; two harvests with the same give the same files."""
    model = hashlib.sha256()
    for name, tensor in sorted(source.runs.model.state_dict().items()):
        model.update(name.encode())
        model.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    data = hashlib.sha256()
    for part in torch.arange(len(source)).split(1024):
        for tensor in (source.runs.series, source.runs.mask):
            if tensor is not None:
                data.update(tensor[part].cpu().contiguous().numpy().tobytes())
    made = {
        "model": model.hexdigest(),
        "series": data.hexdigest(),
        "n_series": len(source),
        "hooks": list(source.hooks),
        "head": source.head,
        "seed": seed,
    }
    return made if source.positions is None else {**made, "positions": repr(source.positions)}


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    advice = "it is no index of activations: delete the folder"
    index = storage.read_json(path, "an index of activations", advice, version=_VERSION)
    with storage.reading(path, "is no index of activations", "delete the folder"):
        if not isinstance(index["made"], dict):
            raise ValueError("it does not say what the activations are of")
        if type(index["series_per_shard"]) is not int or index["series_per_shard"] < 1:
            raise ValueError("series_per_shard is no count")
        for entry in index["shards"]:
            if entry is not None and not (
                type(entry["rows"]) is int and entry["rows"] >= 0 and isinstance(entry["file"], str)
            ):
                raise ValueError("a shard has no name or no number of rows")
    return index


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    storage.write_text(folder / INDEX, storage.json_text(index, "an index", indent=1))


_Chunk = tuple[Rows, Tensor | None]  # rows by hook and their places
_Loading = tuple[int, Callable[[], _Chunk]]  # how many rows, and how to get them


class Stream(ABC):
    """Batches of rows without end; every epoch visits every row once, in a new order.

    A subclass says what an epoch consists of.

    Args:
        batch_size: rows per batch.
        seed: of the order.
    """

    last_places: Tensor | None = None

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.batches_drawn = batch_size, seed, 0
        self._batches = self._run(skip=0)

    @abstractmethod
    def _chunks(self, generator: torch.Generator) -> Iterator[_Loading]:
        """One epoch: parts that fit in memory."""

    def _batch(self, rows: Rows) -> Any:
        """A batch as the stream gives it."""
        return next(iter(rows.values()))

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        rows, self.last_places = next(self._batches)
        self.batches_drawn += 1
        return self._batch(rows)

    def state_dict(self) -> dict[str, int]:
        """How far the stream has got."""
        return {"batches_drawn": self.batches_drawn, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on as a stream with the same arguments would after so many batches.

        Cheap where activations are kept; where they are not, the forward passes are run again.

        Raises:
            ArgumentError: no such state, or of another seed.
        """
        if not isinstance(state, Mapping) or not {"seed", "batches_drawn"} <= set(state):
            raise ArgumentError(f"expected what a stream's state_dict() gave, got {state!r:.100}")
        if state["seed"] != self.seed:
            raise ArgumentError(f"expected the state of seed {self.seed}, got {state['seed']}")
        drawn = state["batches_drawn"]
        if type(drawn) is not int or drawn < 0:
            raise ArgumentError(
                f"expected batches_drawn as an integer of at least 0, got {drawn!r}"
            )
        self.batches_drawn, self._batches = drawn, self._run(skip=drawn)

    def _run(self, skip: int) -> Iterator[_Chunk]:
        to_skip, parts, short = skip * self.batch_size, [], self.batch_size
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            n_rows = 0
            for length, load in self._chunks(generator):
                n_rows += length
                order = torch.randperm(length, generator=generator)
                if to_skip >= length:
                    to_skip -= length
                    continue
                order, to_skip = order[to_skip:], 0
                rows, places = load()
                while len(order):
                    taken, order = order[:short], order[short:]
                    parts.append(_taken(rows, places, taken))
                    short -= len(taken)
                    if not short:
                        yield _joined(parts)
                        parts, short = [], self.batch_size
                del rows, places, load  # before the next part is loaded beside it
            if not n_rows:
                raise ArgumentError("the series have no observed position to stream")
            epoch += 1


class TensorStream(Stream):
    """Batches of a tensor's rows without end; every epoch visits every row once.

    Args:
        rows: activations [row, width].
        batch_size: rows per batch.
        seed: of the order.
    """

    @checked
    def __init__(self, rows: Float[Tensor, "row width"], batch_size: Count, seed: Seed = 0) -> None:
        if rows.ndim != 2 or not len(rows):
            raise ArgumentError(f"expected activations [row, width], got {list(rows.shape)}")
        if not rows.is_floating_point() or not bool(rows.isfinite().all()):
            raise ArgumentError(
                f"expected finite activations in floating point, got {rows.dtype}"
                + (" with NaN or infinity" if rows.is_floating_point() else "")
            )
        self.rows = rows
        super().__init__(batch_size, seed)

    def _chunks(self, generator: torch.Generator) -> Iterator[_Loading]:
        yield len(self.rows), lambda: ({"rows": self.rows}, None)


class ActivationStream(Stream):
    """Batches of a model's activations without end, for ``SAETrainer(data_provider=...)``.

    The model is frozen, so an activation is computed once and kept where memory allows: in memory
    while all of them fit ``memory_mb``, else in ``cache`` on disk, else the forward pass runs anew
    in every epoch. Either way every epoch visits every observed position once, in a new order, and
    the forward pass stops at the layer that the hooks need.

    Args:
        model: the model.
        series: float [batch, channel, time], or data with their mask.
        hook: a hook name, whose batches are tensors [batch_size, width]; or several, whose batches
            are dicts by name with rows that belong together (sae-lens' ``MultiSAETrainer``).
        mask: bool [batch, time], True where observed; padded positions are skipped.
        batch_size: activations per batch.
        seed: of the order.
        head: at q, k, v, z: ``"joined"`` for rows of n_heads * d_head, ``"each"`` for one row per
            head, a number for that head alone.
        positions: positions of the trunk to stream: a number, several or a slice, negative ones
            from the end; None for all.
        memory_mb: MiB of activations held at a time.
        cache: folder for activations that do not fit; written on the first run, then read.
        shard_mb: MiB per file in it.
        series_per_pass: series per forward pass; by default about 8,192 positions.
        remember: keep the places of the last batch in ``last_places``, int [batch_size, 4]:
            (series, channel, pos, head), -1 where there is no such axis. Where the trunk holds
            mirrored series too, channel ``n_channels + c`` is channel c mirrored.
        progress: show a bar while writing to disk.

    Raises:
        UnknownHookError, HookError: hooks that do not exist or cannot fire.
        SeriesShapeError, SeriesValueError: series that do not fit the model.
        ArgumentError: sizes that are not positive.
        CorruptFileError: a damaged shard in the cache, by name.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> stream = saes.ActivationStream(
        ...     model, torch.randn(20, 12, 25), "blocks.1.attn.hook_z", batch_size=64)
        >>> next(stream).shape
        torch.Size([64, 128])
    """

    @checked
    def __init__(
        self,
        model: HookedTST,
        series: Series | TimeSeriesData,
        hook: str | Sequence[str],
        mask: Mask | None = None,
        *,
        batch_size: Count = 1024,
        seed: Seed = 0,
        head: Heads = "joined",
        positions: int | slice | Sequence[int] | None = None,
        memory_mb: Positive = 512.0,
        cache: str | Path | None = None,
        shard_mb: Positive | None = None,
        series_per_pass: Count | None = None,
        remember: bool = False,
        progress: bool = False,
    ) -> None:
        hooks = [hook] if isinstance(hook, str) else list(hook)
        self.rows = ActivationRows(model, series, hooks, mask, head, positions)
        self.single = isinstance(hook, str)
        self.side_by_side, self.remember = False, remember  # for transcoders, hooks in one row
        self.memory_mb, self.progress = memory_mb, progress
        self.shard_mb = shard_mb or max(1.0, min(32.0, memory_mb / 8))
        self.cache = None if cache is None else Path(cache)
        self.series_per_pass = series_per_pass or self._series_per_pass()
        self._held: _Chunk | None = None
        self._shards: Shards | None = None
        self._checked: set[int] = set()
        self._ready = False
        super().__init__(batch_size, seed)

    def _batch(self, rows: Rows) -> Any:
        if self.side_by_side:
            return torch.cat([rows[name] for name in self.rows.hooks], 1)
        return super()._batch(rows) if self.single else rows

    @property
    def width(self) -> int:
        """Entries per activation of the (first) hook."""
        rows, _ = self.rows(torch.arange(1))
        return rows[self.rows.hooks[0]].shape[1]

    @property
    def kept_in(self) -> str:
        """``"memory"``, ``"disk"`` or ``"nothing"``: where activations wait for the next epoch."""
        self._prepare()
        if self._held is not None:
            return "memory"
        return "nothing" if self._shards is None else "disk"

    def _chunks(self, generator: torch.Generator) -> Iterator[_Loading]:
        self._prepare()
        if self._held is not None:
            held = self._held
            yield _length(held), lambda: self._kept(held)
        elif self._shards is not None:
            shards, limit = self._shards, self.memory_mb * 2**20 / 3
            order, group, size = torch.randperm(len(shards.rows), generator=generator), [], 0.0
            for number in order.tolist():
                bytes_here = (shards.folder / shards.names[number]).stat().st_size
                if group and size + bytes_here > limit:
                    yield self._group(shards, group)
                    group, size = [], 0.0
                group, size = [*group, number], size + bytes_here
            yield self._group(shards, group)
        else:
            order = torch.randperm(len(self.rows), generator=generator)
            parts, size = [], 0
            for index in order.split(self.series_per_pass):
                parts.append(self.rows(index))
                size += _bytes(parts[-1])
                if size > self.memory_mb * 2**20 / 4:  # joining holds everything twice
                    yield self._loaded(parts)
                    parts, size = [], 0
            if parts:
                yield self._loaded(parts)

    def _group(self, shards: Shards, group: list[int]) -> _Loading:
        n_rows = sum(shards.rows[number] for number in group)
        return n_rows, lambda: self._kept(shards.read(group, self._checked))

    def _loaded(self, parts: list[_Chunk]) -> _Loading:
        return sum(map(_length, parts)), lambda: self._kept(_joined(parts))

    def _kept(self, chunk: _Chunk) -> _Chunk:
        return chunk if self.remember else (chunk[0], None)

    def _series_per_pass(self) -> int:
        """Series with about 8,192 positions, whose activations take a quarter of the memory."""
        if not len(self.rows):
            return 1
        one = self.rows(torch.arange(1))
        by_memory = int(self.memory_mb * 2**20 / 4 / max(_bytes(one), 1))
        return max(1, min(len(self.rows), 8192 // max(len(one[1]), 1), by_memory))

    def _prepare(self) -> None:
        """Decide where activations are kept, by the size of the first pass."""
        if self._ready:
            return
        self._ready = True
        if self.cache is not None:
            self._shards = harvest_to_disk(
                self.rows,
                self.cache,
                shard_mb=self.shard_mb,
                series_per_pass=self.series_per_pass,
                seed=self.seed,
                progress=self.progress,
            )
            return
        passes = torch.arange(len(self.rows)).split(self.series_per_pass)
        parts: list[_Chunk] = [self.rows(passes[0])]
        if 2 * _bytes(parts[0]) * len(passes) <= self.memory_mb * 2**20:
            parts += [self.rows(index) for index in passes[1:]]
            self._held = _joined(parts)


def _taken(rows: Rows, places: Tensor | None, which: Tensor) -> _Chunk:
    taken = {name: tensor[which.to(tensor.device)] for name, tensor in rows.items()}
    return taken, None if places is None else places[which.to(places.device)]


def _bytes(part: _Chunk) -> int:
    return sum(tensor.nbytes for tensor in (*part[0].values(), part[1]) if tensor is not None)


def _length(part: _Chunk) -> int:
    return len(next(iter(part[0].values())))


def _joined(parts: list[_Chunk]) -> _Chunk:
    if len(parts) == 1:
        return parts[0]
    rows = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    places = [part[1] for part in parts if part[1] is not None]
    return rows, torch.cat(places) if places else None
