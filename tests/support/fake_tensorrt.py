"""A TensorRT whose engines run in ONNX Runtime on the memory of a fake driver, for tests of what calls it.

Every call is held to the signature of the real thing: of TensorRT-RTX, from the docstrings of its bindings, and of
TensorRT 10, from its type stubs where `make stubs` has put them. What TensorRT demands beyond that is demanded here,
too: a driver first, a context in the calling thread, shapes before addresses, one run before a capture.
"""

import ctypes
import inspect
import json
import re
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx as rtx
from fake_cuda import FakeDriver

from affect_export.targets.tensorrt import widened
from affect_runtimes.onnxruntime import open_bytes

__all__ = ["STUBS", "fake_tensorrt", "signatures"]

STUBS = Path(__file__).parents[2] / "build" / "tensorrt-stubs"
_SAME = (
    "DataType",
    "Dims",
    "ILogger",
    "IProgressMonitor",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "TensorIOMode",
)
_TYPES: dict[str, Callable[[Any], bool]] = {
    "SupportsInt": lambda v: hasattr(v, "__int__") and not isinstance(v, (str, float)),
    "int": lambda v: hasattr(v, "__int__") and not isinstance(v, (str, float)),
    "str": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "Buffer": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
    "buffer": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
    "tuple": lambda v: isinstance(v, tuple),
    "list": lambda v: isinstance(v, list),
    "Dims": lambda v: isinstance(v, (tuple, list, rtx.Dims)) and all(isinstance(n, int) for n in v),
}


@cache
def signatures(owner: str, method: str) -> tuple[tuple[str, tuple[inspect.Signature, ...]], ...]:
    """(whose, what it takes) of a method of the real TensorRT, `self` left out."""
    text = str(getattr(getattr(rtx, owner), method).__doc__)
    found = re.findall(rf"^(?:\d+\. )?{method}\(self: [^,)]*(?:, )?(.*)\) -> ", text, re.M)
    assert found, f"TensorRT-RTX says nothing of {owner}.{method}"
    told = [("TensorRT-RTX", tuple(_signature(arguments) for arguments in found))]
    if stubs := _stub(owner, method):
        told.append(("TensorRT 10", stubs))
    return tuple(told)


def _signature(arguments: str) -> inspect.Signature:
    made = []
    for name, kind in re.findall(r"(\w+): ((?:[^,\[<]|\[[^]]*\]|<[^>]*>)+)", arguments):
        kind, _, default = kind.partition(" = ")
        empty = None if default else inspect.Parameter.empty
        made.append(
            inspect.Parameter(
                name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=empty, annotation=kind.split(".")[-1]
            )
        )
    return inspect.Signature(made)


@cache
def _classes() -> dict[str, str]:
    """Class -> its text. The stubs are no valid Python throughout, so they are read as lines."""
    text = "\n".join(file.read_text() for file in STUBS.rglob("tensorrt.pyi"))
    return {re.split(r"\W", part, maxsplit=1)[0]: part for part in re.split(r"^class ", text, flags=re.M)[1:]}


def _stub(owner: str, method: str) -> tuple[inspect.Signature, ...]:
    found = re.findall(rf"^    def {method}\(self(?:, )?(.*)\) -> ", _classes().get(owner, ""), re.M)
    return tuple(_signature(arguments) for arguments in found)


def _check(owner: str, method: str, arguments: tuple[Any, ...]) -> None:
    for whose, ways in signatures(owner, method):
        complaints = []
        for way in ways:
            try:
                bound = way.bind(*arguments)
            except TypeError as error:
                complaints.append(str(error))
                continue
            wrong = [
                f"{name} is {value!r}, not {way.parameters[name].annotation}"
                for name, value in bound.arguments.items()
                if not _TYPES.get(way.parameters[name].annotation, lambda v: True)(value)
            ]
            if not wrong:
                break
            complaints += wrong
        else:
            raise AssertionError(f"{whose} does not take {owner}.{method}{arguments!r}: {'; '.join(complaints)}")


