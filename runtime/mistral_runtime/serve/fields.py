"""Reading a JSON object field by field: every type and range is checked, and a field nobody reads is refused by name.

A field that is dropped silently would change the answer without a word, so there is no other way to read one.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

from mistral_runtime.serve.api_error import ApiError, bad_request

_Value = TypeVar("_Value")
_SHOWN = 80


def shown(value: Any) -> str:
    """Return a value as an error tells it: as JSON's types are called, and short."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    text = repr(value[:_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN + 2 else text[:_SHOWN] + "…"


class Fields:
    """The fields of one object. null counts as absent, as it does for OpenAI.

    Args:
        values: The object.
        path: What to put before names in errors, such as `messages[3].`.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._read: set[str] = set()

    def wrong(self, name: str, expected: str) -> ApiError:
        """Return the error for a field that is not what it should be."""
        found = shown(self._values[name]) if name in self._values else "nothing"
        return bad_request(f"{self._path}{name}: expected {expected}, found {found}", param=f"{self._path}{name}")

    def raw(self, name: str) -> Any:
        """Return whatever is there, None where nothing is."""
        self._read.add(name)
        return self._values.get(name)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, default: _Value, *, low: int, high: int) -> int | _Value:
        """Return a whole number from `low` to `high`. 3.0 is one, as JSON has no other numbers."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        value = self.raw(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, name: str, default: _Value) -> str | _Value:
        """Return a string."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def required_text(self, name: str) -> str:
        """Return a string that has to be there."""
        value = self.text(name, None)
        if value is None:
            raise self.wrong(name, "a string")
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """Return one of a few words."""
        value = self.text(name, default)
        if value not in allowed:
            raise self.wrong(name, f"one of {', '.join(allowed)}")
        return value

    def array(self, name: str, *, at_most: int) -> list[Any] | None:
        """Return an array, None where there is none."""
        value = self.raw(name)
        if value is not None and (not isinstance(value, list) or len(value) > at_most):
            raise self.wrong(name, f"an array of at most {at_most}")
        return value

    def child(self, name: str) -> Fields | None:
        """Return the fields of an object inside this one, None where there is none."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self._path}{name}.")

    def children(self, name: str, *, at_most: int) -> list[Fields]:
        """Return the fields of each object in an array."""
        found = []
        for index, value in enumerate(self.array(name, at_most=at_most) or []):
            if not isinstance(value, dict):
                raise bad_request(f"{self._path}{name}[{index}]: expected an object, found {shown(value)}", param=name)
            found.append(Fields(value, f"{self._path}{name}[{index}]."))
        return found

    def only(self, name: str, *allowed: Any) -> None:
        """Accept a field at the values that change nothing. The types count too: 1 is not true."""
        value = self.raw(name)
        if value is None or any(type(value) is type(one) and value == one for one in allowed):
            return
        raise self.wrong(name, f"{' or '.join(map(shown, allowed)) or 'nothing'}, since no other value is supported")

    def ignored(self, *names: str) -> None:
        """Accept fields that tell the server something about the caller and have no say in the answer."""
        self._read.update(names)

    def done(self) -> None:
        """Refuse what nobody has read.

        Raises:
            ApiError: There is such a field; the error names it.
        """
        if unknown := sorted(self._values.keys() - self._read):
            names = ", ".join(f"{self._path}{name}"[:_SHOWN] for name in unknown[:5])
            raise bad_request(f"unknown or unsupported field: {names}", param=names, code="unknown_field")
