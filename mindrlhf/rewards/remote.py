"""Rewards from servers by HTTP, in OpenRLHF's protocol; `mindrlhf serve-rm` is such a server.

POST {"query": [prompt + completion], "prompts": [...], "labels": [...]}, one of each an answer, is answered with
{"rewards": [...]} and, if the server likes, "scores" [...] and "extra_logs" {name: number or list}.
"""

import http.client
import ipaddress
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mindrlhf.errors import UserError

TOKEN_VARIABLE = "MINDRLHF_REWARD_TOKEN"
LARGEST_RESPONSE = 64 << 20  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a retry; a server's Retry-After is held to the longest, too
MESSAGE = 300  # characters of a server's error that are shown
LARGEST_REWARD = float(np.finfo(np.float32).max)  # they are kept as float32
_LISTS = ("rewards", "scores")  # one number an answer; a bare number only for a single answer


class RemoteReward:
    """A reward function in OpenRLHF's form that asks servers of one reward model, which share the load.

    The batch is split over the servers, and all shares are asked at the same time. A share that fails is tried again
    `retries` times at the next server each, after pauses that double. A server that says the request is wrong (4xx)
    is believed at once. "extra_logs" has "retries", how many the whole batch needed.
    """

    concurrent = True  # it waits for others, so local functions may run meanwhile

    def __init__(self, urls: Sequence[str], timeout: float = 180.0, retries: int = 5, first_pause: float = FIRST_PAUSE):
        """timeout: seconds of one request, first byte to last. Raises UserError."""
        if not urls:
            raise UserError("urls: none is named")
        if not (math.isfinite(timeout) and timeout > 0):
            raise UserError(f"timeout: {timeout} must be over 0 seconds")
        if retries < 0:
            raise UserError(f"retries: {retries} must be 0 or more")
        self.urls = [checked_url(url) for url in urls]
        self.timeout, self.retries, self.first_pause = timeout, retries, first_pause
        self.place = ", ".join(self.urls)  # for error messages

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        """What the servers returned for all n answers, put together. Raises UserError."""
        spans = [span for span in np.array_split(np.arange(len(queries)), len(self.urls)) if len(span)]
        columns = {"query": queries, "prompts": prompts, "labels": labels}
        shares = [{name: [values[i] for i in span] for name, values in columns.items()} for span in spans]
        asked = [Background(self._ask, share, number) for number, share in enumerate(shares)]
        answers = [one.result() for one in asked]
        found = [answer for answer, _ in answers]
        logs = {name: _joined(found, name) for name in dict.fromkeys(key for answer in found for key in answer)}
        return {
            "rewards": logs.pop("rewards", []),
            "scores": logs.pop("scores", None),
            "extra_logs": {**logs, "retries": float(sum(retries for _, retries in answers))},
        }

    def _ask(self, share: dict[str, list], number: int) -> tuple[dict[str, list], int]:
        """The answer to one share as lists of its length, first asked at server `number`, and the retries."""
        try:
            body = json.dumps(share, default=str, allow_nan=False).encode()
        except ValueError:
            raise UserError("a label is not a finite number, which JSON cannot hold; mend the data's labels") from None
        last = None
        for attempt in range(self.retries + 1):
            url = self.urls[(number + attempt) % len(self.urls)]
            try:
                return _checked(url, post(url, body, self.timeout), len(share["query"])), attempt
            except Unavailable as error:
                last = error
            if attempt < self.retries:
                pause = max(self.first_pause * 2**attempt, last.pause)
                # Jitter: whoever failed together must not come back together.
                time.sleep(min(pause, LONGEST_PAUSE) * random.uniform(0.75, 1.25))
        raise UserError(
            f"{url}: no answer in {self.retries + 1} attempts, the last: {last}; see that the server runs there "
            "(`mindrlhf serve-rm`), or raise timeout or retries of this reward"
        )


class Background:
    """A call in a thread of its own. A daemon: Ctrl-C does not wait for it."""

    def __init__(self, function: Callable, *arguments: Any):
        self._returned, self._error = None, None
        self._thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable, *arguments: Any) -> None:
        try:
            self._returned = function(*arguments)
        except BaseException as error:
            self._error = error

    def error(self) -> BaseException | None:
        """What the call raised, once it has come to its end."""
        self._thread.join()
        return self._error

    def result(self) -> Any:
        """What the call returned or raised, once it has."""
        if error := self.error():
            raise error
        return self._returned


class Unavailable(Exception):
    """No answer this time. pause: seconds that the server asks to be left alone for."""

    def __init__(self, problem: str, pause: float = 0.0):
        super().__init__(" ".join(problem.split()))
        self.pause = pause


