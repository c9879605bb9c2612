"""``tstlens report`` and ``tstlens sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tstlens.cli.apps import app
from tstlens.storage import check_folder


@app.command()
def report(
    model: Annotated[
        str, typer.Argument(help="A shipped checkpoint, a folder, or a hub id.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; by default <model>-report.html here.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set to report on; by default the checkpoint's own.", show_default=False
        ),
    ] = None,
    max_pairs: Annotated[int, typer.Option(min=2, help="Clean/corrupted pairs per question.")] = 24,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the pairs, the control and the bootstrap.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Which heads and time steps made a model decide: one HTML file and its numbers as JSON."""
    from tstlens.report import build

    path = build(model, out, data=data, max_pairs=max_pairs, seed=seed, progress=not quiet)
    print(f"wrote {path} and {path.with_suffix('.json')}")


@app.command()
def sweep(
    checkpoint: Annotated[
        str, typer.Argument(help="A shipped checkpoint, a folder, or a hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder; run again to resume.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="Data set; by default the checkpoint's own.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    per_class: Annotated[
        int | None,
        typer.Option(min=1, help="Most misclassified series of a class.", show_default=False),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="A site, z say; repeat for more. All if not given.", show_default=False),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="log_prob, prob, logit or logit_diff; repeat for more; the first three "
            "if not given.",
            show_default=False,
        ),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(
            help="denoise (clean into corrupted) or noise; both if not given.", show_default=False
        ),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Write figures too.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Patch every site over all misclassified series, both ways round, into one folder."""
    from tstlens.data import load_described, misclassified_pairs
    from tstlens.model import HookedTST
    from tstlens.patching import campaign_grids, run_campaign

    check_folder(out, "the campaign", replaced=False)
    model = HookedTST.from_pretrained(checkpoint)
    described = {"name": data} if data else model.info.get("data") or {}
    pairs = misclassified_pairs(model, load_described(described, split), per_class)
    campaign = run_campaign(
        model,
        pairs,
        out,
        grids=campaign_grids(model, site),
        metrics=metric or ("log_prob", "prob", "logit"),
        directions=direction or ("denoise", "noise"),
        figures=figures,
        progress=not quiet,
    )
    print(campaign)
