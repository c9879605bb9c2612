"""The docs' table of families: what the tests of this folder converted, and what was refused.

``TSTLENS_WRITE_DOCS=1 pytest tests/zoo`` runs every conversion test and writes
``docs/families.md`` from what it saw: source classes, package versions, the options that took
several values, the largest parity differences and the words of every refusal. Nothing in the
table is typed by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata as metadata
import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from tstlens.errors import UnsupportedSourceError
from tstlens.zoo import converting
from tstlens.zoo.registry import families

DOCS = Path(__file__).resolve().parents[2] / "docs" / "families.md"
_NOT_OPTIONS = {
    "class_names",
    "model_name",
    "seed",
    "n_layers",
    "d_model",
    "n_heads",
    "d_head",
    "d_mlp",
    "n_channels",
    "n_time",
    "n_ctx",
    "module_class",
    "kind",
    "n_classes",
    "horizon",
    "eps",
}
_SIZES = ("patch_len", "stride", "n_", "d_", "context", "max_", "length", "output")


class Recorder:
    """Sees every conversion while it is installed."""

    def __init__(self) -> None:
        self.sources: dict[str, set[str]] = defaultdict(set)
        self.options: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.configs: dict[str, set[str]] = defaultdict(set)
        self.parity: dict[str, list[tuple[float, float | None]]] = defaultdict(list)
        self.refused: dict[str, set[str]] = defaultdict(set)
        self._choose, self._check = converting.choose, converting.check_parity
        self._family = ""

    def install(self) -> None:
        """Listen to ``convert``."""
        converting.choose = self._chosen  # type: ignore[assignment]
        converting.check_parity = self._checked  # type: ignore[assignment]

    def remove(self) -> None:
        """Stop listening."""
        converting.choose, converting.check_parity = self._choose, self._check

    def _chosen(self, source: Any, name: str | None) -> Any:
        family = self._choose(source, name)

        @functools.wraps(family.build)
        def build(*args: Any, **kwargs: Any) -> Any:
            self._family = family.name
            try:
                return family.build(*args, **kwargs)
            except UnsupportedSourceError as error:
                self.refused[family.name].add(str(error).replace("\n", " "))
                raise

        return dataclasses.replace(family, build=build)

    def _checked(self, model: Any, source: Any, trials: Any, source_name: str) -> Any:
        parity = self._check(model, source, trials, source_name)
        name = self._family
        if parity.passed and name in families():
            self.sources[name].add(f"{source_name}{_provenance(type(source))}")
            cfg = model.cfg.to_dict()
            self.configs[name].add(str(sorted(cfg.items(), key=str)))
            self.parity[name].append((parity.max_rel, parity.max_rel_float64))
            for option, value in _flat(cfg):
                self.options[name][option].add(str(value))
        return parity

    def page(self) -> str:
        """The docs' page."""
        lines = [
            "# Source families",
            "",
            "Written by `TSTLENS_WRITE_DOCS=1 pytest tests/zoo` from what its tests converted.",
            "Differences are relative to the largest output of the source: the largest over all "
            "conversions of the tests, on random, constant and (where the source takes them) "
            "padded or missing series. Limits: 1e-5 in float32, or 4 times the source's own "
            "rounding where that is more; 1e-10 in float64.",
            "",
            "| family | source | conversions | float32 | float64 |",
            "|---|---|---|---|---|",
        ]
        for name in families():
            found = self.parity.get(name, [])
            double = [value for _, value in found if value is not None]
            cells = (
                f"{max(value for value, _ in found):.1e}" if found else "not run",
                f"{max(double):.1e}" if double else "not run",
            )
            sources = ", ".join(f"`{source}`" for source in sorted(self.sources[name])) or "-"
            configs = len(self.configs[name])
            lines.append(f"| {name} | {sources} | {configs} | {cells[0]} | {cells[1]} |")
        for name, summary in families().items():
            varied = {
                option: values
                for option, values in sorted(self.options[name].items())
                if len(values) > 1
            }
            lines += ["", f"## {name}", "", f"{summary}.", ""]
            if varied:
                lines += ["| option | values converted |", "|---|---|"]
                lines += [
                    f"| {option} | {', '.join(f'`{value}`' for value in sorted(values)[:12])} |"
                    for option, values in varied.items()
                ]
            if self.refused[name]:
                lines += ["", "Refused, in the words of the errors:", ""]
                lines += [f"- {_escaped(text)}" for text in sorted(self.refused[name])]
        return "\n".join(lines) + "\n"


def _flat(cfg: dict[str, Any]) -> list[tuple[str, Any]]:
    flat = []
    for name, value in cfg.items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        for leaf, part in parts:
            plain = leaf or name
            sized = isinstance(part, int) and not isinstance(part, bool)
            if plain in _NOT_OPTIONS or (sized and plain.startswith(_SIZES)):
                continue
            flat.append((f"{name}.{leaf}" if leaf else name, part))
        if isinstance(value, dict):
            flat.append((name, value.get("kind")))
    return flat


def _provenance(kind: type) -> str:
    """Whose code a source runs: a package with its version, or the tests' own restatement."""
    file = Path(inspect.getsourcefile(kind.forward) or "")  # type: ignore[attr-defined]
    if "tests" in file.parts:
        return " (restated in the tests)"
    package = kind.__module__.split(".")[0]
    distributions = metadata.packages_distributions().get(package, [])
    known = [name for name in distributions if name != "tstlens"]
    return f" ({known[0]} {metadata.version(known[0])})" if known else ""


def _escaped(text: str) -> str:
    return re.sub(r"([<>|])", r"\\\1", text)
