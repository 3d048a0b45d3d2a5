"""The route of the web page."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mistral_runtime.serve.page import load_page


async def show_page(_request: Request) -> Response:
    """Return the page."""
    page = load_page()
    return Response(page.body, headers=page.headers)
