"""The queue before the one model: who is computed next. Plain Python, no web and no model.

Clients take turns: one that sends many requests at once waits behind those that sent one. The
requests of one client keep their order. A request that is cancelled while it waits never starts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Literal

from vicuna.errors import UserError

# Jobs that may wait: of one client (a page submits six at once), from one address (a whole
# class may share it), in all.
PER_CLIENT, PER_ADDRESS, IN_ALL = 12, 48, 200

State = Literal["waiting", "running", "done"]


class Job:
    """A request in the queue.

    client_id: whose turn it uses. address: the client's; "" if unknown.
    work: what is done when it is its turn.
    then: what is done at its end, whatever the end is, and before anybody sees that it ended.
    cancelled: set by `cancel`; `work` looks at it.
    latest: the newest thing that `work` had to tell; error: what it raised.
    """

    def __init__(
        self,
        client_id: str,
        work: Callable[[Job], Any],
        then: Callable[[Job], None] = lambda _: None,
        address: str = "",
    ) -> None:
        self.client_id, self.work, self.then, self.address = client_id, work, then, address
        self.queue: FairQueue | None = None
        self.followers = 0  # pages that look at it
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.state: State = "waiting"
        self.latest: Any = None
        self.result: Any = None
        self.error: BaseException | None = None

    def cancel(self) -> None:
        """The answer is no longer wanted; what was said until then is kept. One that waits leaves
        the queue at once."""
        self.cancelled.set()
        if self.queue is not None:
            self.queue.cancel(self)

    def run(self) -> None:
        """Do the work. What goes wrong is kept in `error`, so that the next job is done."""
        try:
            if not self.cancelled.is_set():
                self.result = self.work(self)
        except BaseException as e:
            self.error = e
        try:
            self.then(self)
        except BaseException as e:
            self.error = self.error or e
        self.state = "done"
        self.ended.set()

    def wait(self) -> Any:
        """The result. Raises: what the work raised."""
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.result


class FairQueue:
    """Jobs in the order in which they will be done: people in turn, each one's in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: Job | None = None
        self._closed = False

    def submit(self, job: Job) -> Job:
        """Take a job in.

        Raises: UserError where too many wait: of this client, from this address, or in all.
        """
        with self._changed:
            everybody = [other for own in self._waiting.values() for other in own]
            near = sum(1 for other in everybody if job.address and other.address == job.address)
            own = len(self._waiting.get(job.client_id, ()))
            if own >= PER_CLIENT or near >= PER_ADDRESS or len(everybody) >= IN_ALL:
                raise UserError(
                    "too many questions wait already",
                    fix="Wait until some of them are answered, or stop them.",
                )
            job.queue = self
            self._waiting.setdefault(job.client_id, deque()).append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job that was cancelled while it waits; one that is being done ends by itself."""
        with self._changed:
            own = self._waiting.get(job.client_id, deque())
            if job not in own:
                return
            own.remove(job)
            if not own:
                del self._waiting[job.client_id]
        job.run()

    def next(self) -> Job | None:
        """Wait for the job whose turn it is; None when the queue was closed."""
        with self._changed:
            self._running = None
            while not self._closed:
                if self._waiting:
                    client_id, jobs = self._waiting.popitem(last=False)
                    job = jobs.popleft()
                    if jobs:
                        self._waiting[client_id] = jobs  # behind everybody else
                    job.state, self._running = "running", job
                    return job
                self._changed.wait()
            return None

    def position(self, job: Job) -> int:
        """How many jobs will be done before this one; 0 where it is its turn."""
        with self._changed:
            if job.state != "waiting":
                return 0
            people = list(self._waiting)
            own = self._waiting.get(job.client_id, deque())
            if job not in own:
                return 0
            round_, place = own.index(job), people.index(job.client_id)
            before = sum(
                min(len(jobs), round_ + (i < place))
                for i, jobs in enumerate(self._waiting.values())
                if people[i] != job.client_id
            )
            return before + round_ + (self._running is not None)

    def length(self) -> int:
        """Jobs that wait or are being done."""
        with self._changed:
            return sum(map(len, self._waiting.values())) + (self._running is not None)

    def close(self) -> None:
        """Let `next` return None; what still waits is cancelled."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._changed.notify_all()
        for job in left:
            job.cancel()
