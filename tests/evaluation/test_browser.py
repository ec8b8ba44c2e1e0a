"""The page in a real browser."""

import json

import pytest

from tests.evaluation.devtools import BROWSER, Browser
from tests.evaluation.stored import byte_level_tokenizer
from tests.evaluation.talking import Script, make_chat_run, serving

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt install chromium-headless-shell")

ENTER, ESCAPE = ("Enter", 13), ("Escape", 27)
ANSWERS = "[...document.querySelectorAll('.assistant')].map(line => line.textContent)"
TEXT = "document.getElementById('log').innerText"
IS_READY = "document.getElementById('stop').disabled && !document.getElementById('send').disabled"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with serving(make_chat_run(tmp_path_factory.mktemp("page") / "tiny-chat"), max_new_tokens=16) as port:
        yield port


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(browser, port):
    """The page anew, without a conversation; afterwards, that it asked nobody else and had nothing to complain of."""
    browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
    browser.wait_for("document.title === 'tiny-chat'")
    browser.evaluate("sessionStorage.clear()")
    browser.events.clear()
    browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
    browser.wait_for("document.title === 'tiny-chat'")
    yield browser
    assert not complaints(browser)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.split("/")[2] for url in asked if not url.startswith("data:")} == {f"127.0.0.1:{port}"}


def complaints(browser: Browser) -> list[dict]:
    told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [event["params"] for event in browser.events if event["method"] in told]


def ask(page: Browser, question: str) -> None:
    page.evaluate("document.getElementById('question').focus()")
    page.type(question)
    page.press(*ENTER)


def test_a_question_is_answered_while_the_answer_is_written(page, monkeypatch):
    script = Script(monkeypatch, "one two three ", is_endless=True)
    ask(page, "count")
    page.wait_for(f"{ANSWERS}.length && {ANSWERS}[0].length > 3")
    assert not page.evaluate(IS_READY)
    script.is_endless = False
    page.wait_for(IS_READY)
    [answer] = page.evaluate(ANSWERS)
    assert answer.endswith("one two three ")
    assert answer.replace("one two three ", "") == ""
    assert page.evaluate("document.querySelector('.user').textContent") == "count"
    assert page.evaluate("document.activeElement.id") == "question"


def test_the_model_is_told_what_was_said_before(page, port):
    for question in ("def f", "return"):
        ask(page, question)
        page.wait_for(IS_READY)
    [first, second] = page.evaluate(ANSWERS)
    asked = [
        json.loads(event["params"]["request"]["postData"])
        for event in page.events
        if event["method"] == "Network.requestWillBeSent" and event["params"]["request"]["method"] == "POST"
    ]
    user = [{"role": "user", "content": "def f"}]
    assert asked[0] == {"messages": user, "stream": True}
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert asked[1]["messages"][1]["content"] == first != second


def test_what_looks_like_html_is_shown_as_text(page, monkeypatch):
    text = "<b>x</b><img src=x onerror=alert(1)><script>alert(2)</script> &amp;"
    Script(monkeypatch, text)
    ask(page, text)
    page.wait_for(f"{ANSWERS}.length && {IS_READY}")
    assert page.evaluate(ANSWERS) == [text]
    assert page.evaluate("document.querySelector('.user').textContent") == text
    assert page.evaluate("document.querySelectorAll('#log b, #log img, #log script').length") == 0


@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_can_be_stopped(way, page, monkeypatch):
    script = Script(monkeypatch, "on and on ", is_endless=True)
    ask(page, "go")
    page.wait_for(f"{ANSWERS}.length && {ANSWERS}[0].length > 30")
    if way == "button":
        page.evaluate("document.getElementById('stop').click()")
    else:
        page.press(*ESCAPE)
    page.wait_for(IS_READY)
    assert script.has_closed.wait(20)
    assert page.evaluate("document.querySelector('.note').textContent") == "Stopped."
    [kept] = page.evaluate("JSON.parse(sessionStorage.getItem('messages')).slice(1)")
    assert [kept["content"]] == page.evaluate(ANSWERS)


def test_a_conversation_outlives_a_reload_but_not_a_reset(page, port, monkeypatch):
    Script(monkeypatch, "fine")
    ask(page, "how are you?")
    page.wait_for(IS_READY)
    page.call("Page.reload")
    page.wait_for(f"{ANSWERS}.length === 1")
    assert page.evaluate(TEXT) == "how are you?\nfine"
    endless = Script(monkeypatch, "on and on ", is_endless=True)
    ask(page, "go")
    page.wait_for(f"{ANSWERS}.length === 2")
    page.evaluate("document.getElementById('reset').click()")  # in the middle of an answer
    page.wait_for(IS_READY)
    assert endless.has_closed.wait(20)
    assert page.evaluate(TEXT) == ""
    page.call("Page.reload")
    page.wait_for("document.title === 'tiny-chat'")
    assert page.evaluate(TEXT) == ""


def test_an_answer_that_had_no_room_says_so(page, monkeypatch):
    def generate(model, prompt, **settings):
        return iter([[token] for token in byte_level_tokenizer().encode("and then")])

    monkeypatch.setattr("evaluation.chat_session.generate", generate)
    ask(page, "go on")
    page.wait_for(f"{ANSWERS}.length && {IS_READY}")
    assert page.evaluate(TEXT) == "go on\nand then\nCut: there was no room for more."


def test_shift_enter_is_a_new_line(page, monkeypatch):
    Script(monkeypatch, "fine")
    page.evaluate("document.getElementById('question').focus()")
    page.type("a")
    page.press(*ENTER, shift=True)
    page.type("b")
    assert page.evaluate("document.getElementById('question').value") == "a\nb"
    page.press(*ENTER)
    page.wait_for(f"{ANSWERS}.length && {IS_READY}")
    assert page.evaluate("document.querySelector('.user').textContent") == "a\nb"


def test_a_full_context_loses_its_oldest_turns_and_says_so(browser, page, monkeypatch):
    Script(monkeypatch, "fine")
    for word in ("one ", "two ", "six "):
        ask(page, word * 12)
        page.wait_for(IS_READY)
    assert "The context is full" in page.evaluate(TEXT)
    assert page.evaluate(f"{ANSWERS}.length") == 3
    browser.events[:] = [e for e in browser.events if e["method"] != "Log.entryAdded"]  # each 400 is told there


def test_an_error_is_shown_and_what_was_asked_is_forgotten(browser, page, monkeypatch):
    Script(monkeypatch, "fine")
    ask(page, "x" * 999)
    page.wait_for(f"document.querySelector('.note') && {IS_READY}")
    assert "leaves no room in a context of 128; shorten it" in page.evaluate(TEXT)
    ask(page, "short")
    page.wait_for(f"{ANSWERS}.length && {IS_READY}")
    browser.events[:] = [e for e in browser.events if e["method"] != "Log.entryAdded"]
