"""Step time and memory of our training loop against the Trainer of transformers.

    python tests/bench/trainer_step.py

A stock Llama of 23 M parameters with a vocabulary of 32,000, float32, one process on one thread,
AdamW fused on both sides. Steps alternate; minima of the rounds are compared, three times over.
Times are processor time of the thread. Memory is what the resident set of a process grows by at its
fullest, a process for each side.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from plan_memory import memory_status  # noqa: E402
from step import CLIP, RECIPE, REPEATS, ROUNDS, ratios, through_loop  # noqa: E402

TIME = "step of a stock Llama / the Trainer's"
MEMORY = "peak memory of it / the Trainer's"
BATCH, LENGTH, VOCAB = 4, 256, 32_000
SHAPE = dict(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024
)  # 23 M parameters
SMALL = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
RATE = 1e-4
BeginStep = Callable[[], None]


def config_of(shape: dict[str, int]):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, tie_word_embeddings=True, **shape
    )


def all_tokens(steps: int) -> torch.Tensor:
    """Tokens [steps, BATCH, LENGTH + 1] that both sides read."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, VOCAB, (steps, BATCH, LENGTH + 1), generator=generator)


def run_ours(shape: dict[str, int], tokens: torch.Tensor, begin_step: BeginStep) -> None:
    """Train by our loop, one step for each row of `tokens`; call `begin_step` before each."""
    from megamod.dist.scope import Sharing
    from megamod.dist.topology import DomainTopology
    from megamod.models.lm.host import find_stock_class, make_dense_class
    from megamod.train.engine import build_engine
    from megamod.train.optim import make_adamw

    config = config_of(shape)
    torch.manual_seed(1)
    model = make_dense_class(find_stock_class(config))._from_config(
        config, attn_implementation="sdpa"
    )
    ds_config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 0},  # as launchers/pretrain.py sets it for one process
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    topology = DomainTopology(1, ("x",), Sharing.DENSE)
    engine = build_engine(model, lambda groups: make_adamw(groups, **RECIPE), ds_config, topology)
    del model

    def batches(first: int) -> Iterator[dict[str, object]]:
        for number in itertools.count(first):
            begin_step()
            rows = tokens[number % len(tokens)]
            yield {
                "input_ids": rows[:, :-1],
                "labels": rows[:, 1:],
                "domain": 0,
                "domains": torch.zeros(BATCH, dtype=torch.long),
                "tokens": BATCH * LENGTH,
            }

    through_loop(engine, ("x",), torch.device("cpu"), batches, len(tokens) - 1)


def run_trainer(shape: dict[str, int], tokens: torch.Tensor, begin_step: BeginStep) -> None:
    """Train by the Trainer, one step for each row of `tokens`; call `begin_step` before each."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Turn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begin_step()

    names = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    variables = {name: os.environ.pop(name) for name in names}  # with them it would use DDP
    torch.manual_seed(1)
    model = LlamaForCausalLM._from_config(config_of(shape), attn_implementation="sdpa")
    folder = tempfile.TemporaryDirectory()
    arguments = TrainingArguments(
        folder.name,
        use_cpu=True,
        max_steps=len(tokens),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=RECIPE["betas"][0],
        adam_beta2=RECIPE["betas"][1],
        adam_epsilon=RECIPE["eps"],
        weight_decay=RECIPE["weight_decay"],
        max_grad_norm=CLIP,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens[..., :-1].reshape(-1, LENGTH)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Turn()])
    os.environ |= variables
    trainer.train()
    folder.cleanup()


class Turns:
    """Two threads of which one runs at a time; each hands over to the other before its steps.

    Attributes:
        times: seconds of processor time of the finished steps, of both sides.
    """

    def __init__(self) -> None:
        self.times: tuple[list[float], list[float]] = ([], [])
        self._gates = threading.Semaphore(0), threading.Semaphore(0)
        self._started: list[float | None] = [None, None]

    def begin_step(self, side: int) -> None:
        """End the last step of `side`, let the other side make one, and begin the next."""
        first = self._started[side] is None
        if not first:
            self.times[side].append(time.thread_time() - self._started[side])
            self._gates[1 - side].release()
        if not first or side == 1:
            self._gates[side].acquire()
        self._started[side] = time.thread_time()

    def end(self, side: int) -> None:
        """Let the other side make the rest of its steps alone."""
        self._gates[1 - side].release(2 * ROUNDS * REPEATS)


def ratios_of_times() -> list[float]:
    """Sorted ratios ours / Trainer's of the minima of each repeat."""
    for train in (run_ours, run_trainer):  # two threads cannot import the libraries at once
        train(SMALL, all_tokens(2), lambda: None)
    tokens = all_tokens(ROUNDS * REPEATS + 2)
    turns, faults = Turns(), []

    def trainer() -> None:
        torch.set_num_threads(1)
        try:
            run_trainer(SHAPE, tokens, lambda: turns.begin_step(1))
        except BaseException as error:
            faults.append(error)
        finally:
            turns.end(1)

    thread = threading.Thread(target=trainer)

    def begin_step() -> None:
        if thread.ident is None:  # our engine is built
            thread.start()
        turns.begin_step(0)

    try:
        run_ours(SHAPE, tokens, begin_step)
    finally:
        turns.end(0)
        thread.join()
    if faults:
        raise faults[0]
    # The first step of each side warms up.
    return ratios(*(side[1 : 1 + ROUNDS * REPEATS] for side in turns.times))


def peak(side: str) -> int:
    """Bytes by which the resident set grew at its fullest over three steps."""
    train, before = (run_ours if side == "ours" else run_trainer), 0
    for shape in (SMALL, SHAPE):  # the first one only loads the libraries
        before = memory_status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        train(shape, all_tokens(3), lambda: None)
    return memory_status("VmHWM") - before


def in_own_process(*arguments: str) -> list[float]:
    """Numbers that this file prints as its last line, run with these arguments."""
    # Freed blocks go back at once, so that what is resident is what is in use. The C library reads
    # this when a process starts.
    memory = {"MALLOC_MMAP_THRESHOLD_": "65536"} if arguments[0] == "peak" else {}
    command = [sys.executable, __file__, *arguments]
    ended = subprocess.run(
        command, env=os.environ | memory, check=True, stdout=subprocess.PIPE, text=True
    )
    return [float(word) for word in ended.stdout.splitlines()[-1].split()]


def measure() -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    memory = [in_own_process("peak", side)[0] for side in ("ours", "trainer")]
    return {TIME: in_own_process("times"), MEMORY: [memory[0] / memory[1]] * 3}


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    if not sys.argv[1:]:
        for name, middle in measure().items():
            print(f"{name}: {middle[1]:.3f} ({middle[0]:.3f} to {middle[2]:.3f})")
        return
    from megamod.dist.process import join_process_group

    join_process_group(600)
    print(*(ratios_of_times() if sys.argv[1] == "times" else [peak(sys.argv[2])]))


if __name__ == "__main__":
    main()
