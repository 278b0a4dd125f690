"""Requests per second of `megamod serve` at a fixed 99th percentile of the delay, by N.

    python tests/bench/serve.py --size base --p99 2 --json FILE

Three servers run at once on this machine, of a stock BERT (N = 1) and of multiplexed ones of that
size, with random weights, each on one thread. Requests of one text of 128 tokens arrive at random
moments (Poisson) at a fixed rate. The highest rate at which 99 % of them are answered within --p99
seconds is searched by bisection, in rounds in which each server has its turn.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from mux_throughput import make_mux, make_stock

COUNTS = (1, 2, 5)
LENGTH = 128
STEP = 1.08  # ratio of neighbouring rates
LOWEST, HIGHEST = 0.5, 400.0  # requests per second
LEAST_REQUESTS, LEAST_SECONDS = 200, 15
ROUNDS = 8


def save_model(folder: Path, size: str, instances: int) -> None:
    """Write a classifier with random weights and a tokenizer of single words."""
    from transformers import BertTokenizerFast

    from megamod.models.presets import PRESETS

    shape = PRESETS["mux_bert"][size]
    model = (
        make_mux("sequence", shape, instances) if instances > 1 else make_stock("sequence", shape)
    )
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{number}" for number in range(model.config.vocab_size - len(words))]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)


@contextlib.contextmanager
def start_servers(root: Path, size: str, max_batch: int) -> Iterator[dict[int, str]]:
    """Start a server for every N; yield their addresses."""
    servers, addresses = [], {}
    try:
        for instances in COUNTS:
            folder = root / f"n{instances}"
            save_model(folder, size, instances)
            words = ["--max_batch", str(max_batch), "--max_seq_length", str(LENGTH)]
            words += ["--max_queue", "100000", "--port", "0"]
            servers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "megamod", "serve", str(folder), *words],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
            addresses[instances] = servers[-1].stdout.readline().split()[-1]
        yield addresses
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(60)


def make_request(generator: random.Random) -> dict[str, str]:
    """A text that fills a row."""
    return {"input": " ".join(f"w{generator.randrange(20_000)}" for _ in range(LENGTH - 2))}


async def measure_delays(
    address: str, rate: float, limit: float, generator: random.Random
) -> list[float]:
    """Send requests at a rate; return their delays in seconds, sorted.

    It ends early, with an endless delay, as soon as a request waits for more than 3 times `limit`
    or the server refuses it as one too many (status 429).
    """
    count = max(LEAST_REQUESTS, round(LEAST_SECONDS * rate))
    settings = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    tasks: list[asyncio.Task[float]] = []
    late = asyncio.Event()
    async with httpx.AsyncClient(base_url=address, timeout=3 * limit, limits=settings) as client:

        async def send() -> float:
            started = time.monotonic()
            try:
                response = await client.post("/v1/classify", json=make_request(generator))
            except httpx.TimeoutException:
                late.set()
                return float("inf")
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                late.set()
                return float("inf")
            response.raise_for_status()
            return time.monotonic() - started

        due = time.monotonic()
        while len(tasks) < count and not late.is_set():
            due += generator.expovariate(rate)
            await asyncio.sleep(max(0, due - time.monotonic()))
            tasks.append(asyncio.ensure_future(send()))
        answers = asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait(
            [answers, asyncio.ensure_future(late.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        for task in tasks:
            task.cancel()  # those that are not done
        delays = await answers
    for delay in delays:
        # A request whose time is over may end as cancelled instead of timed out.
        if isinstance(delay, Exception):
            raise delay
    if not late.is_set() and all(isinstance(delay, float) for delay in delays):
        return sorted(delays)
    return [float("inf")]


def percentile(delays: Sequence[float], share: float) -> float:
    """The smallest delay that a share of the requests does not exceed."""
    return delays[min(len(delays) - 1, int(share * len(delays)))]


def search(addresses: dict[int, str], limit: float, seed: int) -> dict[int, dict[str, float]]:
    """Find for every N the highest rate at which the 99th percentile is below `limit` seconds."""
    rates = [LOWEST]
    while rates[-1] < HIGHEST:
        rates.append(rates[-1] * STEP)
    bounds = {instances: (-1, len(rates)) for instances in addresses}
    best: dict[int, dict[str, float]] = {}
    generator = random.Random(seed)
    for round_number in range(ROUNDS):
        for instances, address in addresses.items():
            low, high = bounds[instances]
            if high - low < 2:
                continue
            middle = (low + high) // 2
            delays = asyncio.run(measure_delays(address, rates[middle], limit, generator))
            p99 = percentile(delays, 0.99)
            bounds[instances] = (middle, high) if p99 <= limit else (low, middle)
            if p99 <= limit:
                best[instances] = {
                    "requests_per_second": rates[middle],
                    "p50": percentile(delays, 0.5),
                    "p99": p99,
                    "requests": len(delays),
                }
            print(
                f"round {round_number + 1}, N = {instances}: {rates[middle]:.1f} per second, "
                f"p99 {p99:.2f} s",
                flush=True,
            )
    return best


def main() -> None:
    """Parse, measure, and print a row for every N."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base", help="small, base, large")
    parser.add_argument("--p99", type=float, default=2.0, help="seconds (default: 2)")
    parser.add_argument("--max_batch", type=int, default=4, help="of the servers (default: 4)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        start_servers(Path(folder), args.size, args.max_batch) as addresses,
    ):
        best = search(addresses, args.p99, args.seed)
    single = best[1]["requests_per_second"]
    for instances, row in best.items():
        rate = row["requests_per_second"]
        print(
            f"N = {instances}: {rate:6.1f} requests/s, {rate / single:.2f} x N = 1, "
            f"p50 {row['p50']:.2f} s, p99 {row['p99']:.2f} s of {row['requests']}"
        )
    if args.json:
        args.json.write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
