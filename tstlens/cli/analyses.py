"""``tstlens report``, ``sweep`` and ``benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tstlens.cli.apps import app
from tstlens.cli.options import Data, Model, Quiet, option
from tstlens.storage import check_file, check_folder


@app.command()
def report(
    model: Model,
    out: Annotated[
        Path | None, option("The HTML file; by default <model>-report.html here.")
    ] = None,
    data: Data = None,
    max_pairs: Annotated[int, option("Clean/corrupted pairs per question.", min=2)] = 24,
    seed: Annotated[int, option("Of the pairs, the control and the bootstrap.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Which heads and time steps made a model decide: one HTML file and its numbers as JSON."""
    from tstlens.report import build

    path = build(model, out, data=data, max_pairs=max_pairs, seed=seed, progress=not quiet)
    print(f"wrote {path} and {path.with_suffix('.json')}")


@app.command()
def sweep(
    checkpoint: Model,
    out: Annotated[Path, option("Folder; run again to resume.")],
    data: Data = None,
    split: Annotated[str, option("train or test.")] = "test",
    per_class: Annotated[int | None, option("Most misclassified series of a class.", min=1)] = None,
    site: Annotated[
        list[str] | None, option("A site, z say; repeat for more. All if not given.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        option(
            "log_prob, prob, logit or logit_diff; repeat for more; the first three if not given."
        ),
    ] = None,
    direction: Annotated[
        list[str] | None, option("denoise (clean into corrupted) or noise; both if not given.")
    ] = None,
    figures: Annotated[bool, option("Write figures too.")] = True,
    quiet: Quiet = False,
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


@app.command()
def benchmark(
    setting: Annotated[str, option("small (minutes) or full (more tasks and seeds).")] = "small",
    question: Annotated[
        list[str] | None,
        option("where, component, feature, state or coverage; repeat for more, all if not given."),
    ] = None,
    out: Annotated[Path, option("The Markdown page to write.")] = Path("truth.md"),
    images: Annotated[
        bool, option("Draw the figures too; needs Chrome or Chromium.", "--images")
    ] = False,
    update: Annotated[
        bool, option("Keep the page's sections of other questions.", "--update")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Score explanations, circuits, features and codes on tasks with planted answers."""
    from tstlens.truth.suite import QUESTIONS, truth

    check_file(out)
    check_file(out.with_suffix(".csv"))
    found = truth(setting, question or QUESTIONS, progress=not quiet)
    found.save(out, images=images, update=update)
    print(found.to_markdown())
    print(f"wrote {out}")
