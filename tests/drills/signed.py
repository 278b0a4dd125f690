"""Checkpoints whose manifest fits their damaged files, as if somebody had signed them again.

No digest finds such a damage, so that the readers of the files themselves must: what they accept is
what the valid files say, or has another value that a run may have.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from saved_models import make_model

from megamod.dist.scope import Sharing
from megamod.errors import UserError
from megamod.files import hash_file
from megamod.models.lm.load import load_lm
from megamod.states.checkpoint_folder import StateRecord, TrainState, write_fragments
from megamod.states.manifest import find_file_faults, make_digest_entries, write_manifest
from megamod.states.verify import check_checkpoint
from megamod.states.weights import read_weights
from megamod.train.checkpoint import Checkpoints
from megamod.train.fragments import iterate_fragments, read_optimizer_steps

STEP = 4
SETTINGS = {"seed": 1, "learning_rate": 0.003, "domains": ["law", "code"]}
SHARES = ((0, 30), (30, 64))  # of every parameter, in the files of two ranks


def make_engine() -> SimpleNamespace:
    """An engine of one rank in float32 without ZeRO, with a loss scaler as of fp16."""
    module = torch.nn.Linear(16, 4, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.loss_scaler = DynamicLossScaler(2.0**16, 100, 1, 2, False)
    return SimpleNamespace(module=module, optimizer=optimizer)


def make_checkpoints(folder: Path, engine: SimpleNamespace) -> Checkpoints:
    """The checkpoints of a run of one rank."""
    topology = SimpleNamespace(sharing=Sharing.DENSE)
    return Checkpoints(folder, engine, topology, lambda _: [], SETTINGS, None)


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint of two ranks in folder/step-4; returns `folder`."""
    checkpoint = folder / f"step-{STEP}"
    make_model(checkpoint)
    scaler = {key: value for key, value in vars(make_engine().optimizer.loss_scaler).items()}
    del scaler["dtype"]
    state = TrainState(STEP, STEP, {"law": 30, "code": 31}, 1, 2.5, [2])
    StateRecord(state, STEP - 1.0, scaler, SETTINGS, 2).write(checkpoint)
    whole = make_tensors()
    for rank, (start, stop) in enumerate(SHARES):
        parts = {kind: tensor[start:stop] for kind, tensor in whole.items()}
        write_fragments(checkpoint / f"optimizer-{rank}.safetensors", {"weight": (start, parts)})
    write_manifest(checkpoint, make_digest_entries(checkpoint, sorted(checkpoint.iterdir())))
    return folder


def make_tensors() -> dict[str, torch.Tensor]:
    """Master and moments of the only parameter."""
    generator = torch.Generator().manual_seed(5)
    return {
        kind: torch.rand(SHARES[-1][1], generator=generator)
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }


def resume(folder: Path) -> None:
    """Resume; the optimizer is as it was written, and the state is that of the file."""
    checkpoint, engine = folder / f"step-{STEP}", make_engine()
    state = make_checkpoints(folder, engine).load(checkpoint)
    (fragment,) = iterate_fragments(engine)
    for kind, tensor in make_tensors().items():
        assert torch.equal(fragment.tensors[kind], tensor), kind
    content = json.loads((checkpoint / "state.json").read_text())
    assert state.step == content["state"]["step"] == STEP
    assert read_optimizer_steps(engine) == content.get("optimizer_steps", 0) <= STEP
    scaler = engine.optimizer.loss_scaler
    scaler.consecutive_hysteresis = False  # it asks for the rank, and this process has none
    for _ in range(2 * min(scaler.scale_window, 100)):
        scaler.update_scale(False)
    assert scaler.cur_scale > 0


def load_model(folder: Path) -> None:
    """Load the model: its weights are those of the file, and the file has no more."""
    model = load_lm(folder / f"step-{STEP}", flag="--model")
    stored = read_weights(folder / f"step-{STEP}")
    loaded = model.state_dict()
    assert not stored.keys() - loaded.keys(), sorted(stored.keys() - loaded.keys())[:3]
    assert all(torch.equal(loaded[name].float(), stored[name]) for name in stored)


def check_manifest(folder: Path) -> None:
    """A manifest is accepted only if it lists every file with its size and digest."""
    checkpoint = folder / f"step-{STEP}"
    faults = find_file_faults(checkpoint)
    assert bool(faults) is bool(check_checkpoint(checkpoint)[1])
    if faults:
        raise UserError(faults[0])
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    needed = {"state.json", "model.safetensors", *(f"optimizer-{r}.safetensors" for r in (0, 1))}
    assert needed <= listed.keys()
    for name, entry in listed.items():
        assert hash_file(checkpoint / name) == entry["sha256"]


def verify_signed(folder: Path) -> list[str]:
    """Faults that `megamod verify` reports of a checkpoint after its manifest is written anew."""
    checkpoint = folder / f"step-{STEP}"
    files = [file for file in sorted(checkpoint.iterdir()) if file.name != "manifest.json"]
    write_manifest(checkpoint, make_digest_entries(checkpoint, files))
    return check_checkpoint(checkpoint)[1]


FORMATS = (
    ("signed state", f"step-{STEP}/state.json", "json", resume),
    ("signed optimizer", f"step-{STEP}/optimizer-1.safetensors", "header", resume),
    ("signed configuration", f"step-{STEP}/config.json", "json", load_model),
    ("manifest", f"step-{STEP}/manifest.json", "json", check_manifest),
)
"""Name, damaged file, way of damage and reader, as drills/formats.py takes them."""
