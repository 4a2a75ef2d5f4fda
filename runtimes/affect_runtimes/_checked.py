"""Reading JSON that somebody else wrote: nothing is coerced, and every refusal says where, what and what would work."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from affect_runtimes.errors import BundleError, IntegrityError

__all__ = ["Fields", "parse_object", "shown"]

_LARGEST = sys.float_info.max
_MOST_SHOWN = 80  # characters of a value in a message


class Fields:
    """One JSON object, read field by field; each reader checks the type and the range.

    Args:
        raw: the value that should be an object.
        where: what it is, for messages, such as "input 'frame'"; empty for the whole file.

    Raises:
        BundleError: by every reader, where the field is missing or is something else.
    """

    def __init__(self, raw: Any, where: str = "") -> None:
        self.where = where
        if not isinstance(raw, Mapping):
            raise BundleError(f"{where or 'the file'} is malformed: expected an object, found {shown(raw)}")
        self.raw: Mapping[str, Any] = raw

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Says that a field is not what it must be."""
        found = shown(self.raw[key]) if key in self.raw else "nothing: the field is missing"
        raise BundleError(f"{self.where}{': ' if self.where else ''}{key}: expected {expected}, found {found}")

    def given(self, key: str) -> bool:
        """Whether an optional field is there and not null."""
        return self.raw.get(key) is not None

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number in [low, high]; 1.0 and true are none."""
        value = self.raw.get(key)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, f"a whole number in [{low}, {high}]")
        return value

    def number(self, key: str, low: float = -_LARGEST, high: float = _LARGEST) -> float:
        """A finite number in [low, high]."""
        value = self.raw.get(key)
        if not _in_range(value, low, high):
            self.refuse(key, _range_words(low, high))
        return float(value)  # type: ignore[arg-type]

    def numbers(self, key: str, count: int, low: float = -_LARGEST, high: float = _LARGEST) -> tuple[float, ...]:
        """So many finite numbers in [low, high]."""
        values = self.raw.get(key)
        if not isinstance(values, list) or len(values) != count or not all(_in_range(v, low, high) for v in values):
            self.refuse(key, f"a list of {count}, each {_range_words(low, high)}")
        return tuple(float(v) for v in values)

    def flag(self, key: str) -> bool:
        """True or false, and nothing that merely looks like it."""
        value = self.raw.get(key)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """Words that can be printed, at least one character."""
        value = self.raw.get(key)
        if not _is_text(value):
            self.refuse(key, "text that can be printed")
        return str(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; it may be empty."""
        values = self.raw.get(key)
        if not isinstance(values, list) or not all(_is_text(v) for v in values):
            self.refuse(key, "a list of texts")
        return tuple(values)

    def name(self, key: str = "name") -> str:
        """A name of an array: an identifier, so that "state.NAME" and "next_NAME" cannot be read two ways."""
        value = self.raw.get(key)
        if not isinstance(value, str) or not value.isidentifier():
            self.refuse(key, "letters, digits and underscores, no digit first")
        return value

    def choice(self, key: str, options: Sequence[str]) -> str:
        """One of a few words."""
        value = self.raw.get(key)
        if not isinstance(value, str) or value not in options:
            self.refuse(key, f"one of {', '.join(options)}")
        return value

    def object(self, key: str) -> "Fields":
        """An object within this one."""
        if not isinstance(self.raw.get(key), Mapping):
            self.refuse(key, "an object")
        return Fields(self.raw[key], f"{self.where}.{key}" if self.where else key)

    def objects(self, key: str, least: int = 0) -> "list[Fields]":
        """A list of objects, at least so many."""
        values = self.raw.get(key)
        if not isinstance(values, list) or len(values) < least:
            self.refuse(key, f"a list of {least} or more objects")
        prefix = f"{self.where}.{key}" if self.where else key
        return [Fields(value, f"{prefix}[{i}]") for i, value in enumerate(values)]


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Parses the bytes of a JSON file that holds one object.

    Raises:
        IntegrityError: not JSON, or no object.
        BundleError: JSON that no export writes: NaN, Infinity, endless digits, or nested beyond reason.
    """

    def constant(word: str) -> NoReturn:
        raise BundleError(f"{name}: holds {word}, which is no number; export the bundle again")

    try:
        raw = json.loads(data, parse_constant=constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{name}: not JSON ({error}); the bundle is damaged, export it again") from None
    except ValueError as error:  # Python converts no more than some thousand digits
        raise BundleError(f"{name}: holds a number that cannot be read ({error})") from None
    except RecursionError:
        raise BundleError(f"{name}: is nested too deeply to be read; export the bundle again") from None
    if not isinstance(raw, dict):
        raise IntegrityError(f"{name}: expected a JSON object, found {type(raw).__name__}")
    return raw


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _in_range(value: Any, low: float, high: float) -> bool:
    # Comparing is exact for any int, where float() would overflow; NaN and the infinities fail it.
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _range_words(low: float, high: float) -> str:
    return "a finite number" if (low, high) == (-_LARGEST, _LARGEST) else f"a number in [{low:g}, {high:g}]"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()
