"""Front ends and heads of source families: one file each, used where a model was converted."""

from __future__ import annotations

__all__: list[str] = []
