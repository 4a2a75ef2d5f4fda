"""MS-VSSM's 2-D selective scan side by side: the exported ONNX Scan in ONNX Runtime against PyTorch eager.

    python benchmarks/scan_export.py [--repeats 20] [--full]

One line for the layer of each stage at full size (Linear, depthwise convolution, four scans with squeeze-and-excite,
Linear), one for the recurrence in it alone (`scan.selective_scan` from ready inputs), and with --full one for the whole
network on a 224 picture, which takes half a minute to export. Weights are random; one thread; both sides run in this
one process on the same input, taking turns, so that a slow moment of the machine hits both. The ratio is what carries
over to another machine.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from timing import machine, taking_turns
from torch import Tensor, nn

from affect_export.models import scan
from affect_export.models.ms_vssm import MSVSSM, MSVSSMConfig
from affect_export.models.ss2d import PATHS, SS2D, SS2DConfig
from affect_export.targets.base import GraphSource
from affect_export.targets.onnx import write_onnx
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


def exported(module: nn.Module, samples: dict[str, Tensor], output: tuple[int, ...]) -> Any:
    """An ONNX Runtime session of the module on one thread."""
    inputs = tuple(Described(name, ("batch", *v.shape[1:]), "float32") for name, v in samples.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        write_onnx(GraphSource("encoder", module, inputs, (Described("y", ("batch", *output), "float32"),), ()), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(name: str, module: nn.Module, samples: dict[str, Tensor], size: str, repeats: int) -> None:
    """Prints one line."""
    module.eval()
    with torch.no_grad():
        expected = module(*samples.values())
        session = exported(module, samples, tuple(expected.shape[1:]))
        feed = {k: v.numpy() for k, v in samples.items()}
        error = float(np.abs(session.run(None, feed)[0] - expected.numpy()).max() / expected.abs().max())
        times = taking_turns(
            {"onnx": lambda: session.run(None, feed), "torch": lambda: module(*samples.values())}, repeats
        )
    figures = "".join(f"{np.median(t):10.2f}{np.percentile(t, 99):10.2f}" for t in times.values())
    ratio = np.median(times["torch"]) / np.median(times["onnx"])
    print(f"{name:22}{size:>14}{figures}{ratio:8.1f}{error:10.0e}", flush=True)


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
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, one picture")
    print(f"{'':36}{'ONNX Runtime ms':>20}{'PyTorch ms':>20}{'PyTorch':>8}")
    print(f"{'':22}{'positions x D':>14}{'median':>10}{'p99':>10}{'median':>10}{'p99':>10}{'/ ONNX':>8}{'|Δ|/|y|':>10}")
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


if __name__ == "__main__":
    main()
