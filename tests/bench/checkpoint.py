"""Time of a durable checkpoint against torch.save and fsync of the same bytes.

    python tests/bench/checkpoint.py

Ours writes, syncs, digests, lists and renames. Both sides alternate on the same disk.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from ranks import on_ranks  # noqa: E402

ROUNDS, REPEATS = 4, 3


def measure_here(rank: int, folder: str) -> list[float]:
    """Sorted ratios ours / torch.save of the minima of each repeat; about 0.5 GB each."""
    from megamod.dist.process import get_world_size
    from megamod.dist.scope import Sharing
    from megamod.dist.topology import DomainTopology
    from megamod.models.lm.configuration import DemixConfig
    from megamod.models.lm.demix import DemixForCausalLM
    from megamod.runs.pretrain.causal_lm import make_lm_card
    from megamod.states.checkpoint_folder import TrainState
    from megamod.train.checkpoint import Checkpoints
    from megamod.train.engine import build_engine
    from megamod.train.export import ModelExport
    from megamod.train.fragments import iterate_fragments
    from megamod.train.optim import make_adamw

    config = DemixConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8
    )
    topology = DomainTopology(get_world_size(), ("text",), Sharing.DENSE)
    engine = build_engine(
        DemixForCausalLM(config),
        lambda groups: make_adamw(groups, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1),
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        },
        topology,
    )
    root = Path(folder)
    (root / "run.yaml").write_text("seed: 1\n")
    output = make_lm_card(config, Sharing.DENSE, "none")
    export = ModelExport(engine, config, topology, None, root / "run.yaml", output)
    checkpoints = Checkpoints(root / "checkpoints", engine, topology, export, {}, keep_count=1)

    def ours(number: int) -> None:
        assert checkpoints.save(TrainState(step=number))

    def theirs(number: int) -> None:
        weights = {name: p.data for name, p in engine.module.named_parameters()}
        moments = {f.name: f.tensors for f in iterate_fragments(engine)}
        with open(root / "peer.pt", "wb") as file:
            torch.save({"model": weights, "optimizer": moments}, file)
            file.flush()
            os.fsync(file.fileno())

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(1, ROUNDS * REPEATS + 2):
        for name, call in (("theirs", theirs), ("ours", ours)):
            started = time.perf_counter()
            call(number)
            times[name].append(time.perf_counter() - started)
    size = sum(f.stat().st_size for f in (root / "checkpoints").rglob("*") if f.is_file())
    peer = (root / "peer.pt").stat().st_size
    assert abs(size - peer) < 0.01 * peer, (size, peer)
    pairs = [
        min(times["ours"][i : i + ROUNDS]) / min(times["theirs"][i : i + ROUNDS])
        for i in range(1, ROUNDS * REPEATS, ROUNDS)
    ]
    return sorted(pairs)


def measure() -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR", "."))
    try:
        return {"checkpoint / torch.save + fsync": on_ranks(1, measure_here, folder)[0]}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    for name, ratios in measure().items():
        print(f"{name}: {ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})")


if __name__ == "__main__":
    main()
