"""The worker of the one model: a thread in which everything is computed, one request at a time.

`submit` returns a `Job` at once, which can be polled or followed: nothing that serves browsers
waits for the model. Each request names its adapters, so that clients do not change the model under
each other. The keys and values of a prompt are kept for the next one that begins alike; when two
clients take turns, each conversation is computed again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vicuna.data.conversation import Turn
from vicuna.data.templates.base import ThoughtMarks
from vicuna.errors import UserError
from vicuna.generate.chat import Fitted, fit
from vicuna.generate.thoughts import Parts, ThoughtStream, split
from vicuna.model.adapter_location import WEIGHTS
from vicuna.serve.queue import FairQueue, Job
from vicuna.terminal import say_traceback

if TYPE_CHECKING:
    from vicuna.generate.events import Finished, Step
    from vicuna.generate.load import ChatModel
    from vicuna.generate.settings import Settings

MAX_FPS = 25  # snapshots of an answer in progress per second, at most
NO_MARKS = ThoughtMarks("", "")
# Seconds that an answer continues without followers: a page that is being reloaded comes back.
DISCONNECT_GRACE = 20.0


@dataclass(frozen=True)
class GenerateRequest:
    """A request for an answer.

    turns: as a template takes them, a question at the end.
    mix: strengths of adapters, by the path or hub id they are loaded from; none: the base alone.
    template: by name; "" for the adapter's own, or the base's.
    limit: tokens that prompt and answer may have; 0: the whole context.
    """

    turns: Sequence[Turn]
    settings: Settings
    mix: Mapping[str, float] = field(default_factory=dict)
    template: str = ""
    limit: int = 0


@dataclass(frozen=True)
class BeamState:
    """A beam for display: its text after the stable prefix, its score, its number of tokens."""

    text: str
    score: float
    tokens: int
    finished: bool = False


@dataclass(frozen=True)
class Snapshot:
    """An answer in progress, or finished.

    text: final, with its thought. marks: of that thought. beams: the open ones, best first,
    behind the best finished one. dropped: turns that did not fit. finished: the end.
    """

    text: str = ""
    beams: tuple[BeamState, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    dropped: int = 0
    prompt_tokens: int = 0
    finished: Finished | None = None
    marks: ThoughtMarks = NO_MARKS

    def parts(self, behind: str = "") -> Parts:
        """What is thought and what is answered so far, with a branch's own text behind it. What
        may be a part of a mark is in neither until that is known."""
        if self.finished is not None:
            return split(self.text, self.marks)
        return ThoughtStream(self.marks).push(self.text + behind)


@dataclass(frozen=True)
class Queued:
    """Not started: `position` requests are computed before this one."""

    position: int


class ModelWorker:
    """A model, the thread that runs it, and the queue of requests.

    Args:
        open_model: opens the model, inside the thread.

    Raises: what `open_model` raises.
    """

    def __init__(self, open_model: Callable[[], ChatModel]) -> None:
        self.queue = FairQueue()
        self._opened: ChatModel | None = None
        self._failed: BaseException | None = None
        self._stamps: dict[str, float] = {}
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._live, args=(open_model, ready), name="model", daemon=True
        )
        self._thread.start()
        ready.wait()
        if self._failed is not None:
            raise self._failed

    def _live(self, open_model: Callable[[], ChatModel], ready: threading.Event) -> None:
        try:
            self._opened = open_model()
        except BaseException as e:
            self._failed = e
            return
        finally:
            ready.set()
        while (job := self.queue.next()) is not None:
            job.run()
            if job.error is not None and not isinstance(job.error, UserError):
                say_traceback(job.error)

    @property
    def loaded(self) -> ChatModel:
        """The model. Only what changes nothing may be asked of it outside of the thread."""
        assert self._opened is not None
        return self._opened

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.loaded.engine.context_length

    def close(self) -> None:
        """End the thread, after the job that is being done."""
        self.queue.close()
        self._thread.join()
        self.loaded.engine.close()

    def submit(
        self,
        client_id: str,
        request: GenerateRequest,
        then: Callable[[Job], None] = lambda _: None,
        address: str = "",
    ) -> Job:
        """Queue a request; `job.latest` is a `Snapshot` as soon as there is one. `then` is called
        with the job at its end, in the model's thread or in the one that cancels it.

        Raises: UserError where too many wait already.
        """
        return self.queue.submit(
            Job(client_id, lambda job: self._answer(request, job), then, address)
        )

    def choose(self, client_id: str, mix: Mapping[str, float], address: str = "") -> Job:
        """Queue that these adapters are loaded; what does not fit raises there.

        Raises: UserError where too many wait already.
        """
        return self.queue.submit(Job(client_id, lambda _: self._choose(mix), address=address))

    def _choose(self, mix: Mapping[str, float]) -> None:
        """Answer with these adapters from now on. What is not loaded yet is loaded, and what was
        trained anew.

        Raises: UserError where one does not belong to the base.
        """
        for adapter in mix:
            stamp = _stamp(adapter)
            if adapter not in self.loaded.adapters or self._stamps.get(adapter) != stamp:
                self.loaded.load_adapter(adapter, adapter)
                self._stamps[adapter] = stamp
        self.loaded.set_adapter(mix)

    def _answer(self, request: GenerateRequest, job: Job) -> Snapshot:
        self._choose(request.mix)
        return _compute(self.loaded, request, job)

    def fitted(self, request: GenerateRequest) -> Fitted:
        """What of a conversation would be read. The adapters need not be loaded."""
        renderer = self.loaded.renderer_of(request.mix, request.template)
        return fit(
            request.turns, renderer, _limit(self.context, request), request.settings.max_new_tokens
        )

    async def settled(self, job: Job) -> None:
        """Wait for a job's end without holding a thread. Raises: what the work raised."""
        async for _ in self.follow(job):
            pass

    async def follow(
        self, job: Job, heard: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[Queued | Snapshot]:
        """What happens to a job, as it happens; ends with it. Where nobody follows it any more, and
        nobody comes back soon, it is cancelled.

        Args:
            heard: whether what is told here reaches anybody.

        Raises: what the work raised.
        """
        shown: Any = None
        job.followers += 1
        alone = time.monotonic()
        try:
            while not job.ended.is_set():
                if heard():
                    alone = time.monotonic()
                elif time.monotonic() - alone > DISCONNECT_GRACE and job.followers == 1:
                    job.cancel()
                now = Queued(self.queue.position(job)) if job.state == "waiting" else job.latest
                if now is not None and now != shown:
                    yield now
                    shown = now
                await asyncio.sleep(1 / MAX_FPS)
            if job.error is not None:
                raise job.error
            if job.latest is not None and job.latest is not shown:
                yield job.latest
        finally:
            job.followers -= 1
            if not job.followers and not job.ended.is_set():
                asyncio.get_running_loop().call_later(DISCONNECT_GRACE, _abandon, job)


def _abandon(job: Job) -> None:
    if not job.followers:
        job.cancel()


def _limit(context: int, request: GenerateRequest) -> int:
    return min(context, request.limit or context)


def _stamp(adapter: str) -> float:
    """When an adapter's weights were written; 0 for what is no folder."""
    times = [p.stat().st_mtime for name in WEIGHTS if (p := Path(adapter) / name).is_file()]
    return max(times, default=0.0)


def _compute(loaded: ChatModel, request: GenerateRequest, job: Job) -> Snapshot:
    """Compute an answer; pictures of it go into `job.latest`."""
    from vicuna.generate.decode import decode
    from vicuna.generate.events import Finished

    renderer = loaded.renderer_of(request.mix, request.template)
    engine, began = loaded.engine, time.perf_counter()
    limit = _limit(engine.context_length, request)
    fitted = fit(request.turns, renderer, limit, request.settings.max_new_tokens)
    said: list[str] = []
    blank = Snapshot(
        dropped=len(fitted.dropped), prompt_tokens=len(fitted.prompt_ids),
        marks=renderer.template.thought_marks(),
    )  # fmt: skip
    due = 0.0
    for event in decode(
        engine, fitted.prompt_ids, request.settings, renderer, job.cancelled.is_set
    ):
        now = time.perf_counter()
        if isinstance(event, Finished):
            tokens = len(event.token_ids)
            job.latest = replace(
                blank, text=event.text, tokens=tokens, seconds=now - began, finished=event
            )
            continue
        said.append(event.text)
        if now >= due:
            due = now + 1 / MAX_FPS
            job.latest = replace(blank, text="".join(said), seconds=now - began, **_beams(event))
    assert isinstance(job.latest, Snapshot)
    return job.latest


def _beams(step: Step) -> dict[str, Any]:
    """Beams and number of tokens of a snapshot."""
    done = [BeamState(b.open, b.score, b.token_count, True) for b in step.finished[:1]]
    live = [BeamState(b.open, b.score, b.token_count) for b in step.beams]
    tokens = max((b.tokens for b in live), default=0)
    return {"beams": (*done, *live), "tokens": tokens}
