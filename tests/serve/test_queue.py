"""The queue before the model: people in turn, nothing lost, nobody stopped by somebody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vicuna.serve.queue import FairQueue, Job


def joined(queue: FairQueue, *people: str) -> list[Job]:
    return [queue.submit(Job(p, lambda job: job.client_id)) for p in people]


def drain(queue: FairQueue) -> list[Job]:
    done = []
    while queue.length():
        job = queue.next()
        assert job is not None
        job.run()
        done.append(job)
        if not queue._waiting:
            break
    return done


def test_who_asks_much_waits_behind_who_asks_once() -> None:
    queue = FairQueue()
    a1, a2, a3, b1, c1, b2 = joined(queue, "a", "a", "a", "b", "c", "b")
    assert [queue.position(j) for j in (a1, b1, c1, a2, b2, a3)] == [0, 1, 2, 3, 4, 5]
    assert drain(queue) == [a1, b1, c1, a2, b2, a3]


@given(st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_place_in_the_queue_is_what_happens(people: list[str]) -> None:
    queue = FairQueue()
    jobs = joined(queue, *people)
    told = sorted(jobs, key=queue.position)
    assert sorted(map(queue.position, jobs)) == list(range(len(jobs)))
    assert drain(queue) == told
    assert all(job.result == job.client_id for job in jobs)
    order = [j.client_id for j in told]
    for i, person in enumerate(order):  # nobody is computed twice while another one waits
        others = {p for p in order[i:] if p != person}
        if others and i + 1 < len(order):
            assert order[i + 1] != person


def test_a_cancelled_job_is_never_begun_and_others_go_on() -> None:
    queue = FairQueue()
    seen: list[str] = []

    def work(job: Job) -> None:
        seen.append(job.client_id)

    first, second, third = (queue.submit(Job(p, work)) for p in "abc")
    second.cancel()
    drain(queue)
    assert seen == ["a", "c"]
    assert second.ended.is_set()
    assert not first.cancelled.is_set()
    assert not third.cancelled.is_set()


def test_who_does_not_want_to_wait_leaves_at_once() -> None:
    queue = FairQueue()
    ends: list[str] = []
    jobs = [
        queue.submit(Job(p, lambda _: 1, lambda job: ends.append(job.client_id))) for p in "abc"
    ]
    assert queue.next() is jobs[0]
    jobs[1].cancel()
    jobs[0].cancel()  # is being done: its work ends it
    assert jobs[1].ended.is_set()
    assert not jobs[0].ended.is_set()
    assert ends == ["b"]
    assert queue.position(jobs[2]) == 1


def test_what_is_done_at_the_end_is_done_whatever_the_end_is() -> None:
    queue, seen = FairQueue(), []

    def then(job: Job) -> None:
        seen.append((job.client_id, job.ended.is_set()))
        if job.client_id == "b":
            raise ValueError("at the end")

    jobs = [queue.submit(Job(p, lambda job: 1 / (job.client_id != "a"), then)) for p in "ab"]
    drain(queue)
    assert seen == [("a", False), ("b", False)]
    assert isinstance(jobs[0].error, ZeroDivisionError)
    assert isinstance(jobs[1].error, ValueError)


def test_what_goes_wrong_is_kept_for_the_one_who_asked() -> None:
    queue = FairQueue()

    def fail(_: Job) -> Any:
        raise ValueError("mine")

    bad, good = queue.submit(Job("a", fail)), joined(queue, "b")[0]
    drain(queue)
    with pytest.raises(ValueError, match="mine"):
        bad.wait()
    assert good.wait() == "b"


def test_a_closed_queue_ends_who_waits_for_work_and_who_waits_for_an_answer() -> None:
    queue = FairQueue()
    found: list[Job | None] = []
    thread = threading.Thread(target=lambda: found.append(queue.next()))
    thread.start()
    queue.close()
    thread.join(5)
    assert found == [None]
    late = FairQueue()
    job = joined(late, "a")[0]
    late.close()
    assert job.ended.is_set()
    assert job.cancelled.is_set()
