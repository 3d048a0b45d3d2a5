"""GET /v1/models, and how the server is: /health, /ready, /metrics."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mistral_runtime.serve.metrics import CONTENT_TYPE
from mistral_runtime.serve.service import Service, service_of


async def list_models(request: Request) -> Response:
    """List the names that the one model is served under."""
    service = service_of(request)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.model.names]})


async def show_model(request: Request) -> Response:
    """Show one name."""
    service = service_of(request)
    return JSONResponse(_model(service, service.model.require_name(request.path_params["name"])))


def _model(service: Service, name: str) -> dict[str, Any]:
    ready = service.engine.ready
    context = None if ready is None else ready.context
    return {
        "id": name,
        "object": "model",
        "created": service.model.created,
        "owned_by": "mistral-fetch",
        "root": service.model.names[0],
        "max_model_len": context,
        "context": context,
        "chat_template": None if service.model.chat is None else service.model.chat.name,
        "license": service.model.licence,
    }


async def health(request: Request) -> Response:
    """Say that this process lives, and how the engine is."""
    service = service_of(request)
    ready = service.engine.ready
    told: dict[str, Any] = {"status": "ok", "engine": _state(service)}
    if ready is not None:
        told |= {"weights": ready.weights, "device": ready.device, "load_seconds": round(ready.load_seconds, 3)}
    return JSONResponse(told)


async def ready(request: Request) -> Response:
    """Say whether a request would be answered now: 200, or 503 while loading, restarting or about to end."""
    state = _state(service_of(request))
    return JSONResponse({"ready": state == "ready", "engine": state}, 200 if state == "ready" else 503)


def _state(service: Service) -> str:
    return "draining" if service.is_draining else service.engine.state


async def metrics(request: Request) -> Response:
    """Return the numbers for Prometheus."""
    return Response(service_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})
