"""lime_dist: pretraining of LIMe (Layer-Integrated Memory) language models over tensor, pipeline and data ranks.

The method is arXiv 2502.09245. Importing this package imports no framework; the names of `lime_dist.api`, which
are for notebooks, are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lime_dist.api import Model, Plan, build_model, build_plan, load_config, load_model

__version__ = "0.1.0"
__all__ = ["Model", "Plan", "build_model", "build_plan", "load_config", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("lime_dist.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
