import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_prep.chat.chat_format import FORMATS
from data_prep.chat.turns import Turn
from evaluation import serve
from evaluation.chat_server import MAX_BODY_BYTES
from evaluation.engine import complete
from evaluation.model_folder import load_model
from evaluation.sampling import Sampling
from tests.evaluation.stored import byte_level_tokenizer, make_run
from tests.evaluation.talking import CHATML, CONTEXT_LENGTH, Script, connect, events, make_chat_run, post, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "def f"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_chat_run(tmp_path_factory.mktemp("serve") / "tiny-chat")


@pytest.fixture(scope="module")
def port(run):
    with serving(run, max_requests=4, max_new_tokens=16) as port:
        yield port


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run, device="cpu")


def expected(loaded, prompt, *, max_new_tokens=16, num_samples=1, **sampling) -> list[tuple[str, int, str]]:
    """Text, tokens and finish reason of each sample, by the engine and the tokenizer."""
    stop_ids = CHATML.stop_ids(loaded.tokenizer)
    samples = complete(
        loaded.model, prompt, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling), stop_ids=stop_ids,
        num_samples=num_samples,
    )  # fmt: skip
    said = [[token for token in sample if token not in stop_ids] for sample in samples]
    ends = ["stop" if sample[-1] in stop_ids else "length" for sample in samples]
    return [(loaded.tokenizer.decode(tokens), len(tokens), end) for tokens, end in zip(said, ends, strict=True)]


def stream(port: int, path: str, table: dict) -> list[dict | str]:
    with contextlib.closing(connect(port)) as connection:
        connection.request("POST", path, json.dumps(table | {"stream": True}))
        return list(events(connection.getresponse()))


