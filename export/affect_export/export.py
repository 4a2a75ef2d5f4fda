"""From a float model to a verified bundle: built in a scratch folder, held to its bounds, then moved into place."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export import graphs
from affect_export.assembly import VERIFY_STEPS, Verification, assemble, open_here, record
from affect_export.calibration import Calibration, load_calibration, noise_calibration, trajectory
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import Checkpoint
from affect_export.output_folder import check_output_folder, publish, scratch_folder
from affect_export.parity_data import CLIP_STEPS, drift_sequence, parity_sequences
from affect_export.quantization import Quantized, quantize
from affect_export.targets import Plan, Target, WrittenGraph
from affect_quantize.gate import Gate, GateReport, ParitySequence
from affect_runtimes.compare import Bound
from affect_runtimes.errors import InputError, ParityError
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import recorded_inputs, replay

__all__ = ["DRIFT_STEPS", "FULL_DRIFT_STEPS", "ExportResult", "export_model", "tighten"]

DRIFT_STEPS, FULL_DRIFT_STEPS = 2_000, 100_000
_DRIFT_STEPS_OF_LARGE = 200
_SMALL = 20_000_000  # parameters
_STEPS_OF_LARGE = 3
_TIMED_RUNS = 100
_STOOD_IN = "ONNX Runtime, in place of the engine, with its rounding; the device holds the engine itself"
_FUSED_HERE = (
    "encoder: ONNX Runtime, in place of TensorRT, with its rounding; step: the fused step's own kernels, on the "
    "processor; the device holds the engine and the kernels themselves"
)
_LIKENESSES = ("ccc", "least_ccc", "agreement")


@dataclass(frozen=True)
class ExportResult:
    """What came of an export.

    Attributes:
        path: of the bundle; None after a dry run.
        model: its name.
        target: its target's name.
        precision: of convolutions and linear layers.
        size_bytes: of the bundle.
        graph_bytes: role -> size of the graph in fp32 and as it is in the bundle, weights included.
        formats: role -> kind of layer -> number format.
        times_ms: graph -> median and 99th percentile of one run on one thread of this machine, one stream; empty where
            the engine does not run on this one.
        report: of the gate.
        quantized: what was done for INT8, where layers were chosen.
    """

    path: Path | None
    model: str
    target: str
    precision: str
    size_bytes: int
    graph_bytes: Mapping[str, tuple[int, int]]
    formats: Mapping[str, Mapping[str, str]]
    times_ms: Mapping[str, tuple[float, float]]
    report: GateReport
    quantized: Quantized | None


@dataclass(frozen=True)
class _Made:
    """What `_write` left: the folder of the fp32 graphs, these, those of the bundle, and what the gate said."""

    source: Path
    floats: list[WrittenGraph]
    written: list[WrittenGraph]
    report: GateReport
    quantized: Quantized | None


def tighten(bounds: Sequence[Bound], max_drop: float | None) -> tuple[Bound, ...]:
    """A target's bounds with CCC and agreement held to at least 1 - max_drop.

    Raises:
        InputError: max_drop is outside [0, 1], or looser than the target's own policy.
    """
    if max_drop is None:
        return tuple(bounds)
    if not 0.0 <= max_drop <= 1.0:
        raise InputError(f"--max-drop is a fraction in [0, 1]; found {max_drop:g}")
    floor, result = 1.0 - max_drop, []
    for bound in bounds:
        if bound.metric in _LIKENESSES:
            bound = replace(bound, limit=max(bound.limit, floor))
        result.append(bound)
    if all(b.limit > floor for b in result if b.metric in _LIKENESSES):
        loosest = max(1.0 - b.limit for b in bounds if b.metric in _LIKENESSES)
        raise InputError(
            f"--max-drop {max_drop:g} is looser than the target's own bounds (drop <= {loosest:g}); it can only tighten"
        )
    return tuple(result)


def export_model(
    checkpoint: Checkpoint,
    target: Target,
    output: Path,
    *,
    precision: str | None = None,
    bounds: Sequence[Bound] | None = None,
    calibration: Calibration | None = None,
    own: Sequence[ParitySequence] = (),
    force: bool = False,
    dry_run: bool = False,
    parity_steps: int | None = None,
    full_parity: bool = False,
    measure_layers: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Writes a bundle, or nothing.

    The graphs are built in a scratch folder beside `output`, opened by the device's own code, compared with the float
    model, and moved into place in one step (`affect_export.output_folder`).

    Args:
        checkpoint: the float model.
        target: where the bundle is to run.
        output: the bundle's folder.
        precision: one of the target's; None is its default.
        bounds: of the target, perhaps tightened; None is as they are.
        calibration: for INT8; None is the checkpoint's own, and, of random weights, one over noise.
        own: sequences to be held to beside the default ones, perhaps with labels (`own_data.read_folder`).
        force: replace a bundle that is there.
        dry_run: do everything but the move.
        parity_steps: frames of the clip to compare over; None is all of them, or three for a model of over 20 million
            parameters, whose recurrent half is then tried on features alone for longer.
        measure_layers: say what each layer costs in INT8 although the gate is kept with all of them.
        full_parity: try the recurrent half over 100,000 steps instead of 2,000.
        progress: told each stage as it begins.

    Raises:
        InputError: see `check_output_folder`; a precision that the target lacks; INT8 without a calibration.
        ParityError: a bound was missed; nothing is left behind.
        MissingDependencyError: a library that the target's engines are built with.
    """
    if target.ready is not None:
        target.ready(checkpoint.model)
    precision = target.precision(precision)
    bounds = target.bounds[precision] if bounds is None else bounds
    check_output_folder(output, force)
    # Of a single step no correlation can be told.
    if parity_steps is not None and not 2 <= parity_steps <= CLIP_STEPS:
        raise InputError(f"a parity run has 2 to {CLIP_STEPS} steps; asked for {parity_steps}")
    calibrated = precision == "int8" and target.calibrated
    if calibration is not None and not calibrated:
        raise InputError(f"a calibration is of no use here: {target.name} in {precision} takes none")
    if calibrated and calibration is None and checkpoint.calibration is not None:
        calibration = load_calibration(checkpoint.calibration, checkpoint.sha256)
    if calibrated and calibration is None and checkpoint.trained:
        raise InputError(
            f"INT8 needs to see what {checkpoint.name} sees: give --calibration FOLDER with a few hundred faces, clips "
            "or sequences that parity is not measured on, or ask for --precision fp32"
        )
    with scratch_folder(output, dry_run) as scratch:
        check_output_folder(output, force)  # a killed export's bundle may be back in its place
        folder = scratch / "bundle"
        folder.mkdir()
        drift = FULL_DRIFT_STEPS if full_parity else DRIFT_STEPS
        made = _write(
            checkpoint,
            target,
            precision,
            bounds,
            calibration,
            own,
            folder,
            parity_steps,
            drift,
            measure_layers,
            progress,
        )
        if not made.report.passed:
            raise ParityError(_refusal(target, precision, made.report, made.quantized))
        if made.quantized is not None and len(made.quantized.keep) == made.quantized.layers:
            raise ParityError(
                _refusal(target, precision, made.quantized.first, made.quantized)
                + ". It keeps its bounds only with every layer in float; export it with --precision fp32, or "
                "calibrate on more of what the model will see"
            )
        progress("timing")
        bundle = open_here(folder, target)
        result = ExportResult(
            None if dry_run else output,
            checkpoint.name,
            target.name,
            precision,
            bundle.bundle.size_bytes,
            {
                g.source.role: (_graph_bytes(g, made.source), _graph_bytes(w, folder))
                for g, w in zip(made.floats, made.written, strict=True)
            },
            {g.role: dict(g.precision) for g in bundle.bundle.manifest.graphs},
            {} if target.stand_in is not None else _times_ms(bundle),
            made.report,
            made.quantized,
        )
        if not dry_run:
            publish(folder, output, force)
        return result


