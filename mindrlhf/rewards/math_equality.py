"""The reward for mathematically equal answers, compared by math-verify in a process that can be killed."""

import atexit
import importlib.util
import json
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.rewards.rules import answer_form, expected_answer, marked_answer

MAX_ANSWER_LENGTH = 1000  # characters; a longer marked answer is wrong, of unmarked text only the end is read
START_TIMEOUT = 120.0  # seconds: importing sympy takes half a second, from a network drive much longer


def math_reward(
    completions: list[str], label: list[Any], *, timeout: float = 5.0, **columns: Any
) -> dict[str, list[float] | dict[str, list[float]]]:
    """1.0 where the answer found in the completion equals the label as mathematics, else 0.0. Both lists [n].

    The answer is the marked one (see rules.marked_answer). What accuracy_reward takes for equal is equal; the rest is
    compared by math-verify (https://github.com/huggingface/Math-Verify): roots, sets, intervals, tuples, matrices,
    polynomials, equations (x=5 is 5), units, percent (50% equals both 50 and 1/2), decimals to six places. In a
    completion that marks no answer math-verify looks for one: after "final answer is", else the last formula or number.

    timeout: seconds for one comparison. An answer that takes longer, or that brings its process down, is wrong; such
    answers are 1.0 in extra_logs["timeouts"], [n]. Needs `pip install 'mindrlhf[math]'`, else raises UserError.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 3600:
        raise UserError(f"timeout: {timeout!r} is not a number of seconds between 0 and 3600")
    verdicts: dict[tuple[str, str], bool | None] = {}  # the answers of a group are often the same
    rewards, timeouts = [], []
    for text, gold in zip(completions, (expected_answer(answer, "math") for answer in label), strict=True):
        marked = marked_answer(text)
        if answer_form(text if marked is None else marked) == answer_form(gold) != "":
            right: bool | None = True
        elif not gold.strip() or not text.strip() or marked == "" or len(marked or "") > MAX_ANSWER_LENGTH:
            right = False
        else:
            # math-verify looks for LaTeX inside of delimiters only.
            answer = text[-MAX_ANSWER_LENGTH:] if marked is None else _boxed(marked)
            pair = (_boxed(gold), answer)
            if pair not in verdicts:
                verdicts[pair] = _worker.equal(*pair, timeout)
            right = verdicts[pair]
        rewards.append(float(right is True))
        timeouts.append(float(right is None))
    return {"rewards": rewards, "extra_logs": {"timeouts": timeouts}}


def require_math_verify() -> None:
    """Raises UserError where the package is not installed; cheap, it is not imported."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("the math reward needs the package math-verify: pip install 'mindrlhf[math]'")


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


class _Worker:
    """One process of math_worker.py, started when first used, killed at a timeout and started again after it.

    A process of its own, by its file: multiprocessing would import the user's main program once more, and a fork would
    copy MindSpore's threads in the middle of what they do.
    """

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()  # the asynchronous rollout rewards in a thread

    def equal(self, gold: str, answer: str, timeout: float) -> bool | None:
        """Whether math-verify finds them equal; None where it did not answer in time. Raises UserError at its start."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = None
            try:
                request = {"gold": gold, "answer": answer, "timeout": timeout}
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                reply = _read_reply(self._process, timeout)
            except BrokenPipeError:
                pass  # it has just ended: no reply, as from one that ends now
            finally:
                if reply is None:  # after Ctrl-C too: the reply to this request must not become that to the next
                    self._kill()
            return reply and reply["right"]

    def close(self) -> None:
        """Ends the process; the next use starts another."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        self._kill()
        require_math_verify()
        # Without buffers, which select would not see. A session of its own: Ctrl-C is for the run, which still saves.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True,
        )  # fmt: skip
        reply = None
        try:
            reply = _read_reply(self._process, START_TIMEOUT)
        finally:
            if not reply or "ready" not in reply:
                self._kill()
        if self._process is None:
            reason = (reply or {}).get("error") or f"it ended, or said nothing for {START_TIMEOUT:.0f} s"
            raise UserError(f"the math reward's process did not start: {reason}; see pip install 'mindrlhf[math]'")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def _read_reply(process: subprocess.Popen, timeout: float) -> dict | None:
    """One line, parsed; None at the timeout and at the end of the stream."""
    deadline, line = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            ready = selector.select(max(deadline - time.monotonic(), 0))
            chunk = process.stdout.read(65536) if ready else b""
            if not chunk:
                return None
            line += chunk
    return json.loads(line)


_worker = _Worker()
atexit.register(_worker.close)
