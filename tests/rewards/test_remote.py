"""Rewards by HTTP against servers in this process that answer as a test tells them."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mindrlhf.errors import UserError
from mindrlhf.rewards import Rewards, remote
from mindrlhf.rewards.remote import RemoteReward, checked_url
from mindrlhf.types import Prompt

PROMPTS = [Prompt(None, "p", label, i, {}) for i, label in enumerate(["1", None, 3])]
COMPLETIONS = ["a", "bb", "ccc"]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(asked)
        server.headers.append(self.headers)
        answer = server.script.pop(0) if server.script else {}
        answer = answer(asked) if callable(answer) else dict(answer)
        if answer.pop("hang_up", False):
            return
        if "sleep" in answer:
            time.sleep(answer.pop("sleep"))
        body = answer.pop("body", None)
        body = lengths(asked) if body is None else body
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(body)), **answer.pop("headers", {})}
        self.send_response(answer.pop("status", 200))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
        assert not answer

    def log_message(self, *arguments):
        pass


def lengths(asked):
    return {"rewards": [len(query) for query in asked["query"]]}


@pytest.fixture()
def serve():
    """A function: answers, one a request and then right ones for ever -> a running server with .url and .asked."""
    servers = []

    def start(*script):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.script, server.asked, server.headers = list(script), [], []
        server.url = f"http://127.0.0.1:{server.server_port}/get_reward"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture()
def ask():
    """A function: servers or URLs -> the rewards of COMPLETIONS, with pauses of milliseconds."""

    def call(*servers, **options):
        urls = [getattr(server, "url", server) for server in servers]
        reward = RemoteReward(urls, first_pause=0.001, **options)
        return Rewards([("remote", reward, 1.0)])(PROMPTS, COMPLETIONS)

    return call


def test_the_protocol(serve, ask):
    body = {"rewards": [1, 2.5, None], "scores": [0, 1, 0], "extra_logs": {"length": [1, 2, 3], "rate": 0.5}}
    server = serve({"body": body})
    total, parts = ask(server)
    assert server.asked == [{"query": ["pa", "pbb", "pccc"], "prompts": ["p"] * 3, "labels": ["1", None, 3]}]
    assert "Authorization" not in server.headers[0]
    assert total.tolist() == [1, 2.5, 0]
    assert {name: values.tolist() for name, values in parts.items()} == {
        "remote": [1, 2.5, 0],
        "remote/scores": [0, 1, 0],
        "remote/length": [1, 2, 3],
        "remote/rate": [0.5] * 3,
        "remote/retries": [0] * 3,
    }


def test_a_bare_number_for_one_and_nothing_for_none(serve):
    server = serve({"body": {"rewards": 2}})
    assert RemoteReward([server.url])(["pa"], ["p"], [None])["rewards"] == [2]
    assert RemoteReward([server.url])([], [], []) == {"rewards": [], "scores": None, "extra_logs": {"retries": 0.0}}
    assert len(server.asked) == 1


def test_the_token(serve, ask, monkeypatch):
    monkeypatch.setenv("MINDRLHF_REWARD_TOKEN", "secret")
    server = serve()
    ask(server)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("MINDRLHF_REWARD_TOKEN", "two words")
    with pytest.raises(UserError, match="^reward 'remote': MINDRLHF_REWARD_TOKEN: holds white space"):
        ask(server)


def test_no_proxy_to_this_machine(serve, ask, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert ask(serve(), retries=0)[0].tolist() == [2, 3, 4]


def test_servers_share_the_load_at_the_same_time(serve, ask):
    """Each answers only when the other is asked, too."""
    both = threading.Barrier(2, timeout=60)

    def wait(asked):
        both.wait()
        return {}

    servers = [serve(wait), serve(wait)]
    total, parts = ask(*servers)
    assert total.tolist() == [2, 3, 4] and parts["remote/retries"].tolist() == [0] * 3
    assert [server.asked[0]["query"] for server in servers] == [["pa", "pbb"], ["pccc"]]
    assert servers[0].asked[0]["labels"] == ["1", None]


def test_logs_that_one_server_leaves_out_count_as_none(serve, ask):
    first = serve({"body": {"rewards": [1, 1], "scores": [5, 5], "extra_logs": {"a": 7}}})
    _, parts = ask(first, serve({"body": {"rewards": [1], "extra_logs": {"b": [8]}}}))
    assert parts["remote/scores"].tolist() == [5, 5, 0]
    assert parts["remote/a"].tolist() == [7, 7, 0] and parts["remote/b"].tolist() == [0, 0, 8]


@pytest.mark.parametrize(
    "fault",
    [
        {"hang_up": True},
        {"status": 500, "body": {"error": "oh"}},
        {"status": 503, "headers": {"Retry-After": "0"}},
        {"status": 429, "headers": {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}},
        {"status": 408},
        {"body": b'{"rewards": [', "headers": {"Content-Length": "40"}},  # killed while it answered
        {"sleep": 60},
    ],
    ids=str,
)
def test_what_is_tried_again(fault, serve, ask, monkeypatch):
    post, waits = remote.post, iter([0.2, 0.2] if "sleep" in fault else [])
    monkeypatch.setattr(remote, "post", lambda url, body, timeout: post(url, body, next(waits, timeout)))
    server = serve(fault, fault)
    total, parts = ask(server, timeout=60)
    assert total.tolist() == [2, 3, 4] and parts["remote/retries"].tolist() == [2] * 3 and len(server.asked) == 3


def test_shares_of_a_dead_server_move_to_others(serve, ask):
    alive, dead = serve(), serve()
    dead.shutdown()
    dead.server_close()
    total, parts = ask(dead, alive)
    assert total.tolist() == [2, 3, 4] and parts["remote/retries"].tolist() == [1] * 3 and len(alive.asked) == 2


def test_pauses_double_and_obey_retry_after(serve, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: high)
    bad, busy, out = ({"status": 503, "headers": {"Retry-After": after}} for after in ("0", "9", "9999"))
    server = serve(bad, bad, bad, busy, out)
    assert RemoteReward([server.url])(["pa"], ["p"], [None])["extra_logs"]["retries"] == 5
    assert pauses == [1.25, 2.5, 5.0, 9 * 1.25, 60 * 1.25]


def test_after_the_retries(serve, ask):
    server = serve(*[{"status": 500, "body": {"error": "out of\nmemory"}}] * 4)
    with pytest.raises(UserError) as caught:
        ask(server, retries=3)
    assert str(caught.value) == (
        f"reward 'remote': {server.url}: no answer in 4 attempts, the last: HTTP 500 Internal Server Error: out of "
        "memory; see that the server runs there (`mindrlhf serve-rm`), or raise timeout or retries of this reward"
    )
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=f"{server.url}: no answer in 1 attempts, the last: .*Connection refused; see"):
        ask(server, retries=0)
    with pytest.raises(UserError, match="the last: nothing came within 0.1 seconds; see"):
        ask(serve({"sleep": 60}), retries=0, timeout=0.1)


def test_a_server_that_drips_is_slow(serve, ask, monkeypatch):
    """Each byte is in time, the whole is not."""
    server = serve()

    def drip(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(50):
                handler.wfile.write(b" ")
                time.sleep(0.05)

    monkeypatch.setattr(Handler, "do_POST", drip)
    with pytest.raises(UserError, match="the last: nothing came within 0.2 seconds"):
        ask(server, retries=0, timeout=0.2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 400, "body": {"error": "text 7 is\n too long"}}, "URL: HTTP 400 Bad Request: text 7 is too long"),
        ({"status": 422, "body": {"detail": "no"}}, "URL: HTTP 422 Unprocessable .*: no"),
        ({"status": 404, "body": b"<html>" + b"x" * 999}, r"URL: HTTP 404 Not Found: <html>x{294}\.\.\."),
        ({"status": 401}, "URL: HTTP 401 Unauthorized.*; set MINDRLHF_REWARD_TOKEN to the server's token"),
        ({"status": 302, "headers": {"Location": "http://x/"}}, "URL: redirects to 'http://x/'; write the"),
        ({"body": b"<html>"}, "URL: answered with '<html>', which is not JSON; is it a reward server?"),
        ({"body": b"[" * 100000}, r"URL: answered with '\[{60}', which is not JSON"),
        ({"body": [1, 2, 3]}, r'URL: the answer is no object with "rewards", it is \[1, 2, 3\]'),
        ({"body": {"reward": [1], "x": 1}}, 'URL: the answer is no object with "rewards", it has reward, x'),
        ({"body": {"rewards": [1, 2]}}, 'URL: "rewards" are 2 numbers for 3 answers'),
        ({"body": {"rewards": 1.5}}, 'URL: "rewards" are 1.5 for 3 answers'),
        ({"body": b'{"rewards": [1, NaN, 3]}'}, 'URL: "rewards" has nan at index 1, which is not a finite number'),
        ({"body": b'{"rewards": [1, 2, -Infinity]}'}, 'URL: "rewards" has -inf at index 2'),
        ({"body": {"rewards": [1, "2", 3]}}, "URL: \"rewards\" has '2' at index 1, which is not a finite number"),
        ({"body": b'{"rewards": [1' + b"0" * 400 + b", 2, 3]}"}, 'URL: "rewards" has 10+ at index 0'),
        ({"body": {"rewards": [1, 2, 3], "scores": [1]}}, 'URL: "scores" are 1 numbers for 3 answers'),
        ({"body": {"rewards": [1, 2, 3], "extra_logs": {"a": "x"}}}, "URL: \"a\" are 'x' for 3 answers"),
        ({"body": {"rewards": [1, 2, 3], "extra_logs": [1]}}, 'URL: "extra_logs" is a list; it must be an object'),
    ],
)
def test_what_is_not_tried_again(answer, message, serve, ask):
    server = serve(answer)
    with pytest.raises(UserError, match="^reward 'remote': " + message.replace("URL", server.url)) as caught:
        ask(server)
    assert len(server.asked) == 1 and "\n" not in str(caught.value)


def test_too_large_an_answer(serve, ask, monkeypatch):
    monkeypatch.setattr(remote, "LARGEST_RESPONSE", 1 << 20)
    with pytest.raises(UserError, match="answers with more than 1 MB"):
        ask(serve({"body": b" " * (2 << 20)}))


def test_a_label_that_json_cannot_hold(serve):
    server = serve()
    with pytest.raises(UserError, match="a label is not a finite number"):
        RemoteReward([server.url])(["pa"], ["p"], [float("nan")])
    assert not server.asked


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:5000", "has no scheme; write http://127.0.0.1:5000 or https://127.0.0.1:5000"),
        ("localhost:5000/get_reward", "write http://localhost:5000/get_reward"),
        ("ftp://host/", "ftp is not supported; use http or https"),
        ("file:///etc/passwd", "file is not supported"),
        ("http://", "is not complete"),
        ("http:///path", "is not complete"),
        ("http://host:port/", "write it as http://host:port/path"),
        ("http://host:99999/", "write it as http://host:port/path"),
        ("http://a b/", "is not complete"),
        ("http://me:secret@host/", "put no user and password in it; set MINDRLHF_REWARD_TOKEN"),
    ],
)
def test_bad_urls(url, message):
    with pytest.raises(UserError, match=message) as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls: none is named"),
        ({"timeout": 0.0}, "timeout: 0.0 must be over 0 seconds"),
        ({"timeout": float("nan")}, "timeout: nan must be over 0"),
        ({"retries": -1}, "retries: -1 must be 0 or more"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        RemoteReward(**{"urls": ["http://localhost"], **options})


def test_several_servers_with_weights_run_beside_local_functions(serve):
    """The local function waits until both servers were asked."""
    first, second = serve(), serve()

    def local(completions, **columns):
        deadline = time.monotonic() + 60
        while not (first.asked and second.asked) and time.monotonic() < deadline:
            time.sleep(0.001)
        return [100.0] * len(completions)

    parts = [
        ("local", local, 1.0),
        ("remote", RemoteReward([first.url]), 0.5),
        ("remote", RemoteReward([second.url]), 2.0),
    ]
    total, values = Rewards(parts)(PROMPTS, COMPLETIONS)
    assert first.asked and second.asked
    assert total.tolist() == [105, 107.5, 110]
    assert [name for name in values if "/" not in name] == ["local", "remote", "remote_2"]
