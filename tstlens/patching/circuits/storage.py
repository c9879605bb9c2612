"""Circuits on disk: JSON to read back, GraphML for other programs; whole files or none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tstlens.data import Pairs
from tstlens.errors import (
    ArgumentError,
    ConfigVersionError,
    CorruptFileError,
    StorageError,
    UnknownSiteError,
)
from tstlens.patching.circuits.graph import ComponentGraph
from tstlens.patching.metrics import Metric, log_prob, logit, logit_diff, prob

if TYPE_CHECKING:
    from tstlens.patching.circuits.circuit import Circuit

FORMAT = "tstlens-circuit"
FORMAT_VERSION = 1


def metric_named(name: str, pairs: Pairs) -> Metric:
    """The metric of this name for some pairs; what needs more than the pairs has to be given.

    Raises:
        ArgumentError: the pairs do not say what the metric compares with.
    """
    for make in (log_prob, prob, logit):
        if make(pairs.target).name == name:
            return make(pairs.target)
    if pairs.predicted is not None:
        difference = logit_diff(pairs.target, pairs.predicted)
        if difference.name == name:
            return difference
    raise ArgumentError(
        f"the circuit was made with the metric {name!r}, which these pairs alone do not give; "
        "pass metric=, for these pairs"
    )


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write beside the place, then rename: an interrupt leaves the old file or the new one.

    Raises:
        StorageError: the place cannot be written.
    """
    staged = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        staged = Path(name)
        write(staged)
        os.chmod(staged, 0o644)
        os.replace(staged, path)
    except OSError as error:
        raise StorageError(
            f"could not write {path}: {error}; what was there is as it was"
        ) from error
    finally:
        if staged is not None:
            staged.unlink(missing_ok=True)
    return path


def write_json(circuit: Circuit, path: Path) -> Path:
    """See :meth:`Circuit.to_json`."""
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "components": circuit.components.to_dict(),
        "metric": circuit.metric,
        "unit": circuit.unit,
        "better": circuit.better,
        "output": circuit.output,
        "time_cells": circuit.time_cells,
        "made": circuit.made,
        "edges": [
            {"edge": edge.name, "weight": weight}
            for edge, weight in zip(circuit.edges, circuit.weights.tolist(), strict=True)
        ],
        "scores": circuit.scores.tolist(),
    }
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"a circuit's made= must hold JSON values only: {error}") from error
    return write_whole(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a circuit; see :meth:`Circuit.from_json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise StorageError(f"expected a circuit at {path}, found no file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"could not read {path}: {error}") from error
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CorruptFileError(f"{path} is no JSON: {error}; write the circuit again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CorruptFileError(f"{path} is not a circuit that Circuit.to_json wrote")
    version = record.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ConfigVersionError(
            f"{path} has format version {version!r}, this tstlens reads up to {FORMAT_VERSION}; "
            "update tstlens"
        )
    try:
        components = ComponentGraph(**record["components"])
        kept = torch.zeros(len(components.edges), dtype=torch.bool)
        kept[components.edge_numbers([entry["edge"] for entry in record["edges"]])] = True
        cells = record["time_cells"]
        fields = {
            "components": components,
            "scores": torch.tensor(record["scores"], dtype=torch.float64),
            "kept": kept,
            "metric": str(record["metric"]),
            "unit": str(record["unit"]),
            "better": record.get("better"),  # circuits of before had none
            "output": str(record["output"]),
            "time_cells": None if cells is None else tuple((int(a), int(b)) for a, b in cells),
            "made": dict(record["made"]),
        }
    except (KeyError, TypeError, ValueError, UnknownSiteError) as error:
        raise CorruptFileError(f"{path} does not hold a whole circuit: {error}") from error
    if fields["scores"].shape != kept.shape:
        raise CorruptFileError(
            f"{path} holds {len(fields['scores'])} scores, its graph has {len(kept)} edges"
        )
    return fields


def write_graphml(circuit: Circuit, path: Path) -> Path:
    """See :meth:`Circuit.to_graphml`."""
    import networkx as nx

    return write_whole(path, lambda staged: nx.write_graphml_xml(circuit.graph, str(staged)))
