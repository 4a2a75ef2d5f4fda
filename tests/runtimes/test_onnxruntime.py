"""What ONNX Runtime may and may not read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from affect_runtimes.errors import BundleError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.onnxruntime import OnnxRuntimeEngine


def test_weights_that_nobody_hashed_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may point to a file; ONNX Runtime would look for it where the process happens to run."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full(400, 2.0, np.float32), "w")
    onnx.external_data_helper.set_external_data(weights, "w.bin", 0, 1600)
    raw = weights.raw_data
    weights.ClearField("raw_data")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 400]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    (tmp_path / "w.bin").write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    tensors = tuple(Tensor(n, ("batch", 400), "float32") for n in "xy")
    described = Graph("step", "step.onnx", "", {}, tensors[:1], tensors[1:])
    with pytest.raises(BundleError, match=r"w\.bin"):
        OnnxRuntimeEngine(described, data, None, 1)
    # Handed over in memory, which is how a bundle's verified data comes, they are found.
    engine = OnnxRuntimeEngine(replace(described, data="w.bin"), data, raw, 1)
    np.testing.assert_array_equal(engine.run({"x": np.ones((1, 400), np.float32)})["y"], 2.0)
    # Older releases, the last for Python 3.10 among them, do read such files. They are given no graph that has any.
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    for stated, external in ((described, None), (replace(described, data="w.bin"), raw)):
        with pytest.raises(BundleError, match=r"weights outside the graph; ONNX Runtime 1\.23\.2 .*1\.24 or later"):
            OnnxRuntimeEngine(stated, data, external, 1)
    inside = numpy_helper.from_array(np.full(400, 2.0, np.float32), "w")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [inside])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    OnnxRuntimeEngine(described, data, None, 1)
