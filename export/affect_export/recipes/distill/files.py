"""Somebody else's network as a teacher: an ONNX or LiteRT file, described by `affect_export.recipes.distill.spec`.

Such a teacher is asked about every frame on its own. One with a memory is exported to a bundle first.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.recipes.distill.spec import Given, Taken, read_spec
from affect_runtimes.errors import AffectError, InputError, MissingDependencyError
from affect_runtimes.interface import ImageInput, Tensor
from affect_runtimes.manifest import Clock, Graph
from affect_runtimes.onnxruntime import OnnxRuntimeEngine

__all__ = ["SUFFIXES", "FileTeacher"]

Array = NDArray[Any]
SUFFIXES = (".onnx", ".tflite")
_CHUNK = 32
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as OpenCV's grey
_SLACK = 0.05  # of a regression's range


class FileTeacher:
    """A frame-wise teacher in a file.

    Args:
        path: .onnx or .tflite.
        spec: JSON file that describes it; None is the file of the same name that ends with .json.
        threads: for the engine.

    Raises:
        InputError: the description is missing or cannot be used, or does not fit the file.
        AffectError: no such file, or no engine can load it.
        MissingDependencyError: the engine is not installed.
    """

    recurrent = False
    clock: Clock | None = None
    trained = True

    def __init__(self, path: Path, spec: Path | None = None, threads: int = 1) -> None:
        if not path.is_file():
            raise AffectError(f"{path}: no such file")
        self.spec = read_spec(spec or path.with_suffix(".json"), path)
        self.path = path
        kind = _Onnx if path.suffix == ".onnx" else _LiteRt
        self._network: _Onnx | _LiteRt = kind(path, threads)
        self._inputs = [(t, self._tensor_of(t)) for t in self.spec.taken]
        gives = list(self._network.gives)
        for name, tensor in [(g.described.name, g.tensor) for g in self.spec.given] + [*self.spec.features.items()]:
            if tensor not in gives and len(gives) > 1:
                raise InputError(f"{path}: has no output {tensor!r} for {name}; it has {', '.join(gives)}")
        self.inputs = tuple(t.described for t in self.spec.taken)
        self.outputs = tuple(g.described for g in self.spec.given)
        self.licence = self.spec.licence
        self.about: Mapping[str, Any] = {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "described": dict(self.spec.raw),
            "trained": True,
        }
        # Once found to be logits or probabilities, an output stays that: it must not change from clip to clip.
        self._values = {g.described.name: g.values for g in self.spec.given}

    def word(
        self, inputs: Mapping[str, Array], ordered: bool, dt: NDArray[np.float32] | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """See `Teacher.word`; order and time say nothing to a teacher without a memory."""
        rows = len(next(iter(inputs.values())))
        size = self._network.batch or _CHUNK
        parts = []
        for start in range(0, rows, size):
            count = min(size, rows - start)
            fed = {}
            for taken, tensor in self._inputs:
                part = _arranged(taken, inputs[taken.described.name][start : start + count])
                if self._network.batch is not None and count < size:
                    part = np.concatenate([part, np.repeat(part[-1:], size - count, 0)])
                fed[tensor.name] = np.ascontiguousarray(part)
            parts.append({k: np.asarray(v)[:count] for k, v in self._network.ask(fed).items()})
        found = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        only = next(iter(found)) if len(found) == 1 else None
        said = {g.described.name: self._activated(g, found[only or g.tensor], rows) for g in self.spec.given}
        vectors = {
            name: np.asarray(found[only or t], np.float32).reshape(rows, -1) for name, t in self.spec.features.items()
        }
        return said, vectors

    def _tensor_of(self, taken: Taken) -> Tensor:
        """The file's tensor for an input, its shape checked as far as the file states it."""
        takes = list(self._network.takes)
        if len(takes) != len(self.spec.taken):
            raise InputError(
                f"{self.path}: takes {len(takes)} inputs ({', '.join(t.name for t in takes)}), "
                f"{len(self.spec.taken)} are described"
            )
        found = takes[0] if len(takes) == 1 else next((t for t in takes if t.name == taken.tensor), None)
        if found is None:
            raise InputError(
                f"{self.path}: has no input {taken.tensor!r}; it has {', '.join(t.name for t in takes)}. Name it with "
                "'tensor'"
            )
        wanted = _arranged(taken, np.zeros(taken.described.graph_inputs[0].sized(1), np.float32)).shape[1:]
        stated = found.shape[1:]
        if len(stated) != len(wanted) or any(
            isinstance(a, int) and a != b for a, b in zip(stated, wanted, strict=True)
        ):
            raise InputError(
                f"{self.path}: the input {found.name} is {list(found.shape)}, described is one of "
                f"{['batch', *wanted]}; size and layout must be the file's"
            )
        return found

    def _activated(self, given: Given, values: Array, rows: int) -> Array:
        """(rows, labels) or (rows,) inside the stated range."""
        output, where = given.described, f"{self.path}: output {given.described.name}"
        values = np.asarray(values, np.float32)
        wanted = (rows, len(output.labels)) if output.labels else (rows,)
        if values.size != np.prod(wanted):
            said = f"the {len(output.labels)} labels described" if output.labels else "one value a picture"
            raise InputError(f"{where} is {list(values.shape)} for {rows} pictures, which does not fit {said}")
        values = values.reshape(wanted)
        if not np.isfinite(values).all():
            raise AffectError(f"{where} has values that are no numbers")
        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if output.kind == "regression":
            least, most = output.range
            slack = _SLACK * (most - least)
            if low < min(0, least) - slack or high > max(0, most) + slack:
                raise InputError(f"{where} has values from {low:g} to {high:g}, described is the range {output.range}")
            return values.clip(least, most)
        stochastic = low >= -1e-4 and high <= 1 + 1e-4
        if output.kind == "distribution":
            stochastic = stochastic and bool((np.abs(values.sum(1) - 1) < 1e-2).all())
        if self._values[output.name] is None:
            if not stochastic and 0 <= low and high <= 1:
                raise InputError(
                    f"{where} may be logits or probabilities: values from {low:g} to {high:g} whose rows do not sum to "
                    '1. Say which in the description: "values": "logits" or "values": "probabilities"'
                )
            self._values[output.name] = "probabilities" if stochastic else "logits"
        if self._values[output.name] == "logits":
            return _softmax(values) if output.kind == "distribution" else _sigmoid(values)
        if not stochastic:
            raise InputError(
                f"{where} was taken for probabilities, but has values from {low:g} to {high:g}"
                f'{"" if output.kind != "distribution" else " or rows that do not sum to 1"}; are they "logits"?'
            )
        return values.clip(0, 1)


