"""A served model with Mistral's own v3 vocabulary, and clients of it without a socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from starlette.testclient import TestClient

from mistral_runtime.serve.application import build_application
from mistral_runtime.serve.chat_prompt import ChatPrompt
from mistral_runtime.serve.guard import GuardRules
from mistral_runtime.serve.metrics import Metrics
from mistral_runtime.serve.served_model import ServedModel
from mistral_runtime.serve.service import Service
from mistral_runtime.tokenizer import Tokenizer
from tests.runtime.serve.web.scripted_engine import ScriptedEngine, saying

DATA = Path(mistral_common.__file__).parent / "data"
TOKENIZERS = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


@pytest.fixture(scope="session")
def v3() -> Tokenizer:
    """Mistral 7B v0.3's vocabulary."""
    return Tokenizer(DATA / TOKENIZERS["v3"])


@pytest.fixture(scope="session")
def prompts(v3: Tokenizer) -> dict[str | None, ChatPrompt | None]:
    """One writer for each template; None is a base model's."""
    v1 = Tokenizer(DATA / TOKENIZERS["v1"])
    return {"v3": ChatPrompt("v3", v3), "v1": ChatPrompt("v1", v1), "demo": ChatPrompt("demo", v3), None: None}


@pytest.fixture
def make_service(v3: Tokenizer, prompts: dict[str | None, ChatPrompt | None]) -> Callable[..., Service]:
    """Return a function that makes a service whose engine follows a script."""

    def make(script: Any = "Hello there", *, template: str | None = "v3", context: int = 512) -> Service:
        chat = prompts[template]
        tokenizer = v3 if chat is None else chat._tokenizer
        engine = ScriptedEngine(saying(tokenizer, script) if isinstance(script, str) else script, context=context)
        return Service(
            engine, ServedModel(("tiny", "other"), tokenizer, chat, 0), Metrics(lambda: engine.stats, "tiny")
        )

    return make


@pytest.fixture
def client_of() -> Callable[..., TestClient]:
    """Return a function that makes a client of a service."""

    def client(service: Service, rules: GuardRules | None = None) -> TestClient:
        # The client's own way to raise is off: what a route does not catch must be seen as a 500.
        return TestClient(build_application(service, rules), base_url="http://localhost", raise_server_exceptions=False)

    return client
