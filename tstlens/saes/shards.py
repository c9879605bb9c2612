"""Activations on disk: safetensors shards and an index, for data bigger than memory.

Every shard holds the rows of a random part of the series, so reading a few shards and shuffling
them mixes well. Files are written beside their place and renamed into it, the index after each
shard: a harvest that is killed goes on where it was. Shards are read back by memory map.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.errors import ConfigVersionError, CorruptFileError, StorageError
from tstlens.saes.harvest import ActivationRows, Rows

INDEX = "index.json"
PLACES = "places"
_VERSION = 1


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
                self._check(path, self.digests[number])
                checked.add(number)
            try:
                with safe_open(path, framework="pt") as mapped:
                    for name in (*self.hooks, PLACES):
                        part = mapped.get_tensor(name)
                        if name not in together:
                            shape = (total, *part.shape[1:])
                            together[name] = torch.empty(shape, dtype=part.dtype)
                        together[name][filled : filled + n] = part
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CorruptFileError(f"shard {path} cannot be read: {error}") from error
            filled += n
        return together, together.pop(PLACES)

    @staticmethod
    def _check(path: Path, digest: str) -> None:
        try:
            found = _sha256(path)
        except OSError as error:
            raise CorruptFileError(f"shard {path} cannot be read: {error}") from error
        if found != digest:
            raise CorruptFileError(
                f"shard {path} is truncated or was altered: its SHA-256 is {found[:12]}…, the "
                f"index records {digest[:12]}…; delete this file and harvest again: the other "
                "shards are kept"
            )


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be a folder of activations: {error}") from error
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
    with tqdm(total=len(parts), desc="harvest", unit="shard", disable=not progress) as bar:
        for number, part in enumerate(parts):
            known = index["shards"][number]
            if known is None or not (folder / known["file"]).is_file():
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
    beside = folder / f".{name}.{os.getpid()}"
    try:
        save_file(tensors, beside)
        digest = _sha256(beside)
        os.replace(beside, folder / name)
    except OSError as error:
        raise StorageError(f"could not write {folder / name}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
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
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is no index of activations; delete the folder") from error
    if version > _VERSION:
        raise ConfigVersionError(f"{path} has format version {version}; update tstlens")
    return index


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    beside = folder / f".{INDEX}.{os.getpid()}"
    try:
        beside.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(beside, folder / INDEX)
    except OSError as error:
        raise StorageError(f"could not write {folder / INDEX}: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
