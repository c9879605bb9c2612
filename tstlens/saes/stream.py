"""The activation stream: an endless, shuffled, seeded iterator that feeds sae-lens' trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.saes.checks import check_at_least, check_positive, drawn_by
from tstlens.saes.harvest import ActivationRows, Heads, Rows
from tstlens.saes.shards import Shards, harvest_to_disk
from tstlens.shapes import Mask, Series

_Chunk = tuple[Rows, Tensor]  # rows by hook and their places


class ActivationStream:
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
        batch_size: int = 1024,
        seed: int = 0,
        head: Heads = "joined",
        memory_mb: float = 512.0,
        cache: str | Path | None = None,
        shard_mb: float | None = None,
        series_per_pass: int | None = None,
        remember: bool = False,
        progress: bool = False,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        if series_per_pass is not None:
            check_at_least(1, series_per_pass=series_per_pass)
        check_positive(memory_mb=memory_mb, shard_mb=1.0 if shard_mb is None else shard_mb)
        hooks = [hook] if isinstance(hook, str) else list(hook)
        self.rows = ActivationRows(model, series, hooks, mask, head)
        self.single = isinstance(hook, str)
        self.batch_size, self.seed, self.remember = batch_size, seed, remember
        self.memory_mb, self.progress = memory_mb, progress
        self.shard_mb = shard_mb or max(1.0, min(32.0, memory_mb / 8))
        self.cache = None if cache is None else Path(cache)
        self.series_per_pass = series_per_pass or self._series_per_pass()
        self.last_places: Tensor | None = None
        self.batches_drawn = 0
        self._held: _Chunk | None = None
        self._shards: Shards | None = None
        self._checked: set[int] = set()
        self._ready = False
        self._batches = self._run(skip=0)

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Any:
        batch, places = next(self._batches)
        self.batches_drawn += 1
        self.last_places = places
        return batch[self.rows.hooks[0]] if self.single else batch

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

    def state_dict(self) -> dict[str, int]:
        """How far the stream has got."""
        return {"batches_drawn": self.batches_drawn, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on as a stream with the same arguments would after so many batches.

        Cheap where activations are kept; where they are not, the forward passes are run again.
        """
        self.batches_drawn = drawn_by(state, self.seed)
        self._batches = self._run(skip=self.batches_drawn)

    def _run(self, skip: int) -> Iterator[tuple[Rows, Tensor | None]]:
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
                    parts.append(self._take(rows, places, taken))
                    short -= len(taken)
                    if not short:
                        yield _joined(parts)
                        parts, short = [], self.batch_size
                del rows, places, load  # before the next part is loaded beside it
            if not n_rows:
                raise ArgumentError("the series have no observed position to stream")
            epoch += 1

    def _take(self, rows: Rows, places: Tensor, which: Tensor) -> tuple[Rows, Tensor | None]:
        which = which.to(places.device)
        taken = {name: tensor[which] for name, tensor in rows.items()}
        return taken, places[which] if self.remember else None

    def _chunks(self, generator: torch.Generator) -> Iterator[tuple[int, Callable[[], _Chunk]]]:
        """One epoch: parts that fit in memory, each with its length and how to get it."""
        self._prepare()
        if self._held is not None:
            held = self._held
            yield len(held[1]), lambda: held
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
                    yield _loaded(parts)
                    parts, size = [], 0
            if parts:
                yield _loaded(parts)

    def _group(self, shards: Shards, group: list[int]) -> tuple[int, Callable[[], _Chunk]]:
        n_rows = sum(shards.rows[number] for number in group)
        return n_rows, lambda: shards.read(group, self._checked)

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
        parts = [self.rows(passes[0])]
        if 2 * _bytes(parts[0]) * len(passes) <= self.memory_mb * 2**20:
            parts += [self.rows(index) for index in passes[1:]]
            self._held = _loaded(parts)[1]()


def _loaded(parts: list[_Chunk]) -> tuple[int, Callable[[], _Chunk]]:
    rows = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    places = torch.cat([part[1] for part in parts])
    return len(places), lambda: (rows, places)


def _bytes(part: _Chunk) -> int:
    tensors = [*part[0].values(), part[1]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _joined(parts: list[tuple[Rows, Tensor | None]]) -> tuple[Rows, Tensor | None]:
    if len(parts) == 1:
        return parts[0]
    rows = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    places = [part[1] for part in parts if part[1] is not None]
    return rows, torch.cat(places) if places else None
