"""`mindrlhf serve-rm` as a process, asked by rewards/remote.py and by hand."""

import http.client
import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mindrlhf.cli.main import main
from mindrlhf.errors import UserError
from mindrlhf.rewards.remote import RemoteReward
from tests.servers import RewardServer, wait_until, write_reward_model

PROMPTS = ["12=", "345=", "7=", "12="]
ANSWERS = ["one two", "three four five", "", "two one<|endoftext|>"]


@pytest.fixture(scope="module")
def model(mindspore, tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("served") / "reward_model", mindspore)


@pytest.fixture(scope="module")
def oracle(model):
    """A function: prompts, answers -> the scores of the same model in this process."""
    from mindrlhf.trainer.reward_model import RewardModel

    return RewardModel.open(model).score_texts


@pytest.fixture(scope="module")
def shared_server(model):
    with RewardServer(model, "--queue", "100", "--max-body-mb", "0.05", "--max-batch", "8") as server:
        yield server


@pytest.fixture()
def server(shared_server):
    if shared_server.process.poll() is not None:  # a test has stopped it
        shared_server.start()
    return shared_server


def asked(server, prompts, answers, **options):
    reward = RemoteReward([server.url], **options)
    return reward([p + a for p, a in zip(prompts, answers, strict=True)], prompts, [None] * len(prompts))


