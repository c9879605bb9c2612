"""Numbers as compact text: little-endian arrays in base64, which the page decodes on demand."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

_NAMES = {"float32": "f4", "uint32": "u4", "int16": "i2", "uint16": "u2", "uint8": "u1"}


def packed(array: np.ndarray, kind: str) -> dict[str, str]:
    """An array as ``{"t": type, "b": base64}``; floats lose what float32 does not hold.

    Args:
        array: any shape; flattened in C order.
        kind: "float32", "uint32", "int16", "uint16" or "uint8".
    """
    raw = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<")).tobytes()
    return {"t": _NAMES[kind], "b": base64.b64encode(raw).decode("ascii")}


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
