"""The endpoints, as OpenAI's own client and as plain HTTP see them."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx2
import openai
import pytest

from dsv3_jax.data.chat_template import encode_prompt
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.serve import ServeOptions
from dsv3_jax.serve.replies import Reply
from dsv3_jax.serve.requests import GenerationRequest
from dsv3_jax.serve.worker import Progress, TokenBytes
from tests.data.test_chat_template import TEMPLATE, TOKENIZER
from tests.infer.talkative import BROKEN, broken
from tests.serve.running import CONTEXT, MODEL, NAME, RunningServer, served, variables

CHAT: list[Any] = [{"role": "user", "content": "Hello there"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPT = TOKENIZER.encode("Hello")


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(offline: Engine, prompt: list[int], max_tokens: int, **params: Any) -> Completion:
    """What the engine gives without a server."""
    return next(offline.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)))


def sent(server: RunningServer, length: int, content: bytes) -> socket.socket:
    """A connection that has sent the head of a request for `length` bytes, and these."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def test_a_completion_is_that_of_the_engine(client: openai.OpenAI, offline: Engine) -> None:
    answer = client.completions.create(prompt="Hello", max_tokens=12, **GREEDY)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, complete(offline, PROMPT, 12).text, "length")
    ]
    assert (answer.object, answer.model) == ("text_completion", NAME)
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(PROMPT), 12, len(PROMPT) + 12)


def test_a_chat_is_that_of_the_engine(client: openai.OpenAI, offline: Engine) -> None:
    answer = client.chat.completions.create(messages=CHAT, max_completion_tokens=12, **GREEDY)
    expected = complete(offline, encode_prompt(TEMPLATE, TOKENIZER, CHAT), 12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "length")
    assert answer.object == "chat.completion"


def test_streams_bring_the_same_in_pieces(client: openai.OpenAI, offline: Engine) -> None:
    pieces = list(client.completions.create(prompt="Hello", max_tokens=30, stream=True, **GREEDY))
    assert "".join(piece.choices[0].text for piece in pieces) == complete(offline, PROMPT, 30).text
    assert len(pieces) > 5
    assert [piece.choices[0].finish_reason for piece in pieces[-2:]] == [None, "length"]

    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=CHAT, max_tokens=30, **options, **GREEDY))
    *spoken, last = chunks
    expected = complete(offline, encode_prompt(TEMPLATE, TOKENIZER, CHAT), 30)
    assert spoken[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == expected.text
    assert [chunk.usage for chunk in spoken] == [None] * len(spoken)
    assert last.choices == []
    assert last.usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_server_sent_events(server: RunningServer) -> None:
    answer = server.post(prompt="Hello", max_tokens=2, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_several_choices_of_several_prompts(client: openai.OpenAI, offline: Engine) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    asked: dict[str, Any] = {"prompt": prompts, "n": 2, "max_tokens": 6, "seed": 11, "model": NAME, "temperature": 1}
    answer = client.completions.create(**asked, extra_body={"ignore_eos": True})
    expected = [complete(offline, prompts[i // 2], 6, temperature=1.0, seed=11 + i).text for i in range(4)]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 24)
    streamed = [""] * 4
    for piece in client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == expected


def test_a_stop_string_ends_a_completion_before_it(client: openai.OpenAI, offline: Engine) -> None:
    whole = complete(offline, PROMPT, 20).text
    assert whole is not None
    stop = whole[8:10]
    answer = client.completions.create(prompt="Hello", max_tokens=20, stop=[stop], **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_of_completions(client: openai.OpenAI, offline: Engine) -> None:
    answer = client.completions.create(prompt="Hello", max_tokens=8, logprobs=2, temperature=0, model=NAME)
    expected = complete(offline, PROMPT, 8, logprobs=2)
    assert expected.logprobs is not None
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs == pytest.approx([each.logprob for each in expected.logprobs])
    texts = [TOKENIZER.decode([token]) for token in expected.tokens]
    for token, text, top, each in zip(told.tokens, texts, told.top_logprobs, expected.logprobs, strict=True):
        assert token == text or (token.startswith("bytes:\\x") and "\ufffd" in text)
        assert list(top.values()) == pytest.approx([logprob for _, logprob in each.top])
        # The most likely token is the one that was taken.
        assert max(top, key=top.__getitem__) == token
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)
    alone = client.completions.create(prompt="Hello", max_tokens=1, logprobs=0, temperature=0, model=NAME).choices[0].logprobs
    assert [list(top) for top in alone.top_logprobs] == [told.tokens[:1]]


def test_log_probabilities_of_chats(client: openai.OpenAI, offline: Engine) -> None:
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 8, "logprobs": True, "top_logprobs": 3, "seed": 4, "model": NAME}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    prompt = encode_prompt(TEMPLATE, TOKENIZER, CHAT)
    expected = next(offline.generate([prompt], SamplingParams(8, temperature=1.0, seed=4, logprobs=3)))
    assert expected.logprobs is not None
    assert [entry.logprob for entry in content] == pytest.approx([each.logprob for each in expected.logprobs])
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode(errors="replace") == expected.text
    for entry, each in zip(content, expected.logprobs, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([logprob for _, logprob in each.top])
    streamed = client.chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].logprobs.content for chunk in streamed if chunk.choices[0].logprobs]
    assert [entry for piece in pieces for entry in piece] == content


def test_a_prompt_that_comes_again_is_cached(server: RunningServer, client: openai.OpenAI) -> None:
    prompt = [int(i) % 250 + 3 for i in range(7, 7 * 60, 7)]
    cached = []
    for _ in range(2):
        usage = client.completions.create(prompt=prompt, max_tokens=1, **GREEDY).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 48]
    assert server.metric("dsv3_cached_prompt_tokens_total") >= 48


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, client.models.retrieve(NAME).id) == (NAME, NAME)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_have_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="token id 5000 is outside the vocabulary"):
        client.completions.create(model=NAME, prompt=[5000])
    with pytest.raises(openai.BadRequestError, match="token id 6000 is outside the vocabulary"):
        client.completions.create(model=NAME, prompt="x", logit_bias={"6000": 1})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":NaN}', b'{"a":' + b"1" * 5000 + b"}", b"3"])
