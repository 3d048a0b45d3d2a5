"""mistral-fetch: distribute, download, verify, keep and run open-weight models.

From Python: ``from mistral_fetch import ensure``, then ``ensure("mistral-7b").directory``; ``docs/fetch-api.md`` has
the rest. Importing this package is cheap: what works is loaded when it is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mistral_fetch.version import __version__

if TYPE_CHECKING:
    from mistral_fetch.api import FileVerdict, Model, Stop, Verification, ensure, path, verify
    from mistral_fetch.errors import MistralFetchError

__all__ = [
    "FileVerdict",
    "MistralFetchError",
    "Model",
    "Stop",
    "Verification",
    "__version__",
    "ensure",
    "path",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mistral_fetch' has no attribute {name!r}")
    from mistral_fetch import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
