"""A model fit to be talked to, a server of it, and answers written by the test instead of by the model."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from data_prep.chat.chat_folder import ChatFolder, write_chat_folder
from data_prep.chat.chat_format import FORMATS
from evaluation.serve import ServeCommand, listen, make_server
from tests.evaluation.stored import byte_level_tokenizer, make_run

CONTEXT_LENGTH = 128
CHATML = FORMATS["chatml"]


def make_chat_run(run: Path) -> str:
    """A run on chat data, of a random model."""
    make_run(run, byte_level_tokenizer(), context_length=CONTEXT_LENGTH)
    write_chat_folder(run, ChatFolder("chat", 64, CHATML))
    return str(run)


@contextlib.contextmanager
def serving(run: str, **settings) -> Iterator[int]:
    """The port of a server in this process."""
    listener = listen("127.0.0.1", 0)
    server = make_server(ServeCommand(model=Path(run), device="cpu", **settings), listener)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.shutdown()
        thread.join()
        server.close()


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=30)


def post(port: int, path: str, table) -> tuple[int, dict]:
    """Status and JSON of a reply."""
    with contextlib.closing(connect(port)) as connection:
        body = table if isinstance(table, bytes) else json.dumps(table)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.getheader("Content-Type") == "application/json"
        return reply.status, json.loads(reply.read())


def events(reply: http.client.HTTPResponse) -> Iterator[dict | str]:
    """The data of server-sent events as they come, JSON but for [DONE]."""
    assert reply.getheader("Content-Type") == "text/event-stream"
    while line := reply.readline():
        assert reply.readline() == b"\n"
        data = line.decode().removeprefix("data: ").rstrip("\n")
        yield data if data == "[DONE]" else json.loads(data)


class Script:
    """In place of `evaluation.chat_session.generate`: says a text one token at a time, for ever if `is_endless`."""

    def __init__(self, monkeypatch, text: str, *, is_endless: bool = False) -> None:
        tokenizer = byte_level_tokenizer()
        self.tokens = tokenizer.encode(text)
        self.stop_id = CHATML.stop_ids(tokenizer)[0]
        self.is_endless = is_endless
        self.num_begun = 0
        self.has_closed = threading.Event()
        monkeypatch.setattr("evaluation.chat_session.generate", self._generate)

    def _generate(self, model, prompt, **settings) -> Iterator[list[int | None]]:
        self.num_begun += 1
        return self._steps(settings["num_samples"])

    def _steps(self, num_samples: int) -> Iterator[list[int | None]]:
        try:
            while True:
                for token in self.tokens:
                    yield [token] * num_samples
                if not self.is_endless:
                    yield [self.stop_id] * num_samples
                    return
        finally:
            self.has_closed.set()
