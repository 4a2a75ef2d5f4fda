"""One LiteRT engine serves every batch and thread, and damaged files are told, never run."""

import subprocess
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_runtimes.errors import BundleError, MissingDependencyError
from affect_runtimes.interface import Tensor
from affect_runtimes.litert import LiteRTEngine
from affect_runtimes.manifest import Graph

WEIGHT = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
GRAPH = Graph(
    "step",
    "step.tflite",
    "",
    {},
    # The state's batch is not its first axis, as in the models here.
    (Tensor("x", ("batch", 3), "float32"), Tensor("memory", (2, "batch", 3), "float32")),
    (Tensor("y", ("batch", 4), "float32"), Tensor("next_memory", (2, "batch", 3), "float32")),
)


def write_step(operator: str = "FULLY_CONNECTED", signatures: int = 1, kind: str = "FLOAT32") -> bytes:
    """y = W x, next_memory = memory + x; by the schema that LiteRT carries.

    Args:
        operator: "GATHER" takes y from places that x does not have: a graph that loads and cannot run.
        signatures: how many.
        kind: of the output y.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as s

    def made(kind: Any, **values: Any) -> Any:
        thing = kind()
        for name, value in values.items():
            setattr(thing, name, value)
        return thing

    def tensor(name: str, shape: Sequence[int], buffer: int = 0, kind: str = "FLOAT32") -> Any:
        return made(s.TensorT, name=name, shape=list(shape), type=getattr(s.TensorType, kind), buffer=buffer)

    def buffer(values: NDArray[Any]) -> Any:
        return made(s.BufferT, data=np.frombuffer(values.tobytes(), np.uint8))

    def operation(code: int, inputs: list[int], output: int, options: str) -> Any:
        return made(
            s.OperatorT,
            opcodeIndex=code,
            inputs=inputs,
            outputs=[output],
            builtinOptionsType=getattr(s.BuiltinOptions, options),
            builtinOptions=made(getattr(s, f"{options}T"), **({"axis": 1} if options == "GatherOptions" else {})),
        )

    gather = operator == "GATHER"
    tensors = [
        tensor("in_x", (1, 3)),
        tensor("in_memory", (2, 1, 3)),
        tensor("weight", (4, 3), 1),
        tensor("places", (4,), 2, "INT32"),
        tensor("out_y", (1, 4), kind=kind),
        tensor("out_memory", (2, 1, 3)),
    ]
    operators = [
        operation(0, [0, 3] if gather else [0, 2, -1], 4, "GatherOptions" if gather else "FullyConnectedOptions"),
        operation(1, [1, 0], 5, "AddOptions"),
    ]
    codes = [getattr(s.BuiltinOperator, name) for name in (operator, "ADD")]
    named = [
        made(
            s.SignatureDefT,
            signatureKey=f"step{i}",
            subgraphIndex=0,
            inputs=[made(s.TensorMapT, name=n, tensorIndex=i) for n, i in (("x", 0), ("memory", 1))],
            outputs=[made(s.TensorMapT, name=n, tensorIndex=i) for n, i in (("y", 4), ("next_memory", 5))],
        )
        for i in range(signatures)
    ]
    model = made(
        s.ModelT,
        version=3,
        buffers=[made(s.BufferT), buffer(WEIGHT), buffer(np.array([0, 1, 2, 7], np.int32))],
        operatorCodes=[made(s.OperatorCodeT, builtinCode=c, deprecatedBuiltinCode=c, version=1) for c in codes],
        subgraphs=[made(s.SubGraphT, tensors=tensors, inputs=[0, 1], outputs=[4, 5], operators=operators)],
        signatureDefs=named,
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def some_inputs(batch: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {t.name: rng.normal(size=t.sized(batch)).astype(np.float32) for t in GRAPH.inputs}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_is_what_its_rows_are(batch: int) -> None:
    engine, given = LiteRTEngine(GRAPH, write_step(), None, 1), some_inputs(batch)
    found = engine.run(given)
    np.testing.assert_allclose(found["y"], given["x"] @ WEIGHT.T, atol=1e-6)
    np.testing.assert_array_equal(found["next_memory"], given["memory"] + given["x"])
    kept = {name: array.copy() for name, array in found.items()}
    engine.run(some_inputs(batch, seed=1))
    for name, array in kept.items():
        np.testing.assert_array_equal(found[name], array)  # a result is the caller's, whatever runs later


def test_inputs_that_are_views_are_taken_as_they_are_seen() -> None:
    wide = np.random.default_rng(0).normal(size=(2, 2, 6)).astype(np.float32)
    given = {"x": wide[0, :, ::2], "memory": wide[:, :, ::-2]}
    found = LiteRTEngine(GRAPH, write_step(), None, 1).run(given)
    np.testing.assert_array_equal(found["next_memory"], given["memory"] + given["x"])


def test_threads_share_an_engine() -> None:
    engine = LiteRTEngine(GRAPH, write_step(), None, 2)

    def right(seed: int) -> bool:
        given = some_inputs(1 + seed % 3, seed)
        return np.array_equal(engine.run(given)["next_memory"], given["memory"] + given["x"])

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of a step
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(right, range(2000)))
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (replace(GRAPH, inputs=(Tensor("frame", ("batch", 3), "float32"), GRAPH.inputs[1])), "its inputs are"),
        (replace(GRAPH, inputs=(Tensor("x", ("batch", 4), "float32"), GRAPH.inputs[1])), "its inputs are"),
        (replace(GRAPH, inputs=(Tensor("x", (1, "batch"), "float32"), GRAPH.inputs[1])), "its inputs are"),
        (replace(GRAPH, inputs=(Tensor("x", (1, 3, "batch"), "float32"), GRAPH.inputs[1])), "its inputs are"),
        (replace(GRAPH, outputs=GRAPH.outputs[:1]), "its outputs are"),
        (replace(GRAPH, outputs=(Tensor("y", ("batch", 4), "int8"), GRAPH.outputs[1])), "its outputs are"),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_refused(graph: Graph, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        LiteRTEngine(graph, write_step(), None, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "step.tflite: LiteRT cannot run it"),
        (b"TFL3 is not all there is to it", "step.tflite: LiteRT cannot run it"),
        ({"operator": "GATHER"}, "gather"),
        ({"kind": "INT8"}, "step.tflite: LiteRT cannot run it"),
        ({"signatures": 0}, "signature"),
        ({"signatures": 2}, "signature"),
    ],
)
def test_what_cannot_run_is_told_at_loading(data: bytes | dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        LiteRTEngine(GRAPH, data if isinstance(data, bytes) else write_step(**data), None, 1)


def test_weights_beside_the_graph_are_refused() -> None:
    with pytest.raises(BundleError, match="holds its own weights"):
        LiteRTEngine(GRAPH, write_step(), b"weights", 1)


DAMAGE = """
import sys
from pathlib import Path
from affect_runtimes.errors import BundleError
from affect_runtimes.litert import LiteRTEngine
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from {module} import GRAPH
data = Path(sys.argv[2]).read_bytes()
opened = 0
for cut in range(len(data)):
    try:
        LiteRTEngine(GRAPH, data[:cut], None, 1)
    except BundleError:
        continue
    opened += 1
