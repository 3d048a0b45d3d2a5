"""A request's body as a JSON object, parsed with suspicion. Size and time limits are kept by `guard` before."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from mistral_runtime.serve.api_error import bad_request
from mistral_runtime.serve.threads import in_thread
from mistral_runtime.strict_json import parse_object

MAX_DEPTH = 64


async def read_object(request: Request) -> dict[str, Any]:
    """Return the JSON object that was sent.

    Raises:
        ApiError: It is none, or is nested deeper than `MAX_DEPTH`.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise bad_request(f"expected a body of type application/json, found {kind[:80]!r}", code="content_type")
    data = await request.body()
    # Long bodies go to a thread, so that others are answered meanwhile.
    return _parse(data) if len(data) < 1 << 16 else await in_thread(_parse, data)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = parse_object(data)
    except ValueError as error:
        raise bad_request(f"the body is not a JSON object: {error}", code="invalid_json") from error
    if depth_exceeds(value, MAX_DEPTH):
        raise bad_request(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
    return value


def depth_exceeds(value: Any, limit: int) -> bool:
    """Say whether containers lie in one another more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node
