"""The workstation's side: float models, targets, recipes and the commands that make bundles."""

import sys

if sys.version_info < (3, 11):
    raise ImportError(
        f"exports and training need Python 3.11 or later; this is {sys.version.split()[0]}, which runs bundles"
    )
