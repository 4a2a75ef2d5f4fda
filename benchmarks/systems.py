"""One recurrent step against running the sequence form over its whole window each frame, PyTorch, one thread.

    python benchmarks/systems.py [--repeats 15] [--steps 100000]

The second is what the papers' code would do live: 300 frames for Mamba-VA, 256 for AG-SSM, 16 for Mamba-FER, whose
encoders would have cached their features. Both run in this one process on the same random features and full-size
random weights, taking turns; the encoders are not in it. Then the state that a stream carries, and the process's peak
memory over many steps of each model's exported recurrent graph in its tiny preset.
"""

import argparse
import platform
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch
from student import cpu_name, taking_turns

from affect_export.export import export_model
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import load_model
from affect_export.targets import TARGETS
from affect_runtimes.model import BundleModel

WINDOWS = {"mamba-va": 300, "ag-ssm": 256, "mamba-fer": 16}


# Full size but for the encoders, which are not timed: one layer each saves gigabytes.
SHALLOW = {"mamba-va": {"encoder_layers": 1}, "ag-ssm": {"vit_layers": 1, "wavlm_layers": 1}, "mamba-fer": {}}


def features(model: AffectModel, steps: int) -> dict[str, torch.Tensor]:
    """Random features of one stream."""
    g = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(1, steps, *map(int, t.shape[1:]), generator=g) for t in model.features()}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100_000, help="of the memory run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats = arguments.repeats
    print(f"{cpu_name()}, {platform.system()}, Python {platform.python_version()}, 1 thread, {repeats} repeats")
    print(
        f"{'':12}{'window':>8}{'step ms':>10}{'p99':>8}{'window ms':>12}{'p99':>10}{'window / step':>15}"
        f"{'state KiB':>11}"
    )
    for name, window in WINDOWS.items():
        model = load_model(name, random_weights=True, changes=SHALLOW[name]).model
        whole = features(model, window)
        moment = {k: v[:, -1] for k, v in whole.items()}
        state = {s.name: torch.zeros(s.sized(1)) for s in model.states()}
        with torch.inference_mode():
            times = taking_turns(
                {
                    "step": lambda m=model, x=moment, s=state: m.step_features(x, s),
                    "window": lambda m=model, x=whole: m.forward_features(x),
                },
                repeats,
            )
        step, over = times["step"], times["window"]
        kib = sum(4 * np.prod(s.sized(1)) for s in model.all_states()) / 1024
        print(
            f"{name:12}{window:8}{np.median(step):10.2f}{np.percentile(step, 99):8.2f}{np.median(over):12.1f}"
            f"{np.percentile(over, 99):10.1f}{np.median(over) / np.median(step):15.0f}{kib:11.1f}"
        )
        del model
    print(f"\npeak memory of the process, MiB, while the tiny preset's exported step runs {arguments.steps:,} times")
    for name in WINDOWS:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS["cpu"]
            checkpoint = load_model(name, preset="tiny", random_weights=True)
            export_model(checkpoint, target, Path(folder) / "b", bounds=target.bounds, parity_steps=3)
            bundle = BundleModel(Path(folder) / "b")
        rng, wanted = np.random.default_rng(0), bundle.bundle.manifest.graph("encoder").outputs
        given = {t.name: rng.standard_normal(t.sized(1)).astype(np.float32) for t in wanted}
        state, peaks = bundle.initial_state(), []
        for step in range(arguments.steps):
            _, state = bundle.step_features(given, state)
            if step + 1 in (arguments.steps // 100, arguments.steps // 10, arguments.steps):
                peaks.append(f"after {step + 1:,}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f}")
        print(f"{name:12}{'; '.join(peaks)}")


if __name__ == "__main__":
    main()
