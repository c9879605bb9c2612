"""The browser page of a model's codes; ``index.to_html(path)`` writes it."""

from __future__ import annotations

__all__: list[str] = []
