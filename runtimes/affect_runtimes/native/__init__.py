"""The native step library: the engine of native bundles, and of the recurrent part of others where it is installed.

engine   runs a graph
library  finds and loads the library, with ctypes: no compiler and no Python headers are needed on the device
scan     the selective scan alone

The library is one file that CMake installs inside this package. An install without a C++ compiler has no such file:
everything that runs on ONNX Runtime works all the same, and `unavailable_reason` says what is missing.
"""

from affect_runtimes.native.engine import NativeEngine, create
from affect_runtimes.native.library import instruction_set, is_available, unavailable_reason, version
from affect_runtimes.native.scan import selective_scan, selective_scan_step

__all__ = [
    "NativeEngine",
    "create",
    "instruction_set",
    "is_available",
    "selective_scan",
    "selective_scan_step",
    "unavailable_reason",
    "version",
]
