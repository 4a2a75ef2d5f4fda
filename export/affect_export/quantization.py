"""From float graphs to INT8 ones that keep the gate: all layers first, then the costliest back in float."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.calibration import Calibration, trajectory
from affect_export.models.base import AffectModel
from affect_export.parity_data import CLIP_STEPS, clip_inputs, prepared
from affect_export.targets import Plan, Target, WrittenGraph
from affect_quantize.gate import GateReport, ParitySequence
from affect_quantize.qdq import Layer, find_layers
from affect_quantize.search import LayerCost, give_back, relative_error
from affect_runtimes.errors import InputError
from affect_runtimes.onnxruntime import open_bytes

__all__ = ["METHOD", "Quantized", "layer_costs", "open_float_graph", "quantize"]

Array = NDArray[Any]
METHOD = "percentile"
_MOMENTS = 24


@dataclass(frozen=True)
class Quantized:
    """INT8 graphs and how they came to be.

    Attributes:
        written: the graphs.
        report: of the gate.
        first: of the gate, with every layer in INT8.
        method: by which the ranges were chosen.
        calibration: the ranges.
        layers: how many there are that can be INT8.
        keep: (role, layer) of those that stay in float because the gate was not kept otherwise.
        costs: what each layer costs in INT8, in the order of the graphs; nothing where nobody had to know.
    """

    written: list[WrittenGraph]
    report: GateReport
    first: GateReport
    method: str
    calibration: Calibration
    layers: int
    keep: frozenset[tuple[str, str]]
    costs: list[LayerCost]

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {
            "calibration": {"data": self.calibration.data, "frames": self.calibration.frames, "method": self.method},
            "layers_in_int8": self.layers - len(self.keep),
            "kept_in_float": [{"graph": role, "layer": layer} for role, layer in sorted(self.keep)],
            "costs": [cost.to_json() for cost in self.costs],
        }


def open_float_graph(graph: WrittenGraph, folder: Path) -> Any:
    """The ONNX model of a float graph, with its large tensors left where they are."""
    import onnx

    return onnx.load(folder / graph.file, load_external_data=False)


def quantize(
    model: AffectModel,
    target: Target,
    floats: list[WrittenGraph],
    source: Path,
    folder: Path,
    calibration: Calibration,
    attempt: Callable[[list[WrittenGraph]], GateReport],
    measure_layers: bool = False,
    method: str = METHOD,
) -> Quantized:
    """Writes INT8 graphs into a folder.

    Args:
        model: float.
        target: has a quantizer.
        floats: what its builder wrote.
        source: where to.
        folder: where the INT8 graphs go.
        calibration: of this model.
        attempt: INT8 graphs in that folder -> what the gate says of them.
        measure_layers: say what each layer costs even if the gate is kept with all of them.
        method: of the calibration.

    Raises:
        InputError: the calibration lacks the method.
    """
    if target.quantizer is None:
        raise InputError(f"target {target.name} has no INT8")
    if method not in calibration.ranges:
        raise InputError(f"the calibration has no ranges by {method!r}; it has {', '.join(calibration.ranges)}")
    quantizer, ranges = target.quantizer, calibration.ranges[method]
    written: list[WrittenGraph] = []

    def attempt_with(keep: frozenset[tuple[str, str]]) -> GateReport:
        written[:] = quantizer(floats, source, folder, Plan(ranges, calibration.means, keep))
        return attempt(written)

    costs: list[LayerCost] = []

    def measured() -> list[LayerCost]:
        costs[:] = layer_costs(model, target, floats, source, Plan(ranges, calibration.means))
        return costs

    keep, report, first = give_back(attempt_with, measured)
    if measure_layers and not costs:
        measured()
    layers = sum(len(find_layers(open_float_graph(graph, source))) for graph in floats)
    return Quantized(written, report, first, method, calibration, layers, keep, costs)


def layer_costs(
    model: AffectModel, target: Target, floats: list[WrittenGraph], source: Path, plan: Plan
) -> list[LayerCost]:
    """What the outputs lose over some moments of the clip when one layer alone is INT8, layer by layer."""
    assert target.quantizer is not None
    layers: dict[str, list[Layer]] = {g.source.role: find_layers(open_float_graph(g, source)) for g in floats}
    everything = frozenset((role, layer.name) for role in layers for layer in layers[role])
    by_role = {g.source.role: g for g in floats}
    run = {role: _runner(g, source) for role, g in by_role.items()}
    # Spread over the clip: within a second of it, outputs hardly move, and any error is large beside that.
    rows = np.linspace(0, CLIP_STEPS - 1, _MOMENTS).astype(int)
    shown = prepared(model.inputs(), {k: v[rows] for k, v in clip_inputs(model.inputs()).items()})
    clip = ParitySequence("", {k: v[:, None] for k, v in shown.items()}, np.ones((_MOMENTS, 1), np.float32))
    moments = [inputs for role, inputs in trajectory(model, clip) if role == "encoder"]
    features = [run["encoder"](m) for m in moments]
    expected = _outputs(model, run["step"], features)
    costs = []
    for role, its_layers in layers.items():
        for layer in its_layers:
            with tempfile.TemporaryDirectory() as scratch:
                made = target.quantizer(
                    [by_role[role]], source, Path(scratch), replace(plan, keep=everything - {(role, layer.name)})
                )
                alone = _runner(made[0], Path(scratch), target)
            if role == "encoder":
                found = _outputs(model, run["step"], [alone(m) for m in moments])
            else:
                found = _outputs(model, alone, features)
            costs.append(LayerCost(role, layer, {k: relative_error(expected[k], found[k]) for k in expected}))
    return costs


def _runner(
    graph: WrittenGraph, folder: Path, target: Target | None = None
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    data = (folder / graph.file).read_bytes()
    if target is not None and target.stand_in is not None:
        return target.stand_in(graph.described, data).run
    return open_bytes(data, graph.external(folder))


def _outputs(
    model: AffectModel,
    step: Callable[[Mapping[str, Array]], dict[str, Array]],
    features: Sequence[Mapping[str, Array]],
) -> dict[str, Array]:
    state = {s.name: np.full(s.sized(1), s.initial, s.dtype) for s in model.states()}
    said = []
    for moment in features:
        results = step({**moment, "dt": np.ones(1, np.float32), **state})
        state = {name: results[f"next_{name}"] for name in state}
        said.append(results)
    return {o.name: np.stack([r[o.name] for r in said]) for o in model.outputs()}