def test_a_conversation_is_answered_as_the_model_would(port, loaded):
    messages = [
        {"role": "developer", "content": "terse"},
        {"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}]},
        {"role": "assistant", "content": "(x)"},
        {"role": "user", "content": "return"},
    ]
    turns = [Turn("system", "terse"), Turn("user", "def f"), Turn("assistant", "(x)"), Turn("user", "return")]
    prompt = CHATML.prompt(loaded.tokenizer, turns)
    [(text, num_tokens, end)] = expected(loaded, prompt)
    status, reply = post(port, CHAT, {"model": "tiny-chat", "messages": messages, "temperature": 0})
    assert status == 200
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny-chat"
    assert reply["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": text}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": end}]
    assert reply["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": num_tokens, "total_tokens": len(prompt) + num_tokens,
    }  # fmt: skip


def test_a_stream_is_the_same_answer_in_pieces(port):
    asked = {"messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
    _, whole = post(port, CHAT, asked)
    *chunks, usage, done = stream(port, CHAT, asked | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {(chunk["object"], chunk["id"]) for chunk in chunks} == {("chat.completion.chunk", usage["id"])}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert len(choices) > 4
    assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert "".join(choice["delta"]["content"] for choice in choices) == whole["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_several_samples_are_those_of_the_engine(port, loaded):
    prompt = CHATML.prompt(loaded.tokenizer, [Turn("user", "def f")])
    wanted = expected(loaded, prompt, num_samples=3, temperature=0.7, top_p=0.9, seed=5)
    asked = {"messages": HELLO, "n": 3, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    _, reply = post(port, CHAT, asked)
    found = [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in reply["choices"]]
    assert found == [(i, text, end) for i, (text, _, end) in enumerate(wanted)]
    assert reply["usage"]["completion_tokens"] == sum(num_tokens for _, num_tokens, _ in wanted)
    texts = ["", "", ""]
    for chunk in stream(port, CHAT, asked)[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert texts == [text for text, _, _ in wanted]


def test_without_a_seed_answers_differ(port):
    asked = {"messages": HELLO, "temperature": 2.0}
    assert len({post(port, CHAT, asked)[1]["choices"][0]["message"]["content"] for _ in range(4)}) > 1


def test_texts_are_continued_each_from_its_own(port, loaded):
    rows = [loaded.tokenizer.encode("def f"), [loaded.tokenizer.eos_id], loaded.tokenizer.encode("return x")]
    wanted = [text for row in rows for text, _, _ in expected(loaded, row, max_new_tokens=6)]
    asked = {"temperature": 0, "max_tokens": 6}
    _, reply = post(port, COMPLETIONS, asked | {"prompt": ["def f", "", "return x"]})
    assert reply["object"] == "text_completion"
    # The model may say the chat's stop token, which is no end of a text: compare up to it.
    for choice, text in zip(reply["choices"], wanted, strict=True):
        assert choice["text"].startswith(text)
    assert reply["usage"]["prompt_tokens"] == sum(map(len, rows))
    _, by_ids = post(port, COMPLETIONS, asked | {"prompt": rows})
    assert by_ids["choices"] == reply["choices"]
    _, of_one = post(port, COMPLETIONS, asked | {"prompt": rows[2]})
    assert of_one["choices"][0]["text"] == reply["choices"][2]["text"]
    texts = ["", "", ""]
    for chunk in stream(port, COMPLETIONS, asked | {"prompt": rows})[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in reply["choices"]]


@pytest.mark.parametrize("stop", ["stop now", ["never there", "stop now"]])
def test_an_answer_ends_before_a_stop_text(stop, port, monkeypatch):
    script = Script(monkeypatch, "go on and stop now or never", is_endless=True)
    _, reply = post(port, CHAT, {"messages": HELLO, "stop": stop})
    assert reply["choices"][0]["message"]["content"] == "go on and "
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert script.has_closed.wait(10)


def test_what_the_format_says_before_an_answer_is_no_part_of_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    make_run(run, byte_level_tokenizer(), context_length=CONTEXT_LENGTH)
    monkeypatch.setitem(FORMATS, "led", dataclasses.replace(CHATML, name="led", lead=" "))
    with serving(str(run), chat_format="led") as port:
        Script(monkeypatch, "  x")
        assert post(port, CHAT, {"messages": HELLO, "max_tokens": 5})[1]["choices"][0]["message"]["content"] == " x"


def test_the_model_and_the_page_are_told_on_request(port):
    with contextlib.closing(connect(port)) as connection:
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read())
        assert [(model["id"], model["object"]) for model in listed["data"]] == [("tiny-chat", "model")]
        connection.request("GET", "/?from=somewhere")  # on the same connection
        page = connection.getresponse()
        assert page.getheader("Content-Type") == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.getheader("Content-Security-Policy")
        assert page.read().startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("path", "table", "status", "code", "message"),
    [
        (CHAT, b"{", 400, None, "the body is not JSON"),
        (CHAT, b"[" * 100_000, 400, None, "the body is not JSON"),
        (CHAT, b"\xff", 400, None, "the body is not JSON"),
        (CHAT, [], 400, None, "not a JSON object"),
        (CHAT, {"model": "gpt-5", "messages": HELLO}, 404, "model_not_found", "ask for 'tiny-chat'"),
        (CHAT, {"model": 3, "messages": HELLO}, 400, None, "model = 3: expected str"),
        (CHAT, {}, 400, None, "messages: there are none"),
        (CHAT, {"messages": [3]}, 400, None, "messages[0]: role null is none of system, user"),
        (CHAT, {"messages": [{"role": "boss", "content": ""}]}, 400, None, 'role "boss"'),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "neither a text"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "half of a surrogate pair"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 999}]}, 400, "context_length_exceeded", "shorten it"),
        (COMPLETIONS, {"prompt": "x " * 999}, 400, "context_length_exceeded", "no room in a context of 128"),
        (COMPLETIONS, {"prompt": [[7, 99_999]]}, 400, None, "the id 99999"),
        (COMPLETIONS, {"prompt": [["a"]]}, 400, None, "expected a text, a list of texts, or token ids"),
        (COMPLETIONS, {"prompt": {"a": 1}}, 400, None, "expected a text, a list of texts, or token ids"),
        (CHAT, {"messages": HELLO, "logprobs": True}, 400, "unsupported_parameter", "logprobs is not something"),
        (CHAT, {"messages": HELLO, "tools": [{}]}, 400, "unsupported_parameter", "tools is not something"),
        (CHAT, {"messages": HELLO, "temprature": 1}, 400, "unsupported_parameter", "temprature"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, None, "temperature = -1.0: must be 0"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, None, 'temperature = "hot": expected float'),
        (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "top_p": NaN}', 400, None, "top_p = nan"),
        (CHAT, {"messages": HELLO, "temperature": 10**400}, 400, None, "expected float"),
        (CHAT, {"messages": HELLO, "seed": 1.5}, 400, None, "seed = 1.5: expected int"),
        (CHAT, {"messages": HELLO, "n": 17}, 400, None, "n = 17: must be from 1 to 16"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, None, "max_tokens = 0"),
        (CHAT, {"messages": HELLO, "stop": [3]}, 400, None, "expected a text or a list of texts"),
        (CHAT, {"messages": HELLO, "stream": "yes"}, 400, None, 'stream = "yes": expected bool'),
        ("/v1/embeddings", {}, 404, None, "/v1/embeddings: there is nothing"),
        ("/", {}, 405, None, "send GET instead of POST"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_request_is_refused_in_openais_form(path, table, status, code, message, port):
    found, reply = post(port, path, table)
    error = reply["error"]
    assert (found, error["code"]) == (status, code)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}


def test_settings_without_effect_are_accepted(port):
    asked = {"messages": HELLO, "user": "me", "logprobs": False, "frequency_penalty": 0, "tools": [], "stop": None,
             "response_format": {"type": "text"}, "temperature": None, "max_tokens": 2}  # fmt: skip
    assert post(port, CHAT, asked)[0] == 200


def test_a_body_that_is_too_large_is_refused(port):
    status, reply = post(port, CHAT, b" " * (MAX_BODY_BYTES + 1))
    assert status == 413
    assert str(MAX_BODY_BYTES) in reply["error"]["message"]


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("POST /v1/completions HTTP/1.1\r\nHost: a\r\n\r\n", 411),
        ("POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 411),
        ("POST /v1/completions HTTP/1.1\r\nContent-Length: " + "9" * 5000 + "\r\n\r\n", 411),
        ("DELETE / HTTP/1.1\r\n\r\n", 501),
        ("nonsense\r\n\r\n", None),  # who may not know what a status is gets none
    ],
)
def test_what_is_hardly_http_is_refused_and_the_connection_closed(request_text, status, port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request_text.encode())
        with connection.makefile("rb") as reply:
            content = reply.read()  # to its end
    head, _, body = content.rpartition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status if status else b""), content
    assert json.loads(body)["error"]["message"]