def _arranged(taken: Taken, rows: Array) -> Array:
    """(n, 3, H, W), normalised -> the file's channels and layout."""
    if not isinstance(taken.described, ImageInput):
        return rows
    if taken.colour == "bgr":
        rows = rows[:, ::-1]
    elif taken.colour == "grey":
        rows = np.einsum("nchw,c->nhw", rows, _LUMA)[:, None]
    return rows if taken.layout == "nchw" else rows.transpose(0, 2, 3, 1)


class _Onnx(OnnxRuntimeEngine):
    """A graph that no manifest describes: it says itself what it takes."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnx

        try:
            # With its external weights, which the engine would not look for.
            data = onnx.load(str(path)).SerializeToString()
        except Exception as error:  # protobuf's errors, and what damaged bytes lead to
            raise AffectError(f"{path}: cannot be read as ONNX ({error})") from None
        self.graph = Graph("teacher", str(path), "", {}, (), ())
        self.takes, gives = self._load(data, None, threads)
        self.gives = [g.name for g in gives]
        for tensor in self.takes:
            if tensor.dtype not in ("float32", "float16"):
                raise InputError(f"{path}: the input {tensor.name} takes {tensor.dtype}; float32 and float16 are known")
        first = self.takes[0].shape[0] if self.takes and self.takes[0].shape else None
        self.batch = first if isinstance(first, int) else None

    def ask(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        kinds = {t.name: t.dtype for t in self.takes}
        return self._run({k: v.astype(kinds[k]) for k, v in inputs.items()})


class _LiteRt:
    """A LiteRT (TensorFlow Lite) file; whole numbers are quantized and read by the scales in the file."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise MissingDependencyError(
                f"{path}: a .tflite teacher runs on LiteRT: pip install 'affect-edge[tflite]' ({error})"
            ) from None
        try:
            self._interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise AffectError(f"{path}: LiteRT cannot load it ({error})") from None
        self._in = self._interpreter.get_input_details()
        self._out = self._interpreter.get_output_details()
        self.takes = [Tensor(d["name"], tuple(int(v) for v in d["shape"]), np.dtype(d["dtype"]).name) for d in self._in]
        self.gives = [d["name"] for d in self._out]
        self.batch: int | None = int(self._in[0]["shape"][0])

    def ask(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for detail in self._in:
            self._interpreter.set_tensor(detail["index"], _quantized(detail, inputs[detail["name"]]))
        self._interpreter.invoke()
        return {d["name"]: _dequantized(d, self._interpreter.get_tensor(d["index"])) for d in self._out}


def _quantized(detail: Mapping[str, Any], values: Array) -> Array:
    kind = np.dtype(detail["dtype"])
    if kind.kind == "f":
        return np.asarray(values, kind)
    scale, zero = detail["quantization"]
    if not scale:
        raise InputError(f"the input {detail['name']} takes {kind.name} and has no scale, so no numbers fit it")
    limits = np.iinfo(kind)
    return np.asarray(np.rint(values / scale + zero).clip(limits.min, limits.max), kind)


def _dequantized(detail: Mapping[str, Any], values: Array) -> Array:
    scale, zero = detail["quantization"]
    if values.dtype.kind == "f" or not scale:
        return np.asarray(values, np.float32)
    return np.asarray((values.astype(np.float32) - zero) * scale, np.float32)


def _softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(raised / raised.sum(-1, keepdims=True), np.float32)


def _sigmoid(logits: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)
