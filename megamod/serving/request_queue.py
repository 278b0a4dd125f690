"""Bounded queue of requests, answered in groups: full groups at once, others by a deadline.

The N rows that share a multiplexed forward pass are a group (N = 1: a row alone), and a batch is
several groups in one forward pass. One worker thread runs the model, so models need no locks, and
requests that arrive while it runs wait for the next batch.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class QueueFullError(RuntimeError):
    """There is no room for a request.

    Attributes:
        retry_after: seconds after which there should be room, 1 or more.
    """

    def __init__(self, waiting: int, limit: int, retry_after: int):
        """Make the error; `limit` is the largest number of waiting requests."""
        super().__init__(
            f"{waiting} requests are waiting, of {limit} at most; try again in {retry_after} s"
        )
        self.retry_after = retry_after


class DrainingError(RuntimeError):
    """The queue answers what it has accepted and accepts nothing new."""

    def __init__(self):
        """Make the error, whose message clients see."""
        super().__init__("the server is shutting down and accepts no new requests")


@dataclass(eq=False)
class _Entry(Generic[Request]):
    """A waiting request.

    Attributes:
        outcome: its answer, or the exception that it raised.
        arrived: time of the event loop.
    """

    request: Request
    outcome: asyncio.Future
    arrived: float


@dataclass(frozen=True)
class BatchReport:
    """A batch that was run: its requests, the places of its groups, and seconds."""

    requests: int
    places: int
    seconds: float


@dataclass
class RequestQueue(Generic[Request, Answer]):
    """Queue between the handlers of requests, in an event loop, and a model in a thread.

    Attributes:
        answer_batch: answers a batch of requests, in their order, in the worker thread.
        group_size: N, requests that share a forward pass.
        max_groups: groups in a batch.
        max_wait: seconds that the first request of an incomplete group waits for others.
        limit: most waiting requests; those of the running batch do not count.
        on_batch: called after every batch.
        draining: True if nothing new is accepted. Signal handlers may set it.
        running: number of requests in the running batch.
    """

    answer_batch: Callable[[Sequence[Request]], Sequence[Answer]]
    group_size: int
    max_groups: int
    max_wait: float
    limit: int
    on_batch: Callable[[BatchReport], None] = lambda report: None
    draining: bool = False
    running: int = field(default=0, init=False)
    _waiting: deque[_Entry[Request]] = field(default_factory=deque)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    _seconds_per_request: float = 0.0  # moving average

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """True if every accepted request is answered."""
        return not self._waiting and not self.running

    async def submit(self, requests: Sequence[Request]) -> list[Answer]:
        """Queue requests and return their answers, in their order; all are accepted or none.

        If the caller is cancelled, those that are not yet running are dropped.

        Args:
            requests: requests for `answer_batch`, those of one HTTP request.
        Raises:
            QueueFullError: if there is no room for all of them.
            DrainingError: if the queue is closed.
            Exception: that of the first request that `answer_batch` raised one for.
        """
        if self.draining:
            raise DrainingError
        if len(self._waiting) + len(requests) > self.limit:
            raise QueueFullError(len(self._waiting), self.limit, self._estimate_wait_seconds())
        loop = asyncio.get_running_loop()
        entries = [_Entry(request, loop.create_future(), loop.time()) for request in requests]
        self._waiting.extend(entries)
        self._arrival.set()
        try:
            outcomes = [await entry.outcome for entry in entries]
        except asyncio.CancelledError:
            for entry in entries:
                entry.outcome.cancel()
                if entry in self._waiting:
                    self._waiting.remove(entry)
            raise
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    async def serve(self) -> None:
        """Answer batches of requests as they become due, until the task is cancelled.

        The model runs in one worker thread, so that the event loop goes on meanwhile.
        """
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as worker:
            while True:
                count = await self._wait_until_due()
                batch = [self._waiting.popleft() for _ in range(count)]
                self.running = count
                requests = [entry.request for entry in batch]
                try:
                    outcomes, seconds = await loop.run_in_executor(
                        worker, self._answer_or_fail_each, requests
                    )
                finally:
                    self.running = 0
                for entry, outcome in zip(batch, outcomes, strict=True):
                    if not entry.outcome.done():  # else the caller is gone
                        entry.outcome.set_result(outcome)
                share = 0.2 if self._seconds_per_request else 1.0
                self._seconds_per_request += share * (seconds / count - self._seconds_per_request)
                groups = math.ceil(count / self.group_size)
                self.on_batch(BatchReport(count, groups * self.group_size, seconds))

    async def drain(self) -> None:
        """Accept nothing new, and wait until everything accepted is answered."""
        self.draining = True
        while not self.idle:
            await asyncio.sleep(0.01)

    async def _wait_until_due(self) -> int:
        """Wait until a batch is due by `_count_due_requests`; return the number of its requests.

        It wakes at each arrival, and when the oldest request has waited for `max_wait`.
        """
        loop = asyncio.get_running_loop()
        while not (count := self._count_due_requests(loop.time())):
            self._arrival.clear()
            first = self._waiting[0].arrived if self._waiting else math.inf
            timeout = None if math.isinf(first) else first + self.max_wait - loop.time()
            try:
                await asyncio.wait_for(self._arrival.wait(), timeout)
            except TimeoutError:
                continue
        return count

    def _count_due_requests(self, now: float) -> int:
        """Count the oldest requests that are to run now; 0: wait for more.

        Full groups run at once, as many as a batch holds. The remaining requests run too if the
        oldest of them has waited for `max_wait` and the batch has room for another group.

        Args:
            now: time of the event loop, in seconds.
        """
        capacity = self.group_size * self.max_groups
        count = len(self._waiting)
        full = min(count // self.group_size * self.group_size, capacity)
        if full in (count, capacity):
            return full
        is_late = self._waiting[full].arrived + self.max_wait <= now
        return count if is_late or self.draining else full

    def _answer_or_fail_each(
        self, requests: Sequence[Request]
    ) -> tuple[list[Answer | Exception], float]:
        """Answer a batch in the worker thread; return its outcomes and the seconds that it took.

        An outcome is an answer, or the exception of its request. If a batch fails, each of its
        requests runs again alone, so that one harms no other.
        """
        started = time.monotonic()
        try:
            outcomes = list(self.answer_batch(requests))
        except Exception as error:
            if len(requests) == 1:
                outcomes = [error]
            else:
                logger.warning("a batch of %d requests failed: %s", len(requests), error)
                outcomes = [self._answer_or_fail_each([request])[0][0] for request in requests]
        return outcomes, time.monotonic() - started

    def _estimate_wait_seconds(self) -> int:
        """Estimate the seconds, 1 or more, until the waiting requests are answered."""
        waiting = len(self._waiting) + self.running
        return max(1, math.ceil(waiting * self._seconds_per_request))
