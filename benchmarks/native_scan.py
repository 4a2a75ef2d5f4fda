"""The selective scan over a whole sequence: native library, exported ONNX Scan in ONNX Runtime, PyTorch; one thread.

    python benchmarks/native_scan.py [--repeats 30] [--length 3136] [--channels 192]

From ready inputs (x, delta, B, C, random), at N = 1 and N = 16. The three run in this one process, taking turns.
PyTorch is the reference of this package, `affect_export.models.scan.selective_scan`, without gradients. What the
exponentials alone would take at the library's own rate is the floor.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from timing import machine, taking_turns
from torch import Tensor, nn

from affect_export.models import scan
from affect_export.targets.base import GraphSource
from affect_export.targets.onnx import write_onnx
from affect_runtimes import native
from affect_runtimes.interface import Tensor as Described


class Recurrence(nn.Module):
    """x and delta (B, L, D), b and c (B, L, N) -> y (B, L, D)."""

    def __init__(self, a: Tensor, skip: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("skip", skip)

    def forward(self, *tensors: Tensor) -> Tensor:
        x, delta, b, c = tensors
        a = self.get_buffer("a")
        state = x.new_zeros(x.shape[0], x.shape[2], a.shape[1])
        y, _ = scan.selective_scan(x, delta, a, b, c, self.get_buffer("skip"), state)
        return y


def compare(states: int, length: int, channels: int, repeats: int) -> None:
    """Prints one line."""
    generator = torch.Generator().manual_seed(0)
    a = -(torch.rand(channels, states, generator=generator) + 0.5)
    skip = torch.randn(channels, generator=generator)
    samples = {
        "x": torch.randn(1, length, channels, generator=generator),
        "delta": torch.rand(1, length, channels, generator=generator),
        "b": torch.randn(1, length, states, generator=generator),
        "c": torch.randn(1, length, states, generator=generator),
    }
    module = Recurrence(a, skip).eval()
    takes = tuple(Described(name, ("batch", *v.shape[1:]), "float32") for name, v in samples.items())
    gives = (Described("y", ("batch", length, channels), "float32"),)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        write_onnx(GraphSource("encoder", module, takes, gives, ()), path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {k: v.numpy() for k, v in samples.items()}
    arguments = (feed["x"], feed["delta"], a.numpy(), feed["b"], feed["c"], skip.numpy())
    with torch.inference_mode():
        expected = module(*samples.values()).numpy()
        off = np.abs(native.selective_scan(*arguments)[0] - expected).max() / np.abs(expected).max()
        times = taking_turns(
            {
                "native": lambda: native.selective_scan(*arguments),
                "onnx": lambda: session.run(None, feed),
                "torch": lambda: module(*samples.values()),
            },
            repeats,
        )
    figures = "".join(f"{np.median(t):10.2f}{np.percentile(t, 99):10.2f}" for t in times.values())
    median = {k: float(np.median(t)) for k, t in times.items()}
    ratios = f"{median['onnx'] / median['native']:10.1f}{median['torch'] / median['native']:10.1f}"
    rate = length * channels * states / median["native"] / 1e6
    print(f"{states:4}{figures}{ratios}{rate:10.2f}{off:10.0e}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--length", type=int, default=3136)
    parser.add_argument("--channels", type=int, default=192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(options.repeats))
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, native {native.version()} "
        f"({native.instruction_set()}); L {options.length}, D {options.channels}, one sequence"
    )
    print(f"{'':4}{'native ms':>20}{'ONNX Runtime ms':>20}{'PyTorch ms':>20}{'native is faster':>20}{'1e9 exp':>10}")
    head = "".join(f"{'median':>10}{'p99':>10}" for _ in range(3))
    print(f"{'N':>4}{head}{'x ONNX':>10}{'x PyTorch':>10}{'a second':>10}{'|Δ|/|y|':>10}")
    for states in (1, 16):
        compare(states, options.length, options.channels, options.repeats)


if __name__ == "__main__":
    main()
