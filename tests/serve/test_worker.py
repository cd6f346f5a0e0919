"""The engine's thread: what it tells, and what it does when the engine fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.serve.requests import ApiError
from dsv3_jax.serve.worker import Job, Progress, Worker

TEN = SamplingParams(max_tokens=10, ignore_eos=True)


def with_worker(engine: Engine, use: Callable[[Worker], Awaitable[Any]]) -> Any:
    """Runs `use` on an event loop, with the thread at work."""

    async def run() -> Any:
        worker = Worker(engine)
        worker.start(asyncio.get_running_loop())
        try:
            return await asyncio.wait_for(use(worker), 60)
        finally:
            await asyncio.to_thread(worker.stop)

    return asyncio.run(run())


async def end_of(job: Job) -> list[Any]:
    """The events of a job until all its choices have ended."""
    events, left = [], len(job.choices)
    while left:
        events.append(await job.events.get())
        left -= isinstance(events[-1], Progress) and events[-1].finish_reason is not None
    return events


def test_a_job_is_accepted_and_told_step_by_step(engine: Engine, offline: Engine) -> None:
    prompts = [[5, 6], [7]]

    async def use(worker: Worker) -> list[Any]:
        job = Job([(prompt, TEN) for prompt in prompts])
        worker.submit(job)
        return await end_of(job)

    accepted, *progress = with_worker(engine, use)
    assert accepted is None
    for i, expected in enumerate(offline.generate(prompts, TEN)):
        own = [each for each in progress if each.choice == i]
        assert "".join(each.text for each in own) == expected.text
        assert [each.num_tokens for each in own] == [1] * 10
        assert [each.finish_reason for each in own] == [None] * 9 + ["length"]


def test_a_job_is_refused_as_a_whole(engine: Engine) -> None:
    """The first choice would do; the second is no token."""

    async def use(worker: Worker) -> tuple[Any, bool]:
        jobs = [Job([([5], TEN), ([10**6], TEN)]), Job([([10**6], TEN)])]
        for job in jobs:
            worker.submit(job)
        # Once the second has been told, the first has been dealt with.
        events = [await job.events.get() for job in jobs]
        return events[0], engine.idle

    event, idle = with_worker(engine, use)
    assert isinstance(event, ApiError)
    assert event.status == 400
    assert "token id 1000000" in event.message
    assert idle


def test_a_job_that_is_cancelled_gives_back_its_slots(slow: Engine) -> None:
    async def use(worker: Worker) -> None:
        job = Job([([5], SamplingParams(max_tokens=200, ignore_eos=True))] * 6)
        worker.submit(job)
        while not isinstance(await job.events.get(), Progress):
            pass
        assert (worker.counts["running"], worker.counts["waiting"]) == (4, 2)
        worker.cancel(job)
        while worker.counts["running"] or worker.counts["waiting"]:
            await asyncio.sleep(0.01)

    with_worker(slow, use)
    assert slow.counts["free_pages"] + slow.counts["cached_pages"] == slow.sizes.pages


def test_all_who_wait_hear_of_a_failure(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[Any]:
        raise RuntimeError("out of memory")

    async def use(worker: Worker) -> list[Any]:
        jobs = [Job([([5], TEN)]) for _ in range(3)]
        for job in jobs[:2]:
            worker.submit(job)
        events = [await jobs[0].events.get() for _ in range(2)]
        while worker.failure is None:
            await asyncio.sleep(0.01)
        worker.submit(jobs[2])
        return [*events, await jobs[2].events.get()]

    monkeypatch.setattr(engine, "step", fail)
    try:
        accepted, *failed = with_worker(engine, use)
        assert accepted is None
        assert [event.code for event in failed] == ["engine_failed"] * 2
    finally:
        for request in list(engine._requests.values()):
            engine.cancel(request)
    assert "RuntimeError: out of memory" in capfd.readouterr().err
