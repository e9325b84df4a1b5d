"""Frozen dataclasses of plain values, and the same after a trip through JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_json(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON values.

    Args:
        value: A dataclass as ``from_json`` builds them.

    Returns:
        Its fields; infinities, which JSON does not have, are the strings ``"inf"`` and ``"-inf"``.
    """
    plain: dict[str, Any] = _plain(asdict(value))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def from_json(kind: type[T], data: Any) -> T:
    """Build a dataclass from what ``to_json`` and JSON made of it.

    Args:
        kind: A dataclass whose fields are numbers, strings, dataclasses, tuples ``tuple[X, ...]``
            of such, or one of them or ``None``.
        data: Its JSON value.

    Returns:
        An equal dataclass.

    Raises:
        TypeError: A value is of another type than its field, or a field is missing or unknown.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Point:
        ...     x: float
        ...     names: tuple[str, ...]
        >>> from_json(Point, {"x": 1.5, "names": ["a"]})
        Point(x=1.5, names=('a',))
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__}: expected an object, got {type(data).__name__}")
    hints = get_type_hints(kind)
    wanted = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if wanted != set(data):
        odd = ", ".join(sorted(wanted ^ set(data)))
        raise TypeError(f"{kind.__name__}: missing or unknown {odd}")
    return kind(**{name: _value(hints[name], data[name], name) for name in wanted})


def _value(hint: Any, value: Any, name: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return None if value is None else _value(kinds[0], value, name)
    if is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
        return tuple(_value(get_args(hint)[0], item, name) for item in value)
    if hint is float and value in ("inf", "-inf"):
        return float(value)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{name}: expected {hint.__name__}, got {type(value).__name__}")
    return float(value) if hint is float else value
