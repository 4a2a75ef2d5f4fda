"""One recurrent step against running the sequence form over its whole window each frame; one thread.

    python benchmarks/systems.py [--repeats 15] [--steps 100000]

The window is what the papers' code would run live: 300 frames for Mamba-VA, 256 for AG-SSM, 16 for Mamba-FER. Only the
recurrent halves are timed, from features that an encoder would have left, at full size with random weights: the
sequence form in PyTorch, the step in PyTorch and the exported step in ONNX Runtime, in this one process, taking turns.
Then each model's state, and the peak memory (Linux) of a fresh process
that steps the tiny preset's bundle over and over.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from timing import machine, taking_turns

from affect_export import graphs
from affect_export.export import export_model
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import load_model
from affect_export.targets import TARGETS
from affect_export.targets.onnx import write_onnx

WINDOWS = {"mamba-va": 300, "ag-ssm": 256, "mamba-fer": 16}
# Full size but for the encoders, which are not timed: one layer each saves gigabytes.
SHALLOW = {"mamba-va": {"encoder_layers": 1}, "ag-ssm": {"vit_layers": 1, "wavlm_layers": 1}, "mamba-fer": {}}

MEMORY = """
import sys
from pathlib import Path
import numpy as np
from affect_runtimes.model import BundleModel

def peak_mib():
    # Not getrusage: its peak begins with that of the process that forked this one.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

model, steps = BundleModel(sys.argv[1]), int(sys.argv[2])
wanted, rng = model.bundle.manifest.graph("encoder").outputs, np.random.default_rng(0)
given = {t.name: rng.standard_normal(t.sized(1)).astype(np.float32) for t in wanted}
state, said = model.initial_state(), []
for step in range(1, steps + 1):
    _, state = model.step_features(given, state)
    if step in (steps // 100, steps // 10, steps):
        said.append(f"after {step:,}: {peak_mib():.1f}")
print("; ".join(said))
"""


def features(model: AffectModel, steps: int) -> dict[str, torch.Tensor]:
    """Random features of one stream."""
    g = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(1, steps, *map(int, t.shape[1:]), generator=g) for t in model.features()}


def exported_step(model: AffectModel) -> onnxruntime.InferenceSession:
    """The step graph in ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        write_onnx(graphs.graph_sources(model)[1], path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def speed(name: str, window: int, repeats: int) -> None:
    """Prints one line of the first table."""
    model = graphs.folded(load_model(name, random_weights=True, changes=SHALLOW[name]).model)
    whole, session = features(model, window), exported_step(model)
    moment = {k: v[:, -1] for k, v in whole.items()}
    state = {s.name: torch.zeros(s.sized(1)) for s in model.states()}
    arrays = {k: v.numpy() for k, v in {**moment, **state, "dt": torch.ones(1)}.items()}
    feed = {i.name: arrays[i.name] for i in session.get_inputs()}
    with torch.inference_mode():
        times = taking_turns(
            {
                "window": lambda: model.forward_features(whole),
                "step": lambda: model.step_features(moment, state),
                "exported": lambda: session.run(None, feed),
            },
            repeats,
        )
    figures = "".join(f"{np.median(t):11.3f}{np.percentile(t, 99):10.3f}" for t in times.values())
    median = {k: np.median(t) for k, t in times.items()}
    ratios = f"{median['window'] / median['step']:9.0f}{median['window'] / median['exported']:10.0f}"
    print(f"{name:10}{window:7}{figures}{ratios}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100_000, help="of the memory run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(options.repeats))
    print(f"{'':17}{'window, PyTorch ms':>21}{'step, PyTorch ms':>21}{'step, exported ms':>21}{'window / step':>19}")
    print(f"{'':10}{'frames':>7}" + f"{'median':>11}{'p99':>10}" * 3 + f"{'PyTorch':>9}{'exported':>10}")
    for name, window in WINDOWS.items():
        speed(name, window, options.repeats)
    print("\nstate of one stream in bytes; peak memory in MiB of a process that steps the tiny preset's bundle")
    for name in WINDOWS:
        full = load_model(name, random_weights=True, changes=SHALLOW[name]).model
        size = sum(4 * int(np.prod(s.sized(1))) for s in full.all_states())
        with tempfile.TemporaryDirectory() as folder:
            target, bundle = TARGETS["onnx"], Path(folder) / "bundle"
            checkpoint = load_model(name, preset="tiny", random_weights=True)
            export_model(checkpoint, target, bundle, parity_steps=3)
            command = [sys.executable, "-c", MEMORY, str(bundle), str(options.steps)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"{name:10} {size:>9,}   {said}", flush=True)


if __name__ == "__main__":
    main()