def _refusal(target: Target, precision: str, report: GateReport, quantized: Quantized | None) -> str:
    missed = "; ".join(f"{where}: {figure}" for where, figure in report.failures)
    words = f"the {target.name} bundle in {precision} is not the float model any more, nothing was written: {missed}"
    if quantized is None:
        return words
    outputs = {figure.output for _, figure in report.failures}
    worst = sorted(quantized.costs, key=lambda c: c.worst_of(outputs), reverse=True)[:3]
    named = ", ".join(f"{c.role} {c.layer.name} ({c.worst_of(outputs):.1%})" for c in worst)
    return f"{words}. The layers that cost these outputs most in INT8, as share of their spread: {named}"


def _write(
    checkpoint: Checkpoint,
    target: Target,
    precision: str,
    bounds: Sequence[Bound],
    calibration: Calibration | None,
    own: Sequence[ParitySequence],
    folder: Path,
    steps: int | None,
    drift_steps: int,
    measure_layers: bool,
    progress: Callable[[str], None],
) -> "_Made":
    model = checkpoint.model
    large = sum(p.numel() for p in model.parameters()) > _SMALL
    if steps is None:
        steps = _STEPS_OF_LARGE if large else CLIP_STEPS
    progress("float graphs")
    # Where a packer is still to come, the graphs are not yet those of the bundle.
    graphs_folder = folder if target.packer is None else folder.with_name("graphs")
    source = graphs_folder if precision == "fp32" else folder.with_name("float")
    for made_here in (graphs_folder, source):
        made_here.mkdir(exist_ok=True)
    floats = target.builder(graphs.graph_sources(model), source)
    progress("the float model over the parity set")
    verification = Verification(model, min(VERIFY_STEPS, steps))
    sequences = [*parity_sequences(model.inputs(), steps), verification.sequence, *own]
    if not model.states():
        drift_steps = 2  # without a memory there is no drift to find
    elif large and drift_steps == DRIFT_STEPS:
        drift_steps = _DRIFT_STEPS_OF_LARGE
    sequences.append(drift_sequence(_features(model, sequences[0]), drift_steps))
    gate = Gate(
        lambda given: graphs.run_step_form(model, given),
        sequences,
        graphs.output_kinds(model),
        lambda given: graphs.run_sequence_form(model, given),
    )

    written: list[WrittenGraph] = []
    more: dict[str, Any] = {}

    def attempt(graphs_there: list[WrittenGraph]) -> GateReport:
        written[:] = graphs_there
        if target.packer is not None:
            written[:], said = target.packer(graphs_there, graphs_folder, folder)
            more.update(said)
        bundle = assemble(checkpoint, target, precision, bounds, written, verification, folder)
        report = gate.check(lambda given: graphs.run_bundle(bundle, given), bounds)
        if target.stand_in is None:
            more["ran_on"] = bundle.engines
        if all(graph.native is None and graph.fused is None for graph in written):
            return report
        # A device without the library runs the other form, and who asks for it.
        plain = open_here(folder, target, plain=True)
        alone = gate.check(lambda given: graphs.run_bundle(plain, given), bounds)
        named = {
            f"{name}, on {target.engine} alone": figures
            for name, figures in alone.comparisons.items()
            if figures != report.comparisons.get(name)  # the float model against itself
        }
        return GateReport({**report.comparisons, **named})

    quantized = None
    if precision == "int8" and not target.calibrated:
        assert target.quantizer is not None
        progress("INT8, held to the float model")
        report = attempt(target.quantizer(floats, source, graphs_folder, Plan({})))
    elif precision == "int8":
        if calibration is None:
            progress("calibration over noise, as the weights are random")
            calibration = noise_calibration(checkpoint, floats, source)
        progress("INT8, held to the float model")
        quantized = quantize(model, target, floats, source, graphs_folder, calibration, attempt, measure_layers)
        report = quantized.report
    else:
        progress(f"{precision}, held to the float model")
        made = floats
        if precision == "fp16":
            assert target.halver is not None
            made = target.halver(floats, source, graphs_folder)
        report = attempt(made)
    if quantized is not None:
        more["quantization"] = quantized.to_json()
    if report.passed and target.finisher is not None:
        progress("building ahead of time")
        written[:], built = target.finisher(model, written, folder)
        assemble(checkpoint, target, precision, bounds, written, verification, folder)
        more |= built
    if target.stand_in is not None:
        more["ran_on"] = _STOOD_IN if all(graph.fused is None for graph in written) else _FUSED_HERE
    record(folder, report, steps, more)
    if report.passed:
        replay(open_here(folder, target))
    return _Made(source, floats, written, report, quantized)


