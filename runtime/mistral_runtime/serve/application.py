"""The ASGI application: what lies at each path, behind the guard."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from mistral_runtime.serve.chat_route import chat_completions
from mistral_runtime.serve.completion_route import completions
from mistral_runtime.serve.failures import Handler, answered, show_http_error
from mistral_runtime.serve.guard import Guard, GuardRules
from mistral_runtime.serve.model_routes import health, list_models, metrics, ready, show_model
from mistral_runtime.serve.service import Service
from mistral_runtime.serve.token_routes import detokenize, embeddings, tokenize, tokenizer_info
from mistral_runtime.serve.web_page import show_page

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", show_page),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{name:path}", show_model),
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/embeddings", embeddings),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/tokenizer_info", tokenizer_info),
)


def build_application(service: Service, rules: GuardRules | None = None) -> ASGIApp:
    """Return the application that answers for a service."""
    app = Starlette(
        routes=[Route(path, answered(handler), methods=[method]) for method, path, handler in ROUTES],
        exception_handlers={HTTPException: show_http_error},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return Guard(app, rules or GuardRules())
