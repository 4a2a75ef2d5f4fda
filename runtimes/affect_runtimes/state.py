"""The recurrent state of streams as a value: named arrays tied to the model that made them."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes._checked import shown
from affect_runtimes.errors import StateError
from affect_runtimes.files import read_file, replace_file

__all__ = ["State"]

Array = NDArray[Any]
_MAGIC = b"AFFSTATE"
_VERSION = 1
_DTYPES = ("float32", "float16", "int8", "int32", "int64")
_MOST_BYTES = 2**33
"""Of a file: far more than eight streams of the largest state that a manifest may state."""
_MOST_HEADER_BYTES = 2**20


class State:
    """What one stream, or several side by side, carry from step to step. Never changes; a step returns a new one.

    Attributes:
        model: digest of the weights that it belongs to.
        arrays: name -> read-only array with a batch axis; empty for a model that carries nothing.
        axes: name -> which axis is the batch.
        batch: how many streams lie side by side.
    """

    __slots__ = ("arrays", "axes", "batch", "model")

    def __init__(
        self, model: str, arrays: Mapping[str, Array], axes: Mapping[str, int], batch: int | None = None
    ) -> None:
        """Takes the arrays without copying and marks them read-only.

        Args:
            model: see above.
            arrays: see above.
            axes: see above.
            batch: number of streams; None reads it from the arrays.

        Raises:
            StateError: the arrays disagree on the batch, or names and axes differ.
        """
        if set(arrays) != set(axes):
            raise StateError(f"arrays {sorted(arrays)} and batch axes {sorted(axes)} name different states")
        sizes = {name: array.shape[axes[name]] for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise StateError(f"the arrays of one state disagree on the number of streams: {sizes}")
        found = next(iter(sizes.values()), 1 if batch is None else batch)
        if batch not in (None, found):
            raise StateError(f"the arrays of one state hold {found} streams, but it is said to hold {batch}")
        for array in arrays.values():
            array.setflags(write=False)
        self.model = model
        self.arrays: dict[str, Array] = dict(arrays)
        self.axes: dict[str, int] = dict(axes)
        self.batch = found

    @staticmethod
    def stack(states: Sequence["State"]) -> "State":
        """Several streams' states side by side, in order, for one batched step.

        Raises:
            StateError: no state at all, or states of different models.
        """
        if not states:
            raise StateError("stack needs at least one state, found none")
        first = states[0]
        for other in states[1:]:
            if other.model != first.model or other.axes != first.axes:
                raise StateError(f"cannot stack states of model {other.model[:12]} and model {first.model[:12]}")
        if len(states) == 1:
            return first
        arrays = {name: _join([s.arrays[name] for s in states], axis) for name, axis in first.axes.items()}
        return State(first.model, arrays, first.axes, sum(s.batch for s in states))

    def split(self, n: int) -> list["State"]:
        """The inverse of `stack`: n states of one stream each.

        Raises:
            StateError: the state does not hold n streams.
        """
        if n != self.batch:
            raise StateError(f"asked to split into {n} streams, but the state holds {self.batch}")
        pieces = {name: _cut(a, n, self.axes[name]) for name, a in self.arrays.items()}
        return [State(self.model, {k: v[i] for k, v in pieces.items()}, self.axes, 1) for i in range(n)]

    def to_bytes(self) -> bytes:
        """Exactly this state, to be stored or sent; `from_bytes` restores it bit for bit."""
        header = json.dumps(
            {
                "model": self.model,
                "batch": self.batch,
                "arrays": [[k, str(a.dtype), list(a.shape), self.axes[k]] for k, a in self.arrays.items()],
            }
        ).encode()
        body = b"".join(np.ascontiguousarray(a).tobytes() for a in self.arrays.values())
        content = _MAGIC + struct.pack("<II", _VERSION, len(header)) + header + body
        return content + hashlib.sha256(content).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """Restores what `to_bytes` made.

        Raises:
            StateError: other bytes, cut or changed ones, or a newer version's.
        """
        start = len(_MAGIC) + 8
        if len(data) < start + 32 or data[: len(_MAGIC)] != _MAGIC:
            raise StateError(
                f"these {len(data)} bytes are not a saved state (they do not begin with {_MAGIC.decode()})"
            )
        content, digest = data[:-32], data[-32:]
        if hashlib.sha256(content).digest() != digest:
            raise StateError("the saved state is damaged: its checksum does not match (cut short or changed)")
        version, length = struct.unpack_from("<II", content, len(_MAGIC))
        if version != _VERSION:
            raise StateError(f"the saved state has version {version}; this release reads version {_VERSION}")
        try:
            header = _read_header(content[start : start + length])
            arrays, axes, at = {}, {}, start + length
            for name, dtype, shape, axis in header["arrays"]:
                count = math.prod(shape)  # exact, however large
                arrays[name] = np.frombuffer(content, np.dtype(dtype), count, at).reshape(shape).copy()
                axes[name] = axis
                at += arrays[name].nbytes
            if at != len(content):
                raise StateError(f"the saved state has {len(content) - at} bytes too many")
            return cls(header["model"], arrays, axes, header["batch"])
        except (ValueError, OverflowError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(f"the saved state's header is malformed: {error}") from None

    def save(self, path: str | Path) -> None:
        """Keeps exactly this state in a file, for `load` after a restart.

        The file is replaced with one rename, for its owner alone to read: whenever the process is killed, it holds this
        state or the one that was saved before, whole.

        Args:
            path: of a file in a folder that exists.

        Raises:
            StateError: it cannot be written; what was saved there before is as it was.
        """
        try:
            replace_file(Path(path), self.to_bytes())
        except OSError as error:
            raise StateError(
                f"{path}: the state cannot be saved there ({error.strerror or error}); it needs room in a folder that "
                "exists and that this user can write to"
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Restores what `save` kept. Whether it is this model's is checked when it is given to a step.

        Raises:
            StateError: no such file, or one that holds no whole state; the message names it.
        """
        try:
            return cls.from_bytes(read_file(Path(path), _MOST_BYTES))
        except OSError as error:
            raise StateError(f"{path}: no saved state can be read there ({error.strerror or error})") from None
        except MemoryError:
            raise StateError(f"{path}: the saved state does not fit into memory") from None
        except StateError as error:
            raise StateError(f"{path}: {error}") from None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {a.shape} {a.dtype}" for k, a in self.arrays.items())
        return f"State(model={self.model[:12]}, {shapes})"


