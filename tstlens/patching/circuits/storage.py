"""Circuits on disk: JSON to read back, GraphML for other programs; whole files or none."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tstlens import storage
from tstlens.data import Pairs
from tstlens.errors import ArgumentError, CorruptFileError
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
    text = storage.json_text(record, "a circuit's made=", indent=1, allow_nan=False)
    return storage.write_text(path, text)


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a circuit; see :meth:`Circuit.from_json`."""
    record = storage.read_json(
        path,
        "a circuit that Circuit.to_json wrote",
        "write the circuit again",
        format=FORMAT,
        version=FORMAT_VERSION,
    )
    with storage.reading(path, "does not hold a whole circuit", "write the circuit again"):
        _check_scores(record)
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
    if fields["scores"].shape != kept.shape:
        raise CorruptFileError(
            f"{path} holds {len(fields['scores'])} scores, its graph has {len(kept)} edges"
        )
    return fields


def write_graphml(circuit: Circuit, path: Path) -> Path:
    """See :meth:`Circuit.to_graphml`."""
    import networkx as nx

    buffer = BytesIO()
    nx.write_graphml_xml(circuit.graph, buffer)
    return storage.write_bytes(path, buffer.getvalue())


def _check_scores(record: dict[str, Any]) -> None:
    """Compare sizes with the scores that are there, before the graph of edges is built."""
    n_scores, components = len(record["scores"]), record["components"]
    for name, value in components.items():
        if type(value) is int and abs(value) > max(n_scores, 1):
            raise ValueError(f"{n_scores} scores, its graph has {name}={value:,}")
