"""A circuit and its faithfulness as plain numbers and as sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from tstlens.patching import Circuit, Completeness, Faithfulness, Node
from tstlens.patching.circuits.tables import label_of
from tstlens.report.circuits import BUDGET, STEPS, CircuitFound
from tstlens.report.wording import percent

LISTED = 6  # parts that the circuit needs most
_ENOUGH = 0.9  # share of the gap that counts as doing what the model does
_LITTLE = 0.01  # loss of a part that is hardly needed


def of_circuit(found: CircuitFound) -> dict[str, Any]:
    """Edges, faithfulness, completeness and minimality as plain values, with sentences."""
    circuit, faithful = found.circuit, found.faithfulness
    names = {node.name: _label(circuit, node) for node in circuit.nodes}
    live = circuit.prune()
    needed = found.minimality.to_dataframe()
    loss = np.asarray(needed["loss"], dtype=float)
    numbers: dict[str, Any] = {
        "n_edges": len(circuit),
        "n_all": len(circuit.kept),
        "n_connected": len(live),
        "budget": BUDGET,
        "steps": STEPS,
        "positions": bool(circuit.components.n_pos),
        "nodes": list(names.values()),
        "chosen_on": list(found.chosen_on),
        "judged_on": list(found.judged_on),
        "apart": found.apart,
        "edges": [
            {
                "from": names[edge.sender.name],
                "to": names[edge.receiver.name],
                "part": edge.part,
                "weight": float(weight),
            }
            for edge, weight in zip(circuit.edges, circuit.weights.tolist(), strict=True)
        ],
        "faithfulness": {
            **_curve(faithful),
            "of_circuit": faithful.of_circuit,
            "low": _known(found.interval.low[0]),
            "high": _known(found.interval.high[0]),
            "random": {
                "orders": len(faithful.random),
                "curve": faithful.random_curves.mean(0).tolist(),
                "cpr": faithful.random_cpr,
                "cmd": faithful.random_cmd,
            },
        },
        "on_its_own_half": {
            **_curve(found.of_chosen),
            "of_circuit": found.of_chosen.of_circuit,
        },
        "completeness": _completeness(found.completeness),
        "minimality": {
            "n_parts": len(loss),
            "n_hardly": int((loss < _LITTLE).sum()),
            "most_needed": [
                {"label": names[part], "loss": float(lost)}
                for part, lost in zip(needed["part"][:LISTED], loss[:LISTED], strict=True)
            ],
        },
    }
    return {**numbers, "sentences": _sentences(numbers)}


def _label(circuit: Circuit, node: Node) -> str:
    """As the rest of the report names it: "MLP L0"."""
    return f"MLP L{node.layer}" if node.kind == "mlp" else label_of(circuit, node)


def _curve(faithful: Faithfulness) -> dict[str, Any]:
    return {
        "fractions": list(faithful.fractions),
        "n_edges": list(faithful.n_edges),
        "curve": faithful.curve.tolist(),
        "cpr": faithful.cpr,
        "cmd": faithful.cmd,
    }


def _completeness(found: Completeness) -> dict[str, Any]:
    """What circuit and model close without the same random parts, as shares of the gap."""
    gap = (found.full - found.empty).mean()
    left = {
        name: float((getattr(found, name).mean() - found.empty.mean()) / gap)
        for name in ("circuit", "model")
    }
    apart = found.incompleteness
    return {
        "samples": len(found.removed),
        **left,
        "mean": float(apart.mean()),
        "worst": float(apart.max()),
    }


def _sentences(n: dict[str, Any]) -> dict[str, str]:
    f, own = n["faithfulness"], n["on_its_own_half"]
    apart = "no series is in both halves" if n["apart"] else "the halves share clean series"
    halves = (
        f"Edges were chosen on {len(n['chosen_on'])} pairs and judged on the other "
        f"{len(n['judged_on'])} ({apart})."
    )
    interval = ""
    if f["low"] is not None:
        interval = f" (95 % interval over pairs {percent(f['low'])} to {percent(f['high'])})"
    return {
        "halves": halves,
        "circuit": (
            f"The {n['n_edges']} of {n['n_all']} edges with the largest estimated effect. "
            f"{n['n_connected']} of them lie on a way from the input to the class through other "
            "edges of the circuit; the rest does nothing by itself."
        ),
        "verdict": (
            f"Alone, with every other edge left corrupted, these edges close "
            f"{percent(f['of_circuit'])} of the gap{interval}; as many edges "
            f"picked at random close about {percent(_at(f['random']['curve'], f, n['budget']))}. "
            f"{_enough(f, n['n_all'])}"
        ),
        "cpr": (
            f"CPR {f['cpr']:.2f} is the area under the curve over the share of edges (not its "
            f"logarithm, as drawn): larger is better, about 1 if the first few edges "
            f"do it all (random edges {f['random']['cpr']:.2f})."
        ),
        "cmd": (
            f"CMD {f['cmd']:.2f} is the area between the curve and 1: smaller is better, 0 if "
            f"any share of edges does what the model does (random edges {f['random']['cmd']:.2f})."
        ),
        "own": (
            f"On the half that the edges were chosen on, CPR is {own['cpr']:.2f} and the circuit "
            f"closes {percent(own['of_circuit'])}."
        ),
        "completeness": (
            f"Complete? Without a random half of the circuit's parts the whole model still closes "
            f"{percent(n['completeness']['model'])} of the gap, the circuit without the same parts "
            f"{percent(n['completeness']['circuit'])} (means of {n['completeness']['samples']} "
            "halves): what the model has more comes from outside the circuit."
        ),
        "minimality": _minimality(n["minimality"]),
    }


def _minimality(part: dict[str, Any]) -> str:
    top = [f"{row['label']} ({percent(row['loss'])})" for row in part["most_needed"][:3]]
    return (
        f"Needed? Taken out one at a time, these cost the circuit most, in shares of the gap: "
        f"{', '.join(top)}; {part['n_hardly']} of its {part['n_parts']} parts cost less than "
        f"{percent(_LITTLE)} each."
    )


def _enough(f: dict[str, Any], n_all: int) -> str:
    for share, count, value in zip(f["fractions"], f["n_edges"], f["curve"], strict=True):
        if value >= _ENOUGH:
            what = f"{100 * share:g} % of the edges ({count})"
            if share >= 0.5:
                return f"It takes {what} to pass {percent(_ENOUGH)}: the work is spread out."
            return f"The strongest {what} pass {percent(_ENOUGH)}."
    return f"No share of the {n_all} edges measured passes {percent(_ENOUGH)}."


def _at(curve: list[float], f: dict[str, Any], share: float) -> float:
    """The curve at the circuit's share of edges."""
    return float(np.interp(share, f["fractions"], curve))


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
