"""The five systems at full size with random weights, exported and held to the gate; `make test-full-size` runs them.

Each takes minutes and up to sixteen gigabytes of memory, so each runs in a process of its own.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from affect_export import cli
from affect_export.models import MODELS
from affect_export.targets.onnx import EXTERNAL_ABOVE
from affect_runtimes.bundle import Bundle
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import replay

SYSTEMS = tuple(name for name in MODELS if name != "student")
TOLERANCE = 1e-4


@pytest.mark.full_size
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_full_size_export_is_the_float_model(name: str) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    # Not tmp_path: pytest would keep gigabytes for later.
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / name
        assert cli.main(["--model", name, "--random-weights", "--target", "onnx", "--output", str(output)]) == 0
        bundle = Bundle.open(output)
        assert not bundle.manifest.trained
        assert "RANDOM" in bundle.read("MODEL_CARD.md").decode()
        report = json.loads(bundle.read("parity.json"))
        assert report["steps"] >= 3
        worst = [f for figures in report["comparisons"].values() for f in figures if f["metric"] == "max_abs"]
        assert worst and all(f["value"] <= TOLERANCE for f in worst)
        for graph in bundle.manifest.graphs:
            assert len(bundle.read(graph.file)) <= EXTERNAL_ABOVE + 2**20
            assert graph.data is None or len(bundle.read(graph.data)) > EXTERNAL_ABOVE
        assert replay(BundleModel(bundle))
