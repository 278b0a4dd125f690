"""Planned against measured peak memory of a rank: the growth of the resident set, on a CPU.

    python tests/bench/plan_memory.py

A run is built and makes three steps in a process of its own. What it had resident before the model
was there is taken off. Memory that is asked for and never touched is not resident, so buffers are
small here; on a GPU they count as they are planned.
"""

import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from ranks import on_ranks  # noqa: E402

BUCKET = 1_000_000
LENGTH, VOCAB, WIDTH, LAYERS = 256, 16384, 768, 8
CASES = [  # ZeRO stage, precision, micro-batch, micro-batches of a step, recomputing
    (0, "fp32", 4, 1, False),
    (1, "fp32", 4, 1, False),
    (1, "bf16", 4, 1, False),
    (2, "bf16", 4, 1, False),
    (1, "bf16", 16, 2, False),
    (2, "bf16", 16, 2, False),
    (2, "bf16", 16, 1, True),
]
Case = tuple[int, str, int, int, bool]


def measured(rank: int, case: Case) -> int:
    """Bytes by which the resident set grew at its fullest, from the model to the third step."""
    from megamod.models.lm.configuration import DemixConfig
    from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
    from megamod.train.engine import build_engine, finish_micro_step
    from megamod.train.optim import make_adamw, set_learning_rate

    stage, precision, micro_batch, micro_steps, checkpointing = case
    torch.set_num_threads(1)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    small = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
    large = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=12)
    before = 0
    for number, shape in enumerate((small, large)):  # the first one only brings in the libraries
        if number:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = memory_status("VmRSS")
        model = DemixForCausalLM(
            DemixConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, domains=["x"], **shape)
        )
        initialise_lm_weights(model, seed=1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        engine = build_engine(
            model,
            lambda groups: make_adamw(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
            config,
            _alone(),
        )
        del model
        for _ in range(3 * micro_steps):
            tokens = torch.randint(4, VOCAB, (micro_batch, LENGTH + 1))
            set_learning_rate(engine.optimizer, 1e-4)
            loss = engine(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
            engine.backward(loss)
            finish_micro_step(engine, 1.0)
        if not number:
            engine.destroy()
            del engine
    return memory_status("VmHWM") - before


def planned(case: Case, folder: Path) -> int:
    """Bytes at the fullest moment, by the planner."""
    import json

    from megamod.args import DataArgs, LoraArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
    from megamod.btm.campaign import BtmArgs
    from megamod.flags import parse_args
    from megamod.planning.job import list_jobs
    from megamod.planning.plan import plan_job
    from megamod.planning.plan_args import PlanArgs

    stage, precision, micro_batch, micro_steps, checkpointing = case
    zero = {"stage": stage, "reduce_bucket_size": BUCKET}
    file = folder / "ds.json"
    file.write_text(
        json.dumps({"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}})
    )
    flags = f"""--world_size 1 --model tiny --hidden_size {WIDTH} --num_hidden_layers {LAYERS}
        --num_attention_heads 12 --vocab_size {VOCAB} --max_seq_length {LENGTH}
        --per_device_train_batch_size {micro_batch} --global_batch_size {micro_batch * micro_steps}
        --gradient_checkpointing {checkpointing} --deepspeed {file}"""
    kinds = (PlanArgs, BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs)
    kinds += (OptimArgs, MuxArgs, DataArgs)
    parsed = parse_args(*kinds, argv=flags.split())
    (job,) = list_jobs(parsed)
    return plan_job(job, parsed[0]).memory.peak


def _alone():
    from megamod.dist.scope import Sharing
    from megamod.dist.topology import DomainTopology

    return DomainTopology(1, ("x",), Sharing.DENSE)


def memory_status(key: str) -> int:
    """Bytes of an entry of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def main() -> None:
    import tempfile

    # Freed blocks go back at once, so that what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            real = on_ranks(1, measured, case)[0]
            output = planned(case, Path(folder))
            stage, precision, micro_batch, micro_steps, checkpointing = case
            recomputed = ", recomputed" if checkpointing else ""
            rows = f"{micro_steps} x {micro_batch} x {LENGTH}"
            print(
                f"stage {stage}, {precision}, {rows}{recomputed}: planned "
                f"{output / 1e9:.3f} GB, measured {real / 1e9:.3f} GB: {output / real - 1:+.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
