"""Adoption: routing on pretrained text-to-image models, as diffusers pipelines.

The package itself can be called, because it has the function's name: ``semantic_routing.adopt`` is the function at
first, and the package as soon as anything has imported it.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

from semantic_routing.adopt.api import adopt, load_routing
from semantic_routing.adopt.routing import Routing

__all__ = ["Routing", "adopt", "load_routing"]


class _Callable(ModuleType):
    """A module that is called as its function of the same name."""

    __call__ = staticmethod(adopt)


# ``help`` and editors then show how the function is called; the submodules can still be imported.
__doc__ = adopt.__doc__ or __doc__
__signature__ = inspect.signature(adopt)
sys.modules[__name__].__class__ = _Callable
