"""The shipped student side by side: ONNX Runtime bundle against PyTorch eager, one thread each, and import times.

    python benchmarks/student.py [--repeats 300]

Both run in this one process on the same frames, taking turns, so that a slow moment of the machine hits both. Times
are milliseconds; the ratio is what carries over to another machine.
"""

import argparse
import subprocess
import sys

import numpy as np
import torch
from timing import machine, taking_turns

from affect_edge import Recognizer
from affect_export.models.checkpoint import SHIPPED, load_model
from affect_export.parity_data import carphone_crops
from affect_runtimes.model import BundleModel


def import_ms(statement: str, repeats: int = 5) -> float:
    """Median time of an import statement in fresh processes, less nothing: numpy included."""
    code = f"import time; s = time.perf_counter(); {statement}; print(time.perf_counter() - s)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(repeats)
    ]
    return float(np.median([float(r.stdout) for r in runs])) * 1e3


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    bundle, student = BundleModel(Recognizer().bundle), load_model("student", SHIPPED).model
    print(machine(repeats))
    frames = {"frame": bundle.normalise(carphone_crops()[:1])}
    features, tensors = bundle.encode(frames), {"frame": torch.from_numpy(frames["frame"])}
    state, torch_state = bundle.initial_state(), student.initial_state(1)
    dt, torch_features = torch.ones(1), {"features": torch.from_numpy(features["features"])}
    with torch.no_grad():
        times = taking_turns(
            {
                "encode, bundle": lambda: bundle.encode(frames),
                "encode, PyTorch": lambda: student.encode(tensors),
                "step, bundle": lambda: bundle.step_features(features, state),
                "step, PyTorch": lambda: student.step_features(torch_features, torch_state, dt),
            },
            repeats,
        )
    print(f"{'':18}{'median ms':>10}{'p99 ms':>10}{'PyTorch / bundle':>18}")
    for name, values in times.items():
        stage = name.split(",")[0]
        ratio = np.median(times[f"{stage}, PyTorch"]) / np.median(times[f"{stage}, bundle"])
        shown = f"{ratio:18.1f}" if name.endswith("bundle") else ""
        print(f"{name:18}{np.median(values):10.3f}{np.percentile(values, 99):10.3f}{shown}")
    opened = bundle.bundle
    print(f"bundle {opened.size_bytes / 1e6:.2f} MB, of which graphs {opened.graph_bytes / 1e6:.2f} MB")
    print(
        f"import affect_edge {import_ms('import affect_edge'):.0f} ms, import numpy {import_ms('import numpy'):.0f} ms"
    )


if __name__ == "__main__":
    main()
