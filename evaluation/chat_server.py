"""An HTTP server for one model: OpenAI's API under /v1, and a page at /.

Every request has a thread, and one thread more computes for all. Requests that are answered at the same time take
turns, token by token, so that each is answered as if it were alone. A client that goes away takes its answer with it.
"""

import json
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from evaluation.chat_session import Delta, stream_answer
from evaluation.openai_format import ApiError, Reply, Request, Served, models, read_request

MAX_BODY_BYTES = 4 * 2**20
PAGE = Path(__file__).with_name("page.html")
# The page brings all it needs, and may ask nobody but this server.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
_METHODS = {"/": "GET", "/v1/models": "GET", "/v1/chat/completions": "POST", "/v1/completions": "POST"}


class ChatServer(socketserver.ThreadingTCPServer):
    """Serves what `load_served` gives to those who connect to a listening socket."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, load_served: Callable[[], Served], *, max_requests: int) -> None:
        super().__init__(listener.getsockname(), ChatHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.started_s = int(time.time())
        self.page = PAGE.read_bytes()
        self.slots = threading.BoundedSemaphore(max_requests)
        self._max_requests, self._is_closing = max_requests, False
        # Only this thread meets the model: CUDA's current device and OpenMP's workers belong to a thread.
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.served = self._compute(load_served)

    def steps(self, request: Request) -> Generator[list[Delta], None, None]:
        """What each step adds to the answers; samples are counted over prompts."""
        for i, prompt in enumerate(request.prompts):
            with closing(stream_answer(self.served.loaded, prompt, request.wish)) as steps:
                while (deltas := self._compute(next, steps, None)) is not None:
                    yield [delta._replace(sample=delta.sample + i * request.wish.num_samples) for delta in deltas]

    def close(self) -> None:
        """Stops listening, tells those who wait that there is no answer, and ends the model's thread."""
        self._is_closing = True
        self.server_close()
        deadline_s = time.monotonic() + 5
        for _ in range(self._max_requests):
            self.slots.acquire(timeout=max(0.0, deadline_s - time.monotonic()))
        self._model_thread.shutdown(cancel_futures=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A lost connection is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._is_closing:
            raise ApiError(503, "the server is shutting down")
        return self._model_thread.submit(function, *arguments).result()


class ChatHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: ChatServer
    server_version = "bessemer"
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True
    _is_streaming = False
    """Whether a reply has begun, so that an error can no longer have a status of its own."""

    def do_GET(self) -> None:
        """The page, or what is served."""
        with self._told_failures():
            if self._route() == "/":
                self._send(200, self.server.page, "text/html; charset=utf-8", _PAGE_HEADERS)
            else:
                self._send_json(200, models(self.server.served.name, self.server.started_s))

    def do_POST(self) -> None:
        """An answer, or why there is none."""
        with self._told_failures():
            body = self._body()
            is_chat = self._route() == "/v1/chat/completions"
            request = read_request(body, self.server.served, is_chat=is_chat)
            with self.server.slots, self._told_failures():  # before the slot is free: `close` waits for it
                self._answer(request)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself is refused in the same form."""
        self.close_connection = True
        self._fail(ApiError(code, message or explain or "not a request that this server knows"))

    @contextmanager
    def _told_failures(self) -> Generator[None, None, None]:
        try:
            yield
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            self.log_message("the client went away")
        except ApiError as error:
            self._fail(error)
        except Exception as error:
            traceback.print_exc()
            self._fail(ApiError(500, f"{type(error).__name__}: {error}"))

    def _route(self) -> str:
        path = self.path.partition("?")[0]
        if path not in _METHODS:
            raise ApiError(404, f"{path}: there is nothing; known are {', '.join(_METHODS)}")
        if _METHODS[path] != self.command:
            raise ApiError(405, f"{path}: send {_METHODS[path]} instead of {self.command}")
        return path

    def _body(self) -> bytes:
        told = self.headers.get("Content-Length")
        length = int(told) if told is not None and told.isdecimal() and len(told) < 16 else None
        if length is not None and length <= MAX_BODY_BYTES:
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionAbortedError
            return body
        self.close_connection = True  # what comes next on this connection is not a request
        if length is None:
            raise ApiError(411, f"Content-Length = {told}: expected the number of bytes of the body")
        left = min(length, 16 * MAX_BODY_BYTES)
        while left and (block := self.rfile.read(min(left, 2**16))):  # a client reads the reply when all is sent
            left -= len(block)
        raise ApiError(413, f"the body has {length} bytes; at most {MAX_BODY_BYTES} are read")

    def _answer(self, request: Request) -> None:
        reply = Reply(request, self.server.served.name)
        with closing(self.server.steps(request)) as steps:
            for deltas in steps:
                chunks = reply.chunks(deltas)
                for chunk in chunks if request.streams else ():
                    self._send_event(chunk)
                if self._client_is_gone():
                    raise ConnectionAbortedError
        if not request.streams:
            self._send_json(200, reply.whole())
            return
        if request.has_usage:
            self._send_event(reply.usage_chunk())
        self.wfile.write(b"data: [DONE]\n\n")

    def _client_is_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _fail(self, error: ApiError) -> None:
        if self._is_streaming:
            self._send_event(error.body)
        else:
            self._send_json(error.status, error.body)

    def _send_event(self, table: dict[str, Any]) -> None:
        if not self._is_streaming:
            self._is_streaming = self.close_connection = True
            self.send_response(200)
            self._send_headers({"Content-Type": "text/event-stream", "Connection": "close"})
        self.wfile.write(b"data: " + json.dumps(table).encode() + b"\n\n")

    def _send_json(self, status: int, table: dict[str, Any]) -> None:
        self._send(status, json.dumps(table).encode(), "application/json", {})

    def _send(self, status: int, content: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        closing_header = {"Connection": "close"} if self.close_connection else {}
        self._send_headers({"Content-Type": kind, "Content-Length": str(len(content)), **headers, **closing_header})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in {**headers, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, value)
        self.end_headers()
