"""Shared fixtures: a tiny student with random weights, and bundles exported from it once a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint, load_model, save_model
from affect_export.parity_data import carphone_crops
from affect_export.targets import TARGETS
from affect_runtimes.bundle import Bundle
from affect_runtimes.model import BundleModel

# Of models this small a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random weights, saved and loaded again."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(
        load_model("student", preset="tiny", random_weights=True, seed=1).model, path, version="0.0.1", trained=False
    )
    return load_model("student", path)


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny student; tests that change it use `bundle_folder`."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export_model(checkpoint, TARGETS["onnx"], folder)
    return folder


@pytest.fixture(scope="session")
def model(exported: Path) -> BundleModel:
    return BundleModel(Bundle.open(exported))


@pytest.fixture
def bundle_folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def crops() -> NDArray[np.uint8]:
    """The carphone crops at their own size, (120, 112, 112, 3) uint8."""
    return carphone_crops()