def _held(kind: type) -> type:
    """Has every public method, and the making, of a fake class held to the real one's signature."""
    for name, method in list(vars(kind).items()):
        made_by_callers = name == "__init__" and kind.__name__ in ("Builder", "OnnxParser", "Runtime")
        if inspect.isfunction(method) and (made_by_callers or not name.startswith("_")):

            def held(self: Any, *arguments: Any, _name: str = name, _method: Any = method) -> Any:
                _check(kind.__name__, _name, arguments)
                return _method(self, *arguments)

            setattr(kind, name, held)
    return kind


def fake_tensorrt(driver: FakeDriver, name: str = "tensorrt", version: str = "10.3.0") -> Any:
    """A module for `sys.modules`. Of its own it has the counts `builds` and `runs`, and the knobs `refuse`, `on_build`,
    `captures`, `memory`, `breaks` and `wrong`, a factor on whatever an engine gives.
    """
    trt: Any = types.ModuleType(name)
    trt.builds, trt.runs, trt.refuse, trt.captures, trt.memory, trt.breaks, trt.wrong = (
        0,
        0,
        set(),
        True,
        True,
        False,
        1.0,
    )
    trt.on_build = lambda: None
    trt.__version__ = version
    own = ("ComputeCapability", "DynamicShapesKernelSpecializationStrategy") if name == "tensorrt_rtx" else ()
    for same in (*_SAME, *own):
        setattr(trt, same, getattr(rtx, same))
    trt.BuilderFlag = types.SimpleNamespace(TF32=rtx.BuilderFlag.TF32)
    if name == "tensorrt_rtx":
        trt.BuilderFlag.REQUIRE_USER_ALLOCATION = rtx.BuilderFlag.REQUIRE_USER_ALLOCATION
        trt.own_allocation = False  # knob: networks that cannot be built for graphs
    graphs: dict[bytes, Any] = {}

    def ready() -> None:
        assert driver.initialised, "TensorRT was touched before the driver: it would have ended the process"
        driver.here()

    @_held
    class Builder:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, rtx.ILogger)
            self._logger = logger

        def create_network(self, flags: int = 0) -> Any:
            assert flags == 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            return types.SimpleNamespace(data=None)

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            ready()
            assert rtx.BuilderFlag.TF32 not in config._flags and config._limits[rtx.MemoryPoolType.WORKSPACE] > 0
            if getattr(trt, "own_allocation", False) and rtx.BuilderFlag.REQUIRE_USER_ALLOCATION in config._flags:
                return None
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            trt.builds += 1
            trt.on_build()
            if not monitor.step_complete("Building", 1):
                return None
            monitor.phase_finish("Building")
            if trt.breaks:
                self._logger.log(rtx.ILogger.Severity.ERROR, "no tactic was found")
                return None
            (profile,) = config._profiles
            model = onnx.load_from_string(network.data)
            for value in model.graph.input:
                sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
                least, best, most = profile._shapes[value.name]
                assert len(least) == len(best) == len(most) == len(sizes)
                for a, b, c, d in zip(least, best, most, sizes, strict=True):
                    assert (1 <= a <= b <= c) if d == 0 else (a == b == c == d)
            shapes = {n: [list(s) for s in three] for n, three in profile._shapes.items()}
            graphs_too = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None) in config._flags
            header = {
                "by": f"{name} {version}",
                "gpu": driver.capability,
                "shapes": shapes,
                "captures": graphs_too or name == "tensorrt",
                "number": trt.builds,
            }
            return memoryview(json.dumps(header).encode() + b"\0" + network.data)

    @_held
    class IBuilderConfig:
        def __init__(self) -> None:
            self._profiles: list[Any] = []
            self._flags, self._limits = {rtx.BuilderFlag.TF32}, dict[Any, int]()
            self.progress_monitor: Any = None

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self._limits[pool] = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return len(self._profiles) - 1

    @_held
    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = (min, opt, max)

    @_held
    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            self._network, self._errors = network, list[str]()

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> str:
            return self._errors[index]

        def parse(self, model: bytes, path: str | None = None) -> bool:
            found = {node.op_type for node in onnx.load_from_string(model).graph.node}
            self._errors += [f"No importer registered for op: {op}" for op in sorted(found & trt.refuse)]
            self._network.data = bytes(model)
            return not self._errors

    @_held
    class Runtime:
        def __init__(self, logger: Any) -> None:
            ready()
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            ready()
            head, _, data = bytes(serialized_engine).partition(b"\0")
            try:
                header = json.loads(head)
            except ValueError:
                header = {}
            if header.get("by") != f"{name} {version}" or header["gpu"] != list(driver.capability):
                self._logger.log(rtx.ILogger.Severity.ERROR, "the engine is of another version or GPU")
                return None
            return ICudaEngine(data, header)

    @_held
    class ICudaEngine:
        def __init__(self, data: bytes, header: Any) -> None:
            self._model, self._shapes, self._data = onnx.load_from_string(data), header["shapes"], data
            self._captures = header["captures"]
            graph = self._model.graph
            self._values = {v.name: v for v in (*graph.input, *graph.output)}
            self._inputs = {v.name for v in graph.input}

        @property
        def num_io_tensors(self) -> int:
            return len(self._values)

        def get_tensor_name(self, index: int) -> str:
            return str(list(self._values)[index])

        def get_tensor_mode(self, name: str) -> Any:
            return rtx.TensorIOMode.INPUT if name in self._inputs else rtx.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            assert self._values[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            return rtx.DataType.FLOAT

        def get_tensor_shape(self, name: str) -> Any:
            return rtx.Dims([d.dim_value or -1 for d in self._values[name].type.tensor_type.shape.dim])

        def create_execution_context(self, runtime_config: Any = None) -> Any:
            ready()
            if name == "tensorrt_rtx":
                # Otherwise kernels for new shapes come later, and a graph would never get them.
                eager = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
                assert runtime_config.dynamic_shapes_kernel_specialization_strategy == eager
            return IExecutionContext(self) if trt.memory else None

    class IExecutionContext:
        def __init__(self, engine: Any) -> None:
            self._engine, self._addresses, self._sizes = engine, dict[str, int](), dict[str, tuple[int, ...]]()
            self._fresh, self._graphs = True, 0

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self._engine._shapes[name]
            self._sizes[name], self._fresh = shape, True
            return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert name in self._engine._values
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            ready()
            assert stream_handle == 77
            assert set(self._sizes) == self._engine._inputs and set(self._addresses) == set(self._engine._values)
            if driver.stale:
                driver.stale = False
                return False
            if driver.recording is not None:
                self._graphs += 1
                assert self._graphs == 1, "two graphs of one context"
                if self._fresh or not trt.captures:
                    driver.invalid = True
                    return False
            self._fresh = False
            at, sizes = dict(self._addresses), dict(self._sizes)
            driver.enqueue(lambda: self._compute(at, sizes))
            return True

        def _compute(self, at: dict[str, int], sizes: dict[str, tuple[int, ...]]) -> None:
            if self._engine._data not in graphs:
                graphs[self._engine._data] = open_bytes(widened(self._engine._data))
            trt.runs += 1
            taken = {
                n: np.frombuffer(driver.view(at[n], 4 * int(np.prod(s)), True), np.float32).reshape(s).copy()
                for n, s in sizes.items()
            }
            for n, array in graphs[self._engine._data](taken).items():
                raw = np.ascontiguousarray(trt.wrong * array, np.float32).tobytes()
                ctypes.memmove(driver.view(at[n], len(raw), True), raw, len(raw))

    if name == "tensorrt_rtx":

        def is_stream_capturable(self: Any, stream: int) -> bool:
            return bool(trt.captures and self._engine._captures)

        def create_runtime_config(self: Any) -> Any:
            return types.SimpleNamespace()

        ICudaEngine.create_runtime_config = create_runtime_config  # type: ignore[attr-defined]
        IExecutionContext.is_stream_capturable = is_stream_capturable  # type: ignore[attr-defined]
    _held(IExecutionContext)
    for kind in (Builder, OnnxParser, Runtime):
        setattr(trt, kind.__name__, kind)
    return trt
