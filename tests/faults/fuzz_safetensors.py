"""Coverage-guided fuzzing of checkpoints, with atheris: `pip install atheris`, then

    PYTHONPATH=tests/support python tests/faults/fuzz_safetensors.py -max_total_time=60 [CORPUS]

Whatever the bytes are, nothing but an AffectError may come out; anything else ends the run and is kept as crash-*.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris
from instrumented import follow

from affect_export.models.checkpoint import load_model
from affect_runtimes.errors import AffectError

FOLDER = tempfile.TemporaryDirectory()
PATH = Path(FOLDER.name) / "weights.safetensors"
OURS = {"model": "student", "version": "1", "licence": "x", "trained": "true"}


def one(data: bytes) -> None:
    """The first byte says whether the others are the file, its header, or the configuration in it."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    if kind == 1:
        rest = struct.pack("<Q", len(rest)) + rest
    elif kind == 2:
        told = {"__metadata__": OURS | {"config": rest.decode(errors="replace")}}
        header = json.dumps(told | {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        rest = struct.pack("<Q", len(header)) + header + bytes(4)
    PATH.write_bytes(rest)
    try:
        load_model("student", PATH)
    except AffectError:
        pass


if __name__ == "__main__":
    follow(__name__, "affect_export.models.checkpoint", "affect_export.models.config")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
