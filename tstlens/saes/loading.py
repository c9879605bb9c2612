"""SAEs from disk, from a shipped checkpoint, and from other people's state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from torch import Tensor

from tstlens import storage
from tstlens.arguments import checked
from tstlens.data.validate import usable_device
from tstlens.errors import (
    CorruptFileError,
    StateDictError,
    UnknownCheckpointError,
)
from tstlens.model.saving import find_checkpoint
from tstlens.model.storage import check_dictionary
from tstlens.randomness import seeded

FOLDER = "saes"
_WEIGHTS, _CONFIG = "sae_weights.safetensors", "cfg.json"


@checked
def list_saes(checkpoint: str | Path) -> list[str]:
    """Hook points for which a model's folder or shipped checkpoint holds an SAE.

    Args:
        checkpoint: a name or folder, as for ``HookedTST.from_pretrained``.

    Example:
        >>> from tstlens import saes
        >>> "blocks.0.hook_mlp_out" in saes.list_saes("japanese-vowels")
        True
    """
    folder = find_checkpoint(checkpoint) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / _CONFIG).is_file())


@checked
@seeded(0)
def load(
    name: str | Path, hook: str | None = None, *, device: str | torch.device = "cpu"
) -> SAE[Any]:
    """Load an SAE: a folder that ``save_model`` wrote, or the one that ships with a checkpoint.

    Args:
        name: the SAE's own folder; with ``hook`` a checkpoint's name or folder.
        hook: the hook point, as :func:`list_saes` lists them.
        device: where to put it.

    Returns:
        The SAE in eval mode.

    Raises:
        UnknownCheckpointError: no such checkpoint, or no SAE for this hook point in it.
        CorruptFileError: files that are missing, truncated or no SAE, or that are not those that
            the model was saved with.

    Example:
        >>> from tstlens import saes
        >>> saes.load("japanese-vowels", "blocks.0.hook_mlp_out").cfg.d_in
        128
    """
    place = str(usable_device(device))
    if hook is None:
        folder = Path(name)
        storage.recover(folder)
        if not _is_folder(folder):
            raise UnknownCheckpointError(
                str(name), [], "Give the folder of an SAE, or a checkpoint and hook="
            )
    else:
        known = list_saes(name)
        if hook not in known:
            come = f"These SAEs come with {name}" if known else f"No SAE comes with {name}"
            raise UnknownCheckpointError(hook, known, f"{come}; saes.train trains one")
        folder = find_checkpoint(name) / FOLDER / hook
    missing = [part for part in (_CONFIG, _WEIGHTS) if not storage.regular(folder / part)]
    if missing:
        raise CorruptFileError(f"expected {missing[0]} in {folder}, found none; save the SAE again")
    check_dictionary(folder)
    config = storage.read_json(folder / _CONFIG, "an SAE's config", "save the SAE again")
    fault = "holds no SAE that sae-lens can load"
    if config.get("architecture") == "codebook" and "codebook" not in SAE_CLASS_REGISTRY:
        fault = "holds a codebook: import tstlens.codebooks first"
    with storage.reading(folder, fault, "save the SAE again"):
        return SAE.load_from_disk(folder, device=place).eval()


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


_ENCODERS = ("encoder", "enc", "encode", "encoder.0", "enc.0", "fc1", "encoder_linear")
_DECODERS = ("decoder", "dec", "decode", "decoder.0", "dec.0", "fc2", "decoder_linear")


@checked
@seeded(0)
def from_linear(
    state_dict: Mapping[str, Tensor],
    hook: str,
    *,
    model_name: str = "",
    subtract_decoder_bias: bool = False,
) -> StandardSAE:
    """A ReLU autoencoder of two linear layers, ``dec(relu(enc(x)))``, as an sae-lens StandardSAE.

    Args:
        state_dict: with ``encoder.weight`` [latent, width], ``encoder.bias``, ``decoder.weight``
            [width, latent] and ``decoder.bias``; other common names of the two layers work too,
            as do missing biases and a missing decoder weight (tied to the encoder's).
        hook: the hook point whose activations it reads.
        model_name: goes into the metadata.
        subtract_decoder_bias: the encoder reads ``x - decoder.bias``.

    Returns:
        A ``StandardSAE`` with equal outputs.

    Raises:
        StateDictError: no two such layers, left-over entries, or shapes that do not fit.

    Example:
        >>> import torch
        >>> from tstlens import saes
        >>> layers = torch.nn.ModuleDict(
        ...     {"encoder": torch.nn.Linear(8, 32), "decoder": torch.nn.Linear(32, 8)})
        >>> saes.from_linear(layers.state_dict(), "blocks.0.hook_mlp_out").cfg.d_sae
        32
    """
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or not bool(tensor.isfinite().all()):
            got = "NaN or infinity" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise StateDictError(f"expected a tensor of finite numbers for {name}, got {got}")
    entries = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    encoder = _layer(entries, _ENCODERS)
    decoder = _layer(entries, _DECODERS)
    if encoder is None:
        raise StateDictError(
            f"expected an encoder's weight, such as encoder.weight, got {sorted(entries)}"
        )
    used = {f"{name}.{part}" for name in (encoder, decoder) for part in ("weight", "bias")}
    left = sorted(set(entries) - used)
    if left:
        raise StateDictError(
            f"expected two linear layers and nothing else, got {left[0]} beside them; an "
            "autoencoder with more than that is not a StandardSAE"
        )
    w_enc = entries[f"{encoder}.weight"]
    w_dec = entries.get(f"{decoder}.weight", w_enc.T)
    d_sae, d_in = w_enc.shape
    if w_dec.shape != (d_in, d_sae):
        raise StateDictError(
            f"expected a decoder weight [width={d_in}, latent={d_sae}] for the encoder's "
            f"{list(w_enc.shape)}, got {list(w_dec.shape)}"
        )
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            dtype=str(w_enc.dtype).removeprefix("torch."),
            apply_b_dec_to_input=subtract_decoder_bias,
            metadata=SAEMetadata(hook_name=hook, model_name=model_name),
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(w_enc.T)
        sae.W_dec.copy_(w_dec.T)
        for target, name, size in ((sae.b_enc, encoder, d_sae), (sae.b_dec, decoder, d_in)):
            bias = entries.get(f"{name}.bias", torch.zeros(size))
            if bias.shape != (size,):
                raise StateDictError(f"expected {name}.bias [{size}], got {list(bias.shape)}")
            target.copy_(bias)
    return sae.eval()


def _layer(entries: Mapping[str, Tensor], names: tuple[str, ...]) -> str | None:
    for name in names:
        weight = entries.get(f"{name}.weight")
        if weight is not None and weight.ndim == 2:
            return name
    return None
