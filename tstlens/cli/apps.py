"""The command line's groups of commands."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Open up time-series transformers with the workflows of TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sae_app = typer.Typer(help="Sparse autoencoders.", no_args_is_help=True)
codebook_app = typer.Typer(help="Codebooks.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
app.add_typer(codebook_app, name="codebook")
