"""The command line: ``tstlens report``, ``sweep``, ``train``, ``sae``, ``codebook`` and so on."""

from __future__ import annotations

import sys

from tstlens.cli import analyses, dictionaries, models
from tstlens.cli.apps import app
from tstlens.errors import TstlensError

__all__ = ["analyses", "app", "dictionaries", "main", "models"]


def main() -> None:
    """Run the command line; an error made on purpose prints its message and exits with 1."""
    try:
        app()
    except TstlensError as error:
        print(f"tstlens: {error}", file=sys.stderr)
        raise SystemExit(1) from None
