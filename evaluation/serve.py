"""Serves a model over HTTP: OpenAI's API under /v1, and a page to talk to it at /.

    python -m evaluation.serve runs/sft
    curl -N http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Where does Elna live?"}], "stream": true}'

There are no keys: whoever reaches the port can use the model. Ctrl-C ends it.
"""

import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from data_prep import command_line

if TYPE_CHECKING:
    from evaluation.chat_server import ChatServer
    from evaluation.openai_format import Served

# torch and the model are imported where they are used, so that --help is instant.


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeCommand:
    """Serves a model over HTTP: OpenAI's API under /v1, and a page to talk to it at /."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one, without any protection."""
    port: int = 8000
    """Port to listen at; 0 picks a free one."""
    name: str | None = None
    """Name under which the model is asked for, by default that of its folder."""
    max_requests: int = 8
    """Requests that are answered at the same time; others wait."""
    max_new_tokens: int = 512
    """Longest answer where a request does not say, in tokens."""
    temperature: float = 0.8
    """Divides the logits where a request does not say; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Keep only the likeliest tokens whose probabilities together reach p, where a request does not say."""
    chat_format: str = "auto"
    """auto (the model's own, if it has one), or the name of one, for models that were fine-tuned elsewhere."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuses what can never be served."""
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: must be from 0 to 65535")
        for key in ("max_requests", "max_new_tokens"):
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be at least 1")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = str(error.strerror).partition(" (while ")[0]
        raise ValueError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port (0 picks a free one) or --host"
        ) from error


def make_server(command: ServeCommand, listener: socket.socket) -> "ChatServer":
    """A server whose model is loaded; `serve_forever` answers."""
    from evaluation.chat_server import ChatServer

    return ChatServer(listener, lambda: _load(command), max_requests=command.max_requests)


def _load(command: ServeCommand) -> "Served":
    from data_prep.chat.chat_format import ChatFormatError
    from evaluation.chat_session import usable_chat_format
    from evaluation.model_folder import load_model
    from evaluation.openai_format import Served
    from evaluation.sampling import Sampling

    sampling = Sampling(temperature=command.temperature, top_p=command.top_p)
    loaded = load_model(command.model, device=command.device)
    try:
        chat_format = usable_chat_format(loaded, command.chat_format)
    except ChatFormatError as error:
        if command.chat_format != "auto":
            raise
        chat_format = None
        print(f"note: /v1/completions alone is served. {error}", file=sys.stderr)
    name = command.name or command.model.resolve().name
    return Served(
        name=name, loaded=loaded, chat_format=chat_format, sampling=sampling, max_new_tokens=command.max_new_tokens
    )


def serve(command: ServeCommand) -> None:
    """Serves until SIGINT or SIGTERM."""
    with listen(command.host, command.port) as listener:  # before the model is loaded: a busy port shows at once
        server = make_server(command, listener)
        for number in (signal.SIGINT, signal.SIGTERM):
            # serve_forever runs in this thread, and `shutdown` waits for it.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        host, port = f"[{command.host}]" if ":" in command.host else command.host, listener.getsockname()[1]
        print(f"http://{host}:{port} serves {server.served.name}: a page at /, OpenAI's API under /v1", flush=True)
        server.serve_forever(poll_interval=0.1)
        server.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        serve(command_line.read(ServeCommand, argv, prog="python -m evaluation.serve", description=__doc__))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
