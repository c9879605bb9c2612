"""SAEs from and to disk, from other people's state dicts, and trained, scored and shown whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from torch import Tensor

from tstlens import storage
from tstlens.arguments import Seed, checked, configured
from tstlens.data import TimeSeriesData, load_dataset
from tstlens.data.validate import usable_device
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    StateDictError,
    UnknownCheckpointError,
)
from tstlens.model import HookedTST
from tstlens.model.folders import find_checkpoint
from tstlens.model.saving import as_model
from tstlens.model.storage import check_dictionary, write_dictionary
from tstlens.randomness import seeded
from tstlens.saes.reading import features
from tstlens.saes.scoring import Scores, score
from tstlens.saes.training import TrainConfig, train
from tstlens.storage import check_file

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


@checked
def save(sae: SAE[Any], path: str | Path) -> Path:
    """Write an SAE (or a codebook) to a folder that :func:`load` and sae-lens read.

    As ``sae.save_model(path)``, but its files are replaced as a set or not at all, an SAE in
    training is written as the one for use, and what it is gets recorded: by the model's folder that
    it goes into (``saes/<hook point>``), or in ``sha256.json`` beside it.

    Args:
        sae: what :func:`train` or :func:`load` returned, or any SAE of sae-lens.
        path: the folder; made if missing. An SAE in it is replaced, other files stay.

    Returns:
        The folder.

    Raises:
        StorageError: the place is a file, cannot be written, or holds links or pipes.

    Example:
        >>> import tempfile
        >>> from tstlens import saes
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")
        >>> saes.load(saes.save(sae, tempfile.mkdtemp())).cfg.d_sae == sae.cfg.d_sae
        True
    """
    return save_with(sae, Path(path), {})


def save_with(sae: SAE[Any], folder: Path, texts: Mapping[str, str]) -> Path:
    """:func:`save` with further files of the same set, by name."""
    write = sae.save_inference_model if isinstance(sae, TrainingSAE) else sae.save_model
    write_dictionary(folder, write, texts)
    return folder


SCORES, README = "scores.json", "README.md"


@configured(TrainConfig, rest="options")
def make_sae(
    model: HookedTST | str | Path,
    hook: str,
    folder: str | Path,
    *,
    sae: str = "topk",
    dataset: str | None = None,
    command: str = "",
    overwrite: bool = False,
    config: TrainConfig | None = None,
    **settings: Any,
) -> tuple[SAE[Any], Scores]:
    """Train an SAE on a data set's training split, score it on its test split, and save both.

    Args:
        model: the model, or a name or folder of one.
        hook: the hook point.
        folder: where to: the files that sae-lens loads, ``scores.json`` and ``README.md``.
        sae: an architecture, see :func:`architectures`.
        dataset: as aeon spells it; the model's own by default.
        command: how to do this again, for the README.
        overwrite: replace an SAE that is in the folder already.
        config: how to train.
        **settings: as for :func:`train`.

    Returns:
        The SAE and its scores.

    Raises:
        ArgumentError: the folder holds an SAE already; or the model does not say which data it was
            trained on, and none were given.
        StorageError: the folder cannot be written.
    """
    config, folder = config or TrainConfig(), Path(folder)
    if not overwrite and (folder / "cfg.json").exists():
        raise ArgumentError(
            f"{folder} holds an SAE already; choose another folder, or overwrite=True "
            "(--overwrite) to replace it"
        )
    storage.check_folder(folder, "the SAE")
    model = as_model(model)
    known = model.info.get("data", {})
    name = dataset or known.get("name")
    if not name:
        raise ArgumentError("the model does not say which data it was trained on; give dataset=")
    how = {
        key: known[key]
        for key in ("equal_length", "scaling")
        if dataset in (None, known.get("name")) and known.get(key) is not None
    }
    made = train(model, load_dataset(name, split="train", **how), hook, sae, config=config)
    scores = score(model, made, load_dataset(name, split="test", **how), seed=config.seed)
    recipe = {name: getattr(config, name) for name in ("steps", "batch_size", "lr", "seed")}
    recipe |= config.options
    record = {**scores.to_dict(), "recipe": recipe, "command": command}
    texts = {SCORES: storage.json_text(record, "scores")}
    save_with(made, folder, {**texts, README: _readme(model, made, scores, command)})
    return made, scores


def _readme(model: HookedTST, sae: SAE[Any], scores: Scores, command: str) -> str:
    metadata = sae.cfg.metadata
    accuracy = "accuracy" in scores.task["original"]
    measure = "accuracy" if accuracy else next(iter(scores.task["original"]))
    shown = (lambda value: f"{value:.2%}") if accuracy else (lambda value: f"{value:.4g}")
    said, coded = storage.plain, storage.quoted
    usage = [
        "from tstlens import HookedTST, saes",
        "",
        f"sae = saes.load({coded(model.cfg.model_name)}, {coded(scores.hook)})",
        f"model = HookedTST.from_pretrained({coded(model.cfg.model_name)})",
        "model.add_sae(sae)",
    ]
    lines = [
        f"# SAE at {scores.hook}",
        "",
        f"A {sae.cfg.architecture()} sparse autoencoder of sae-lens with {sae.cfg.d_sae} latents "
        f"on {sae.cfg.d_in} dimensions of {said(model.cfg.model_name or 'a model')}, trained on "
        f"{said(metadata.dataset_path)} ({said(metadata.dataset_split)} split, padding left out).",
        "",
        f"Scores on {said(scores.data)}, {scores.n_activations:,} activations:",
        "",
        f"| dictionary | latents | explained variance | L0 | dead | {measure} spliced in |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.n_latents} | {row.explained_variance:.1%} | {row.l0:.2f} | "
        f"{row.n_dead} | {shown(row.task[measure])} |"
        for row in scores.rows
    ]
    original, zero, mean = (
        shown(scores.task[kind][measure]) for kind in ("original", "zero", "mean")
    )
    lines += [
        "",
        f"The model itself: {measure} {original}; with the activation replaced by zeros {zero}, by "
        f"its mean {mean}. Where these hardly differ, the last column says little about a "
        "dictionary: look at the explained variance beside the controls.",
        "",
        storage.fenced("\n".join(usage), "python"),
        "",
    ]
    if command:
        lines += ["Made by", "", storage.fenced(command, "bash"), ""]
    return "\n".join(lines)


@checked
def browse(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    path: str | Path,
    *,
    title: str | None = None,
    n_windows: int = 9,
    seed: Seed = 0,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Write a page on which every latent of an SAE can be looked up, sorted, searched and seen.

    Every latent has its strongest windows on the raw series, the classes it is active in, the
    properties that it follows, what its removal does to the output and the latents like it.
    Everything is inside the file. To work with the numbers as well, call :func:`features` and its
    ``to_html``: this does both and keeps the page alone. What can mislead is what can mislead in
    :func:`features`.

    Args:
        model: the model that the SAE was trained on.
        sae: as for :func:`features`.
        data: series to read it on, held out from its training where there are enough.
        path: the file to write; its folder is made if missing.
        title: heading of the page.
        n_windows: strongest windows per latent.
        seed: of shuffles, splits and samples.
        progress: show progress bars.
        **options: of :func:`features`.

    Returns:
        The path.

    Raises:
        ArgumentError, SeriesShapeError: as :func:`features`.
        StorageError: the place is a folder, or cannot be written.

    Example:
        >>> from tstlens import HookedTST, load_dataset, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")  # doctest: +SKIP
        >>> sae = saes.load("japanese-vowels", "blocks.0.hook_mlp_out")  # doctest: +SKIP
        >>> test = load_dataset("JapaneseVowels", split="test")  # doctest: +SKIP
        >>> saes.browse(model, sae, test, "features.html")  # doctest: +SKIP
    """
    check_file(Path(path))
    found = features(model, sae, data, seed=seed, progress=progress, **options)
    return found.to_html(path, title=title, n_windows=n_windows, seed=seed)
