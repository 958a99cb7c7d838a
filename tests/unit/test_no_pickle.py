"""No pickle between processes or from files, read from the sources: whoever writes a pickle runs commands in its reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lime_dist

ROOT = Path(lime_dist.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "marshal", "shelve", "joblib", "torch.load", "torch.save",
    "torch.serialization", "torch.package", "torch.multiprocessing", "torch.distributed.rpc", "torch.distributed.checkpoint",
    "concurrent.futures.process", "multiprocessing.Process", "multiprocessing.set_start_method", "multiprocessing.managers",
    "multiprocessing.pool", "multiprocessing.queues", "multiprocessing.reduction",
}  # fmt: skip
# Object collectives, process pools and the like, whatever they hang on.
NAMES = {
    "send_object_list", "recv_object_list", "broadcast_object_list", "scatter_object_list", "all_gather_object",
    "gather_object", "Queue", "SimpleQueue", "JoinableQueue", "Manager", "Pool", "ProcessPoolExecutor", "read_pickle", "to_pickle",
}  # fmt: skip
OF_THREADS = "queue."
OF_CONNECTIONS = {"send", "recv"}  # which have send_bytes and recv_bytes
OF_TENSORS = "torch.distributed."
TIMED = {"bench/checkpoints.py": ["torch.save"]}  # against which saves are timed; nothing reads what it writes
START_METHODS = {"spawn", "forkserver"}


def refused(source: str) -> list[tuple[int, str]]:
    """Line and what stands there."""
    tree = ast.parse(source)
    found = [(line, name) for line, name in full_names(tree) if pickles(name)]
    if any(name.startswith("multiprocessing") for _, name in full_names(tree)):
        found += [(line, name) for line, name in full_names(tree) if sends_objects(name)]
    return sorted({*found, *refused_arguments(tree)})


def pickles(name: str) -> bool:
    is_listed = name.rpartition(".")[2] in NAMES and not name.startswith(OF_THREADS)
    return is_listed or any(f"{name}.".startswith(f"{module}.") for module in MODULES)


def sends_objects(name: str) -> bool:
    return name.rpartition(".")[2] in OF_CONNECTIONS and not name.startswith(OF_TENSORS)


def full_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module, function and attribute that is named, by what the local names stand for."""
    known = dict(imported_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = dotted(node).partition(".")
            yield node.lineno, known.get(first, first) + dot + rest


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text; `.c` for an attribute of what has no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def refused_arguments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in START_METHODS:
            yield node.lineno, node.value
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == "get_context" and not node.args:
            yield node.lineno, "get_context()"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_pickles(path: Path) -> None:
    assert [name for _, name in refused(path.read_text())] == TIMED.get(str(path.relative_to(ROOT)), [])


REFUSED = [
    "import pickle",
    "def f():\n    from pickle import loads as read",
    "import dill as p",
    "import marshal, shelve",
    "import cloudpickle.cloudpickle",
    "import torch\ntorch.load('x')",
    "import torch as t\nt.save({}, 'x')",
    "from torch import load",
    "import torch\ntorch.serialization.load('x')",
    "import torch.distributed as dist\ndist.broadcast_object_list([1])",
    "import torch\ntorch.distributed.all_gather_object([], 1)",
    "from torch.distributed import gather_object",
    "from torch.distributed import scatter_object_list as scatter",
    "from torch import distributed as d\nd.send_object_list([1])",
    "import multiprocessing\nmultiprocessing.get_context('spawn')",
    "import multiprocessing\nmultiprocessing.get_context()",
    "import multiprocessing as mp\nmp.set_start_method('forkserver')",
    "import multiprocessing\nmultiprocessing.Process(target=print)",
    "from multiprocessing import Process\nProcess(target=print)",
    "from multiprocessing import get_context\nget_context()",
    "import multiprocessing\nmultiprocessing.get_context('fork').Queue()",
    "from multiprocessing import Pool",
    "import multiprocessing.pool",
    "from multiprocessing.connection import Connection\ndef f(pipe: Connection):\n    pipe.send(1)",
    "import multiprocessing\na, b = multiprocessing.Pipe()\nb.recv()",
    "from concurrent.futures import ProcessPoolExecutor",
    "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()",
    "import torch.multiprocessing as mp",
    "from torch import multiprocessing",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy as np\nnp.load('x', allow_pickle=unsafe)",
    "import pandas\npandas.read_pickle('x')",
]
ALLOWED = [
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print)",
    "import multiprocessing\na, b = multiprocessing.Pipe()\nb.send_bytes(a.recv_bytes())",
    "import torch.distributed as dist\ndist.send(tensor, 1)",
    "import queue\nqueue.Queue()",
    "from safetensors.torch import load, save",
    "import json\njson.load(file)",
]


@pytest.mark.parametrize("source", REFUSED)
def test_it_is_found(source: str) -> None:
    assert refused(source)


@pytest.mark.parametrize("source", ALLOWED)
def test_what_does_not_pickle_is_let_through(source: str) -> None:
    assert refused(source) == []
