"""Adoption: routing on pretrained text-to-image models, as diffusers pipelines.

The package itself can be called, so that ``from semantic_routing import adopt`` is the function whichever of the two
was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from semantic_routing.adopt.api import adopt, load_routing
from semantic_routing.adopt.routing import Routing

__all__ = ["Routing", "adopt", "load_routing"]


class _Callable(ModuleType):
    """A module that is called as its function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Routing:
        return adopt(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
