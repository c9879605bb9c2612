"""``tstlens sae`` and ``tstlens codebook``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tstlens.cli.apps import codebook_app, sae_app
from tstlens.errors import ArgumentError
from tstlens.storage import check_file


@sae_app.command("train")
def sae_train(
    model: Annotated[
        str, typer.Argument(help="A shipped checkpoint, a folder, or a hub id.", show_default=False)
    ],
    hook: Annotated[
        str, typer.Argument(help="A hook point: blocks.0.hook_mlp_out.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to save to; sae-<hook> here by default.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="As sae-lens calls it.")] = "topk",
    data: Annotated[
        str | None, typer.Option(help="Data set; by default the checkpoint's own.")
    ] = None,
    d_sae: Annotated[
        int | None, typer.Option(min=1, help="Latents; 4 times the width by default.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Active latents per position.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 5000,
    batch_size: Annotated[int, typer.Option(min=1, help="Activations per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of initialisation and shuffles.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Folder to keep progress in; a run there is continued.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an SAE that is in the folder already.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
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
        d_sae=d_sae,
        k=k,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        checkpoint=resume,
        command=shlex.join(["tstlens", *sys.argv[1:]]),
        overwrite=overwrite,
        progress=not quiet,
    )
    print(scores.to_dataframe().round(4).to_string(index=False))
    print(f"saved  {folder}")


@sae_app.command()
def browse(
    model: Annotated[
        str, typer.Argument(help="A shipped checkpoint, a folder, or a hub id.", show_default=False)
    ],
    sae: Annotated[
        str | None,
        typer.Argument(
            help="The SAE's folder, or the hook point of one that ships with the checkpoint; "
            "by default the first that ships.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file; by default <model>-features.html.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data set to read; by default the checkpoint's own.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="train, test or all.")] = "test",
    windows: Annotated[int, typer.Option(min=1, help="Strongest windows per latent.")] = 9,
    seed: Annotated[int, typer.Option(help="Of shuffles, splits and samples.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
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
def codebook_fit(
    model: Annotated[
        str, typer.Argument(help="A shipped checkpoint, a folder, or a hub id.", show_default=False)
    ],
    hook: Annotated[
        list[str],
        typer.Option(help="A hook point: blocks.0.hook_mlp_out; repeat for more."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to save to; <model>-codebooks by default.", show_default=False),
    ] = None,
    n_codes: Annotated[int, typer.Option(min=1, help="Codes per table.")] = 256,
    k: Annotated[int, typer.Option(min=1, help="Codes active at once.")] = 1,
    n_groups: Annotated[
        int, typer.Option(min=0, help="Tables; 0 is one per head where there are heads.")
    ] = 0,
    similarity: Annotated[str, typer.Option(help="cosine, inner_product or euclidean.")] = "cosine",
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Fit the tables only, and leave the model as it is.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the series.")] = 20,
    lr: Annotated[float, typer.Option(help="Learning rate of the model.")] = 3e-4,
    codebook_lr: Annotated[float, typer.Option(help="Learning rate of the tables.")] = 3e-3,
    sae_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the SAEs scored beside; 0 for none.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of the order, the start and the revivals.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Folder to keep progress in; a run there is continued.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is in the folder already.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Fit codebooks (with the model, unless --frozen), score them on the test split, save both."""
    from tstlens.codebooks import make_codebooks

    folder = out or Path(f"{Path(model).name}-codebooks")
    _, scores = make_codebooks(
        model,
        hook,
        folder,
        n_codes=n_codes,
        k=k,
        n_groups=n_groups,
        similarity=similarity,
        train_model=not frozen,
        epochs=epochs,
        lr=lr,
        codebook_lr=codebook_lr,
        sae_steps=sae_steps,
        seed=seed,
        checkpoint=resume,
        command=shlex.join(["tstlens", *sys.argv[1:]]),
        overwrite=overwrite,
        progress=not quiet,
    )
    print(scores.to_dataframe().round(4).to_string(index=False))
    print(f"saved  {folder}")


@codebook_app.command("browse")
def codebook_browse(
    model: Annotated[
        str,
        typer.Argument(
            help="A shipped checkpoint with codebooks beside it, or a folder that codebook fit "
            "wrote.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file; by default <model>-codes.html.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data set to read; by default the model's own.", show_default=False),
    ] = None,
    notes: Annotated[
        Path | None, typer.Option(help="A file of saved notes on codes.", show_default=False)
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows per code.")] = 9,
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
