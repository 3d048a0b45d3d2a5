"""The page of ``/status``: one file, and the policy that lets nothing but its own blocks run."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@dataclass(frozen=True)
class Page:
    """The body and the headers that belong to it."""

    body: bytes
    headers: dict[str, str]


@lru_cache(maxsize=1)
def load_page() -> Page:
    """Read the page and compute its policy; the file is read once in a process's life."""
    body = files("mistral_fetch.publish").joinpath("status.html").read_bytes()
    policy = f"{_POLICY}; style-src {_hash_of(b'style', body)}; script-src {_hash_of(b'script', body)}"
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Page(body, headers)


def _hash_of(tag: bytes, page: bytes) -> str:
    """Return the source expression for the page's one block of a kind (Content Security Policy Level 3, 8.4)."""
    found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    assert found, "the page is part of this package"
    return f"'sha256-{b64encode(hashlib.sha256(found[1]).digest()).decode()}'"
