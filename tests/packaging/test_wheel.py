"""The wheel: what it holds, that it is built without a compiler too, and that it alone gives a working recognizer."""

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

PACKAGES = {
    "affect_demos": ROOT / "demos",
    "affect_edge": ROOT / "sdk",
    "affect_export": ROOT / "export",
    "affect_quantize": ROOT / "quantize",
    "affect_runtimes": ROOT / "runtimes",
}

NATIVE_LIBRARY = re.compile(r"affect_runtimes/(lib)?affect_edge\.(so|dylib|dll)")
BUILT = re.compile(r"affect_runtimes/((lib)?affect_(edge|cuda_host)\.(so|dylib|dll)|fused/cuda/.+)")
"""What CMake adds: libraries, and the kernels for NVIDIA's GPUs."""
KERNELS = {f"affect_runtimes/fused/cuda/{name}" for name in ("numbers.h", "scan.cu", "step.cu", "step.h")}

WORKSTATION_ONLY = (
    "torch",
    "onnx",
    "onnxscript",
    "tensorflow",
    "transformers",
    "safetensors",
    "nncf",
    "rich",
    "matplotlib",
)


@dataclass(frozen=True)
class Built:
    """A wheel and what its build printed."""

    path: Path
    log: str

    @property
    def names(self) -> set[str]:
        with zipfile.ZipFile(self.path) as wheel:
            return set(wheel.namelist())

    @property
    def metadata(self) -> str:
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()


def build_wheel(folder: Path, **environment: str) -> Built:
    """Builds the tree's wheel as pip does, with the build tools of this environment: no network is needed.

    Variables that steer a build are taken out of the environment, so that only `environment` does.
    """
    inherited = {
        key: value for key, value in os.environ.items() if key not in {"AFFECT_PURE_PYTHON", "CXX", "CMAKE_ARGS"}
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            folder,
            ROOT,
        ],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob("*.whl")
    return Built(path, done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel as this machine builds it: pure where the tests are told that it has no compiler."""
    environment = {key: os.environ[key] for key in ("AFFECT_PURE_PYTHON", "CXX") if key in os.environ}
    return build_wheel(tmp_path_factory.mktemp("wheel"), **environment)


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("pure")
    return build_wheel(folder, CXX=str(folder / "no-such-compiler"))


def package_files() -> set[str]:
    """The files of the five packages in the tree, as they are named inside a wheel.

    A library that was built by hand may lie there, too, or a link to it; no wheel takes it along.
    """
    found = {
        file.relative_to(source).as_posix()
        for package, source in PACKAGES.items()
        for file in (source / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    return {name for name in found if not BUILT.fullmatch(name)}


def test_the_wheel_holds_the_five_packages_with_their_data(wheel: Built) -> None:
    inside = {name for name in wheel.names if ".dist-info/" not in name and not BUILT.fullmatch(name)}
    assert inside == package_files()
    for package in PACKAGES:
        assert f"{package}/__init__.py" in inside
        assert f"{package}/py.typed" in inside


def test_the_wheel_carries_a_bundle(wheel: Built) -> None:
    assert any(re.fullmatch(r"affect_edge/bundles/[^/]+/manifest\.json", name) for name in wheel.names)


def test_the_wheel_carries_the_licence(wheel: Built) -> None:
    licences = {name.partition(".dist-info/licenses/")[2] for name in wheel.names}
    assert {"LICENSE", "NOTICE"} <= licences
    assert Parser().parsestr(wheel.metadata)["License-Expression"] == "Apache-2.0"


@pytest.mark.skipif(os.environ.get("AFFECT_PURE_PYTHON") == "1", reason="AFFECT_PURE_PYTHON=1: no compiler here")
def test_the_wheel_has_the_native_library_and_fits_every_python_3(wheel: Built) -> None:
    assert any(NATIVE_LIBRARY.fullmatch(name) for name in wheel.names), wheel.log
    assert wheel.names >= KERNELS
    python, abi, platform = wheel.path.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_without_a_compiler_the_wheel_is_pure_and_says_so(wheel_without_compiler: Built) -> None:
    assert wheel_without_compiler.path.name.endswith("-py3-none-any.whl")
    assert not any(NATIVE_LIBRARY.fullmatch(name) for name in wheel_without_compiler.names)
    assert "no working C++20 compiler was found" in wheel_without_compiler.log
    assert {name for name in wheel_without_compiler.names if ".dist-info/" not in name} == package_files()


def base_requirements(metadata: str) -> Iterator[str]:
    """The names of the distributions that a plain `pip install` of the wheel brings, with all that they bring."""
    pending = [Requirement(line) for line in Parser().parsestr(metadata).get_all("Requires-Dist", [])]
    seen: set[str] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        yield name
        pending += [Requirement(line) for line in importlib.metadata.requires(name) or ()]


@pytest.fixture(scope="module")
def device(wheel: Built, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders that are all a device has: the unpacked wheel, and its base dependencies (links to those here)."""
    installed, dependencies = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("dependencies")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", installed, wheel.path],
        check=True,
    )
    for name in base_requirements(wheel.metadata):
        distribution = importlib.metadata.distribution(name)
        # Files outside site-packages (scripts) begin with "..": a device's Python does not see them either.
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            link = dependencies / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return [installed, dependencies]


def run_on_device(device: list[Path], code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python that sees the standard library and the device's folders only."""
    prelude = f"import sys; sys.path += {[str(folder) for folder in device]!r}\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + code], capture_output=True, text=True, check=False, cwd=device[0]
    )


@pytest.mark.parametrize("library", WORKSTATION_ONLY)
def test_the_device_has_no_library_of_the_workstation(device: list[Path], library: str) -> None:
    done = run_on_device(device, f"import {library}")
    assert f"No module named '{library}'" in done.stderr


def test_the_wheel_alone_gives_a_working_recognizer(device: list[Path]) -> None:
    code = """
import numpy as np
from affect_edge import Recognizer
recognizer = Recognizer()
state = recognizer.initial_state()
crop = np.full((recognizer.crop_px, recognizer.crop_px, 3), 128, np.uint8)
for _ in range(3):
    affect, state = recognizer.step(crop, state, dt=1.0)
assert -1 <= affect.valence <= 1, affect
print(affect.expression)
"""
    done = run_on_device(device, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_wheel_has_the_version_that_the_sdk_states(device: list[Path], wheel: Built) -> None:
    done = run_on_device(device, "import affect_edge; print(affect_edge.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == Parser().parsestr(wheel.metadata)["Version"]


def test_the_wheel_alone_finds_its_native_library(device: list[Path], wheel: Built) -> None:
    done = run_on_device(device, "from affect_runtimes import native; print(native.is_available())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(any(NATIVE_LIBRARY.fullmatch(name) for name in wheel.names))


def test_the_wheel_has_one_plain_library(wheel: Built) -> None:
    """No links by which versions lie side by side, no header and no static library: a wheel cannot hold the first."""
    found = [name for name in wheel.names if re.search(r"affect_edge\.(so|dylib|dll|a|h|pc)", name)]
    assert all(NATIVE_LIBRARY.fullmatch(name) for name in found) and len(found) <= 1


def test_the_wheel_alone_looks_for_faces(device: list[Path]) -> None:
    """The face detector's bundles are in the wheel, and they run on what a device has."""
    code = """
import numpy as np
from affect_edge import AffectFaceDetector
print(AffectFaceDetector().detect(np.zeros((99, 99, 3), np.uint8)))
"""
    done = run_on_device(device, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
