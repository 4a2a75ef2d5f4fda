"""The recurrent state of streams as a value: named arrays tied to the model that made them."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import StateError

__all__ = ["State"]

Array = NDArray[Any]
_MAGIC = b"AFFSTATE"
_VERSION = 1
_DTYPES = ("float32", "float16", "int8", "int32", "int64")


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
            header = json.loads(content[start : start + length])
            arrays, axes, at = {}, {}, start + length
            for name, dtype, shape, axis in header["arrays"]:
                if dtype not in _DTYPES:
                    raise StateError(f"state {name!r} has dtype {dtype!r}; known: {', '.join(_DTYPES)}")
                count = int(np.prod(shape, dtype=np.int64))
                arrays[name] = np.frombuffer(content, np.dtype(dtype), count, at).reshape(shape).copy()
                axes[name] = int(axis)
                at += arrays[name].nbytes
            if at != len(content):
                raise StateError(f"the saved state has {len(content) - at} bytes too many")
            # States of release 0.1.0 leave their number to the arrays.
            batch = int(header["batch"]) if "batch" in header else None
            return cls(str(header["model"]), arrays, axes, batch)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(f"the saved state's header is malformed: {error}") from None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {a.shape} {a.dtype}" for k, a in self.arrays.items())
        return f"State(model={self.model[:12]}, {shapes})"


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
