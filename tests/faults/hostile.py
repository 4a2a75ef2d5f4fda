"""Opens what nobody would write, in a process of its own with a bounded memory; run by tests/faults/test_hostile_*.py.

    python tests/faults/hostile.py KIND FOLDER CASES

KIND: onnx (damaged graphs with manifests that fit them), native (damaged programs of the native library), safetensors
(damaged checkpoints), bomb (graphs and recordings that take far more
than they weigh, or never end). FOLDER holds a bundle, or a
checkpoint. Prints JSON: outcome -> how many. An outcome is "opened", the name of an error, or "signal N".
"""

import hashlib
import json
import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MEMORY = 4 << 30
SECONDS = 4
SEED = 9


def damaged(data: bytes, numbers: random.Random) -> bytes:
    """Flipped bits, a changed or missing stretch, or a cut: what a disk, a cable or an attacker makes of a file."""
    changed = bytearray(data)
    for _ in range(numbers.choice([1, 1, 2, 8])):
        at, length = numbers.randrange(len(changed)), numbers.choice([1, 2, 4, 9])
        what = numbers.randrange(6)
        if what == 0:
            changed[at] ^= 1 << numbers.randrange(8)
        elif what == 1:
            changed[at : at + length] = numbers.randbytes(length)
        elif what == 2:
            changed[at : at + length] = b"\xff" * length
        elif what == 3:
            del changed[at : at + length]
        elif what == 4:
            changed[at:at] = changed[at : at + length]
        else:
            del changed[max(1, at) :]
    return bytes(changed)


def put(folder: Path, name: str, data: bytes) -> None:
    """A file of a bundle changed by somebody who makes the manifest fit."""
    from affect_runtimes.manifest import to_text

    (folder / name).write_bytes(data)
    raw = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    if name in raw["files"]:
        raw["files"][name] = digest
    for graph in raw["graphs"]:
        if graph["file"] == name:
            graph["sha256"] = digest
    (folder / "manifest.json").write_text(to_text(raw))


def outcome(work: Callable[[], object]) -> str:
    """What became of it, in a child that has a limit on its memory and its time."""
    from affect_runtimes.errors import AffectError

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        said = "opened"
        try:
            work()
        except AffectError as error:
            said = type(error).__name__
        except BaseException as error:
            said = f"NOT OURS: {type(error).__name__}: {error}"[:300]
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if code == 0 and said else f"signal {-code}"


def bundle_cases(kind: str, folder: Path, count: int) -> Counter[str]:
    import onnxruntime  # noqa: F401

    import affect_runtimes.native
    import affect_runtimes.onnxruntime  # noqa: F401
    from affect_runtimes.model import BundleModel
    from affect_runtimes.verify import replay

    numbers, found = random.Random(SEED), Counter[str]()
    raw = json.loads((folder / "manifest.json").read_text())
    names = [g["file" if kind == "onnx" else "native"] for g in raw["graphs"] if kind == "onnx" or g.get("native")]
    whole = {name: (folder / name).read_bytes() for name in names}
    for _ in range(count):
        name = numbers.choice(names)
        put(folder, name, damaged(whole[name], numbers))
        found[outcome(lambda: replay(BundleModel(folder, plain=kind == "onnx")))] += 1
        put(folder, name, whole[name])
    return found


