"""Hyper-parameters of a model: a frozen dataclass that goes through JSON and back, with every value checked."""

from collections.abc import Mapping
from dataclasses import fields, replace
from inspect import formatannotation
from sys import float_info
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from affect_runtimes.errors import InputError

__all__ = ["ModelConfig"]


class ModelConfig:
    """Base of the frozen dataclasses that hold a model's hyper-parameters; plain values and tuples of them only."""

    @classmethod
    def tiny(cls) -> Self:
        """A preset for tests: the same graph, well under a million parameters."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes an equal configuration."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, values: Mapping[str, Any], base: Self | None = None) -> Self:
        """The inverse of `to_json`, also after a round trip through JSON, where tuples became lists.

        Args:
            values: field -> value.
            base: gives the fields that `values` lacks; None is the defaults.

        Raises:
            InputError: a field that there is not, a value of another kind than the field's annotation says, or a number
                that is not finite or no size.
        """
        known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
        kinds, base = get_type_hints(cls), cls() if base is None else base
        plain = {k: _plain(v) for k, v in values.items()}
        for name, value in plain.items():
            if name not in known:
                raise InputError(f"{cls.__name__} has no field {name!r}; it has {', '.join(known)}")
            usual, kind = getattr(base, name), kinds[name]
            if not _fits(value, kind) or (name in _OF_CHANNELS and len(value) != len(usual)):
                said = formatannotation(kind)
                raise InputError(f"{cls.__name__}.{name}: expected a value like {usual!r} ({said}), found {value!r}")
            numbers = value if isinstance(value, tuple) else (value,)
            # Only the ints inside pairs, as of AG-SSM's regions, are places and may be 0.
            if int in (kind, *get_args(kind)) and any(v is not None and v < 1 for v in numbers):
                raise InputError(f"{cls.__name__}: {name} {value!r} is no size or count; 1 and more are")
            if name in _ABOVE_ZERO and min(numbers) <= 0:
                raise InputError(f"{cls.__name__}: {name} {value!r} is not above 0, as in {usual!r}")
        made: Self = replace(base, **plain)  # type: ignore[type-var]
        return made


# Fields of several models that mean the same in each of them.
_OF_CHANNELS = ("mean", "std")
_ABOVE_ZERO = ("std", "mel_std", "frame_interval_s")


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; any finite number is a float, and a bool is no int."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return value in parts
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(each) and all(_fits(v, k) for v, k in zip(value, each, strict=True))
    if kind is float:
        return type(value) in (int, float) and abs(value) <= float_info.max
    return type(value) is kind
