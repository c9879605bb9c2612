"""The activation stream: an endless, shuffled, seeded iterator that feeds sae-lens' trainers.

Rows of a tensor as an endless, shuffled, seeded stream of batches.

Activations as rows: the forward pass up to a layer, padding left out, one row per position.

A row's *place* says where it comes from: (series, channel, pos, head). Channel is -1 where the
trunk mixes channels, pos is -1 for pooled vectors, head is -1 unless heads are rows of their own.
Models that run the mirrored series too give rows of both passes, as a spliced dictionary meets
both; there channel ``n_channels + c`` is channel c mirrored.

Activations on disk: safetensors shards and an index, for data bigger than memory.

Every shard holds the rows of a random part of the series, so reading a few shards and shuffling
them mixes well. Files are written beside their place and renamed into it, the index after each
shard: a harvest that is killed goes on where it was. Shards are read back by memory map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from tstlens import storage
from tstlens.arguments import Count, Positive, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, CorruptFileError, StorageError
from tstlens.model import HookedTST
from tstlens.saes.checks import check_at_least, check_positive, drawn_by
from tstlens.shapes import Mask, Series

Heads = Literal["joined", "each"] | int

Rows = dict[str, Tensor]  # hook name -> [row, width]


class ActivationRows:
    """Calls give the activations of some of the series, as rows, and where they come from.

    Args:
        model: runs in eval mode and without gradients, no further than the hooks need. Hooks and
            spliced dictionaries on it stay and take part.
        series: [batch, channel, time], or data with their mask.
        hooks: hook names.
        mask: [batch, time], True where observed.
        head: of q, k, v, z and result: ``"joined"`` makes one row of all heads, ``"each"`` one row
            per head, a number takes that head.

    Raises:
        UnknownHookError, HookError: a hook point that does not exist, does not fire, or has no
            feature axis.
        ArgumentError: ``head="each"`` with several hooks, or a head that is not there.
    """

    def __init__(
        self,
        model: HookedTST,
        series: Series | TimeSeriesData,
        hooks: Sequence[str],
        mask: Mask | None = None,
        head: Heads = "joined",
    ) -> None:
        if isinstance(series, TimeSeriesData):
            if mask is not None:
                raise ArgumentError("data bring their own mask; leave out mask=")
            series, mask = series.series, series.mask
        model.check_series(series, mask)
        if not len(series):
            raise ArgumentError("expected at least one series, got none")
        model.require_live(hooks)
        for name in hooks:
            model.require_features(name)
        if not hooks or len(set(hooks)) != len(hooks):
            raise ArgumentError(f"expected one or more different hook names, got {list(hooks)}")
        if head == "each" and len(hooks) > 1:
            raise ArgumentError(
                "with head='each' rows of several hooks would not belong together; stream one hook"
            )
        if head not in ("joined", "each") and (
            isinstance(head, str) or not hasattr(head, "__index__")
        ):
            raise ArgumentError(f"expected head 'joined', 'each' or a head's number, got {head!r}")
        if isinstance(head, int) and not 0 <= head < model.cfg.n_heads:
            raise ArgumentError(f"expected a head in 0..{model.cfg.n_heads - 1}, got {head}")
        self.model, self.series, self.mask = model, blanked(series, mask), mask
        self.hooks, self.head = tuple(hooks), head
        self.stop_at_layer, self.runs_head = _extent(model, self.hooks)

    def __len__(self) -> int:
        return len(self.series)

    @torch.no_grad()
    def __call__(self, index: Tensor) -> tuple[Rows, Tensor]:
        """Rows of the series at ``index``, and their places, int [row, 4]."""
        model, device = self.model, self.model.cfg.device
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        # Module.eval() visits every module, which took a tenth of a pass; and parts may differ.
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            mask = None if self.mask is None else self.mask[index].to(device)
            with model.hooks(fwd_hooks=[(name, keep) for name in self.hooks]):
                residual, state = model.embed_series(self.series[index].to(device), mask)
                stop = self.stop_at_layer
                if stop:
                    residual = model(residual, start_at_layer=0, stop_at_layer=stop, state=state)
                if self.runs_head:
                    model.unembed(residual, state)
        finally:
            for module in training:
                module.training = True
        rows, places = {}, None
        for name in self.hooks:
            activation = kept[name]
            places = _places(activation, index, state.n_series_channels, self.head == "each")
            activation = self._by_head(activation, name)
            observed = model.observed_at(name, state)
            if observed is not None and activation.ndim > 2:
                activation, places = activation[observed], places[observed]
            rows[name] = activation.reshape(-1, activation.shape[-1])
            places = places.reshape(-1, 4)
        lengths = {len(tensor) for tensor in rows.values()}
        if len(lengths) > 1:
            shapes = [list(activation.shape) for activation in kept.values()]
            raise ArgumentError(
                f"expected hooks with the same positions, got {shapes} at {list(self.hooks)}; "
                "stream them one by one"
            )
        return rows, places if places is not None else torch.empty(0, 4, dtype=torch.long)

    def _by_head(self, activation: Tensor, name: str) -> Tensor:
        if activation.ndim < 4:
            if self.head not in ("joined",):
                raise ArgumentError(f"head={self.head!r} was given, but {name} has no heads")
            return activation
        if self.head == "joined":
            return activation.flatten(-2)
        return activation if self.head == "each" else activation[..., int(self.head), :]


def _extent(model: HookedTST, hooks: Sequence[str]) -> tuple[int, bool]:
    """The layer to stop before, and whether the head has to run."""
    stops = [model.point(name).stop for name in hooks]
    runs_head = None in stops
    return model.cfg.n_layers if runs_head else max(stop or 0 for stop in stops), runs_head


def _places(activation: Tensor, index: Tensor, n_channels: int, each_head: bool) -> Tensor:
    """(series, channel, pos, head) of every row, shaped like the activation without features."""
    shape = activation.shape[: 3 if each_head else 2] if activation.ndim > 2 else (len(activation),)
    row = torch.arange(shape[0])
    places = torch.full((*shape, 4), -1, dtype=torch.long)
    by_row = (-1, *(1,) * (len(shape) - 1))
    places[..., 0] = index.cpu()[row // n_channels].view(by_row)
    if n_channels > 1:
        places[..., 1] = (row % n_channels).view(by_row)
    if len(shape) > 1:
        places[..., 2] = torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2))
    if len(shape) > 2:
        places[..., 3] = torch.arange(shape[2])
    return places.to(activation.device)


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
    folder = Path(folder)
    with storage.claimed(folder):
        return _harvest(source, folder, shard_mb, series_per_pass, seed, progress)


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
    for name, tensor in sorted(source.model.state_dict().items()):
        model.update(name.encode())
        model.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    data = hashlib.sha256()
    for part in torch.arange(len(source)).split(1024):
        data.update(source.series[part].cpu().contiguous().numpy().tobytes())
        if source.mask is not None:
            data.update(source.mask[part].cpu().contiguous().numpy().tobytes())
    return {
        "model": model.hexdigest(),
        "series": data.hexdigest(),
        "n_series": len(source),
        "hooks": list(source.hooks),
        "head": source.head,
        "seed": seed,
    }


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
        batch_size: Count = 1024,
        seed: Seed = 0,
        head: Heads = "joined",
        memory_mb: Positive = 512.0,
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


class TensorStream:
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
        check_at_least(1, batch_size=batch_size)
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.batches_drawn = 0
        self._batches = self._run(0)

    def __iter__(self) -> TensorStream:
        return self

    def __next__(self) -> Tensor:
        self.batches_drawn += 1
        return next(self._batches)

    def state_dict(self) -> dict[str, int]:
        """How far the stream has got."""
        return {"batches_drawn": self.batches_drawn, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on as a stream with the same arguments would after so many batches."""
        self.batches_drawn = drawn_by(state, self.seed)
        self._batches = self._run(self.batches_drawn)

    def _run(self, skip: int) -> Iterator[Tensor]:
        n = len(self.rows)
        epoch, within = divmod(skip * self.batch_size, n)
        order = self._order(epoch)[within:]
        while True:
            while len(order) < self.batch_size:
                epoch += 1
                order = torch.cat([order, self._order(epoch)])
            taken, order = order[: self.batch_size], order[self.batch_size :]
            yield self.rows[taken.to(self.rows.device)]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator)