def test_what_is_no_json_object_is_refused(server: RunningServer, content: bytes) -> None:
    answer = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_half_a_surrogate_is_refused(server: RunningServer) -> None:
    body = f'{{"model": "{NAME}", "prompt": "x", "\\ud800": 1}}'
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_other_types_paths_and_methods(server: RunningServer) -> None:
    answer = server.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        answer = server.http.request(method, path)
        assert (answer.status_code, path in answer.json()["error"]["message"]) == (status, True)


def test_a_body_that_is_too_large_is_not_read(engine: Engine) -> None:
    with served(engine, options=ServeOptions(max_body=1000)) as server:
        assert server.post(prompt="x" * 2000).status_code == 413
        # Nor one that does not say how large it is.
        parts = (b"x" * 600 for _ in range(5))
        answer = server.http.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert server.post(prompt="Hello", max_tokens=1).status_code == 200


def test_a_client_that_does_not_send_its_request_is_told(engine: Engine) -> None:
    with served(engine, options=ServeOptions(read_timeout=0.2)) as server:
        with sent(server, 50, b"{") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_key_is_asked_for(engine: Engine) -> None:
    with served(engine, api_key="sesame") as server:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"authorization": "Bearer sesamé"}):
            encoded = {name: value.encode() for name, value in header.items()}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = server.http.get(path, headers=encoded)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        assert [server.http.get(path).status_code for path in ("/", "/health")] == [200, 200]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0)
        assert client.completions.create(prompt="Hello", max_tokens=1, **GREEDY).usage is not None
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="open").models.list()


def test_a_full_queue_sends_clients_away(slow: Engine) -> None:
    with served(slow, options=ServeOptions(max_queue=1)) as server:
        assert server.post(prompt="Hello", n=6).status_code == 400
        threads = [
            threading.Thread(target=server.post, kwargs={"prompt": "Hello", "n": n, "max_tokens": 20, "ignore_eos": True})
            for n in (4, 1)
        ]
        for thread in threads:
            thread.start()
        while server.metric("dsv3_waiting") != 1:
            time.sleep(0.01)
        answer = server.post(prompt="Hello", max_tokens=1)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert server.post(prompt="Hello", max_tokens=1).status_code == 200


