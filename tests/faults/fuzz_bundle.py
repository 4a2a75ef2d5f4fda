"""Coverage-guided fuzzing of what reads a bundle and a saved state, with atheris: `pip install atheris`, then

    PYTHONPATH=tests/support python tests/faults/fuzz_bundle.py -max_total_time=60 [CORPUS]

Whatever the bytes are, nothing but an AffectError may come out; anything else ends the run and is kept as crash-*.
"""

import hashlib
import io
import json
import struct
import sys
from types import SimpleNamespace
from typing import Any

import atheris
from instrumented import follow

from affect_edge._recognizer import SHIPPED
from affect_runtimes import verify
from affect_runtimes.errors import AffectError
from affect_runtimes.manifest import Manifest, to_text
from affect_runtimes.signing import read_signatures
from affect_runtimes.state import State

MANIFEST = Manifest.read((SHIPPED / "manifest.json").read_bytes())
RAW = json.loads((SHIPPED / "manifest.json").read_text())


def one(data: bytes) -> None:
    """The first byte says what the others are of."""
    if not data:
        return
    kind, rest = data[0] % 6, data[1:]
    try:
        if kind == 0:
            Manifest.read(rest)
        elif kind == 1:
            changed(rest)
        elif kind == 2:
            State.from_bytes(rest)
        elif kind == 3:
            # Behind its checksum.
            content = b"AFFSTATE" + struct.pack("<II", 1, min(len(rest), rest[0] if rest else 0)) + rest
            State.from_bytes(content + hashlib.sha256(content).digest())
        elif kind == 4:
            read_signatures(rest)
        else:
            recorded(rest)
    except AffectError:
        pass


def changed(data: bytes) -> None:
    """The shipped manifest, some places of it changed, signed again."""
    provider = atheris.FuzzedDataProvider(data)
    raw = json.loads(json.dumps(RAW))
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        inside: Any = raw
        while isinstance(inside, dict | list) and inside:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            key = provider.PickValueInList(keys)
            if not isinstance(inside[key], dict | list) or provider.ConsumeBool():
                inside[key] = value(provider)
                break
            inside = inside[key]
    Manifest.read(to_text(raw).encode())


def value(provider: Any) -> Any:
    kind = provider.ConsumeIntInRange(0, 7)
    if kind == 0:
        return provider.ConsumeInt(9)
    if kind == 1:
        return provider.ConsumeFloat()
    if kind == 2:
        return provider.ConsumeBool()
    if kind == 3:
        return None
    if kind == 4:
        return [value(provider) for _ in range(provider.ConsumeIntInRange(0, 3))]
    if kind == 5:
        return {provider.ConsumeUnicode(4): value(provider)}
    return provider.ConsumeUnicode(12)


def recorded(data: bytes) -> None:
    bundle: Any = SimpleNamespace(
        path=SHIPPED, manifest=MANIFEST, model_name="student", read=lambda name: io.BytesIO(data).getvalue()
    )
    verify.recorded_inputs(SimpleNamespace(bundle=bundle))  # type: ignore[arg-type]


if __name__ == "__main__":
    follow(__name__, "affect_runtimes")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
