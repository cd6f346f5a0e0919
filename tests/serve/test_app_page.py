"""The chat page, in a real browser; and what it may do at all."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator

import pytest

from dsv3_jax.data.chat_template import encode_prompt
from dsv3_jax.infer import Engine
from dsv3_jax.serve import ServeOptions
from dsv3_jax.serve.app import load_page
from tests.data.test_chat_template import TEMPLATE, TOKENIZER
from tests.serve.browser import Page, browser
from tests.serve.running import CONTEXT, NAME, RunningServer, served

LOADED = "document.querySelector('#model').textContent.startsWith('tiny')"
IDLE = "!document.querySelector('#send').hidden"
ERROR = "document.querySelector('#error').textContent"
SPOKEN = "[...document.querySelectorAll('article')].map((article) => article.textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture
def visited(page: Page, slow: Engine) -> Iterator[tuple[Page, RunningServer]]:
    """The page of a server that takes its time; each server has a port, and so a storage, of its own."""
    with served(slow) as server:
        page.problems.clear()
        page.open(server.url)
        page.wait(LOADED)
        yield page, server
        assert page.problems == []


@contextlib.contextmanager
def another_server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that answers everyone, and what it has been asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()


def send(page: Page, text: str) -> None:
    page.type("#text", text)
    page.click("#send")


def set_field(page: Page, field: str, value: str) -> None:
    page.evaluate(f"document.querySelector('{field}').value = '{value}'")


def test_the_page_sends_and_shows_the_answer_as_it_comes(visited: tuple[Page, RunningServer]) -> None:
    page, server = visited
    set_field(page, "#most", "60")
    send(page, "Hello")
    page.wait("document.querySelectorAll('article').length === 2")
    lengths = [0]
    while not page.evaluate(IDLE):
        lengths.append(page.evaluate("document.querySelectorAll('article')[1].textContent.length"))
    assert len(set(lengths)) > 5, "the answer came in one piece"
    question, answer = page.evaluate(SPOKEN)
    assert question == "Hello"
    assert answer
    assert page.evaluate(ERROR) == ""
    assert server.metric("dsv3_requests_total", endpoint="/v1/chat/completions", status="200") == 1


def test_the_page_keeps_the_conversation(visited: tuple[Page, RunningServer]) -> None:
    """The second request carries the first turn, a reload forgets nothing, and a new conversation does."""
    page, server = visited
    set_field(page, "#most", "3")
    for i, text in enumerate(("Hello", "there")):
        page.type("#text", text)
        page.press_enter()
        page.wait(f"{IDLE} && document.querySelectorAll('article').length === {2 * i + 2}")
    spoken = page.evaluate(SPOKEN)
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), spoken, strict=False)]
    both = [len(encode_prompt(TEMPLATE, TOKENIZER, each)) for each in (messages[:1], messages)]
    assert server.metric("dsv3_prompt_tokens_total") == sum(both)
    page.call("Page.reload")
    page.wait(f"document.readyState === 'complete' && {LOADED}")
    assert page.evaluate(SPOKEN) == spoken
    page.click("#clear")
    assert page.evaluate(SPOKEN) == []
    assert page.evaluate("sessionStorage.getItem('messages')") == "[]"


def test_the_page_stops_an_answer(visited: tuple[Page, RunningServer]) -> None:
    page, server = visited
    send(page, "Hello")
    page.wait("(document.querySelectorAll('article')[1] || {}).textContent")
    page.click("#stop")
    page.wait(IDLE)
    server.wait_until_free()
    assert server.metric("dsv3_requests_total", status="499") == 1
    assert server.metric("dsv3_generated_tokens_total") < CONTEXT / 2
    question, answer = page.evaluate(SPOKEN)
    assert (question, bool(answer), page.evaluate(ERROR)) == ("Hello", True, "")


def test_a_new_conversation_ends_the_answer_of_the_old(visited: tuple[Page, RunningServer]) -> None:
    page, server = visited
    send(page, "Hello")
    page.wait("(document.querySelectorAll('article')[1] || {}).textContent")
    page.click("#clear")
    page.wait(IDLE)
    server.wait_until_free()
    assert page.evaluate(f"[sessionStorage.getItem('messages'), {ERROR}, {SPOKEN}]") == ["[]", "", []]


def test_the_page_shows_errors_and_gives_the_message_back(visited: tuple[Page, RunningServer]) -> None:
    page, _ = visited
    long = "Hello " * CONTEXT
    send(page, long)
    page.wait(f"{IDLE} && {ERROR}")
    assert "maximum context length is 256 tokens" in page.evaluate(ERROR)
    assert page.evaluate("document.querySelector('#text').value") == long
    assert page.evaluate(SPOKEN) == []
    # The next answer that comes takes the error away.
    page.evaluate("document.querySelector('#text').value = ''")
    set_field(page, "#most", "2")
    send(page, "Hello")
    page.wait(f"{IDLE} && document.querySelectorAll('article').length === 2")
    assert page.evaluate(ERROR) == ""


def test_an_error_in_the_middle_of_an_answer_is_shown(page: Page, slow: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step = slow.step
    # So slow that a whole answer takes several times the limit.
    monkeypatch.setattr(slow, "step", lambda: time.sleep(0.1) or step())
    with served(slow, options=ServeOptions(timeout=1)) as server:
        page.open(server.url)
        page.wait(LOADED)
        # Greedy: a sampled answer may end before the limit.
        page.evaluate("document.querySelector('#temperature').value = '0'")
        send(page, "Hello")
        page.wait(f"{IDLE} && {ERROR}")
        assert "took more than 1 seconds" in page.evaluate(ERROR)
        assert page.evaluate(SPOKEN)[0] == "Hello"


def test_the_page_asks_for_a_key(page: Page, engine: Engine) -> None:
    with served(engine, api_key="sesame") as server:
        page.open(server.url)
        page.wait(f"{ERROR}.includes('API key')")
        assert page.evaluate("document.querySelector('#settings').open")
        page.evaluate("document.querySelector('#key').focus()")
        page.type("#key", "sesame")
        page.press_enter()
        page.wait(LOADED)
        page.wait(f"{ERROR} === ''")
        set_field(page, "#most", "2")
        send(page, "Hello")
        page.wait(f"{IDLE} && document.querySelectorAll('article').length === 2")


def test_without_a_chat_template_the_page_continues_text(page: Page, engine: Engine) -> None:
    with served(engine, template=None) as server:
        page.open(server.url)
        page.wait(LOADED)
        set_field(page, "#most", "4")
        send(page, "Hello")
        page.wait(f"{IDLE} && document.querySelectorAll('article').length === 2")
        assert server.metric("dsv3_requests_total", endpoint="/v1/completions", status="200") == 1


def test_the_page_fits_a_phone_and_names_its_controls(visited: tuple[Page, RunningServer]) -> None:
    page, _ = visited
    page.call("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=1, mobile=True)
    try:
        page.evaluate("document.querySelector('#settings').open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "textbox", "spinbutton", "log")
        names = {node["role"]["value"]: [] for node in nodes if node["role"]["value"] in roles}
        for node in nodes:
            if node["role"]["value"] in roles:
                names[node["role"]["value"]].append(node["name"]["value"])
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
    assert sorted(names["button"]) == ["New conversation", "Send"]
    assert sorted(names["textbox"]) == ["API key", "Message"]
    assert sorted(names["spinbutton"]) == ["Most tokens", "Temperature"]
    assert names["log"] == ["Conversation"]


def test_the_page_runs_and_loads_nothing_but_its_own(page: Page, engine: Engine) -> None:
    with served(engine) as server:
        page.open(server.url)
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
        assert page.evaluate("window.ran") is None
        # Another origin, which would answer, and which no-cors would let a page without a policy ask.
        with another_server() as (url, asked):
            assert page.evaluate(f"fetch('{url}', {{mode: 'no-cors'}}).then(() => 0, () => 1)") == 1
            assert not asked
            page.open(url)
            assert page.evaluate("fetch('/again').then(() => 0, () => 1)") == 0
            assert "/again" in asked


def test_the_policy_names_the_script_and_nothing_from_elsewhere() -> None:
    page = load_page()
    text, headers = bytes(page.body), page.headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert not re.search(rb"https?://|\son\w+=|\sstyle=", text)
    assert NAME.encode() not in text
