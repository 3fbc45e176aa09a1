"""Reading a request's JSON object field by field: the wrong type, and what is left over, is refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msa_jax.serve.errors import ApiError, shown


class Fields:
    """A JSON object of which every field is taken once. null means absent.

    Every reader raises `ApiError` 400, naming the field, when its value has another type.
    """

    def __init__(self, value: Any, where: str = ""):
        """`where` is the object's own place, such as `messages[0]`; empty for the whole body."""
        if not isinstance(value, dict):
            raise ApiError(
                400, f"{where or 'The body'} must be a JSON object, got {shown(value)}.", param=where or None
            )
        self._left = {name: item for name, item in value.items() if item is not None}
        self._where = where

    def at(self, name: str) -> str:
        """A field's full name."""
        return f"{self._where}.{name}" if self._where else name

    def refusal(self, name: str, need: str, value: Any) -> ApiError:
        return ApiError(400, f"{self.at(name)} must be {need}, got {shown(value)}.", param=self.at(name))

    def take(self, name: str) -> Any:
        """Of any type; None when absent."""
        return self._left.pop(name, None)

    def string(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.refusal(name, "a string", value)
        return value

    def boolean(self, name: str) -> bool | None:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "true or false", value)
        return value

    def integer(self, name: str, least: int | None = None, most: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        bounds = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        need = f"an integer{' of ' if bounds else ''}{' and '.join(bounds)}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(name, need, value)
        if (least is not None and value < least) or (most is not None and value > most):
            raise self.refusal(name, need, value)
        return value

    def number(self, name: str, least: float | None = None) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        need = "a number" if least is None else f"a number of at least {least:g}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(name, need, value)
        if not abs(value) < 1e300 or not math.isfinite(value) or (least is not None and value < least):
            raise self.refusal(name, need, value)
        return value

    def strings(self, name: str) -> tuple[str, ...] | None:
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.refusal(name, "a list of strings", value)
        return None if value is None else tuple(value)

    def items(self, name: str) -> list[Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.refusal(name, "a list", value)
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "an object", value)
        return value

    def done(self, known: Sequence[str] = ()) -> None:
        """Refuse what was not taken. `known` names what there is, for the message."""
        for name in self._left:
            there_are = f"; there are {', '.join(known)}" if known else ""
            raise ApiError(
                400, f"{shown(self.at(name))} is not a field of this request{there_are}.",
                param=self.at(name)[:80], code="unknown_parameter",
            )  # fmt: skip
