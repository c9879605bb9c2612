"""The command line's groups of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from tstlens import __version__

app = typer.Typer(
    help="Open up time-series transformers with the workflows of TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool | None) -> bool | None:
    if wanted:
        typer.echo(f"tstlens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = None,
) -> None:
    """What every command takes: nothing but ``--version``."""


sae_app = typer.Typer(help="Sparse autoencoders.", no_args_is_help=True)
codebook_app = typer.Typer(help="Codebooks.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
app.add_typer(codebook_app, name="codebook")
