"""Target `triton`: a model repository for NVIDIA's Triton Inference Server, for more streams than one device has.

The bundle's folder `models` is the repository. Its graphs are those of the other GPU targets, with the step cut to what
Triton's sequence batcher wants (`affect_export.triton_graph`); the server keeps the states.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from affect_export.targets.base import WrittenGraph
from affect_export.targets.tensorrt import JETSON_ORIN, run_in_place, widened
from affect_export.triton_graph import CONTROLS, check_states, serving_step
from affect_export.triton_repository import Serving, repository_files, version_folder
from affect_runtimes.base import GraphEngine
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.onnxruntime import open_bytes

if TYPE_CHECKING:
    from affect_export.models.base import AffectModel

__all__ = ["FOLDER", "TRITON", "ServedStep"]

Array = NDArray[Any]
FOLDER, GRAPH = "models", "model.onnx"
"""Of the repository, in the bundle; of a graph in its version folder, also where the server wants a plan made of it."""


class ServedStep(GraphEngine):
    """A served step as the step that it was: it plays Triton's part, for a stream in the middle of its sequence."""

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        import onnx

        self._serve = open_bytes(widened(data), threads=threads)
        model = onnx.load_from_string(data)
        self._controls = {i.name for i in model.graph.input} & set(CONTROLS)
        # Names are the same; shapes are, but for where the batch is.
        stated = {t.name: t for t in (*self.graph.inputs, *self.graph.outputs)}
        found = [
            [stated.get(v.name, _unknown(v.name)) for v in side] for side in (model.graph.input, model.graph.output)
        ]
        return [t for t in found[0] if t.name not in self._controls], found[1]

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        batch = inputs["dt"].shape[0]
        given = {t.name: _batch_first(inputs[t.name], t) for t in self.graph.inputs}
        given |= {name: np.full((batch, 1), float(name == "READY"), np.float32) for name in self._controls}
        served = self._serve(given)
        return {t.name: _batch_back(served[t.name], t) for t in self.graph.outputs}


def _unknown(name: str) -> Tensor:
    return Tensor(name, ("unknown",), "float32")


def _batch_first(array: Array, tensor: Tensor) -> Array:
    moved = np.ascontiguousarray(np.moveaxis(array, tensor.batch_axis, 0))
    return moved[:, None] if moved.ndim == 1 else moved


def _batch_back(array: Array, tensor: Tensor) -> Array:
    flat = array[:, 0] if len(tensor.shape) == 1 else array
    return np.moveaxis(flat, 0, tensor.batch_axis)


def _stand_in(graph: Graph, data: bytes) -> GraphEngine:
    # The gate judges the graphs before they are served, and what lies in the repository is replayed.
    return ServedStep(graph, data, None, 1) if _is_served(graph) else run_in_place(graph, data)


def _is_served(graph: Graph) -> bool:
    return graph.role == "step" and graph.file.startswith(f"{FOLDER}/")


def serve(
    model: "AffectModel", written: list[WrittenGraph], folder: Path, *, serving: Serving
) -> tuple[list[WrittenGraph], dict[str, Any]]:
    """Makes a model repository of graphs that lie in a bundle's folder.

    Args:
        model: float; its states are what the server keeps.
        written: encoder and step.
        folder: of the bundle.
        serving: how it is served.

    Raises:
        InputError: a model that Triton cannot serve, such as one with sound, whose ring of samples no graph keeps.
    """
    import onnx

    name = type(model).NAME
    by_role = {g.source.role: g for g in written}
    states = model.all_states()
    files = repository_files(name, by_role["encoder"].source, by_role["step"].source, states, serving)
    for path, content in files.items():
        place = folder / FOLDER / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    made: list[WrittenGraph] = []
    for graph in written:
        data = onnx.load(folder / graph.file)
        if graph.source.role == "step":
            data = serving_step(data, states)
        file = f"{FOLDER}/{version_folder(name, graph.source.role)}/{GRAPH}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data.SerializeToString(deterministic=True))
        (folder / graph.file).unlink()
        made.append(replace(graph, file=file, beside=tuple(f"{FOLDER}/{p}" for p in files) if not made else ()))
    return made, {"triton": {"repository": FOLDER, "models": sorted({p.split("/")[0] for p in files})}}


TRITON = replace(
    JETSON_ORIN,
    name="triton",
    summary="a model repository for Triton Inference Server, INT8 with the scan in fp16; many streams on one GPU",
    engine="triton",
    arch=("x86_64", "aarch64"),
    stand_in=_stand_in,
    finisher=partial(serve, serving=Serving()),
    max_batch=None,
    step_engines={},
    ready=lambda model: check_states(model.all_states()),
    then="on the server: tritonserver --model-repository {path}/models",
)
