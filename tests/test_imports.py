"""The import rule: who imports whom, and what a device never has to load."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

NOT_AT_IMPORT = {
    "torch",
    "onnx",
    "onnxscript",
    "tensorflow",
    "safetensors",
    "onnxruntime",
    "ai_edge_litert",
    "cv2",
    "matplotlib",
    "rich",
    "aiohttp",
    "cryptography",
    "sounddevice",
    "soxr",
}
"""Libraries that `import affect_edge` must leave alone: the first five for good, the others until first use."""

IMPORT_AND_REPORT = """
import json, sys, time
started = time.perf_counter()
import affect_edge
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_importing_the_sdk_loads_numpy_and_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_AND_REPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"import affect_edge: {report['seconds'] * 1000:.0f} ms")
    assert {"affect_edge", "affect_runtimes", "numpy"} <= set(report["loaded"])
    assert not NOT_AT_IMPORT & set(report["loaded"])


def test_importing_the_native_engine_loads_no_library_at_all() -> None:
    """Neither a heavy one nor its own, which is loaded when it is asked for."""
    code = (
        "import json, sys, affect_runtimes.native as native\n"
        "loaded = native.library.library.cache_info().currsize\n"
        "print(json.dumps([loaded, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    libraries, modules = json.loads(done.stdout)
    assert libraries == 0
    assert not NOT_AT_IMPORT & set(modules)


def test_the_rooms_import_only_what_they_may() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
