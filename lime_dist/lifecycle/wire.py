"""Values between processes: plain ones as JSON, tensors as safetensors. Reading runs nothing that the sender names.

Everything but plain JSON values is a list whose first item says what it is: ["tuple", 1, 2], ["tensor", 0]. A dataclass
travels as the name of its class and its fields; the reader takes the class from the modules that it has imported itself.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = struct.Struct(">Q")  # of the JSON, which stands before the tensors


def pack(value: Any) -> bytes:
    """None, numbers, texts, paths, lists, tuples, dicts, dataclasses and tensors. Raises: TypeError for anything else."""
    tensors: list[Tensor] = []
    text = json.dumps(_to_tree(value, tensors)).encode()
    return _LENGTH.pack(len(text)) + text + _tensors_to_bytes(tensors)


def unpack(data: bytes) -> Any:
    """What was packed; tensors lie on the CPU. Raises: an error of some kind for what `pack` does not write."""
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    return _from_tree(json.loads(data[_LENGTH.size : end]), _tensors_from_bytes(data[end:]))


def name_of(thing: Any) -> str:
    """`module:name` of a class or function. Raises: ValueError when it is not found under it, as within a function."""
    name = f"{thing.__module__}:{thing.__qualname__}"
    if "<" in name or find(name) is not thing:
        raise ValueError(f"{name}: another process finds only what stands in a module")
    return name


def find(name: str) -> Any:
    """What `name_of` named, if its module has been imported. Raises: ValueError."""
    module, _, path = name.partition(":")
    try:
        return operator.attrgetter(path)(sys.modules[module])
    except (KeyError, AttributeError):
        raise ValueError(f"{name}: not known here") from None


def _to_tree(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", *(_to_tree(item, tensors) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([_to_tree(key, tensors), _to_tree(item, tensors)] for key, item in value.items())]
    if isinstance(value, Path):
        return ["path", str(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return ["dataclass", name_of(type(value)), _to_tree(fields, tensors)]
    if _is_tensor(value):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # imported already if there are any: it takes seconds
    return torch is not None and isinstance(value, torch.Tensor)


def _from_tree(tree: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *content = tree
    if kind not in _READERS:
        raise ValueError(f"{kind!r} is no kind of value")
    return _READERS[kind](content, tensors)


def _items(content: list[Any], tensors: list[Tensor]) -> list[Any]:
    return [_from_tree(item, tensors) for item in content]


def _dataclass(content: list[Any], tensors: list[Tensor]) -> Any:
    name, fields = content
    cls = find(name)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{name} is no dataclass")
    return cls(**_from_tree(fields, tensors))


_READERS: dict[str, Callable[[list[Any], list[Tensor]], Any]] = {
    "list": _items,
    "tuple": lambda content, tensors: tuple(_items(content, tensors)),
    "dict": lambda content, tensors: dict(_items(pair, tensors) for pair in content),
    "path": lambda content, _: Path(*content),
    "dataclass": _dataclass,
    "tensor": lambda content, tensors: tensors[content[0]],
}


def _tensors_to_bytes(tensors: list[Tensor]) -> bytes:
    if not tensors:
        return b""
    from safetensors.torch import save

    # Copies, as one tensor may be sent twice, or parts of one storage.
    return save({str(index): tensor.detach().cpu().clone().contiguous() for index, tensor in enumerate(tensors)})


def _tensors_from_bytes(data: bytes) -> list[Tensor]:
    if not data:
        return []
    from safetensors.torch import load

    found = load(data)
    return [found[str(index)] for index in range(len(found))]
