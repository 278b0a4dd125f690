"""Saving and resuming: no kill loses a checkpoint, any world size and ZeRO stage reads it.

The format is that of `megamod.states.checkpoint_folder`.

Commit: every rank writes and syncs its files in a hidden folder and lists their digests; rank 0
gathers the lists into the manifest, then renames the folder, and only then deletes older ones. A
folder without a manifest that verifies does not count as a checkpoint.
"""

import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import deepspeed
import torch.distributed as dist
from safetensors import safe_open

from megamod.dist.process import broadcast_from_rank_0, is_true_on_all_ranks
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError, report_damage
from megamod.files import hash_file, sync_file, sync_folder, write_atomic
from megamod.states.checkpoint_folder import (
    PENDING,
    SOUND,
    STATE,
    StateRecord,
    TrainState,
    build_optimizer_path,
    find_checkpoint,
    format_checkpoint_name,
    list_checkpoints,
    parse_checkpoint_step,
    read_fragment_ranges,
    write_fragments,
    write_latest,
)
from megamod.states.manifest import make_digest_entry, write_manifest
from megamod.train.branched_model import check_branched_model
from megamod.train.fragments import (
    copy_masters_to_weights,
    iterate_fragment_shards,
    iterate_fragments,
    read_optimizer_steps,
    set_optimizer_steps,
)

logger = logging.getLogger(__name__)

ModelWriter = Callable[[Path], list[Path]]
"""Writes this rank's files of the model folder and returns them. Called on every rank."""


