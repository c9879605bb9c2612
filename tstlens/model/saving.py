"""``save_pretrained`` and ``from_pretrained``: folders, shipped checkpoints, hub repositories."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from tstlens import family_index, storage
from tstlens.arguments import checked
from tstlens.data.validate import usable_device
from tstlens.errors import ArgumentError, CorruptFileError
from tstlens.model.config import HookedTSTConfig
from tstlens.model.folders import CONFIG, find_checkpoint, read_config
from tstlens.model.parity import Parity
from tstlens.model.storage import (
    DICTIONARIES,
    check_sizes,
    is_foreign,
    read_weights,
    write_folder,
)

if TYPE_CHECKING:
    from tstlens.model.hooked_tst import HookedTST

_Model = TypeVar("_Model", bound="SavedModel")


class SavedModel(nn.Module):
    """Saving and loading of a :class:`HookedTST`."""

    cfg: HookedTSTConfig
    info: dict[str, Any]
    parity: Any
    save_spliced: Callable[[Path], None]
    process_weights_: Callable[..., None]

    @checked
    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights and config to a folder, atomically.

        Dictionaries that are spliced in are saved beside the model, in their own format, under
        ``saes/<hook point>``; :meth:`from_pretrained` gives the model without them.

        Args:
            folder: where to; made if missing, and replaced as a whole if it holds a model.

        Returns:
            The folder.

        Raises:
            StorageError: the place is a file, cannot be written, or holds links or pipes.
        """
        return save_with(self, Path(folder), {})

    @classmethod
    @checked
    def from_pretrained(
        cls: type[_Model],
        name: str | Path,
        *,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
    ) -> _Model:
        """Load a model in eval mode.

        Args:
            name: a shipped checkpoint (see :func:`list_checkpoints`), a folder that
                ``save_pretrained`` wrote, or a hub id ``"organisation/model"`` of such a folder;
                or a folder or hub id of a source family with a format of its own, which is then
                converted (see :func:`tstlens.convert`).
            embed: the front end, where the model was converted with one of the user's own.
            head: the head, likewise.
            device: where to put the model.
            dtype: what to cast it to; ``"float32"`` is ``torch.float32``.
            torch_dtype: the same, as Hugging Face's libraries call it.
            fold_ln: as the three after it, see ``HookedTST.process_weights_``; other than in
                TransformerLens weights are as they were saved unless something else is asked for.
            center_writing_weights: likewise.
            center_unembed: likewise.
            fold_value_biases: likewise.

        Raises:
            UnknownCheckpointError: nothing goes by that name.
            DownloadError: a hub id that cannot be reached or does not exist.
            CorruptFileError: weights are truncated or altered, or do not fit the config.
            ConfigVersionError: a newer tstlens wrote the folder.
            ArgumentError: the model needs ``embed`` or ``head`` and they were not given.
            NonlinearResidualError, ArgumentError: a rewriting of weights that would change the
                model's output; the message says why.

        Example:
            >>> from tstlens.model import HookedTST
            >>> model = HookedTST.from_pretrained("japanese-vowels")
            >>> model.cfg.n_layers
            3
        """
        if device is not None:
            usable_device(device)
        dtype, also = _dtype(dtype), _dtype(torch_dtype)
        if dtype and also and dtype != also:
            raise ArgumentError(f"dtype and torch_dtype mean the same; got {dtype} and {also}")
        dtype = dtype or also
        folder = find_checkpoint(name)
        model = (
            family_index.convert(folder) if is_foreign(folder) else cls._load(folder, embed, head)
        )
        model.process_weights_(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
        )
        return model.to(device=device, dtype=dtype) if device or dtype else model

    @classmethod
    def _load(
        cls: type[_Model], folder: Path, embed: nn.Module | None, head: nn.Module | None
    ) -> _Model:
        record = read_config(folder)
        with storage.reading(
            folder / CONFIG, "does not describe a model", "fetch or save the model again"
        ):
            cfg = HookedTSTConfig.from_dict(record["config"])
            parity = Parity.from_dict(record["parity"]) if "parity" in record else None
            info = dict(record.get("info", {}))
        weights = read_weights(folder, record)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        check_sizes(cfg.n_layers, shapes, folder)
        with torch.device("meta"):  # nothing is allocated before the sizes are known to fit
            _check_fit(cls(cfg, embed=embed, head=head), shapes, folder)
        model = cls(cfg, embed=embed, head=head)
        dtype_of = next((t.dtype for t in weights.values() if t.is_floating_point()), None)
        model.to(dtype=dtype_of)
        model.load_state_dict(weights, strict=True)
        model.info = info
        model.parity = parity
        return model


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if given is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ArgumentError(f"expected a floating point dtype for the model, got {given}")
    return found


def save_with(
    model: Any, folder: Path, texts: Mapping[str, str], *, only_spliced: bool = False
) -> Path:
    """:meth:`SavedModel.save_pretrained` with further files of the same set.

    Args:
        model: the model.
        folder: where to.
        texts: file name -> text, a README say.
        only_spliced: whether dictionaries that lie there and are not spliced in go.
    """
    record = {"config": model.cfg.to_dict(), "info": model.info}
    if model.parity is not None:
        record["parity"] = model.parity.to_dict()

    def write_more(staging: Path) -> None:
        if only_spliced:
            shutil.rmtree(staging / DICTIONARIES, ignore_errors=True)
        model.save_spliced(staging)
        for name, text in texts.items():
            storage.write_text(staging / name, text)

    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("splices.")}
    write_folder(folder, weights, record, write_more)
    return folder


def _check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, extra = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if missing or extra or wrong:
        problems = [
            *(["missing " + ", ".join(missing[:5])] if missing else []),
            *(["unexpected " + ", ".join(extra[:5])] if extra else []),
            *wrong[:5],
        ]
        raise CorruptFileError(
            f"the weights in {folder} do not fit the model: {'; '.join(problems)}. If the front "
            "end or the head is a module of your own, pass the same class with the same sizes"
        )


def as_model(model: HookedTST | str | Path) -> HookedTST:
    """The model itself, or the one that goes by this name."""
    from tstlens.model.hooked_tst import HookedTST

    return model if isinstance(model, HookedTST) else HookedTST.from_pretrained(model)