def _read_header(data: bytes) -> dict[str, Any]:
    """What a saved state says of its arrays, every part of it checked: anybody can make the checksum fit.

    Raises:
        StateError: anything that `State.to_bytes` does not write.
    """
    if len(data) > _MOST_HEADER_BYTES:
        raise StateError(f"the saved state's header is malformed: {len(data)} bytes, at most {_MOST_HEADER_BYTES}")
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateError(f"the saved state's header is malformed: {error}") from None
    arrays = header.get("arrays") if isinstance(header, dict) else None
    # States of release 0.1.0 leave the number of streams to the arrays.
    batch = header.setdefault("batch", None) if isinstance(header, dict) else None
    if not isinstance(arrays, list) or not isinstance(header.get("model"), str):
        raise StateError("the saved state's header is malformed: it names no model, or no arrays")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise StateError(f"the saved state's header is malformed: it holds {shown(batch)} streams")
    seen = set()
    for entry in arrays:
        name, dtype, shape, axis = entry if isinstance(entry, list) and len(entry) == 4 else (None, None, None, None)
        if not isinstance(name, str) or name in seen:
            raise StateError(f"the saved state's header is malformed: an array is {shown(entry)}")
        seen.add(name)
        if dtype not in _DTYPES:
            raise StateError(f"state {shown(name)} has dtype {shown(dtype)}; known: {', '.join(_DTYPES)}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise StateError(f"state {shown(name)} has the shape {shown(shape)}, expected sizes")
        if type(axis) is not int or not 0 <= axis < len(shape):
            raise StateError(f"state {shown(name)} has its streams on axis {shown(axis)} of {len(shape)}")
    return dict(header)


def _join(arrays: Sequence[Array], axis: int) -> Array:
    """Side by side; where an engine holds them (`affect_runtimes.tensorrt`), it is asked first."""
    joined = getattr(arrays[0], "joined", None)
    found: Array | None = None if joined is None else joined(arrays, axis)
    return np.concatenate([np.asarray(a) for a in arrays], axis=axis) if found is None else found


def _cut(array: Array, n: int, axis: int) -> list[Array]:
    """The inverse of `_join`."""
    cut = getattr(array, "cut", None)
    if cut is not None:
        pieces: list[Array] = cut(n, axis)
        return pieces
    # Copies: a view would keep every stream's arrays alive as long as one of them lives.
    return [piece.copy() for piece in np.split(array, n, axis=axis)]
