"""Step time with and without each of several parts.

    python tests/bench/step_parts.py

One process, one thread; both ways take turns, minima of processor time are compared, three times.
Memory is what autograd keeps for the backward pass (saved-tensor hooks). Overlap of reduction is
measured on two processes, by the clock.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from loader import our_reader, seconds, write_domains  # noqa: E402
from ranks import on_ranks  # noqa: E402

ROUNDS, REPEATS = 8, 3
BATCH, LENGTH, WIDTH, HEADS, LAYERS, VOCAB = 4, 512, 256, 4, 4, 16384


def make_model(attention: str):
    from megamod.models.lm.configuration import DemixConfig
    from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights

    config = DemixConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        domains=["x"],
    )
    model = DemixForCausalLM._from_config(config, attn_implementation=attention)
    initialise_lm_weights(model, seed=1)
    return model


def forward_backward(model, tokens: torch.Tensor) -> None:
    model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    model.zero_grad()


def whole_logits(model, tokens: torch.Tensor) -> None:
    """The usual loss: all logits at once."""
    logits = model(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.zero_grad()


def compiled() -> tuple[Callable[[torch.Tensor], None], float]:
    """Forward and backward of a model with compiled blocks, and seconds of its first call."""
    from megamod.train.compiled import compile_blocks

    model = make_model("sdpa")
    compile_blocks(model)
    started = time.perf_counter()
    forward_backward(model, torch.randint(4, VOCAB, (BATCH, LENGTH + 1)))
    return lambda tokens: forward_backward(model, tokens), time.perf_counter() - started


def kept_bytes(call: Callable[[], None]) -> int:
    """Bytes of different storages that autograd keeps, parameters left out."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(seen.values())


def optimizers() -> tuple[Callable[[], None], Callable[[], None]]:
    """AdamW over 20 M elements, fused and as torch chooses by itself on a CPU."""

    def make(fused: bool) -> Callable[[], None]:
        parameters = [torch.nn.Parameter(torch.randn(1000, 1000)) for _ in range(20)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return torch.optim.AdamW(parameters, lr=1e-4, fused=fused or None).step

    return make(True), make(False)


def overlap(rank: int, stage: int) -> list[float]:
    """Sorted ratios without / with of the minima of each repeat: whole steps, dense."""
    from step import CLIP, make_engine, random_batch

    from megamod.train.engine import finish_micro_step

    engines = [make_engine("none", stage, overlap_comm=on)[0] for on in (True, False)]
    result = []
    for repeat in range(REPEATS + 1):
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(ROUNDS):
            batch = random_batch(2 * number + rank, 0)
            for engine, into in zip(engines, times, strict=True):
                torch.distributed.barrier()
                started = time.perf_counter()
                loss = engine(batch["input_ids"], shift_labels=batch["labels"]).loss
                engine.backward(loss)
                finish_micro_step(engine, CLIP)
                torch.distributed.barrier()
                into.append(time.perf_counter() - started)
        if repeat:
            result.append(min(times[1]) / min(times[0]))
    return sorted(result)


def reading_share(step: Callable[[], None]) -> float:
    """Time of a batch of the step's size, read in this process, as a share of the step."""
    with tempfile.TemporaryDirectory() as folder:
        read = our_reader(write_domains(Path(folder)), BATCH, LENGTH)
        batch = min(seconds(read, 100) / 100 for _ in range(REPEATS))
    return batch / min(seconds(step, 1) for _ in range(REPEATS))


def ratios(with_it: Callable[[], None], without: Callable[[], None]) -> list[float]:
    """Sorted ratios without / with of the minima of each repeat."""
    result = []
    with_it(), without()
    for _ in range(REPEATS):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for call, into in zip((with_it, without), times, strict=True):
                started = time.process_time()
                call()
                into.append(time.process_time() - started)
        result.append(min(times[1]) / min(times[0]))
    return sorted(result)


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    tokens = torch.randint(4, VOCAB, (BATCH, LENGTH + 1))
    model, eager = make_model("sdpa"), make_model("eager")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing is compiled already
        by_compiler, first = compiled()
    rows = {
        "attention by SDPA, forward and backward": (
            lambda: forward_backward(model, tokens),
            lambda: forward_backward(eager, tokens),
        ),
        "loss by chunks of logits, forward and backward": (
            lambda: forward_backward(model, tokens),
            lambda: whole_logits(model, tokens),
        ),
        "compiled blocks, forward and backward": (
            lambda: by_compiler(tokens),
            lambda: forward_backward(model, tokens),
        ),
        "fused AdamW": optimizers(),
    }
    for name, (with_it, without) in rows.items():
        low, middle, high = ratios(with_it, without)
        kept = ""
        if "backward" in name:
            kept = f", keeps {kept_bytes(with_it) / kept_bytes(without):.2f} of the bytes"
        print(f"{name}: {middle:.2f}x as fast ({low:.2f} to {high:.2f}){kept}", flush=True)
    print(f"compiled blocks: {first:.1f} s until the first pass is done")
    for stage in (1, 2):
        low, middle, high = on_ranks(2, overlap, stage)[0]
        name = f"overlap_comm, ZeRO {stage}, 2 processes"
        print(f"{name}: {middle:.3f}x as fast ({low:.3f} to {high:.3f})", flush=True)
    share = reading_share(lambda: forward_backward(model, tokens))
    print(f"reading a batch: {share:.5f} of forward and backward")


if __name__ == "__main__":
    main()
