"""A reward model behind HTTP, in the protocol that rewards/remote.py speaks.

Each connection has a thread, which only reads, waits and writes. The model runs in the thread that called `serve`, the
main one, since MindSpore is not made for several.
"""

import contextlib
import hmac
import json
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.rewards.remote import TOKEN_VARIABLE, bearer_token, is_loopback
from mindrlhf.trainer.score_queue import BAD_REQUEST, OK, TOO_LARGE, UNAVAILABLE, Refusal, Request, ScoreQueue
from mindrlhf.utils.parallel import start

PATHS = ("/", "/get_reward")
MOST_CONNECTIONS = 128
SILENCE = 30.0  # seconds without a byte after which a connection is closed
BODY_SECONDS = 120.0  # of a whole body
DISCARD_SECONDS = 5.0  # of a body that is too large
STOP_SECONDS = 10.0  # for what is queued when the server is told to stop
RETRY_AFTER = 1  # seconds that a client is asked to wait where the server is full


@dataclass(frozen=True)
class ServerSettings:
    """What `mindrlhf serve-rm` was asked for."""

    model: str  # directory
    host: str = "127.0.0.1"
    port: int = 5000  # 0: any that is free
    max_batch: int = 64  # texts scored at once
    max_wait: float = 0.005  # seconds that a batch waits for more
    queue: int = 1024  # texts that may wait
    max_body: int = 16 << 20  # bytes of a request
    normalize: bool = False


def serve(settings: ServerSettings) -> None:
    """Until SIGTERM or SIGINT. Raises UserError for a bad address, no token where one is needed, and a bad model."""
    queue = ScoreQueue(settings.queue, settings.max_batch, settings.max_wait)
    with RewardServer(settings, queue) as server:
        start()
        from mindrlhf.trainer.reward_model import RewardModel

        model = RewardModel.open(settings.model)
        model.score_texts([""], ["warm up"])  # compiles the first shape, before anybody waits for it
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with server.address_errors():
            server.server_activate()
        accepting = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        accepting.start()
        print(f"listening on {server.url}", flush=True)
        while not stop.is_set():
            queue.answer_next(model, 0.2, settings.normalize)
        server.shutdown()
        server.server_close()
        queue.finish(model, STOP_SECONDS, settings.normalize)
    print(f"stopped; {queue.answered} texts were scored", flush=True)


