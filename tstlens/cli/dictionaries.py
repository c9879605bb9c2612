"""``tstlens sae`` and ``tstlens codebook``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from tstlens.cli.apps import codebook_app, sae_app
from tstlens.cli.options import (
    Data,
    Model,
    Overwrite,
    Quiet,
    Resume,
    argument,
    option,
    settings_of,
)
from tstlens.errors import ArgumentError
from tstlens.storage import check_file


@sae_app.command("train")
@settings_of("tstlens.saes.training.TrainConfig", "progress")
def sae_train(
    model: Model,
    hook: Annotated[str, argument("A hook point: blocks.0.hook_mlp_out.")],
    out: Annotated[Path | None, option("Folder to save to; sae-<hook> here by default.")] = None,
    architecture: Annotated[str, option("As sae-lens calls it.")] = "topk",
    data: Data = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Train an SAE on a model's activations, score it on the test split, and save it."""
    from tstlens.saes.dictionaries import make_sae

    folder = out or Path(f"sae-{hook}")
    _, scores = make_sae(
        model,
        hook,
        folder,
        sae=architecture,
        dataset=data,
        checkpoint=resume,
        command=shlex.join(["tstlens", *sys.argv[1:]]),
        overwrite=overwrite,
        progress=not quiet,
        **settings,
    )
    _print_saved(scores, folder)


@sae_app.command()
def browse(
    model: Model,
    sae: Annotated[
        str | None,
        argument(
            "The SAE's folder, or the hook point of one that ships with the checkpoint; by default "
            "the first that ships."
        ),
    ] = None,
    out: Annotated[Path | None, option("The HTML file; by default <model>-features.html.")] = None,
    data: Data = None,
    split: Annotated[str, option("train, test or all.")] = "test",
    windows: Annotated[int, option("Strongest windows per latent.", min=1)] = 9,
    seed: Annotated[int, option("Of shuffles, splits and samples.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Every latent of an SAE on the raw series: one HTML page that needs no network."""
    from tstlens import saes
    from tstlens.data import load_described
    from tstlens.model import HookedTST

    if out is not None:
        check_file(out)
    loaded = HookedTST.from_pretrained(model)
    known = saes.list_saes(model)
    if sae is None and not known:
        raise ArgumentError(f"no SAE ships with {model!r}; give the folder of one")
    hook = known[0] if sae is None else sae
    dictionary = saes.load(model, hook=hook) if hook in known else saes.load(hook)
    described = {"name": data} if data else loaded.info.get("data") or {}
    series = load_described(described, split)
    path = out or Path(f"{Path(model).name}-features.html")
    saes.browse(loaded, dictionary, series, path, n_windows=windows, seed=seed, progress=not quiet)
    print(f"wrote {path}")


@codebook_app.command("fit")
@settings_of("tstlens.codebooks.fitting.FitConfig", "train_model")
def codebook_fit(
    model: Model,
    hook: Annotated[list[str], option("A hook point: blocks.0.hook_mlp_out; repeat for more.")],
    out: Annotated[Path | None, option("Folder to save to; <model>-codebooks by default.")] = None,
    frozen: Annotated[
        bool, option("Fit the tables only, and leave the model as it is.", "--frozen")
    ] = False,
    sae_steps: Annotated[int, option("Steps of the SAEs scored beside; 0 for none.", min=0)] = 1000,
    resume: Resume = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Fit codebooks (with the model, unless --frozen), score them on the test split, save both."""
    from tstlens.codebooks import make_codebooks

    folder = out or Path(f"{Path(model).name}-codebooks")
    _, scores = make_codebooks(
        model,
        hook,
        folder,
        train_model=not frozen,
        sae_steps=sae_steps,
        checkpoint=resume,
        command=shlex.join(["tstlens", *sys.argv[1:]]),
        overwrite=overwrite,
        progress=not quiet,
        **settings,
    )
    _print_saved(scores, folder)


def _print_saved(scores: Any, folder: Path) -> None:
    print(scores.to_dataframe().round(4).to_string(index=False))
    print(f"saved  {folder}")


@codebook_app.command("browse")
def codebook_browse(
    model: Annotated[
        str,
        argument(
            "A shipped checkpoint with codebooks beside it, or a folder that codebook fit wrote."
        ),
    ],
    out: Annotated[Path | None, option("The HTML file; by default <model>-codes.html.")] = None,
    data: Data = None,
    notes: Annotated[Path | None, option("A file of saved notes on codes.")] = None,
    windows: Annotated[int, option("Windows per code.", min=1)] = 9,
) -> None:
    """Every code on the raw series, with searches by class: one HTML page that needs no network."""
    from tstlens import codebooks
    from tstlens.data import load_described

    path = out or Path(f"{Path(model).name}-codes.html")
    check_file(path)
    loaded = codebooks.load(model)
    described = {"name": data} if data else loaded.info.get("data") or {}
    train, test = (load_described(described, split) for split in ("train", "test"))
    codebooks.browse(loaded, train, path, test=test, notes=notes, n_windows=windows)
    print(f"wrote {path}")