def test_four_clients_at_once_get_the_answers_that_each_gets_alone(port):
    asked = [{"messages": [{"role": "user", "content": text}], "seed": i, "temperature": 1.0, "max_tokens": 24}
             for i, text in enumerate(["def f", "return", "x + 1", "naïve café"])]  # fmt: skip
    alone = [post(port, CHAT, one)[1]["choices"] for one in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: post(port, CHAT, one)[1]["choices"], asked))
    assert together == alone
    assert len({choices[0]["message"]["content"] for choices in alone}) == 4


def test_a_short_answer_does_not_wait_for_a_long_one(port, monkeypatch):
    script = Script(monkeypatch, "on and on ", is_endless=True)
    with contextlib.closing(connect(port)) as long:
        long.request("POST", CHAT, json.dumps({"messages": HELLO, "stream": True}))
        first = events(long.getresponse())
        next(first)
        _, reply = post(port, CHAT, {"messages": HELLO, "stop": "and"})
        assert reply["choices"][0]["message"]["content"] == "on "
        next(first)
    assert script.num_begun == 2


def test_more_requests_than_are_answered_at_a_time_wait(run, monkeypatch):
    with serving(run, max_requests=1) as port:
        script = Script(monkeypatch, "on and on ", is_endless=True)
        with ThreadPoolExecutor(1) as pool, contextlib.closing(connect(port)) as first:
            first.request("POST", CHAT, json.dumps({"messages": HELLO, "stream": True}))
            chunks = events(first.getresponse())
            next(chunks)
            second = pool.submit(post, port, CHAT, {"messages": HELLO, "stop": "and"})
            for _ in range(20):
                next(chunks)
            assert (script.num_begun, second.done()) == (1, False)
            chunks.close()
            first.close()
            assert second.result(timeout=20)[1]["choices"][0]["message"]["content"] == "on "


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_takes_its_answer_with_it(streams, port, monkeypatch):
    script = Script(monkeypatch, "on and on ", is_endless=True)
    connection = connect(port)
    connection.request("POST", CHAT, json.dumps({"messages": HELLO, "stream": streams}))
    if streams:
        chunks = events(connection.getresponse())
        next(chunks)
    assert not script.has_closed.is_set()
    connection.close()
    if streams:
        chunks.close()  # the reply holds the socket, too
    assert script.has_closed.wait(20)


