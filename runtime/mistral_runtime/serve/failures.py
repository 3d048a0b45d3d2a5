"""What a client hears when something goes wrong: failures by name, a bug as 500, with its traceback kept here."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mistral_runtime.serve.api_error import ApiError, ClientGone, as_api_error
from mistral_runtime.terminal import write_err

# Nobody reads it but the access log; the number is nginx's for a client that closed its connection.
GONE = 499
Handler = Callable[[Request], Awaitable[Response]]


def foreseen(error: Exception) -> ApiError:
    """Return what to answer; for a bug, print its traceback and say no more than that there is one."""
    known = as_api_error(error)
    if known is not None:
        return known
    write_err("".join(traceback.format_exception(error)).rstrip())
    return ApiError(500, "this is a bug in the server; its log has the traceback", code="bug")


def answered(handler: Handler) -> Handler:
    """Return a route that answers for every exception of `handler`."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (ClientGone, ClientDisconnect):  # the second in the middle of a body
            return Response(status_code=GONE)
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence; a bug's traceback goes to the log
            return foreseen(error).response()

    return answer


async def show_http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    told = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.url.path[:200]} takes no {request.method}",
    }
    response = ApiError(error.status_code, told.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response
