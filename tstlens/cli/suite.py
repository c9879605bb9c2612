"""``tstlens benchmark``: every method against an answer that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tstlens.cli.apps import app
from tstlens.storage import check_file


@app.command()
def benchmark(
    setting: Annotated[
        str, typer.Option(help="small (minutes) or full (more tasks and seeds).")
    ] = "small",
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="where, component, feature, state or coverage; repeat for more, all if not given.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The Markdown page to write.")] = Path("truth.md"),
    images: Annotated[
        bool, typer.Option("--images", help="Draw the figures too; needs Chrome or Chromium.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Keep the page's sections of other questions.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Score explanations, circuits, features and codes on tasks with planted answers."""
    from tstlens.truth.suite import QUESTIONS, truth

    check_file(out)
    check_file(out.with_suffix(".csv"))
    found = truth(setting, question or QUESTIONS, progress=not quiet)
    found.save(out, images=images, update=update)
    print(found.to_markdown())
    print(f"wrote {out}")
