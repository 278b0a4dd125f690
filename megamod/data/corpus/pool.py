"""Encoding of a stream of texts, in this process or in workers, with the same result."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import numpy as np

from megamod.data.corpus.tokenizers import Tokenizer

EncodeTexts = Callable[[Iterable[str]], Iterator[np.ndarray]]
"""From texts to their ids, int32 [n] for each, as by `Tokenizer.encode_batch`."""

BATCH_CHARACTERS = 1 << 20  # a batch for a worker ends with the text that reaches this many
BATCH_TEXTS = 4096

_tokenizer: Tokenizer | None = None  # of a worker process


@contextmanager
def open_encoder(tokenizer: Tokenizer, worker_count: int) -> Iterator[EncodeTexts]:
    """Yield a function from texts to their ids in the same order; end the workers afterwards.

    The function keeps only a few batches of texts in memory. It raises BrokenProcessPool if a
    worker dies.

    Args:
        tokenizer: copied to each worker.
        worker_count: number of worker processes; 1 encodes in this process.
    """
    if worker_count == 1:
        yield lambda texts: (
            ids for batch in _batch_texts(texts) for ids in tokenizer.encode_batch(batch)
        )
        return
    pool = ProcessPoolExecutor(
        worker_count, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
    )
    try:
        yield lambda texts: _encode_in_workers(pool, worker_count, texts)
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in_workers(
    pool: ProcessPoolExecutor, worker_count: int, texts: Iterable[str]
) -> Iterator[np.ndarray]:
    """Encode texts in worker processes; yield their ids in order, int32 [n] for each text.

    At most two batches per worker are encoded ahead.

    Args:
        pool: the workers, set up by `_start_worker`.
        worker_count: number of the workers.
        texts: consumed as results are taken.
    """
    batches = _batch_texts(texts)
    pending = deque(
        pool.submit(_encode_batch, batch) for batch in islice(batches, 2 * worker_count)
    )
    while pending:
        yield from pending.popleft().result()
        pending.extend(pool.submit(_encode_batch, batch) for batch in islice(batches, 1))


def _batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of at most `BATCH_TEXTS` texts and about `BATCH_CHARACTERS` characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _start_worker(tokenizer: Tokenizer) -> None:
    """Set up a worker process of the pool.

    It stores the tokenizer for `_encode_batch`, ignores Ctrl-C, which the parent handles, and exits
    with its parent.
    """
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _tokenizer = tokenizer


def _exit_with_parent() -> None:
    """Exit when the parent is gone: a killed parent closes no queue, so a worker would hang."""
    wait([parent_process().sentinel])
    os._exit(1)


def _encode_batch(texts: list[str]) -> list[np.ndarray]:
    """Encode texts with the tokenizer of this worker process: int32 [n] ids for each text."""
    return _tokenizer.encode_batch(texts)