class RewardServer(ThreadingHTTPServer):
    """Bound to its address when made, so that a port in use is known before a model is loaded; not yet listening."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, settings: ServerSettings, queue: ScoreQueue):
        self.settings, self.queue, self.token = settings, queue, bearer_token()
        with self.address_errors():
            self.address_family, _, _, _, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            if not is_loopback(address[0]) and not self.token:
                problem = f"{settings.host} can be reached from other machines, so a token is needed"
                raise UserError(f"--host: {problem}; set {TOKEN_VARIABLE} here and for the clients")
            super().__init__(address[:2], Handler, bind_and_activate=False)
            self.server_bind()
        self.connections = threading.BoundedSemaphore(MOST_CONNECTIONS)

    @contextlib.contextmanager
    def address_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"--host {self.settings.host} --port {self.settings.port}"
            raise UserError(f"{where}: {error.strerror}; choose another, or --port 0 for any that is free") from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks the host's name up, which may take long

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.settimeout(1.0)
        with contextlib.suppress(OSError):  # it may have gone already
            request.sendall(f"HTTP/1.1 503 Busy\r\nRetry-After: {RETRY_AFTER}\r\nContent-Length: 0\r\n\r\n".encode())
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes away is no news
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection: any number of requests after each other."""

    protocol_version = "HTTP/1.1"  # connections stay open
    server_version, sys_version = "mindrlhf", ""
    timeout = SILENCE
    disable_nagle_algorithm = True
    server: RewardServer

    def do_GET(self) -> None:
        queue = self.server.queue
        if self.path != "/health":
            self.send_error(HTTPStatus.NOT_FOUND, f"no {self.path:.60}; GET /health, POST / or /get_reward")
            return
        status = "stopping" if queue.stopping else "ok"
        model = self.server.settings.model
        self._reply(OK, {"status": status, "model": model, "queued": queue.waiting, "answered": queue.answered})

    def do_POST(self) -> None:
        queue = self.server.queue
        try:
            self._check_address()
            request = read_request(self._body())
            queue.submit(request)
        except Refusal as refusal:
            self.send_error(refusal.status, str(refusal))
            return
        try:
            while not request.done.wait(1.0):
                if self._client_is_gone():
                    self.close_connection = True
                    return
            if request.refusal:
                self.send_error(request.refusal.status, str(request.refusal))
            else:
                scores = [float(score) for score in request.scores]
                self._reply(OK, {"rewards": scores, "scores": scores, "extra_logs": {}})
        finally:
            queue.close(request)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also what http.server itself answers malformed requests with. The connection ends: its body may be unread."""
        self.close_connection = True
        headers = {"Connection": "close"}
        if code == UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_AFTER)
        elif code == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        self._reply(code, {"error": " ".join((message or HTTPStatus(code).phrase).split())}, headers)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not a line a request."""

    def _reply(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _check_address(self) -> None:
        """Token and path. Raises Refusal."""
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        token = self.server.token
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            self._discard()
            raise Refusal(HTTPStatus.UNAUTHORIZED, "wants the header Authorization: Bearer and the server's token")
        if self.path not in PATHS:
            self._discard()
            raise Refusal(HTTPStatus.NOT_FOUND, f"no {self.path:.60}; POST to / or /get_reward")

    def _body(self) -> bytes:
        """Raises Refusal for one of unknown or too large size, or too slow, and OSError where the client goes away."""
        length, limit = self.headers.get("Content-Length", ""), self.server.settings.max_body
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length; send it whole")
        if len(length) > 18 or int(length) > limit:
            self._discard()
            fix = "send fewer texts at a time, or start the server with a larger --max-body-mb"
            raise Refusal(TOO_LARGE, f"the request has {length:.20} bytes, the limit is {limit}; {fix}")
        chunks, missing, deadline = [], int(length), time.monotonic() + BODY_SECONDS
        while missing:
            chunk = self.rfile.read1(min(missing, 1 << 16))
            if not chunk:
                raise ConnectionError("the body ended early")
            if time.monotonic() > deadline:  # a byte now and then keeps the socket's own timeout from striking
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, f"the body took more than {BODY_SECONDS:.0f} seconds")
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)

    def _discard(self) -> None:
        """What a client is still sending: were it cut off, it would see that instead of the answer."""
        length, deadline = self.headers.get("Content-Length", ""), time.monotonic() + DISCARD_SECONDS
        missing = int(length[:18]) if length.isascii() and length.isdigit() else 0
        while missing and time.monotonic() < deadline:
            missing -= len(self.rfile.read1(min(missing, 1 << 16))) or missing

    def _client_is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


def read_request(body: bytes) -> Request:
    """From the protocol's JSON. A query is its prompt and an answer; without prompts each is scored as a whole, which
    tokenises otherwise. Raises Refusal."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(BAD_REQUEST, f"the body is not JSON: {error}") from None
    if not isinstance(content, dict) or "query" not in content:
        raise Refusal(BAD_REQUEST, 'the body must be {"query": [text, ...], "prompts": [text, ...]}')
    queries, prompts = _texts(content, "query"), _texts(content, "prompts")
    if prompts and len(prompts) != len(queries):
        raise Refusal(BAD_REQUEST, f'"prompts" are {len(prompts)} for {len(queries)} texts of "query"')
    prompts = prompts or [""] * len(queries)
    for i, (prompt, query) in enumerate(zip(prompts, queries, strict=True)):
        if not query.startswith(prompt):
            raise Refusal(BAD_REQUEST, f'"query" at index {i} does not begin with its prompt; send prompt + answer')
    answers = [query[len(prompt) :] for prompt, query in zip(prompts, queries, strict=True)]
    return Request(prompts, answers)


def _texts(content: dict[str, Any], name: str) -> list[str]:
    """A list of texts; empty for what is missing or null."""
    values = content.get(name)
    values = [] if values is None else values
    if not isinstance(values, list):
        raise Refusal(BAD_REQUEST, f'"{name}" is a {type(values).__name__}, not a list of texts')
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise Refusal(BAD_REQUEST, f'"{name}" has a {type(value).__name__} at index {i}, not text')
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and tokenizers cannot read
            raise Refusal(BAD_REQUEST, f'"{name}" has text at index {i} that is not Unicode') from None
    return values
