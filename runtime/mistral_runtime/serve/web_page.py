"""The web page at /: one packaged file that loads nothing from elsewhere, and a policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from mistral_runtime.serve.api_error import ApiError

PAGE = Path(__file__).with_name("page") / "index.html"
_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL)


async def show_page(_request: Request) -> Response:
    """Return the page."""
    if not PAGE.is_file():
        raise ApiError(404, "this installation has no web page; the API is at /v1", code="no_page")
    text = PAGE.read_text("utf-8")
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": content_policy(text),
        "cache-control": "no-cache",
    }
    return Response(text, headers=headers)


def content_policy(page: str) -> str:
    """Return the Content-Security-Policy that allows a page its own inline blocks, by digest, and nothing else."""
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[kind].append(f"'sha256-{digest}'")
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(allowed["script"]) or "'none'",
        "style-src": " ".join(allowed["style"]) or "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
