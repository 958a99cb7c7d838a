"""What ranks tell one another before there are groups, as text: JSON of a shape that the reader names, signed with the
job's secret where there is one.

Whoever reaches the store may have written what is read here. It is data of the named shape or it is refused.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Generic, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

MAX_BYTES = 2**22
_SIGNATURE_BYTES = 64  # SHA-256 in hexadecimal

T = TypeVar("T")


class Refused(ValueError):
    """Bytes that no rank of this job writes. The message has no subject: whoever knows whose bytes they are adds it."""


@dataclass(frozen=True)
class Topic(Generic[T]):
    """What is told under `name`. shape: T once more, to check by: a plain type, a dataclass, list[X], tuple[X, ...],
    tuple[X, Y], dict[str, X] or a union of them."""

    name: str
    shape: Any


def pack(name: str, value: object, secret: bytes | None) -> str:
    """`name`: where the value will stand, so that it counts nowhere else."""
    text = json.dumps(value, default=_as_tree, allow_nan=False)
    return _sign(name, text.encode(), secret) + text


def unpack(name: str, data: bytes, shape: Any, secret: bytes | None) -> Any:
    """Raises: Refused."""
    if len(data) > MAX_BYTES:
        raise Refused(f"has {len(data)} bytes, {MAX_BYTES} at most are read")
    size = 0 if secret is None else _SIGNATURE_BYTES
    signature, text = data[:size], data[size:]
    if not hmac.compare_digest(signature, _sign(name, text, secret).encode()):
        raise Refused("is not signed with this job's secret (LIME_DIST_JOB_SECRET)")
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Refused("is no JSON") from None
    return conform(tree, shape)


def _sign(name: str, text: bytes, secret: bytes | None) -> str:
    return "" if secret is None else hmac.new(secret, name.encode() + b"\0" + text, "sha256").hexdigest()


def _as_tree(value: Any) -> dict[str, Any]:
    """Of a dataclass, for JSON."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _refuse_constant(text: str) -> NoReturn:
    raise Refused(f"has the number {text}")


def conform(tree: Any, shape: Any) -> Any:
    """The value of `shape` that JSON's `tree` stands for. Raises: Refused."""
    origin, parts = get_origin(shape), get_args(shape)
    if origin in (Union, UnionType):
        return _conform_to_one(tree, parts)
    if isinstance(shape, type) and dataclasses.is_dataclass(shape):
        return _build(tree, shape)
    if origin is tuple:
        return _conform_tuple(tree, parts)
    if origin is list and isinstance(tree, list):
        return [conform(item, parts[0]) for item in tree]
    if origin is dict and isinstance(tree, dict):
        return {key: conform(item, parts[1]) for key, item in tree.items()}
    if shape is float and type(tree) in (int, float):
        return _conform_float(tree)
    if type(tree) is not (NoneType if shape is None else shape):
        raise Refused(f"has a {type(tree).__name__} where {getattr(shape, '__name__', shape)} belongs")
    return tree


def _conform_to_one(tree: Any, shapes: tuple[Any, ...]) -> Any:
    """The first that fits; if none does, what is wrong with the first."""
    errors = []
    for shape in shapes:
        try:
            return conform(tree, shape)
        except Refused as error:
            errors.append(error)
    raise errors[0]


def _build(tree: Any, cls: type) -> Any:
    hints = get_type_hints(cls)
    if not isinstance(tree, dict) or tree.keys() != hints.keys():
        raise Refused(f"has not the fields of {cls.__name__}")
    return cls(**{name: conform(value, hints[name]) for name, value in tree.items()})


def _conform_tuple(tree: Any, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(tree, list):
        raise Refused(f"has a {type(tree).__name__} where a list belongs")
    if shapes[-1] is Ellipsis:
        shapes = shapes[:1] * len(tree)
    if len(tree) != len(shapes):
        raise Refused(f"has a list of {len(tree)} where {len(shapes)} belong")
    return tuple(conform(item, shape) for item, shape in zip(tree, shapes))


def _conform_float(number: float) -> float:
    if abs(number) > 2**1000 or math.isnan(number):
        raise Refused("has a number out of range")
    return float(number)
