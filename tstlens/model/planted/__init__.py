"""Small transformers whose circuit is known: weights written by hand, or trained to have it.

`component_task` makes one by name. Ask ``task.verify()`` before scoring a method on it: a graph
that does not hold under interchange interventions is no answer to score against.
"""

from __future__ import annotations

from tstlens.model.planted.program import Program, Variable
from tstlens.model.planted.task import (
    ComponentSample,
    ComponentTask,
    PlantedGraph,
    component_names,
    component_task,
)
from tstlens.model.planted.verification import Verification

__all__ = [
    "ComponentSample",
    "ComponentTask",
    "PlantedGraph",
    "Program",
    "Variable",
    "Verification",
    "component_names",
    "component_task",
]
