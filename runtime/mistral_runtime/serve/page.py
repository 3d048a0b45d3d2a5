"""The web page that `serve` shows at its root: one file, and the policy that lets nothing but its own blocks run."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

_BLOCKS = {
    "style-src": re.compile(rb"<style>(.*?)</style>", re.DOTALL),
    "script-src": re.compile(rb"<script>(.*?)</script>", re.DOTALL),
}
_ALWAYS = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
)


@dataclass(frozen=True)
class Page:
    """What to answer with: the body and every header that belongs to it."""

    body: bytes
    headers: dict[str, str]


@lru_cache(maxsize=1)
def load_page() -> Page:
    """Read the page and compute its headers; the file is read once in a process's life."""
    body = files("mistral_runtime.serve").joinpath("page").joinpath("index.html").read_bytes()
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(body),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return Page(body, headers)


def content_security_policy(page: bytes) -> str:
    """Return a policy under which only this page's own style and script blocks count, each by its sha256.

    Requests can go to the page's own origin alone. Source: Content Security Policy Level 3, section 8.4.
    """
    blocks = [f"{directive} {_hashes(pattern, page)}" for directive, pattern in _BLOCKS.items()]
    return "; ".join([*_ALWAYS, *blocks])


def _hashes(pattern: re.Pattern[bytes], page: bytes) -> str:
    found = [b64encode(hashlib.sha256(block).digest()).decode() for block in pattern.findall(page)]
    return " ".join(f"'sha256-{digest}'" for digest in found)
