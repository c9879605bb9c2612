"""Making an SAE that can be shipped: train, score on the test split, write it all to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens import SAE

from tstlens import storage
from tstlens.data import load_dataset
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.model.saving import as_model
from tstlens.saes.saving import save_with
from tstlens.saes.scores import Scores
from tstlens.saes.scoring import score
from tstlens.saes.training import train

SCORES, README = "scores.json", "README.md"


def make_sae(
    model: HookedTST | str | Path,
    hook: str,
    folder: str | Path,
    *,
    sae: str = "topk",
    dataset: str | None = None,
    d_sae: int | None = None,
    k: int | None = None,
    steps: int = 5000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    command: str = "",
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> tuple[SAE[Any], Scores]:
    """Train an SAE on a data set's training split, score it on its test split, and save both.

    Args:
        model: the model, or a name or folder of one.
        hook: the hook point.
        folder: where to: the files that sae-lens loads, ``scores.json`` and ``README.md``.
        sae: an architecture, see :func:`architectures`.
        dataset: as aeon spells it; the model's own by default.
        d_sae, k, steps, batch_size, lr, seed, checkpoint, progress, **options: as for
            :func:`train`.
        command: how to do this again, for the README.
        overwrite: replace an SAE that is in the folder already.

    Returns:
        The SAE and its scores.

    Raises:
        ArgumentError: the folder holds an SAE already; or the model does not say which data it was
            trained on, and none were given.
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
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
    made = train(
        model,
        load_dataset(name, split="train", **how),
        hook,
        sae,
        d_sae=d_sae,
        k=k,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        **options,
    )
    scores = score(model, made, load_dataset(name, split="test", **how), seed=seed)
    recipe = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, **options}
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
