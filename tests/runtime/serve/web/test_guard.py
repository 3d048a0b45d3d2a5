"""Who may ask, and how much."""

from __future__ import annotations

import pytest

from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.api_keys import ApiKeys, load_api_keys
from mistral_runtime.serve.guard import GuardRules
from mistral_runtime.serve.host_rules import HostRules
from mistral_runtime.serve.web_page import content_policy

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "a secret question"}]}


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("models.example:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_server_are_answered(make_service, client_of, host, status):
    client = client_of(make_service(), GuardRules(HostRules(frozenset({"models.example"}))))
    assert client.get("/v1/models", headers={"host": host}).status_code == status
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin, status",
    [
        (None, 200),
        ("http://localhost", 200),
        ("https://chat.example", 200),
        ("http://evil.example", 403),
        ("http://localhost:9999", 403),
        ("null", 403),
    ],
)
def test_pages_from_elsewhere_may_not_ask(make_service, client_of, origin, status):
    client = client_of(make_service(), GuardRules(HostRules(allowed_origins=frozenset({"https://chat.example"}))))
    headers = {} if origin is None else {"origin": origin}
    response = client.post(CHAT, json=ASK, headers=headers)
    assert response.status_code == status
    allowed = response.headers.get("access-control-allow-origin")
    assert allowed == ("https://chat.example" if origin == "https://chat.example" else None)


def test_no_page_may_read_an_answer_unless_it_is_listed(make_service, client_of):
    response = client_of(make_service()).get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_listed_page_is_told_what_it_may_send(make_service, client_of):
    rules = GuardRules(HostRules(allowed_origins=frozenset({"https://chat.example"})), ApiKeys(["k"]))
    headers = {"access-control-request-method": "POST", "origin": "https://chat.example"}
    response = client_of(make_service(), rules).options(CHAT, headers=headers)
    assert response.status_code == 204
    assert "authorization" in response.headers["access-control-allow-headers"]
    headers["origin"] = "https://evil.example"
    assert client_of(make_service(), rules).options(CHAT, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "header, status",
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic second", 401),
        ("Bearer ", 401),
        ("Bearer first", 200),
        ("bearer second", 200),
        ("Bearer \u00e9", 401),
    ],
)
def test_a_key_is_needed_where_there_are_keys(make_service, client_of, header, status):
    client = client_of(make_service(), GuardRules(keys=ApiKeys(["first", "second"])))
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/tokenizer_info"):
        assert client.get(path, headers=headers).status_code == status
    for path in ("/health", "/ready"):
        assert client.get(path, headers=headers).status_code == 200


def test_keys_are_read_from_a_private_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\n first \nsecond\n")
    path.chmod(0o600)
    load_api_keys(path).require("Bearer first")
    path.chmod(0o640)
    with pytest.raises(BadRequest, match="expected mode 600 or stricter, found 640"):
        load_api_keys(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "two words\n", "h\u00e9\n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(BadRequest):
        load_api_keys(path)
    with pytest.raises(BadRequest, match="cannot be read"):
        load_api_keys(tmp_path / "none")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(make_service, client_of, chunked):
    def pieces():
        yield b"x" * 600
        yield b"x" * 600

    client = client_of(make_service(), GuardRules(max_body=1024))
    response = client.post(CHAT, content=pieces() if chunked else b"x" * 1200)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert response.headers["connection"] == "close"


def test_the_log_tells_counts_and_no_content(make_service, client_of):
    lines = []
    client = client_of(make_service("a private answer"), GuardRules(log=lines.append))
    client.post(CHAT, json=ASK)
    client.post(CHAT + "?token=private", json=ASK | {"stream": True})
    client.get("/v1/nothing%0Anew%1b[31m")
    client.get("/ready")  # a probe is no news
    first, second, third = lines
    assert first.startswith(f"POST {CHAT} 200 ")
    assert first.endswith("6+3 tokens")
    assert second.endswith("6+3 tokens")
    assert third.startswith("GET /v1/nothing?new?[31m 404 ")
    assert not any("secret" in line or "private" in line for line in lines)


def test_readiness_follows_the_engine(make_service, client_of):
    service = make_service()
    client = client_of(service)
    assert client.get("/ready").json() == {"ready": True, "engine": "ready"}
    for state in ("loading", "restarting", "failed"):
        service.engine.state = state
        assert client.get("/ready").status_code == 503
        assert client.get("/health").json()["engine"] == state
    service.engine.state = "ready"
    service.is_draining = True
    assert client.get("/ready").json() == {"ready": False, "engine": "draining"}
    assert client.post(CHAT, json=ASK).status_code == 503


def test_numbers_have_vllms_names(make_service, client_of):
    client = client_of(make_service("one two three"))
    client.post(CHAT, json=ASK)
    lines = client.get("/metrics").text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert told['vllm:num_requests_running{model_name="tiny"}'] == "1.0"
    assert told['vllm:num_requests_waiting{model_name="tiny"}'] == "2.0"
    assert told['vllm:kv_cache_usage_perc{model_name="tiny"}'] == "0.25"
    assert told['vllm:prefix_cache_hits_total{model_name="tiny"}'] == "25.0"
    assert told['vllm:generation_tokens_total{model_name="tiny"}'] == "50.0"
    assert told['vllm:time_to_first_token_seconds_count{model_name="tiny"}'] == "1.0"
    assert told['vllm:inter_token_latency_seconds_count{model_name="tiny"}'] == "2.0"
    assert told['vllm:request_success_total{finished_reason="stop",model_name="tiny"}'] == "1.0"
    assert told['vllm:request_success_total{finished_reason="abort",model_name="tiny"}'] == "0.0"


def test_the_pages_policy_allows_its_own_blocks_only():
    policy = content_policy("<style>a{}</style><script>let a</script><script>let b</script>")
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 3
    assert "unsafe" not in policy