def test_a_failure_is_told_before_an_answer_or_in_it(port, monkeypatch, capsys):
    script = Script(monkeypatch, "good so far")
    script.tokens = [*script.tokens[:3], "no token"]
    status, reply = post(port, CHAT, {"messages": HELLO})
    assert status == 500
    assert reply["error"]["type"] == "server_error"
    assert reply["error"]["message"].startswith("TypeError: ")
    *chunks, last = stream(port, CHAT, {"messages": HELLO})
    assert len(chunks) >= 1
    assert last == reply
    assert "Traceback" in capsys.readouterr().err
    assert post(port, COMPLETIONS, {"prompt": "a", "max_tokens": 1, "model": "none"})[0] == 404  # it lives


def test_a_base_model_continues_texts_and_says_how_it_would_chat(tmp_path, capsys):
    make_run(tmp_path / "base", byte_level_tokenizer())
    with serving(str(tmp_path / "base"), name="mine") as port:
        assert "has no chat.json" in capsys.readouterr().err
        assert post(port, COMPLETIONS, {"prompt": "def f", "model": "mine", "max_tokens": 3})[0] == 200
        status, reply = post(port, CHAT, {"messages": HELLO})
    assert status == 400
    assert "start the server with --chat-format NAME" in reply["error"]["message"]


def test_a_port_in_use_is_one_line_with_the_remedy(port, run, capsys):
    assert serve.main([run, "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot listen at 127.0.0.1:{port}: Address already in use; choose another --port")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "--port", "0"], "nowhere: does not exist"),
        (["RUN", "--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["RUN", "--max-requests", "0"], "--max-requests 0: must be at least 1"),
        (["RUN", "--port", "0", "--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid:0"),
        (["RUN", "--port", "0", "--temperature", "-1"], "temperature = -1.0"),
        (["RUN", "--port", "0", "--chat-format", "chatlm"], "did you mean 'chatml'?"),
        (["RUN", "--port", "0", "--chat-format", "gemma"], "the tokenizer has no <bos>"),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments, complaint, run, capsys):
    with contextlib.suppress(SystemExit):  # of the command line's own checks
        assert serve.main([run if argument == "RUN" else argument for argument in arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_server_in_the_middle_of_an_answer(number, run):
    command = [sys.executable, "-m", "evaluation.serve", run, "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread())
    try:
        told = server.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+) serves tiny-chat", told)[1])
        with contextlib.closing(connect(port)) as idle, contextlib.closing(connect(port)) as connection:
            idle.request("GET", "/v1/models")
            assert idle.getresponse().read()
            asked = {"prompt": ["a"] * 100_000, "max_tokens": 99, "temperature": 0, "stream": True}
            connection.request("POST", COMPLETIONS, json.dumps(asked))
            chunks = events(connection.getresponse())
            next(chunks)
            server.send_signal(number)
            *_, last = chunks
            assert last["error"]["message"] == "the server is shutting down"
        _, errors = server.communicate(timeout=30)
        assert server.returncode == 0
        assert "Traceback" not in errors
    finally:
        server.kill()
        server.communicate()


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, evaluation.serve as s\ntry: s.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
    assert "--max-requests" in done.stdout
