"""Activations on disk: safetensors shards and an index, for data bigger than memory.

Every shard holds the rows of a random part of the series, so reading a few shards and shuffling
them mixes well. Files are written beside their place and renamed into it, the index after each
shard: a harvest that is killed goes on where it was. Shards are read back by memory map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from tstlens import storage
from tstlens.errors import CorruptFileError, StorageError
from tstlens.saes.harvest import ActivationRows, Rows

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