def _graph_bytes(graph: WrittenGraph, folder: Path) -> int:
    if graph.size is not None:
        return graph.size
    return sum((folder / name).stat().st_size for name in (graph.file, graph.data) if name is not None)


def _times_ms(model: BundleModel) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile of encode and of step over what the bundle recorded; after one for warming up."""
    dt, given = recorded_inputs(model)
    image = model.bundle.manifest.image
    state, spent = model.initial_state(1), []
    for t in [0, *np.resize(np.arange(len(dt)), _TIMED_RUNS)]:
        inputs = {name: values[t][None] for name, values in given.items()}
        if image is not None:
            inputs[image.name] = model.normalise(inputs[image.name])
        seen, rings = model.perceive(inputs, state)
        began = time.perf_counter()
        features = model.encode(seen)
        encoded = time.perf_counter()
        _, state = model.step_features(features, state, dt[t : t + 1], rings)
        spent.append((encoded - began, time.perf_counter() - encoded))
    ms = 1e3 * np.array(spent[1:])
    return {
        name: (float(np.median(column)), float(np.percentile(column, 99)))
        for name, column in zip(("encode", "step"), ms.T, strict=True)
    }


def _features(model: AffectModel, sequence: ParitySequence) -> dict[str, NDArray[Any]]:
    """The encoder's features over a sequence's first stream."""
    moments = [inputs for role, inputs in trajectory(model, sequence.stream(0)) if role == "step"]
    return {t.name: np.concatenate([m[t.name] for m in moments]) for t in model.features()}