@dataclass(frozen=True)
class History:
    """Steps between the last checkpoint and the one to write.

    Attributes:
        sound: step of the last checkpoint if finite steps followed it; None: the sound checkpoint
            is the same as before.
        replaced: step of the last checkpoint if nothing was trained since: its weights are equal.
        diverged: the run stops because a step was not finite, so no older checkpoint is deleted
            but the replaced one.
    """

    sound: int | None = None
    replaced: int | None = None
    diverged: bool = False


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        engine: deepspeed.DeepSpeedEngine,
        topology: DomainTopology,
        write_model: ModelWriter,
        settings: Mapping[str, object],
        keep_count: int | None,
        defaults: Mapping[str, object] = MappingProxyType({}),
    ):
        """Prepare to save and load.

        Args:
            folder: folder of the run's checkpoints; `save` creates it.
            engine: its model and optimizer are saved, and changed by `resume` and `load`.
            topology: ranks and domains of the run.
            write_model: see `ModelWriter`.
            settings: values that a resumed run must repeat.
            keep_count: number of checkpoints to keep; None: all.
            defaults: values of settings that an older checkpoint does not have.
        """
        self.folder = Path(folder)
        self.engine = engine
        self.topology = topology
        self.write_model = write_model
        self.settings = dict(settings)
        self.keep = keep_count
        self.defaults = defaults

    def save(self, state: TrainState, history: History | None = None) -> bool:
        """Write a checkpoint; collective. True if all ranks wrote it, and False, logged, if not.

        Then delete older ones beyond the number to keep, but never the last sound one.

        Args:
            state: the step and what else a resumed run continues from.
            history: steps since the last checkpoint; None: nothing is known of them.
        """
        history = history or History()
        final = self.folder / format_checkpoint_name(state.step)
        nonce = broadcast_from_rank_0(secrets.randbits(32))
        temporary = self.folder / f".tmp-{format_checkpoint_name(state.step)}-{nonce:08x}"
        if not self._create_folder_on_all_ranks(temporary):
            return False
        writers = (self.write_model, self._write_optimizer, partial(self._write_state, state=state))
        try:
            self._write_files_with_digests(temporary, writers)
            written = True
        except OSError as error:
            logger.error("checkpoint %s: rank %d: %s", final.name, dist.get_rank(), error)
            written = False
        if is_true_on_all_ranks(written) and dist.get_rank() == 0:
            try:
                # Before the commit: a run killed after it saves this checkpoint no second time.
                if history.sound is not None:
                    write_atomic(self.folder / SOUND, f"{history.sound}\n")
                self._commit(temporary, final)
                self._delete_older_checkpoints(final, history)
            except OSError as error:
                logger.error("checkpoint %s: %s", final.name, error)
                written = False
        written = is_true_on_all_ranks(written)
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        return written

    def resume(self, choice: str) -> TrainState | None:
        """Load a checkpoint into the engine, and delete unfinished ones; collective.

        Args:
            choice: "auto" (the newest valid one, if any was ever written), "none", or a path.
        Returns:
            the state of the run, or None to start afresh.
        Raises:
            UserError: if there is no such valid checkpoint, if checkpoints exist and `choice` is
                "none", or as `load`.
        """
        path = self._select_checkpoint(choice)
        state = None if path is None else self.load(path)
        if dist.get_rank() == 0:
            for stale in self.folder.glob(".tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            if path is not None and path.parent == self.folder:
                write_latest(self.folder, path)
        dist.barrier()
        return state

    def load(self, path: Path) -> TrainState:
        """Load the checkpoint in `path` into the engine; collective.

        Its weights, its optimizer's state and the dynamic loss scale of fp16 are overwritten.

        Returns:
            the state of the run at that checkpoint.
        Raises:
            UserError: if it was made with other settings or another model, or is damaged. If an
                optimizer file is, the engine holds a part of it and cannot be trained.
        """
        folder = self._get_state_folder(path)
        if not (folder / STATE).is_file():
            raise UserError(f"{path} was made with another --untie: it has no {folder / STATE}")
        saved = StateRecord.read(folder)
        if path.name.startswith("step-") and path.name != format_checkpoint_name(saved.state.step):
            raise UserError(
                f"{folder / STATE}: step is {saved.state.step}, in a folder {path.name}"
            )
        saved_settings = {**self.defaults, **saved.settings}
        if saved.branched:  # from another run: it says only what both must agree on
            saved_settings = {**self.settings, **saved.settings}
            check_branched_model(folder, self.engine.module.config)
        differences = [
            f"{key}: {saved_settings.get(key)!r} then, {value!r} now"
            for key, value in self.settings.items()
            if saved_settings.get(key) != value
        ]
        if differences:
            raise UserError(
                f"{path} was made with other settings; give those again, or another --output_dir: "
                + "; ".join(differences)
            )
        with report_damage(f"{path}: its optimizer's state cannot be read"):
            _read_optimizer(path, self.engine, self._get_name_prefix(), saved.branched)
        set_optimizer_steps(self.engine, saved.optimizer_steps)
        copy_masters_to_weights(self.engine)
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if getattr(scaler, "dynamic", False) and saved.loss_scaler.get("dynamic"):
            # Static ones follow from the configuration.
            unknown = saved.loss_scaler.keys() - vars(scaler).keys()
            if unknown or not 0 < saved.loss_scaler.get("cur_scale", 1) < math.inf:
                raise UserError(f"{folder / STATE}: loss_scaler is none of this run's precision")
            vars(scaler).update(saved.loss_scaler)
        return saved.state

    def begin_evaluation(self, step: int) -> None:
        """Record that the evaluation after `step` is due: a resumed run repeats it if it fails.

        Call it before the checkpoint of that step is written, on any ranks: rank 0 writes. A disk
        that takes no record is reported and ignored.
        """
        if dist.get_rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / PENDING, f"{step}\n")
            except OSError as error:
                logger.warning("%s: %s", self.folder / PENDING, error.strerror)

    def end_evaluation(self) -> None:
        """Delete the record of `begin_evaluation`, if there is one."""
        if dist.get_rank() == 0:
            (self.folder / PENDING).unlink(missing_ok=True)

    def was_evaluation_interrupted(self, step: int) -> bool:
        """Return True if the evaluation after `step` began and did not end; collective."""
        record, due = self.folder / PENDING, False
        if dist.get_rank() == 0 and record.is_file():
            due = record.read_text(encoding="utf-8", errors="replace").strip() == str(step)
        return bool(broadcast_from_rank_0(due))

    def find_newest_checkpoint(self, below: int | None = None) -> Path | None:
        """Find the newest valid checkpoint of this run; collective.

        Args:
            below: only checkpoints of smaller steps count; None: all.
        Returns:
            its folder; None if there is no checkpoint.
        Raises:
            UserError: if there are checkpoints and none is valid.
        """
        return self._select_checkpoint("auto", below)

    def _select_checkpoint(self, choice: str, below: int | None = None) -> Path | None:
        """Select a checkpoint on rank 0 by `find_checkpoint`; return or raise on every rank."""
        step, fault = -1, None
        if dist.get_rank() == 0:
            try:
                path = find_checkpoint(self.folder, choice, below)
                if path is not None:
                    step = parse_checkpoint_step(path) if choice == "auto" else 0
            except UserError as error:
                step, fault = -2, error
        step = broadcast_from_rank_0(step)
        if step == -2:
            raise fault or UserError(f"--resume {choice}: rank 0 found no valid checkpoint")
        if step == -1:
            return None
        return self.folder / format_checkpoint_name(step) if choice == "auto" else Path(choice)

    def _create_folder_on_all_ranks(self, folder: Path) -> bool:
        """Create the folder; False on every rank if one cannot, so that none writes alone."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return is_true_on_all_ranks(True)
        except OSError as error:
            logger.error("checkpoints: rank %d: %s", dist.get_rank(), error)
            return is_true_on_all_ranks(False)

    def _write_optimizer(self, folder: Path) -> list[Path]:
        """Write this rank's optimizer fragments into the folder and return the files.

        Without ZeRO every rank holds all, and rank 0 writes them.
        """
        prefix, rank, paths = self._get_name_prefix(), dist.get_rank(), []
        for number, shard in enumerate(iterate_fragment_shards(self.engine)):
            if self.engine.zero_optimization_stage() == 0 and rank > 0:
                continue
            paths.append(build_optimizer_path(folder, rank, number or None))
            write_fragments(paths[-1], {prefix + f.name: (f.start, f.tensors) for f in shard})
        return paths

    def _get_name_prefix(self) -> str:
        """Return the prefix of parameter names in the files of the optimizer.

        It is the domain of an independent model, as all of these have equal names; else empty.
        """
        if self.topology.sharing is Sharing.BTM:
            return self.topology.get_rank_domains(dist.get_rank())[0] + ":"
        return ""

    def _get_state_folder(self, folder: Path) -> Path:
        """Return the folder of state.json.

        Independent models have their own, as their steps and loss scales differ.
        """
        if self.topology.sharing is Sharing.BTM:
            return folder / self.topology.get_rank_domains(dist.get_rank())[0]
        return folder

    def _write_state(self, folder: Path, *, state: TrainState) -> list[Path]:
        """Write state.json into a folder on the ranks that hold a model's first copy; return it.

        These are rank 0 and, with independent models, the first rank of each.
        """
        independent, rank = self.topology.sharing is Sharing.BTM, dist.get_rank()
        if rank > 0 and not (independent and self.topology.is_group_lead(rank)):
            return []
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        scaler_values = (
            {
                name: value
                for name, value in vars(scaler).items()
                if isinstance(value, (int, float, bool))
            }
            if scaler is not None
            else {}
        )
        record = StateRecord(
            state,
            read_optimizer_steps(self.engine),
            scaler_values,
            self.settings,
            dist.get_world_size(),
        )
        return [record.write(self._get_state_folder(folder))]

    def _write_files_with_digests(self, folder: Path, writers: Sequence[ModelWriter]) -> None:
        """Write and sync this rank's files, and list their digests in `.rank-RANK.json`.

        Each file is synced while the next ones are written and digested. `writers` write files into
        the folder and return them.
        """
        with ThreadPoolExecutor(8) as pool:
            jobs = {
                file: (pool.submit(sync_file, file), pool.submit(hash_file, file))
                for write in writers
                for file in write(folder)
            }
            digests = {}
            for file, (synced, digest) in jobs.items():
                synced.result()
                digests[str(file.relative_to(folder))] = make_digest_entry(file, digest.result())
        # Only rank 0 reads this, before the folder is renamed: no sync is needed.
        (folder / f".rank-{dist.get_rank()}.json").write_text(json.dumps(digests))

    def _commit(self, temporary: Path, final: Path) -> None:
        """Write the manifest, rename `temporary` to `final`, and record it as the latest.

        The ranks' lists of digests are deleted. A folder named `final` is replaced.
        """
        digests: dict[str, object] = {}
        for rank in range(dist.get_world_size()):
            part = temporary / f".rank-{rank}.json"
            digests |= json.loads(part.read_text())
            part.unlink()
        for subfolder in {(temporary / name).parent for name in digests} - {temporary}:
            sync_folder(subfolder)
        write_manifest(temporary, digests)
        if final.exists():
            # It is invalid, or of later steps than the checkpoint that --resume PATH named.
            shutil.rmtree(final)
        os.rename(temporary, final)
        write_latest(self.folder, final)

    def _delete_older_checkpoints(self, final: Path, history: History) -> None:
        """Delete the checkpoints beyond the number to keep, but not the recorded sound one.

        `final` is the checkpoint that was just written, `history` of the steps since the one
        before.
        """
        if not self.keep:
            return
        # Later steps belong to an abandoned run or are invalid: they do not count.
        existing = list_checkpoints(self.folder)
        existing = existing[: existing.index(final)]
        older = existing[: len(existing) + 1 - self.keep]
        if history.diverged:
            older = [path for path in older if parse_checkpoint_step(path) == history.replaced]
        sound = self.find_sound_checkpoint()
        for path in older:
            if path != sound:
                shutil.rmtree(path)

    def find_sound_checkpoint(self) -> Path | None:
        """Find the newest checkpoint known to be followed by finite steps; None without one."""
        try:
            step = int((self.folder / SOUND).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        path = self.folder / format_checkpoint_name(step)
        return path if path.is_dir() else None

    def delete_later_checkpoints(self, step: int) -> None:
        """Delete the checkpoints after `step`, which a rollback has rejected; collective."""
        if dist.get_rank() == 0:
            for path in list_checkpoints(self.folder):
                if parse_checkpoint_step(path) > step:
                    shutil.rmtree(path, ignore_errors=True)
        dist.barrier()


def _read_optimizer(
    path: Path, engine: deepspeed.DeepSpeedEngine, prefix: str, branched: bool
) -> None:
    """Fill this rank's fragments, in place, from the fragments of any number of ranks.

    Args:
        path: checkpoint.
        prefix: prefix of the names in its files, before those in the engine.
        branched: moments that the checkpoint lacks are set to zero.
    Raises:
        UserError: if elements are missing or too many; some fragments are filled then.
    """
    named = engine.module.named_parameters()
    sizes = {prefix + name: getattr(p, "ds_numel", p.numel()) for name, p in named}
    pieces = read_fragment_ranges(path, sizes)
    opened = {file: safe_open(file, framework="pt") for row in pieces.values() for *_, file in row}
    keys = {file: set(tensors.keys()) for file, tensors in opened.items()}
    for fragment in iterate_fragments(engine):
        name = prefix + fragment.name
        parts = {
            kind: (0, tensor) if kind in fragment.whole else (fragment.start, tensor)
            for kind, tensor in {**fragment.tensors, **fragment.whole}.items()
        }
        for kind, (offset, tensor) in parts.items():
            filled = 0
            for start, end, file in pieces.get(name, []):
                low, high = max(start, offset), min(end, offset + len(tensor))
                if low >= high:
                    continue
                into = tensor[low - offset : high - offset]
                if f"{kind}/{name}" in keys[file]:
                    into.copy_(opened[file].get_slice(f"{kind}/{name}")[low - start : high - start])
                elif branched:
                    into.zero_()
                else:
                    continue
                filled += high - low
            if filled != len(tensor):
                raise UserError(f"{path}: the optimizer's state of {name} is incomplete")
