"""A model's folder on disk: ``model.safetensors`` and ``config.json``, whole or not there at all.

``config.json`` holds the format's version, the model's configuration, whatever the model's ``info``
says of its data and training, and SHA-256 sums: ``weights_sha256`` is of the weights' file,
``config_sha256`` of everything else that ``config.json`` says (whatever its layout), ``files`` of
the dictionaries beside the model. README and scores are not recorded: they change no result.
Folders that were written before a sum was kept go unchecked for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tstlens import storage
from tstlens.arguments import checked
from tstlens.errors import CorruptFileError, StorageError
from tstlens.model.folders import CONFIG, FORMAT, FORMAT_VERSION, ON_PURPOSE, read_config

WEIGHTS, DICTIONARIES = "model.safetensors", "saes"
SEAL = "sha256.json"  # the sums of a dictionary that lies in no model's folder
_OF_DICTIONARIES = ("cfg.json", "sae_weights.safetensors")  # what sae-lens loads
_SEAL_FORMAT = "tstlens dictionary"


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a model's folder so that an interrupt leaves the old one or the new one, never half.

    Files in an existing folder that are not the model's (a README, say) stay. ``write_more`` is
    called with the folder in the making, to put what else belongs to the model into it.

    Raises:
        StorageError: the place is a file, cannot be written, or holds links or pipes.
    """
    with storage.staged(folder, "the model") as staging:
        storage.write_tensors(staging / WEIGHTS, weights)
        if write_more is not None:
            write_more(staging)
        write_config(staging, {"format": FORMAT, "format_version": FORMAT_VERSION, **config})


def write_config(folder: Path, record: dict[str, Any]) -> None:
    """Write a model's ``config.json`` with the sums of what the folder holds now."""
    text = storage.json_text(record, f"the model's info goes into {CONFIG} and")
    sealed = _sealed(folder, json.loads(text))
    storage.write_text(folder / CONFIG, storage.json_text(sealed, CONFIG))