def post(server, body, path="/", **headers):
    """Status and JSON of one request by hand."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    answer = response.status, json.load(response), response.headers
    connection.close()
    return answer


def test_scores_are_the_model_s(server, oracle):
    answer = asked(server, PROMPTS, ANSWERS)
    assert answer["rewards"] == answer["scores"] and answer["extra_logs"] == {"retries": 0}
    np.testing.assert_allclose(answer["rewards"], oracle(PROMPTS, ANSWERS), atol=1e-5)
    assert len(np.unique(answer["rewards"])) == 4


def test_more_than_a_batch_and_nothing(server, oracle):
    prompts = [f"{number}=" for number in range(50)]
    answers = ["one"] * 50
    np.testing.assert_allclose(asked(server, prompts, answers)["rewards"], oracle(prompts, answers), atol=1e-5)
    assert post(server, {"query": []})[:2] == (200, {"rewards": [], "scores": [], "extra_logs": {}})


def test_queries_without_their_prompts(server, oracle):
    """The whole text is scored where no prompt is given; one that begins with another prompt is a mistake."""
    whole = oracle(["", ""], ["12=one two", "12=one two<|endoftext|>"])
    assert whole[0] == pytest.approx(whole[1], abs=1e-5)  # the stop token is not doubled
    status, answer, _ = post(server, {"query": ["12=one two"]}, "/get_reward")
    assert status == 200 and answer["rewards"] == pytest.approx([whole[0]], abs=1e-5)
    status, answer, _ = post(server, {"query": ["12=one two"], "prompts": ["13="]}, "/get_reward")
    assert (
        status == 400 and answer["error"] == '"query" at index 0 does not begin with its prompt; send prompt + answer'
    )


def test_many_clients(server, oracle):
    """Each gets its own answers, whoever shares its batches."""
    jobs = [([f"{a}{b}=" for b in range(1 + a % 3)], ["one two three"[: 3 + a % 11]] * (1 + a % 3)) for a in range(48)]
    before = server.health()["answered"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: asked(server, *job)["rewards"], jobs))
    for job, answer in zip(jobs, answers, strict=True):
        np.testing.assert_allclose(answer, oracle(*job), atol=1e-5)
    health = server.health()
    assert health["answered"] - before == sum(len(prompts) for prompts, _ in jobs)
    assert (health["status"], health["model"], health["queued"]) == ("ok", str(server.model), 0)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON: Expecting property name"),
        (b"", 400, "the body is not JSON"),
        (b"[" * 40000, 400, "the body is not JSON"),
        (b'"\xff"', 400, "the body is not JSON"),
        ([1], 400, 'the body must be {"query": [text, ...], "prompts": [text, ...]}'),
        ({"prompts": ["1"]}, 400, 'the body must be {"query"'),
        ({"query": "12=one"}, 400, '"query" is a str, not a list of texts'),
        ({"query": ["1", 2]}, 400, '"query" has a int at index 1, not text'),
        ({"query": ["\ud800"]}, 400, '"query" has text at index 0 that is not Unicode'),
        ({"query": ["1"], "prompts": {}}, 400, '"prompts" is a dict, not a list of texts'),
        ({"query": ["1"], "prompts": ["1", "2"]}, 400, '"prompts" are 2 for 1 texts of "query"'),
        ({"query": ["1", ""]}, 400, "neither a prompt nor an answer"),
        ({"query": ["1", "one " * 99]}, 400, "tokens, the reward model's window is 64; lower sampling.max_tokens"),
        ({"query": ["1"] * 101}, 413, "101 texts, the queue holds 100; send fewer at a time, or start the server"),
        ({"query": ["1" * 60000]}, 413, "the limit is 52428; send fewer texts at a time, or start the server with a"),
        ({"query": ["1" * 60000] * 100}, 413, "the limit is 52428"),
    ],
)
def test_refusals(body, status, message, server, oracle):
    found, answer, headers = post(server, body)
    assert found == status and message in answer["error"] and "\n" not in answer["error"]
    assert headers["Connection"] == "close"
    assert asked(server, PROMPTS[:1], ANSWERS[:1])["rewards"] == pytest.approx(oracle(PROMPTS[:1], ANSWERS[:1]), 1e-4)


def test_a_client_shows_the_refusal(server):
    with pytest.raises(UserError, match=f"^{server.url}: HTTP 400 Bad Request: a prompt with its answer is .* 64;"):
        asked(server, ["1="], ["one " * 99])


def raw(server, data):
    """Everything that the server says to these bytes until it hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404, b"GET /health, POST / or /get_reward"),
        (b"POST /x HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 404, b"POST to / or /get_reward"),
        (b"PUT / HTTP/1.1\r\n\r\n", 501, b"Unsupported method"),
        (b"POST / HTTP/1.1\r\n\r\n", 411, b"no Content-Length"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411, b"no Content-Length"),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 411, b"no Content-Length"),
        (b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413, b"the limit is 52428"),
        (b"nonsense\r\n\r\n", 400, b"Bad request"),
        (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414, b"Too Long"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_request(data, status, message, server):
    answer = raw(server, data)
    assert (b" %d " % status) in answer.split(b"\r\n")[0] or data == b"nonsense\r\n\r\n"
    assert b'{"error": ' in answer and message in answer


def test_dead_clients_hold_nothing(server):
    """Silent ones, ones that leave within the body, and ones that leave before the answer."""
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    assert raw(server, b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n{") == b""
    body = json.dumps({"query": ["12=one"] * 90}).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert len(asked(server, PROMPTS, ANSWERS)["rewards"]) == 4
    wait_until(lambda: server.health()["queued"] == 0)
    for connection in silent:
        connection.close()


def test_a_killed_server_costs_retries(server, oracle):
    """It dies while clients ask, and comes back on its port: they go on, with right answers."""
    answers, retries, stop = [], [], threading.Event()

    def ask():
        reward = RemoteReward([server.url], retries=100, first_pause=0.05)
        while not stop.is_set():
            answer = reward([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)], PROMPTS, [None] * 4)
            answers.append(answer["rewards"])
            retries.append(answer["extra_logs"]["retries"])

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(ask) for _ in range(2)]
        try:
            wait_until(lambda: len(answers) > 4)
            server.kill()
            server.start()
            before = len(answers)
            wait_until(lambda: len(answers) > before + 4, 60)
        finally:
            stop.set()
        for client in clients:
            client.result(timeout=60)
    assert sum(retries) > 0
    np.testing.assert_allclose(answers, np.tile(oracle(PROMPTS, ANSWERS), (len(answers), 1)), atol=1e-5)


def test_full_normalised_and_with_a_token(mindspore, tmp_path, monkeypatch, oracle):
    """On every address of this machine. A queue of two: further texts wait at their clients."""
    directory = write_reward_model(tmp_path / "normalised", mindspore, score_mean=0.5, score_std=2.0)
    options = ("--host", "0.0.0.0", "--normalize-reward", "--queue", "2", "--max-wait-ms", "1000")
    with RewardServer(directory, *options, token="secret") as server:
        assert server.health()["status"] == "ok"
        local = f"http://127.0.0.1:{server.port}"
        for token in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answer, headers = post(server, b"not even JSON", **token)
            assert status == 401 and "Authorization: Bearer" in answer["error"]
            assert headers["WWW-Authenticate"] == "Bearer"
        # A large body is read before the answer: else the client would see a broken pipe in its place.
        status, answer, _ = post(server, b" " * (4 << 20))
        assert status == 401
        with pytest.raises(UserError, match="HTTP 401 .*; set MINDRLHF_REWARD_TOKEN to the server's token"):
            RemoteReward([local])(["1="], ["1="], [None])
        monkeypatch.setenv("MINDRLHF_REWARD_TOKEN", "secret")
        expected = (oracle(PROMPTS[:2], ANSWERS[:2]) - 0.5) / 2.0
        queries = [p + a for p, a in zip(PROMPTS[:2], ANSWERS[:2], strict=True)]
        with ThreadPoolExecutor(2) as pool:
            reward = RemoteReward([local], retries=20, first_pause=0.01)
            answers = [pool.submit(reward, queries, PROMPTS[:2], [None] * 2) for _ in range(2)]
            wait_until(lambda: server.health()["queued"] == 2)
            status, answer, headers = post(server, {"query": ["1="]}, Authorization="Bearer secret")
            assert status == 503 and headers["Retry-After"] == "1"
            assert answer["error"] == "the queue is full: 2 of 2 texts wait"
            for one in answers:
                np.testing.assert_allclose(one.result(timeout=60)["rewards"], expected, atol=1e-5)
            assert sum(one.result()["extra_logs"]["retries"] for one in answers) > 0
        assert server.stop(signal.SIGINT)[0] == 0


def test_mistakes(server, model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MINDRLHF_REWARD_TOKEN", raising=False)
    common = ["serve-rm", "--model", str(model)]
    for words, message in (
        (
            [*common, "--host", "0.0.0.0"],
            "--host: 0.0.0.0 can be reached from other machines, so a token is needed; set",
        ),
        ([*common, "--host", "::"], "a token is needed"),
        (
            [*common, "--port", str(server.port)],
            f"--port {server.port}: Address already in use; choose another, or --po",
        ),
        ([*common, "--host", "nowhere.invalid"], "--host nowhere.invalid --port 5000: "),
        ([*common, "--port", "70000"], "--port 70000: must be 0 to 65535"),
        ([*common, "--max-batch", "0"], "--max-batch 0: must be 1 or more"),
        ([*common, "--max-wait-ms", "-1"], "--max-wait-ms -1.0: must be 0 to 1000"),
        ([*common, "--queue", "0"], "--queue 0: must be 1 or more"),
        ([*common, "--max-body-mb", "nan"], "--max-body-mb nan: must be over 0"),
        (["serve-rm", "--model", str(tmp_path / "nowhere"), "--port", "0"], "nowhere"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_it_answers_what_is_queued_before_it_stops(server):
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(asked, server, ["1="] * 100, ["one"] * 100, retries=0)
        wait_until(lambda: server.health()["queued"] or last.done())
        code, output, error = server.stop(signal.SIGTERM)
        rewards = last.result(timeout=60)["rewards"]
    assert rewards == pytest.approx([rewards[0]] * 100, abs=1e-4)
    assert (code, error) == (0, "") and output.startswith("stopped; ")