def bombs(folder: Path) -> dict[str, str]:
    """Each by its name: a step graph with a harmless-looking addition, and recordings."""
    import io
    import zipfile

    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from affect_runtimes.model import BundleModel
    from affect_runtimes.verify import replay

    step, recording = (folder / "step.onnx").read_bytes(), (folder / "verify.npz").read_bytes()
    found = {}

    def tried(name: str, file: str, data: bytes, whole: bytes) -> None:
        put(folder, file, data)
        found[name] = outcome(lambda: replay(BundleModel(folder, plain=True)))
        put(folder, file, whole)

    def with_nodes(nodes: list[Any], tensors: dict[str, Any], of: str = "spare") -> bytes:
        """The step, whose first output waits for the tensor `of`."""
        model = onnx.load_from_string(step)
        graph, given = model.graph, model.graph.output[0].name
        for node in graph.node:
            for number, name in enumerate(node.output):
                if name == given:
                    node.output[number] = "was_first"
        shape = numpy_helper.from_array(np.zeros(1, np.float32), "nothing")
        graph.initializer.extend([shape, *(numpy_helper.from_array(v, k) for k, v in tensors.items())])
        graph.node.extend(nodes)
        graph.node.append(helper.make_node("ReduceMax", [of], ["most"], keepdims=0))
        graph.node.append(helper.make_node("Mul", ["most", "nothing"], ["naught"]))
        graph.node.append(helper.make_node("Add", ["was_first", "naught"], [given]))
        return bytes(model.SerializeToString())

    wide = np.array([1 << 20, 1 << 20], np.int64)
    filled = helper.make_node("ConstantOfShape", ["wide"], ["spare"])
    tried("a terabyte from a constant", "step.onnx", with_nodes([filled], {"wide": wide}), step)
    grown = [
        helper.make_node("Expand", ["dt_first", "wide"], ["spare"]),
        helper.make_node("ReduceMax", ["dt"], ["dt_first"], keepdims=0),
    ]
    tried("a terabyte at the first run", "step.onnx", with_nodes(grown[::-1], {"wide": wide}), step)
    body = helper.make_graph(
        [helper.make_node("Identity", ["goes_on"], ["on"]), helper.make_node("Identity", ["kept"], ["next_kept"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_kept", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["often", "yes", "dt"], ["spare"], body=body)
    often = {"often": np.array(1 << 62, np.int64), "yes": np.array(True)}
    tried("a loop without an end", "step.onnx", with_nodes([loop], often), step)
    gather = helper.make_node("Gather", ["few", "far"], ["spare"])
    far = {"few": np.zeros(2, np.float32), "far": np.array([1 << 40], np.int64)}
    tried("an index out of bounds", "step.onnx", with_nodes([gather], far), step)
    reshape = [helper.make_node("Reshape", ["dt", "odd"], ["spare"])]
    tried("a shape that cannot be", "step.onnx", with_nodes(reshape, {"odd": np.array([7, 7], np.int64)}), step)
    model = onnx.load_from_string(step)
    model.graph.initializer[0].dims[:] = [1 << 31, 1 << 31]
    tried("a tensor larger than its bytes", "step.onnx", model.SerializeToString(), step)
    model = onnx.load_from_string(step)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    tried("weights in a file elsewhere", "step.onnx", model.SerializeToString(), step)
    tried("graphs within graphs", "step.onnx", _nested(3_000), step)
    many = [helper.make_node("Identity", [f"i{n}"], [f"i{n + 1}"]) for n in range(5_000)]
    tried("a chain of thousands", "step.onnx", with_nodes(many, {"i0": np.zeros(1, np.float32)}, "i5000"), step)

    def archive(**arrays: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    with np.load(io.BytesIO(recording)) as file:
        arrays = dict(file)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file_:
        with file_.open("dt.npy", "w", force_zip64=True) as member:
            for _ in range(65):
                member.write(bytes(16 << 20))
    tried("a recording of gigabytes", "verify.npz", buffer.getvalue(), recording)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 44,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file_:
        file_.writestr("dt.npy", header.getvalue())
    tried("a header that promises terabytes", "verify.npz", buffer.getvalue(), recording)
    endless = {k: (np.ones(5000, np.float32) if k == "dt" else v) for k, v in arrays.items()}
    tried("a recording of thousands of steps", "verify.npz", archive(**endless), recording)
    return found


def _nested(levels: int) -> bytes:
    """A model whose graph has a node with a graph with a node with a graph: fields 7, and then 1, 5 and 6 in turns."""

    def field(number: int, data: bytes) -> bytes:
        length, size = len(data), bytearray()
        while length > 127:
            size.append(length & 127 | 128)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + data

    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    return b"\x08\x0a" + field(7, graph)


def checkpoint_cases(path: Path, count: int) -> Counter[str]:
    from affect_export.models.checkpoint import load_model

    load_model("student", path)
    numbers, found, whole = random.Random(SEED), Counter[str](), path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for number in range(count):
        # Most of a checkpoint is numbers, of which any will do: three of four cases go for its header.
        head = numbers.random() < 0.75
        data = damaged(whole[: 8 + header], numbers) + whole[8 + header :] if head else damaged(whole, numbers)
        other = path.with_name(f"damaged{number}.safetensors")
        other.write_bytes(data)
        found[outcome(partial(load_model, "student", other))] += 1
        other.unlink()
    return found


def main(kind: str, path: Path, count: int) -> dict[str, Any]:
    if kind == "bomb":
        return bombs(path)
    return dict(checkpoint_cases(path, count) if kind == "safetensors" else bundle_cases(kind, path, count))


if __name__ == "__main__":
    json.dump(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])), sys.stdout)