print(opened, "of", len(data))
"""


def test_a_file_that_was_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    """In a process of its own, because a crash would take this one along."""
    (tmp_path / "step.tflite").write_bytes(write_step())
    script = DAMAGE.format(module=Path(__file__).stem)
    done = subprocess.run(
        [sys.executable, "-c", script, __file__, tmp_path / "step.tflite"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Padding at the end may be missing: nothing is read from there.
    assert int(done.stdout.split()[0]) < 8, done.stdout


def test_without_litert_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'affect-edge\[tflite\]'"):
        LiteRTEngine(GRAPH, b"", None, 1)


def test_a_board_that_has_only_tflite_runtime_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_edge_litert.interpreter import Interpreter

    asked: list[int] = []

    class Older(Interpreter):  # type: ignore[misc]
        def __init__(self, *, model_content: bytes, num_threads: int) -> None:
            asked.append(num_threads)
            super().__init__(model_content=model_content, num_threads=num_threads)

    module = types.ModuleType("tflite_runtime.interpreter")
    module.__dict__["Interpreter"] = Older
    data = write_step()
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", types.ModuleType("tflite_runtime"))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", module)
    found = LiteRTEngine(GRAPH, data, None, 3).run(some_inputs(1))
    np.testing.assert_allclose(found["y"], some_inputs(1)["x"] @ WEIGHT.T, atol=1e-6)
    assert asked == [3]
