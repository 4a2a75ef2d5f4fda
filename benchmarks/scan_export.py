"""MS-VSSM's 2-D selective scan side by side: native library, exported ONNX Scan in ONNX Runtime, PyTorch eager.

    python benchmarks/scan_export.py [--repeats 20] [--full]

One line for the layer of each stage at full size (Linear, depthwise convolution, four scans with squeeze-and-excite,
Linear), one for the recurrence in it alone (`scan.selective_scan` from ready inputs), and with --full one for the
whole network on a 224 picture, which takes half a minute to export. Weights are random; one thread; all run in this
one process on the same input, taking turns, so that a slow moment of the machine hits all. The ratio is what carries
over to another machine. With --full, also how much of ONNX Runtime's time is neither Scan nor what only prepares its
inputs: no way of cutting the graph at its scans and running these elsewhere could be faster than that.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from timing import machine, taking_turns
from torch import Tensor, nn

from affect_export.models import scan
from affect_export.models.ms_vssm import MSVSSM, MSVSSMConfig
from affect_export.models.ss2d import PATHS, SS2D, SS2DConfig
from affect_export.native import lower, to_bytes
from affect_export.targets.base import GraphSource, WrittenGraph
from affect_export.targets.onnx import write_onnx
from affect_runtimes import native
from affect_runtimes.interface import Tensor as Described


class Layer(nn.Module):
    """SS2D of a picture (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = SS2D(SS2DConfig(channels))
        self.op.randomise_(torch.Generator().manual_seed(0))

    def forward(self, *tensors: Tensor) -> Tensor:
        y: Tensor = self.op(tensors[0])
        return y


class Recurrence(nn.Module):
    """What of a layer is `scan.selective_scan`: x and delta (B, T, 4 D), b and c (B, T, 4, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("a", -torch.rand(channels, 1) - 0.5)
        self.register_buffer("skip", torch.randn(channels))

    def forward(self, *tensors: Tensor) -> Tensor:
        x, delta, b, c = tensors
        state = x.new_zeros(x.shape[0], x.shape[2], 1)
        y, _ = scan.selective_scan(x, delta, self.get_buffer("a"), b, c, self.get_buffer("skip"), state)
        return y


class Network(nn.Module):
    """The encoder of MS-VSSM at full size: (B, 3, 224, 224) -> (B, 768)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MSVSSM()
        self.model.randomise_(0)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model.encode({"frame": tensors[0]})["features"]


def exported(module: nn.Module, samples: dict[str, Tensor], output: tuple[int, ...]) -> tuple[Any, Any]:
    """The module in ONNX Runtime and in the native library, on one thread."""
    inputs = tuple(Described(name, ("batch", *v.shape[1:]), "float32") for name, v in samples.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        source = GraphSource("encoder", module, inputs, (Described("y", ("batch", *output), "float32"),), ())
        write_onnx(source, path)
        graph = WrittenGraph(source, "graph.onnx", {}).described
        program = to_bytes({"encoder": lower(onnx.load(path), graph)})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session, native.NativeEngine(graph, program, None, 1)


def compare(name: str, module: nn.Module, samples: dict[str, Tensor], size: str, repeats: int) -> None:
    """Prints one line."""
    module.eval()
    with torch.no_grad():
        expected = module(*samples.values())
        session, engine = exported(module, samples, tuple(expected.shape[1:]))
        feed = {k: v.numpy() for k, v in samples.items()}
        error = float(np.abs(engine.run(feed)["y"] - expected.numpy()).max() / expected.abs().max())
        times = taking_turns(
            {
                "native": lambda: engine.run(feed),
                "onnx": lambda: session.run(None, feed),
                "torch": lambda: module(*samples.values()),
            },
            repeats,
        )
    figures = "".join(f"{np.median(t):10.2f}{np.percentile(t, 99):10.2f}" for t in times.values())
    median = {k: float(np.median(t)) for k, t in times.items()}
    ratios = f"{median['onnx'] / median['native']:10.1f}{median['torch'] / median['native']:10.1f}"
    print(f"{name:22}{size:>14}{figures}{ratios}{error:10.0e}", flush=True)


def without_scans_ms(module: nn.Module, samples: dict[str, Tensor], repeats: int) -> float:
    """What ONNX Runtime spends outside of its Scans and of what feeds nothing else: softplus, products with A and x."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        inputs = tuple(Described(name, ("batch", *v.shape[1:]), "float32") for name, v in samples.items())
        output = ("batch", *module(*samples.values()).shape[1:])
        path = Path(folder) / "graph.onnx"
        write_onnx(GraphSource("encoder", module, inputs, (Described("y", output, "float32"),), ()), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(repeats):
            session.run(None, {k: v.numpy() for k, v in samples.items()})
        events = json.loads(Path(session.end_profiling()).read_text())
    # In the scans' bodies are Mul, Add and ReduceSum, which nothing else of the network has much of.
    scanning = {"Scan", "Softplus", "Where", "Greater", "Exp", "Mul", "Add", "ReduceSum"}
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return sum(e["dur"] for e in nodes if e["args"]["op_name"] not in scanning) / repeats / 1e3


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--full", action="store_true", help="also the whole network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MSVSSMConfig()
    print(machine(options.repeats))
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, native {native.version()} "
        f"({native.instruction_set()}), one picture"
    )
    print(f"{'':36}{'native ms':>20}{'ONNX Runtime ms':>20}{'PyTorch ms':>20}{'native is faster':>20}")
    head = f"{'median':>10}{'p99':>10}" * 3
    print(f"{'':22}{'positions x D':>14}{head}{'x ONNX':>10}{'x PyTorch':>10}{'|Δ|/|y|':>10}")
    for i, width in enumerate(config.widths):
        side, channels = config.image_px // (4 * 2**i), PATHS * int(config.ssm_ratio * width)
        size = f"{side * side} x {channels}"
        compare(f"stage {i + 1}, layer", Layer(width), {"x": torch.randn(1, side, side, width)}, size, options.repeats)
        samples = {
            "x": torch.randn(1, side * side, channels),
            "delta": torch.rand(1, side * side, channels),
            "b": torch.randn(1, side * side, PATHS, config.d_state),
            "c": torch.randn(1, side * side, PATHS, config.d_state),
        }
        compare(f"stage {i + 1}, recurrence", Recurrence(channels), samples, size, options.repeats)
    if options.full:
        frame = {"frame": torch.randn(1, 3, config.image_px, config.image_px)}
        compare("whole network", Network(), frame, f"{config.image_px} px", options.repeats)
        rest = without_scans_ms(Network().eval(), frame, options.repeats)
        print(f"ONNX Runtime outside of the scans and of what is made for them, in its own profile: {rest:.0f} ms")


if __name__ == "__main__":
    main()