def checked_url(url: str) -> str:
    """The URL itself, if a request can be sent there. Raises UserError that says what to write instead."""
    if not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", url):
        raise UserError(f"url {url!r}: has no scheme; write http://{url} or https://{url}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # the port is checked when it is read
    except ValueError as error:
        raise UserError(f"url {url!r}: {error}; write it as http://host:port/path") from None
    if parts.scheme not in ("http", "https"):
        raise UserError(f"url {url!r}: {parts.scheme} is not supported; use http or https")
    if not host or not url.isascii() or re.search(r"\s", url):
        raise UserError(f"url {url!r}: is not complete; write it as http://host:port/path")
    if parts.username is not None:
        raise UserError(f"url {parts.hostname!r}: put no user and password in it; set {TOKEN_VARIABLE} to a token")
    return url


def bearer_token() -> str:
    """From the environment; empty where none is set. Raises UserError for one that no HTTP header can hold."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(f"{TOKEN_VARIABLE}: holds white space or other than ASCII characters; set another token")
    return token


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def post(url: str, body: bytes, timeout: float) -> Any:
    """The JSON that the server answers with. Raises Unavailable where another attempt may help, else UserError."""
    headers = {"Content-Type": "application/json"}
    if token := bearer_token():
        headers["Authorization"] = f"Bearer {token}"
    proxies = urllib.request.ProxyHandler({} if is_loopback(urlsplit(url).hostname) else None)
    opener = urllib.request.build_opener(proxies, _NoRedirects)
    deadline = time.monotonic() + timeout
    try:
        with opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
            content = _read(url, response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(url, error) from None
    except TimeoutError:
        raise Unavailable(f"nothing came within {timeout:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(str(getattr(error, "reason", error)) or type(error).__name__) from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        shown = content[:60].decode("utf-8", "replace")
        raise UserError(f"{url}: answered with {shown!r}, which is not JSON; is it a reward server?") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without its body, and carry the token to whoever it is sent to."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


def _read(url: str, response: Any, deadline: float) -> bytes:
    """The body, bounded in size and time: a socket's own timeout begins anew with every byte."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_RESPONSE:
            raise UserError(f"{url}: answers with more than {LARGEST_RESPONSE >> 20} MB; is it a reward server?")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise Unavailable(f"the connection ended {response.length} bytes before the answer did")
    return b"".join(chunks)


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    """What to raise for an answer that is not 2xx."""
    status, message = error.code, _message(error)
    described = f"HTTP {status} {error.reason}" + (f": {message}" if message else "")
    if status >= 500 or status in (408, 429):
        after = error.headers.get("Retry-After", "")
        return Unavailable(described, float(after) if re.fullmatch(r"[0-9]{1,9}", after) else 0.0)
    if 300 <= status < 400:
        return UserError(f"{url}: redirects to {error.headers.get('Location')!r:.200}; write the URL that answers")
    fix = f"; set {TOKEN_VARIABLE} to the server's token" if status in (401, 403) else ""
    return UserError(f"{url}: {described}{fix}")


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, in one line."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        found = json.loads(text)
        text = found.get("error") or found.get("detail") or text
    except (ValueError, AttributeError, RecursionError):
        pass
    text = " ".join(str(text).split())
    return text if len(text) <= MESSAGE else text[:MESSAGE] + "..."


def _checked(url: str, answer: Any, count: int) -> dict[str, list]:
    """Rewards, scores and extra logs, flat under their names, as lists of `count` numbers; null is left as None."""
    if not isinstance(answer, dict) or "rewards" not in answer:
        found = f"it has {', '.join(answer) or 'nothing'}" if isinstance(answer, dict) else f"it is {answer!r:.60}"
        raise UserError(f'{url}: the answer is no object with "rewards", {found:.200}; is it a reward server?')
    logs = answer.get("extra_logs") or {}
    if not isinstance(logs, dict):
        raise UserError(f'{url}: "extra_logs" is a {type(logs).__name__}; it must be an object of numbers or lists')
    named = {**logs, "rewards": answer["rewards"]}
    if answer.get("scores") is not None:
        named["scores"] = answer["scores"]
    return {name: _numbers(url, name, value, count, name not in _LISTS or count == 1) for name, value in named.items()}


def _numbers(url: str, name: str, value: Any, count: int, one_for_all: bool) -> list[float | None]:
    if one_for_all and _is_number(value):
        value = [value] * count
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} numbers" if isinstance(value, list) else f"{value!r:.60}"
        raise UserError(f'{url}: "{name}" are {found} for {count} answers')
    for i, one in enumerate(value):
        if one is not None and not (_is_number(one) and abs(one) <= LARGEST_REWARD):
            raise UserError(f'{url}: "{name}" has {one!r:.60} at index {i}, which is not a finite number')
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _joined(answers: list[dict[str, list]], name: str) -> list[float | None]:
    """One list for all shares; what a server leaves out counts as null."""
    return [value for answer in answers for value in answer.get(name, [None] * len(answer["rewards"]))]
