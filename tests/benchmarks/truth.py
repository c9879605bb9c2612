"""Every method against answers that are known: ``python tests/benchmarks/truth.py full docs``.

The same as ``tstlens benchmark``: writes ``truth.md`` and ``truth.csv`` and prints the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tstlens.truth.suite import truth


def main() -> None:
    setting = sys.argv[1] if len(sys.argv) > 1 else "small"
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("docs")
    found = truth(setting)
    path = found.save(folder / "truth.md")
    print(path.read_text())
    print(f"wrote {path}; CPU seconds: {found.seconds}")


if __name__ == "__main__":
    main()
