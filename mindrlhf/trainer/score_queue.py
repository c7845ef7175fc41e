"""Requests of many clients on their way to one model: a bounded queue of texts, taken out in batches."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from mindrlhf.trainer.reward_model import RewardModel
    from mindrlhf.types import Conversation

OK, BAD_REQUEST, TOO_LARGE, BROKEN, UNAVAILABLE = 200, 400, 413, 500, 503  # HTTP's


class Refusal(Exception):
    """A request that is not answered with scores: HTTP's status, and why in one line."""

    def __init__(self, status: int, problem: str):
        super().__init__(problem)
        self.status = status


class Request:
    """Texts that one client wants scored, and what became of it; `done` is set when that is known."""

    def __init__(self, prompts: Sequence[str], answers: Sequence[str]):
        self.prompts, self.answers = prompts, answers
        self.conversations: list[Conversation] | None = None  # once the model has tokenised them
        self.scores = np.zeros(len(answers), np.float32)
        self.missing = len(answers)  # scores
        self.taken = 0  # texts that a batch has
        self.refusal: Refusal | None = None
        self.done = threading.Event()

    def refuse(self, status: int, problem: str) -> None:
        self.refusal = Refusal(status, problem)
        self.done.set()

    def put(self, index: int, score: float) -> None:
        self.scores[index] = score
        self.missing -= 1
        if not self.missing:
            self.done.set()


class ScoreQueue:
    """Handler threads `submit` and `close` requests; the model's thread runs `answer_next`."""

    def __init__(self, capacity: int, max_batch: int, max_wait: float):
        """capacity: texts that may wait; max_wait: seconds that a batch waits to grow to max_batch texts."""
        self.capacity, self.max_batch, self.max_wait = capacity, max_batch, max_wait
        self.answered = 0  # texts
        self.waiting = 0  # texts
        self.stopping = False
        self._requests: deque[Request] = deque()  # with texts that no batch has
        self._open: set[Request] = set()  # submitted and not closed
        self._changed = threading.Condition()

    def submit(self, request: Request) -> None:
        """Raises Refusal where there is no room."""
        count = len(request.answers)
        if count > self.capacity:
            fix = "send fewer at a time, or start the server with a larger --queue"
            raise Refusal(TOO_LARGE, f"{count} texts, the queue holds {self.capacity}; {fix}")
        with self._changed:
            if self.stopping:
                raise Refusal(UNAVAILABLE, "the server is stopping")
            if self.waiting + count > self.capacity:
                raise Refusal(UNAVAILABLE, f"the queue is full: {self.waiting} of {self.capacity} texts wait")
            self._open.add(request)
            if not count:
                request.done.set()
                return
            self._requests.append(request)
            self.waiting += count
            self._changed.notify_all()

    def close(self, request: Request) -> None:
        """The client has its answer, or has gone: what still waits of the request is dropped."""
        with self._changed:
            self._open.discard(request)
            self._drop(request)
            self._changed.notify_all()

    def answer_next(self, model: "RewardModel", patience: float, normalize: bool) -> None:
        """Score one batch; return without one after `patience` seconds. Only ever called by one thread."""
        batch = self._take(patience)
        for request in dict.fromkeys(request for request, _ in batch):
            if request.conversations is None:
                self._guarded([request], lambda request=request: self._tokenise(model, request))
        batch = [(request, index) for request, index in batch if not request.done.is_set()]
        if batch:
            self._guarded([request for request, _ in batch], lambda: self._score(model, batch, normalize))

    def finish(self, model: "RewardModel", limit: float, normalize: bool) -> None:
        """Take nothing more, answer what waits and see it sent, within `limit` seconds; refuse the rest."""
        deadline = time.monotonic() + limit
        self.stopping = True
        while self.waiting and time.monotonic() < deadline:
            self.answer_next(model, 0.0, normalize)
        with self._changed:
            for request in self._open:
                if not request.done.is_set():
                    request.refuse(UNAVAILABLE, "the server is stopping")
            self._changed.wait_for(lambda: not self._open, max(deadline - time.monotonic(), 1.0))

    def _take(self, patience: float) -> list[tuple[Request, int]]:
        """The next texts as (request, index in it), at most max_batch, of as many requests as there are."""
        batch: list[tuple[Request, int]] = []
        with self._changed:
            if self._changed.wait_for(lambda: self.waiting, patience):
                self._changed.wait_for(lambda: self.waiting >= self.max_batch, self.max_wait)
            while self._requests and len(batch) < self.max_batch:
                request = self._requests[0]
                batch.append((request, request.taken))
                request.taken += 1
                self.waiting -= 1
                if request.taken == len(request.answers):
                    self._requests.popleft()
        return batch

    def _drop(self, request: Request) -> None:
        if request in self._requests:
            self._requests.remove(request)
            self.waiting -= len(request.answers) - request.taken

    def _guarded(self, requests: list[Request], work: Callable[[], None]) -> None:
        """A fault of one batch is its clients' answer, not the server's end."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            with self._changed:
                for request in requests:
                    request.refuse(BROKEN, f"the server failed: {type(error).__name__}: {error}")
                    self._drop(request)

    def _tokenise(self, model: "RewardModel", request: Request) -> None:
        try:
            request.conversations = model.conversations(request.prompts, request.answers)
        except UserError as error:
            request.refuse(BAD_REQUEST, str(error))
            with self._changed:
                self._drop(request)

    def _score(self, model: "RewardModel", batch: list[tuple[Request, int]], normalize: bool) -> None:
        scores = model.scores([request.conversations[index] for request, index in batch])
        if normalize:
            scores = model.normalized(scores)
        if not np.isfinite(scores).all():
            raise ValueError("the model's score of a text is not a finite number")
        self.answered += len(batch)
        for (request, index), score in zip(batch, scores, strict=True):
            request.put(index, score)