def _sealed(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    sums = ("weights_sha256", "files", "config_sha256")
    head = {k: v for k, v in record.items() if k in ("format", "format_version")}
    rest = {k: v for k, v in record.items() if k not in head and k not in sums}
    found = sorted(
        path
        for name in _OF_DICTIONARIES
        for path in (folder / DICTIONARIES).glob(f"*/{name}")
        if path.is_file()
    )
    files = {path.relative_to(folder).as_posix(): storage.digest(path) for path in found}
    weights = storage.digest(folder / WEIGHTS)
    record = {**head, "weights_sha256": weights, "files": files, **rest}
    return {**record, "config_sha256": storage.digest_of_json(record)}


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a model's folder, checked against the recorded sum.

    Raises:
        StorageError: the file is missing.
        CorruptFileError: it is truncated, altered, or not what it should be.
    """
    path = weights_path(folder)
    storage.check_digest(
        path, config.get("weights_sha256"), CONFIG, "fetch or save the model again"
    )
    return storage.read_tensors(path)


def weights_path(folder: Path) -> Path:
    """Where a model's weights lie.

    Raises:
        StorageError: they do not.
    """
    path = folder / WEIGHTS
    if not storage.regular(path):
        raise StorageError(f"expected {WEIGHTS} in {folder}, found none; save the model again")
    return path


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds the ``config.json`` of another library's model."""
    try:
        config = storage.read_json(folder / CONFIG, "a config")
    except StorageError:
        return False
    marks = {"model_type", "architectures", "transformer_backbone"}
    return "format" not in config and bool(marks & set(config))


def owner_of(folder: Path) -> Path | None:
    """The model's folder that a dictionary's lies in, or None where it lies in none."""
    folder = folder.resolve()
    model = folder.parent.parent
    if folder.parent.name != DICTIONARIES or not storage.regular(model / CONFIG):
        return None
    try:
        storage.read_json(model / CONFIG, "a model's config", format=FORMAT)
    except StorageError:
        return None
    return model


def write_dictionary(
    folder: Path, write: Callable[[Path], Any], texts: Mapping[str, str] | None = None
) -> None:
    """Write a dictionary's folder as a set, and tell the model that it lies in, or seal it.

    Args:
        folder: of the dictionary. Files in it that are not replaced stay.
        write: puts what sae-lens loads into the folder that it is given.
        texts: further files, by name.
    """

    def into(place: Path) -> None:
        storage.fill(place, write)
        for name, text in (texts or {}).items():
            storage.write_text(place / name, text)

    owner = owner_of(folder)
    if owner is not None:
        name = folder.resolve().name
        with storage.staged(owner, "the dictionary") as staging:
            into(staging / DICTIONARIES / name)
            write_config(staging, read_config(staging, check=False))
        return
    with storage.staged(folder, "the dictionary") as staging:
        into(staging)
        sums = {name: storage.digest(staging / name) for name in _OF_DICTIONARIES}
        record = {"format": _SEAL_FORMAT, "format_version": 1, "sha256": sums}
        storage.write_text(staging / SEAL, storage.json_text(record, SEAL))


def check_dictionary(folder: Path) -> None:
    """Raise :class:`CorruptFileError` if a dictionary is not the one that was saved.

    Args:
        folder: of the dictionary. What its model's ``config.json`` or its own ``sha256.json``
            does not list goes unchecked: it was saved by sae-lens, or before sums were kept.
    """
    model = owner_of(folder)
    if model is not None:
        path, files = model / CONFIG, read_config(model).get("files", {})
        prefix, advice = f"{DICTIONARIES}/{folder.resolve().name}/", ON_PURPOSE
        advice = advice.format(folder=str(model))
    elif storage.regular(folder / SEAL):
        path, prefix = folder / SEAL, ""
        files = storage.read_json(path, "the sums of a dictionary", format=_SEAL_FORMAT, version=1)
        files = files.get("sha256", {})
        advice = f"save it again with saes.save, or, where the change is meant, delete {path}"
    else:
        return
    if not isinstance(files, dict):
        raise CorruptFileError(f"{path} records no sums; {advice}")
    for name in _OF_DICTIONARIES:
        if prefix + name in files and storage.regular(folder / name):
            storage.check_digest(folder / name, files[prefix + name], str(path), advice)


@checked
def seal_checkpoint(folder: str | Path) -> Path:
    """Record anew what a model's folder holds, after a change that was meant.

    Loading refuses weights, a config or dictionaries whose SHA-256 is not the recorded one. Call
    this after editing ``config.json`` by hand, or after writing an SAE into ``saes/<hook point>``
    other than with :func:`tstlens.saes.save`. It does not say whether the change is right: load
    the model and measure it.

    Args:
        folder: the model's, as ``model.save_pretrained`` wrote it.

    Returns:
        The folder.

    Raises:
        StorageError: no model is there, or it cannot be written.
        CorruptFileError: ``config.json`` is no JSON, or not a tstlens model's.

    Example:
        >>> import tempfile
        >>> from tstlens.model import HookedTST, seal_checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> _ = HookedTST.from_pretrained("gunpoint").save_pretrained(folder)
        >>> HookedTST.from_pretrained(seal_checkpoint(folder)).cfg.n_layers
        2
    """
    folder = Path(folder)
    record = read_config(folder, check=False)
    weights_path(folder)
    write_config(folder, record)
    return folder


def check_sizes(config_says: int, shapes: Mapping[str, Any], folder: Path) -> None:
    """Raise unless a config's number of layers can be that of the weights: each has tensors."""
    if config_says > len(shapes):
        raise CorruptFileError(
            f"{folder / CONFIG} says that the model has {config_says:,} layers, and its weights "
            f"have {len(shapes)} tensors in all; fetch or save the model again"
        )
