"""Training, quantization and parity for any module: it is handed models and data, and imports none."""

import sys

if sys.version_info < (3, 11):
    raise ImportError(
        f"exports and training need Python 3.11 or later; this is {sys.version.split()[0]}, which runs bundles"
    )
