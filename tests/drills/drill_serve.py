"""A: a server under mixed load mixes no answers up, loses none, and takes no more memory."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from drills.sizes import SEED, pick, report
from serving.test_serve_classifiers import MALFORMED, post
from serving.test_server import save_classifier
from serving.tiny_services import (
    LENGTH,
    FedRows,
    make_service,
    make_text,
    make_tiny_app,
    open_client,
    read_error,
)

REQUESTS = pick(300, 10_000)
PART = REQUESTS // 10
CLIENTS = 64
GROWTH = 0.02


async def ask(client, texts: list[str]) -> list[dict]:
    """Results for texts; a full queue is asked again."""
    while True:
        response = await post(client, {"input": texts if len(texts) > 1 else texts[0]})
        if response.status_code == 200:
            return response.json()["results"]
        read_error(response, [429])
        assert int(response.headers["retry-after"]) >= 1
        await asyncio.sleep(random.random() / 100)


async def run_part(client, service, first: int, generator: random.Random) -> int:
    """Send a tenth of the requests, a fifth of them malformed; return how many went wrong."""
    fed, wrong, free = FedRows(service), 0, asyncio.Semaphore(CLIENTS)

    async def send_valid(number: int) -> list[tuple[str, dict]]:
        texts = [make_text(3 * number + k) for k in range(generator.choice((1, 1, 1, 2, 3)))]
        async with free:
            return list(zip(texts, await ask(client, texts), strict=True))

    async def send_malformed() -> bool:
        body, status, message = generator.choice(MALFORMED)
        async with free:
            response = await post(client, body)
        return message in read_error(response, [status])

    kinds = [generator.random() < 0.8 for _ in range(PART)]
    tasks = [
        send_valid(first + number) if valid else send_malformed()
        for number, valid in enumerate(kinds)
    ]
    for outcome in await asyncio.gather(*tasks):
        if isinstance(outcome, bool):
            wrong += not outcome
            continue
        for text, result in outcome:
            expected = fed.predict(text)
            score = pytest.approx(expected["score"], abs=1e-5)
            wrong += not (result["label"] == expected["label"] and result["score"] == score)
    return wrong


@pytest.mark.timeout(1800)
def test_mixed_requests_at_once(tmp_path, record_property):
    service, generator = make_service(tmp_path, 3, 4), random.Random(SEED)
    process, sizes = psutil.Process(), []

    async def main() -> int:
        wrong, app = 0, make_tiny_app(service, max_wait=0.002, max_queue=64)
        async with open_client(app) as client:
            for part in range(10):
                wrong += await run_part(client, service, part * PART, generator)
                sizes.append(process.memory_info().rss)
        return wrong

    wrong = asyncio.run(main())
    record_property("figures", f"RSS {sizes[1] / 2**20:.0f} to {sizes[-1] / 2**20:.0f} MiB")
    report(record_property, REQUESTS, wrong + (sizes[-1] > sizes[1] * (1 + GROWTH)))
    assert wrong == 0
    assert sizes[-1] <= sizes[1] * (1 + GROWTH), sizes


async def send_until(address: str, until: asyncio.Event) -> list[tuple[float, int]]:
    """Send requests, each on a connection of its own; return start and status of each.

    Status 0: the connection was refused or reset.
    """
    outcomes = []
    async with httpx.AsyncClient(base_url=address, headers={"connection": "close"}) as client:
        while not until.is_set():
            started = time.monotonic()
            try:
                response = await client.post(
                    "/v1/classify", json={"input": make_text(len(outcomes))}
                )
                outcomes.append((started, response.status_code))
            except httpx.TransportError:
                outcomes.append((started, 0))
                await asyncio.sleep(0.01)
    return outcomes


def test_a_signal_under_load(tmp_path, record_property):
    """Every request is answered, or refused after the signal, and the exit code is 0."""
    folder = save_classifier(tmp_path / "model", 2)
    words = ["serve", str(folder), "--port", "0", "--max_seq_length", str(LENGTH)]
    server = subprocess.Popen(
        [sys.executable, "-m", "megamod", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        address = server.stdout.readline().split()[-1]

        async def main() -> tuple[float, list[tuple[float, int]]]:
            until = asyncio.Event()
            tasks = [asyncio.ensure_future(send_until(address, until)) for _ in range(8)]
            await asyncio.sleep(2)
            signalled = time.monotonic()
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(1)
            until.set()
            return signalled, [outcome for task in tasks for outcome in await task]

        signalled, outcomes = asyncio.run(main())
        code = server.wait(20)
    finally:
        server.kill()
    # A request needs some time to arrive, so those right before the signal may be refused too.
    before = [status for started, status in outcomes if started < signalled - 1]
    after = {status for started, status in outcomes if started >= signalled - 1}
    lost = sum(status != 200 for status in before)
    report(record_property, 1, int(lost > 0 or code != 0))
    assert len(before) > 5 and lost == 0 and code == 0
    assert 0 in after and after <= {0, 200, 503}