def test_a_request_that_takes_too_long_ends(slow: Engine) -> None:
    asked: dict[str, Any] = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True}
    with served(slow, options=ServeOptions(timeout=0.5)) as server:
        answer = server.post(**asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        # Or OpenAI's client would send it twice more.
        assert answer.headers["x-should-retry"] == "false"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match=r"took more than 0\.5 seconds") as ended:
            list(client.completions.create(prompt="Hello", max_tokens=200, stream=True, **GREEDY))
        assert ended.value.code == "timeout"
        server.wait_until_free()
        assert server.metric("dsv3_requests_total", status="504") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slots(slow: Engine, stream: bool) -> None:
    """Slots and the waiting line both: two of six choices wait."""
    with served(slow) as server:
        body = {"model": NAME, "prompt": "Hello", "n": 6, "max_tokens": 240, "ignore_eos": True, "stream": stream}
        started = time.monotonic()
        content = json.dumps(body).encode()
        with sent(server, len(content), content) as connection:
            if stream:
                assert b"200 OK" in connection.recv(1000)
            while (server.metric("dsv3_running"), server.metric("dsv3_waiting")) != (4, 2):
                time.sleep(0.01)
        server.wait_until_free()
        # To finish would have taken two rounds of 240 steps.
        assert time.monotonic() - started < 5
        assert server.metric("dsv3_requests_total", endpoint="/v1/completions", status="499") == 1
        assert server.service.open_requests == 0


def test_a_mistake_within_a_stream_is_the_servers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(engine) as server:
        monkeypatch.setattr("dsv3_jax.serve.app.Reply.chunk", lambda *_: 1 / 0)
        with pytest.raises(httpx2.TransportError):
            server.post(prompt="Hello", stream=True)
        server.wait_until_free()
        assert server.metric("dsv3_requests_total", endpoint="/v1/completions", status="500") == 1
        assert server.service.open_choices == 0


def test_metrics_count_what_was_done(engine: Engine) -> None:
    before = engine.counts
    with served(engine) as server:
        server.post(prompt=[5, 6, 7], max_tokens=10, ignore_eos=True)
        server.post(prompt=[5, 6, 7], max_tokens=10, odd=1)
        assert server.metric("dsv3_requests_total", endpoint="/v1/completions", status="200") == 1
        assert server.metric("dsv3_requests_total", endpoint="/v1/completions", status="400") == 1
        assert server.metric("dsv3_prompt_tokens_total") == 3
        assert server.metric("dsv3_generated_tokens_total") == 10
        assert server.metric("dsv3_time_to_first_token_seconds_count") == 1
        assert server.metric("dsv3_request_seconds_count") == 1
        assert server.metric("dsv3_pages") == 4 * -(-(CONTEXT + 1) // 16)
        # The first token is the prefill's.
        assert server.metric("dsv3_step_tokens_total") - before["step_tokens"] == 9
        assert server.metric("dsv3_steps_total") - before["steps"] == 9
        server.wait_until_free()


def strict(text: str) -> Any:
    """JSON without NaN and infinities."""
    return json.loads(text, parse_constant=pytest.fail)


def test_logits_that_are_not_finite_are_an_error_and_the_server_lives_on() -> None:
    whole = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    with served(Engine(MODEL, broken(variables()), TOKENIZER, max_batch=4, chunk=16, page_size=16)) as server:
        alone = strict(server.post(prompt=[5, 9], **whole).text)["choices"][0]["text"]
        answer = server.post(prompt=[[5, 9], [5, BROKEN]], **whole)
        assert answer.status_code == 500
        assert strict(answer.text)["error"]["code"] == "not_finite"
        assert "the model's logits after 2 tokens are not finite" in strict(answer.text)["error"]["message"]
        drawn = server.post(prompt=[5, 9], stream=True, max_tokens=4, logit_bias={str(BROKEN): 100}, temperature=0)
        events = [line.removeprefix("data: ") for line in drawn.text.splitlines() if line]
        assert drawn.status_code == 200
        assert events.pop() == "[DONE]"
        assert strict(events[-1])["error"]["code"] == "not_finite"
        assert all("choices" in strict(event) for event in events[:-1])
        server.wait_until_free()
        assert strict(server.post(prompt=[5, 9], **whole).text)["choices"][0]["text"] == alone
        assert server.metric("dsv3_requests_total", endpoint="/v1/completions", status="500") == 2


def test_a_stream_names_the_reason_of_an_end_without_text() -> None:
    """As at an end-of-text token, whose step brings no text."""
    request = GenerationRequest(False, [[1]], [SamplingParams()], True, False)
    chunk = Reply(request, "tiny", TokenBytes(TOKENIZER)).chunk(Progress(0, 0, "", [], 0, "stop"))
    assert chunk is not None
    assert chunk["choices"][0]["finish_reason"] == "stop"
