"""Groups and deadlines of the queue, its bound, failing requests, and the end."""

import asyncio
import threading
import time

import pytest

from megamod.serving.request_queue import DrainingError, QueueFullError, RequestQueue


class Recorder:
    """A model that doubles numbers, one batch at a time; "bad" fails, and `gate` holds it back."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, requests):
        self.gate.wait(10)
        self.batches.append(list(requests))
        if "bad" in requests:
            raise ValueError("bad is no number")
        return [2 * request for request in requests]


def run(scenario, **options):
    """Run `scenario(queue, model)` in an event loop, with a queue of groups of 3, 2 in a batch."""
    model = Recorder()
    settings = dict(group_size=3, max_groups=2, max_wait=0.05, limit=20) | options

    async def main():
        queue = RequestQueue(model, **settings)
        worker = asyncio.ensure_future(queue.serve())
        try:
            return await asyncio.wait_for(scenario(queue, model), 20)
        finally:
            worker.cancel()

    return asyncio.run(main()), model


async def hold(queue, model, requests):
    """Submit requests one by one while the model is busy with 0; return their tasks."""
    model.gate.clear()
    tasks = [asyncio.ensure_future(queue.submit([0] * queue.group_size))]
    while not queue.running:
        await asyncio.sleep(0.001)
    tasks += [asyncio.ensure_future(queue.submit([request])) for request in requests]
    await asyncio.sleep(0)
    return tasks[1:]


def test_full_groups_run_at_once_and_the_rest_by_the_deadline():
    async def scenario(queue, model):
        started = time.monotonic()
        tasks = [asyncio.ensure_future(queue.submit([number])) for number in range(7)]
        answers = [await task for task in tasks[:6]]
        early = time.monotonic() - started
        answers.append(await tasks[6])
        return answers, early, time.monotonic() - started

    (answers, early, late), model = run(scenario, max_wait=0.4)
    assert answers == [[2 * number] for number in range(7)]
    assert model.batches == [[0, 1, 2, 3, 4, 5], [6]]
    assert early < 0.4 <= late


def test_a_batch_holds_its_groups_and_no_more():
    reports = []

    async def scenario(queue, model):
        tasks = await hold(queue, model, range(1, 15))
        await asyncio.sleep(queue.max_wait)
        model.gate.set()
        return [(await task)[0] for task in tasks]

    answers, model = run(scenario, on_batch=reports.append)
    assert answers == [2 * number for number in range(1, 15)]
    # The last two are late, and go alone: their batch has one incomplete group.
    assert [len(batch) for batch in model.batches] == [3, 6, 6, 2]
    assert [(report.requests, report.places) for report in reports] == [
        (3, 3),
        (6, 6),
        (6, 6),
        (2, 3),
    ]


def test_several_requests_at_once_keep_their_order():
    async def scenario(queue, model):
        return await asyncio.gather(*(queue.submit([n, n + 1, n + 2]) for n in range(0, 18, 3)))

    answers, _ = run(scenario)
    assert answers == [[2 * n, 2 * n + 2, 2 * n + 4] for n in range(0, 18, 3)]


def test_a_full_queue_refuses_whole_requests():
    async def scenario(queue, model):
        tasks = await hold(queue, model, range(1, 4))
        with pytest.raises(QueueFullError, match="3 requests are waiting, of 5 at most") as error:
            await queue.submit([8, 9, 10])
        assert error.value.retry_after >= 1 and queue.waiting == 3
        tasks.append(asyncio.ensure_future(queue.submit([4, 5])))
        model.gate.set()
        return [await task for task in tasks]

    answers, _ = run(scenario, limit=5)
    assert answers == [[2], [4], [6], [8, 10]]


def test_a_failing_request_harms_no_other():
    async def scenario(queue, model):
        tasks = await hold(queue, model, [1, "bad", 3])
        model.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    (first, bad, third), _ = run(scenario)
    assert (first, third) == ([2], [6])
    assert isinstance(bad, ValueError) and str(bad) == "bad is no number"


def test_abandoned_requests_are_dropped():
    async def scenario(queue, model):
        tasks = await hold(queue, model, [1, 2, 3, 4])
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert queue.waiting == 3
        model.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers, model = run(scenario)
    assert answers[:1] + answers[2:] == [[2], [6], [8]]
    assert isinstance(answers[1], asyncio.CancelledError)
    assert model.batches == [[0, 0, 0], [1, 3, 4]]


def test_a_drained_queue_has_answered_everything():
    async def scenario(queue, model):
        tasks = await hold(queue, model, [1, 2])
        end = asyncio.ensure_future(queue.drain())
        await asyncio.sleep(0)
        with pytest.raises(DrainingError, match="accepts no new requests"):
            await queue.submit([3])
        assert not queue.idle and not end.done()
        model.gate.set()
        await end
        return [task.result() for task in tasks]

    answers, _ = run(scenario, max_wait=0.2)
    assert answers == [[2], [4]]
