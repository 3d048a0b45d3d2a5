"""Texts and token ids continued and scored."""

from __future__ import annotations

import pytest

from mistral_runtime.serve.engine_port import RequestRefused
from mistral_runtime.serve.protocol import Finished, Token
from tests.runtime.serve.web.scripted_engine import events_of

URL = "/v1/completions"


def test_a_text_is_continued_with_its_space(make_service, client_of, v3):
    service = make_service("goes over")
    answer = client_of(service).post(URL, json={"prompt": "the wind"}).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == " goes over"
    (request,) = service.engine.requests
    assert request.prompt == v3.encode("the wind")
    assert request.max_new_tokens == 16
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ([1, 1040], [[1, 1040]]),
        ([[1, 1040], [5]], [[1, 1040], [5]]),
        (["the", "wind"], [[1, 1040], [1, 6303]]),
        ("", [[1]]),
    ],
)
def test_prompts_come_in_four_shapes(make_service, client_of, prompt, expected):
    service = make_service("a")
    answer = client_of(service).post(URL, json={"prompt": prompt}).json()
    assert [request.prompt for request in service.engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))


def test_answers_are_in_the_order_of_the_prompts(make_service, client_of):
    service = make_service("a")
    client_of(service).post(URL, json={"prompt": [[5], [6]], "n": 2, "seed": 1})
    assert [(request.prompt, request.sampling.seed) for request in service.engine.requests] == [
        ([5], 1),
        ([5], 2),
        ([6], 1),
        ([6], 2),
    ]


def test_echo_with_logprobs_scores_the_prompt_as_the_evaluation_harness_reads_it(make_service, client_of, v3):
    context, continuation = v3.encode("the wind"), v3.encode("goes over", bos=False)
    ask = {"prompt": [context + continuation], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = client_of(make_service("now")).post(URL, json=ask).json()["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == "the wind goes over now"
    assert told["token_logprobs"] == [None, -1.0, -1.0, -1.0, -1.0, -0.5]
    assert told["top_logprobs"][0] is None
    # As lm-evaluation-harness does: the continuation is what follows the context, less the token generated.
    scored = slice(len(context), -1)
    assert told["tokens"][scored] == [" goes", " over"]
    assert sum(told["token_logprobs"][scored]) == -2.0
    assert all(
        max(top, key=top.get) == token
        for token, top in zip(told["tokens"][scored], told["top_logprobs"][scored], strict=True)
    )
    assert told["text_offset"] == [0, 0, 3, 8, 13, 18]


def test_scoring_alone_generates_nothing(make_service, client_of):
    ask = {"prompt": "the wind", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = client_of(make_service("now")).post(URL, json=ask).json()
    assert answer["choices"][0]["text"] == "the wind"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert answer["usage"]["completion_tokens"] == 0


def test_an_echo_alone_needs_no_engine(make_service, client_of):
    service = make_service()
    answer = client_of(service).post(URL, json={"prompt": "the wind", "echo": True, "max_tokens": 0}).json()
    assert answer["choices"][0]["text"] == "the wind"
    assert service.engine.requests == []


def test_a_stream_says_the_same(make_service, client_of):
    ask = {"prompt": ["a", "b"], "stream": True, "logprobs": 1, "stream_options": {"include_usage": True}}
    events = events_of(client_of(make_service("你 wind")).post(URL, json=ask).text)
    for index in range(2):
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices) == " 你 wind"
        assert [choice["finish_reason"] for choice in choices][-1] == "stop"
        offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
        assert offsets[-1] == 2
    assert events[-1]["usage"]["prompt_tokens"] == 4


def test_the_chosen_token_is_told_even_where_it_is_not_among_the_likeliest(make_service, client_of):
    def script(request):
        return [Token(request.id, 6303, -3.0, [(7, -0.25)]), Finished(request.id, "stop", 2, 0, 1)]

    answer = client_of(make_service(script)).post(URL, json={"prompt": "x", "logprobs": 1}).json()
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"[/AVAILABLE_TOOLS]": -0.25, " wind": -3.0}]


def test_bytes_that_are_no_character_have_distinct_names(make_service, client_of):
    answer = client_of(make_service("\U0001f9ff")).post(URL, json={"prompt": "x", "logprobs": 0}).json()
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert tokens[-4:] == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
    assert answer["choices"][0]["text"].endswith("\U0001f9ff")


@pytest.mark.parametrize("vector_form", ["float", "base64"])
def test_embeddings(make_service, client_of, vector_form):
    ask = {"input": ["the wind", "hill"], "encoding_format": vector_form, "model": "other"}
    answer = client_of(make_service()).post("/v1/embeddings", json=ask).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    vector = answer["data"][0]["embedding"]
    assert vector == ([0.6, 0.8] if vector_form == "float" else "mpkZP83MTD8=")


def test_an_input_that_the_engine_refuses_is_told(make_service, client_of):
    service = make_service()

    async def embed(request):
        error = {"kind": "BadRequest", "what": "no room", "detail": "expected less", "hint": ""}
        raise RequestRefused(Finished(request.id, "error", error=error))

    service.engine.embed = embed
    response = client_of(service).post("/v1/embeddings", json={"input": "the wind"})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "no room: expected less")


def test_the_tokenizer_is_shown_as_vllm_does(make_service, client_of):
    client = client_of(make_service())
    told = client.post("/tokenize", json={"prompt": "the wind", "return_token_strs": True}).json()
    assert told == {"count": 3, "max_model_len": 512, "tokens": [1, 1040, 6303], "token_strs": ["<s>", "▁the", "▁wind"]}
    told = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert told["tokens"] == [1, 3, 12782, 4]
    assert client.post("/tokenize", json={"prompt": "x", "add_special_tokens": False}).json()["count"] == 1
    assert client.post("/detokenize", json={"tokens": [1, 1040, 6303]}).json() == {"prompt": "the wind"}
    assert client.post("/detokenize", json={"tokens": [40000]}).status_code == 400
    assert client.get("/tokenizer_info").json()["eos_token"] == "</s>"
