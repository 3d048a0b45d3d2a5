"""Run a Mistral-architecture snapshot directory with PyTorch.

This package owns the model, the engine and their command line. It knows nothing of networks, caches or
catalogs: whoever starts it hands over a directory, arguments and standard streams, and reads an exit code. A Python
program may `load` a directory instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_runtime.api import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    # On first use (PEP 562), since the import of torch takes seconds and the command line's --help needs none of it.
    if name in __all__:
        from mistral_runtime import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
