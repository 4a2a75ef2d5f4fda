"""TensorRT on an NVIDIA GPU: on a Jetson the one of JetPack, on x86-64 TensorRT or TensorRT-RTX.

A bundle carries ONNX graphs. The engine for this GPU, driver and TensorRT is built from them at the first load, which
takes from seconds to minutes, and kept (`affect_runtimes.cache`). A bundle may also carry engines that were built ahead
of time; one of them is used where TensorRT-RTX of that very version meets a GPU of that kind, and full TensorRT, which
measures its kernels on the device, is not there.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from affect_runtimes.base import machine
from affect_runtimes.bundle import Bundle
from affect_runtimes.cache import EngineCache, announce
from affect_runtimes.cuda import Device, cuda_words, open_device
from affect_runtimes.errors import BundleError, DeviceError
from affect_runtimes.manifest import Graph
from affect_runtimes.tensorrt.engine import TensorRTEngine
from affect_runtimes.tensorrt.library import RTX, Library, build_engine, find_library, wants_cuda

__all__ = ["TensorRTEngine", "create"]

_log = logging.getLogger(__name__)
_ROOM = 4
"""How many times as large as its graph an engine may become; measured ones are 1 to 5 times, most of it code."""
_LEAST_ROOM = 32 << 20


def create(bundle: Bundle, graph: Graph, threads: int) -> TensorRTEngine:
    """Opens a graph; see `affect_runtimes.base.open_engine`.

    Raises:
        MissingDependencyError: the driver's bindings or TensorRT are not installed.
        DeviceError: no driver, one that is too old, or a cache that cannot be used.
        BundleError: TensorRT cannot build the graph, or load the engine that it built.
    """
    if graph.data is not None:
        raise BundleError(f"{graph.file}: a graph for TensorRT holds its own weights; the manifest names others")
    device = open_device()
    with device.lock:
        device.use()
        library = find_library()
    _check_driver(device, library)
    most = bundle.manifest.max_batch
    identity = {
        "engine": str(library),
        "gpu": f"{device.name} ({device.capability})",
        "driver": " ".join([cuda_words(device.driver), *device.release.split()]),
        "machine": machine(),
    }
    for plan in graph.plans:
        if library.name == RTX and (plan.version, plan.gpu) == (library.version, device.capability):
            words = f"{library}, the engine that the bundle carries for {device.name}"
            _log.info("%s: %s", graph.role, words)
            data = bundle.read(plan.file)
            return TensorRTEngine(graph, data, device, library, most, _of(identity, graph, data), words)
    return _built(bundle, graph, device, library, most, identity)


def _built(
    bundle: Bundle, graph: Graph, device: Device, library: Library, most: int, identity: Mapping[str, str]
) -> TensorRTEngine:
    cache, data = EngineCache(say=announce), bundle.read(graph.file)
    key = {**identity, "graph": graph.sha256, "weights": bundle.manifest.weights_sha256, "most": str(most)}

    def make() -> bytes:
        announce(f"{graph.role}: {library} builds the engine for {device.name}; this takes up to minutes, once")
        with device.building():
            return build_engine(library, graph, data, most, say=announce)

    def use(plan: bytes, entry: Path) -> TensorRTEngine:
        words = f"{library} on {device.name}, its engine kept in {entry}"
        return TensorRTEngine(graph, plan, device, library, most, _of(identity, graph, plan), words)

    room = max(_ROOM * len(data), _LEAST_ROOM)
    engine = cache.load(key, make, room, use, BundleError, f"{graph.role}: the kept engine")
    _log.info("%s: %s", graph.role, engine.words)
    return engine


def _of(identity: Mapping[str, str], graph: Graph, plan: bytes) -> dict[str, str]:
    """What a verdict is about: this very engine. One that is built again may have other kernels."""
    return {**identity, f"{graph.role} engine": hashlib.sha256(plan).hexdigest()}


def _check_driver(device: Device, library: Library) -> None:
    wanted = wants_cuda(library)
    if wanted is not None and device.driver // 1000 < wanted:
        raise DeviceError(
            f"{library} was built for CUDA {wanted}, and the driver supports {cuda_words(device.driver)}: update the "
            f"driver, or install a {library.name} for CUDA {device.driver // 1000}"
        )
