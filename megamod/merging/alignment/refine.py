"""Refinement of orthogonal maps by the loss half way between two causal language models.

On top of the aligned model B come maps that start at the identity, made of skew matrices, so that
every iterate is orthogonal: exp(S - Sᵀ) (of the residual stream exp(C (S - Sᵀ) C), which keeps the
vector of ones), and with rotary embeddings an angle per plane. A step draws rows of the calibration
text and λ between 0.3 and 0.7, and descends on the loss of (1 - λ) A + λ map(B). Orders of features
and of heads stay.
Source: Theus et al. 2025 (Generalized linear mode connectivity for transformers), section 4, for
learned maps.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from megamod.errors import UserError
from megamod.files import write_atomic
from megamod.merging.alignment.calibration import CalibrationBatch, iterate_whole_batches
from megamod.merging.alignment.orthogonal import (
    FREE,
    PLANES,
    make_plane_rotations,
    select_head_map_kind,
    solve_procrustes,
    solve_stream_map,
)
from megamod.merging.alignment.permute import (
    AxisChange,
    apply_changes,
    compute_reference_state,
    make_axis_change,
    permute_state,
)
from megamod.merging.alignment.record import Alignment, get_map_name
from megamod.merging.alignment.symmetry import Symmetry
from megamod.progress import show_progress

logger = logging.getLogger(__name__)

ROWS = 16  # of a step
LENGTH = 128  # tokens of a row at most
RATE = 3e-3
LOWEST, HIGHEST = 0.3, 0.7  # share of the second model in a step
EVERY = 20  # steps between evaluations
HELD_OUT = 10  # one row of so many is never trained on
MOST_HELD_OUT = 128  # rows

MapKey = tuple[str, str]
"""Name of the permutation group, and role, of a map."""


@dataclass
class _RefinementState:
    """State of a refinement.

    Attributes:
        step: number of steps done.
        parameters: what maps are made of, by group and role.
        best: parameters with the smallest held-out loss; `best_loss`: that loss.
        averages, squares: moments of Adam.
    """

    step: int
    parameters: dict[MapKey, Tensor]
    best: dict[MapKey, Tensor]
    best_loss: float
    averages: dict[MapKey, Tensor]
    squares: dict[MapKey, Tensor]


class Refinement:
    """Refinement of the maps of an aligned model.

    Args:
        first, second: the models; the second is mapped by `alignment`.
        symmetry: permutation groups of both models.
        batches: calibration text.
        seed: seed of rows and shares.
        progress_file: keeps the state, so that a killed refinement can resume; None: no file.
    Raises:
        UserError: if the models are no causal language models, or the text has fewer than two rows
            of two tokens.
    """

    def __init__(
        self,
        first: PreTrainedModel,
        second: PreTrainedModel,
        symmetry: Symmetry,
        alignment: Alignment,
        batches: Sequence[CalibrationBatch],
        seed: int,
        progress_file: Path | None = None,
    ):
        if not isinstance(first, AutoModelForCausalLM._model_mapping.get(type(first.config), ())):
            raise UserError(
                f"align.refine_steps: {type(first).__name__} predicts no next token; only causal "
                "language models can be refined"
            )
        self._model, self._symmetry, self._alignment = first.eval(), symmetry, alignment
        self._kind = select_head_map_kind(symmetry.family)
        self._seed, self._file = seed, progress_file
        self._rows, self._held_out = _split_calibration_rows(batches, symmetry.domains)
        states = (
            compute_reference_state(first.state_dict(), symmetry, alignment),
            permute_state(second.state_dict(), symmetry, alignment),
        )
        _warn_of_low_memory(states[0])
        self._reference, self._aligned = states

    def refine_maps(self, steps: int) -> Alignment:
        """Refine the maps by Adam; return the alignment with those of the smallest held-out loss.

        The maps of the start count too, so the loss never rises. Resumes from the progress file if
        there is one, and writes it every `EVERY` steps.

        Args:
            steps: in all, those before a resumption included.
        Raises:
            UserError: if a loss is not finite, or the progress file is damaged.
        """
        state = self._make_initial_state()
        with show_progress(total=steps, title="refining maps", unit="step") as bar:
            bar.update(state.step)
            while state.step < steps:
                self._take_adam_step(state)
                bar.update(1)
                if state.step % EVERY == 0 or state.step == steps:
                    self._update_best_maps(state)
                    self._write_progress_file(state)
        return self._compose_alignment(state.best)

    def _make_initial_state(self) -> _RefinementState:
        """Read the state from the progress file; without one, make a state whose maps change
        nothing, with its held-out loss.

        Raises:
            UserError: if the progress file is damaged, or the loss is not finite.
        """
        zeros = self._make_zero_parameters()
        if self._file is not None and self._file.exists():
            return _read_progress_file(self._file, list(zeros))
        copies = [{key: tensor.clone() for key, tensor in zeros.items()} for _ in range(4)]
        state = _RefinementState(0, copies[0], copies[1], math.inf, copies[2], copies[3])
        self._update_best_maps(state)
        return state

    def _make_zero_parameters(self) -> dict[MapKey, Tensor]:
        """Make parameters of maps that change nothing, on the device of the model.

        Maps of the alignment that cannot be refined, such as signs, have none.
        """
        zeros = {}
        for name, maps in self._alignment.maps.items():
            for role, blocks in maps.items():
                if role == "qk" and self._kind == PLANES:
                    zeros[name, role] = torch.zeros(blocks.shape[0], blocks.shape[1] // 2)
                elif role == "qk" and self._kind != FREE:
                    continue
                elif role != "sign":
                    zeros[name, role] = torch.zeros(blocks.shape)
        return {key: tensor.to(self._model.device) for key, tensor in zeros.items()}

    def _take_adam_step(self, state: _RefinementState) -> None:
        """Take one step of Adam: advance the step, parameters and moments of `state`.

        Raises:
            UserError: if the loss is not finite.
        """
        generator = torch.Generator().manual_seed((self._seed << 32) + state.step)
        share = LOWEST + (HIGHEST - LOWEST) * float(torch.rand((), generator=generator))
        drawn = torch.randperm(len(self._rows), generator=generator)[:ROWS].tolist()
        parameters = {key: t.detach().requires_grad_() for key, t in state.parameters.items()}
        loss = self._compute_loss_of_parameters(parameters, share, [self._rows[i] for i in drawn])
        if not bool(loss.isfinite()):
            raise UserError(f"align.refine_steps: the loss is {float(loss)} at step {state.step}")
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        state.step += 1
        first, second = 0.9, 0.999
        for key, gradient in zip(parameters, gradients, strict=True):
            average = state.averages[key].lerp_(gradient, 1 - first)
            square = state.squares[key].lerp_(gradient**2, 1 - second)
            scale = (square / (1 - second**state.step)).sqrt_().add_(1e-8)
            change = average / (1 - first**state.step) / scale
            state.parameters[key] = state.parameters[key] - RATE * change

    @torch.no_grad()
    def _update_best_maps(self, state: _RefinementState) -> None:
        """Store the parameters in `state.best` if their held-out loss is the smallest so far.

        It is the loss half way between the models, on the held-out rows.

        Raises:
            UserError: if the loss is not finite.
        """
        total, tokens = 0.0, 0
        mixed = self._interpolate_models(state.parameters, 0.5)
        for start in range(0, len(self._held_out), ROWS):
            rows = self._held_out[start : start + ROWS]
            count = sum(len(ids) - 1 for ids, _ in rows)
            total += float(self._compute_loss_with_weights(mixed, rows)) * count
            tokens += count
        loss = total / tokens
        if not math.isfinite(loss):
            raise UserError(f"align.refine_steps: the loss is {loss} at step {state.step}")
        if loss < state.best_loss:
            state.best_loss, state.best = loss, dict(state.parameters)

    def _compute_loss_of_parameters(
        self, parameters: Mapping[MapKey, Tensor], share: float, rows: "Sequence[_Row]"
    ) -> Tensor:
        """Compute the loss of an interpolation of the models; gradients reach the parameters.

        Args:
            parameters: parameters of the maps, by group and role.
            share: share of the mapped model.
            rows: rows of text, see `_compute_loss_with_weights`.
        """
        return self._compute_loss_with_weights(self._interpolate_models(parameters, share), rows)

    def _interpolate_models(
        self, parameters: Mapping[MapKey, Tensor], share: float
    ) -> dict[str, Tensor]:
        """Compute (1 - share) * reference + share * mapped model, by name.

        `parameters` are those of the maps, by group and role. Integers come from the reference.
        """
        changes = self._make_changes(self._make_orthogonal_matrices(parameters))
        return {
            name: torch.lerp(tensor, apply_changes(self._aligned[name], changes[name]), share)
            if name in changes
            else torch.lerp(tensor, self._aligned[name], share)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self._reference.items()
        }

    def _make_orthogonal_matrices(
        self, parameters: Mapping[MapKey, Tensor]
    ) -> dict[MapKey, Tensor]:
        """Make the orthogonal matrices [m, h, h] of all maps from their parameters.

        Parameters [m, h / 2] are angles of planes; [m, h, h] make skew matrices, whose exponentials
        are the maps.
        """
        blocks = {}
        for (name, role), tensor in parameters.items():
            if tensor.dim() == 2:
                blocks[name, role] = make_plane_rotations(tensor.cos(), tensor.sin())
                continue
            skew = tensor - tensor.mT
            if role == "stream" and not self._symmetry.family.rms:
                skew = skew - skew.mean(-1, keepdim=True)
                skew = skew - skew.mean(-2, keepdim=True)
            blocks[name, role] = torch.matrix_exp(skew)
        return blocks

    def _make_changes(self, blocks: Mapping[MapKey, Tensor]) -> dict[str, list[AxisChange]]:
        """Make the changes of each tensor from matrices; orders of features stay.

        Args:
            blocks: [m, h, h] by group and role.
        Returns:
            changes by tensor; tensors of no map have no entry.
        """
        changes: dict[str, list[AxisChange]] = {}
        for group in self._symmetry.groups.values():
            maps = {role: b for (name, role), b in blocks.items() if name == get_map_name(group)}
            for axis in group.axes if maps else ():
                change = make_axis_change(group, axis, None, maps)
                if change.blocks is not None:
                    changes.setdefault(axis.tensor, []).append(change)
        return changes

    def _compute_loss_with_weights(
        self, tensors: Mapping[str, Tensor], rows: "Sequence[_Row]"
    ) -> Tensor:
        """Compute the mean cross entropy of next tokens of the rows, in nats per token.

        Args:
            tensors: weights to run the model with; its own are not changed.
            rows: token ids and domain (None: a model without domains) of each; those of one domain
                are one batch.
        """
        losses, count = [], 0
        for domain in dict.fromkeys(domain for _, domain in rows):
            ids = [ids for ids, part in rows if part == domain]
            (batch,) = iterate_whole_batches(ids, len(ids))
            inputs, mask = batch.input_ids.to(self._model.device), batch.attention_mask
            arguments = {} if domain is None else {"domain": domain}
            arguments |= {"input_ids": inputs, "attention_mask": mask.to(inputs.device)}
            arguments["use_cache"] = False
            logits = functional_call(
                self._model, dict(tensors), kwargs=arguments, tie_weights=False
            ).logits
            targets = inputs[:, 1:].masked_fill(mask[:, 1:].to(inputs.device) == 0, -100)
            losses.append(
                functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"
                )
            )
            count += int(mask[:, 1:].sum())
        return torch.stack(losses).sum() / count

    def _compose_alignment(self, parameters: Mapping[MapKey, Tensor]) -> Alignment:
        """Return the alignment with its maps multiplied by the refined ones.

        `parameters` are those of the refined maps, by group and role. The products are made
        orthogonal in float64 again.
        """
        exact = {key: tensor.double().cpu() for key, tensor in parameters.items()}
        maps = {name: dict(roles) for name, roles in self._alignment.maps.items()}
        for (name, role), blocks in self._make_orthogonal_matrices(exact).items():
            combined = blocks @ maps[name][role]
            if role == "stream":
                matrix, _ = solve_stream_map(combined[0], not self._symmetry.family.rms)
                maps[name][role] = matrix[None]
            elif parameters[name, role].dim() == 2:
                maps[name][role] = combined
            else:
                maps[name][role] = solve_procrustes(combined)[0]
        return replace(self._alignment, maps=maps)

    def _write_progress_file(self, state: _RefinementState) -> None:
        """Write the state to the progress file, atomically; do nothing if there is none."""
        if self._file is None:
            return
        kinds = ("parameters", "best", "averages", "squares")
        tensors = {
            f"{kind}:{name}:{role}": tensor.clone()  # the best may be the present ones
            for kind in kinds
            for (name, role), tensor in getattr(state, kind).items()
        }
        numbers = {"step": str(state.step), "best_loss": state.best_loss.hex()}
        write_atomic(self._file, save(tensors, numbers))


def _read_progress_file(path: Path, keys: Sequence[MapKey]) -> _RefinementState:
    """Read a progress file that `Refinement` wrote.

    Args:
        path: the file.
        keys: group and role of every map.
    Raises:
        UserError: if it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            numbers = file.metadata()
            kinds = (
                {(name, role): file.get_tensor(f"{kind}:{name}:{role}") for name, role in keys}
                for kind in ("parameters", "best", "averages", "squares")
            )
            parameters, best, averages, squares = kinds
            loss = float.fromhex(numbers["best_loss"])
            return _RefinementState(int(numbers["step"]), parameters, best, loss, averages, squares)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged, remove it to start again: {error}") from error


_Row = tuple[list[int], str | None]
"""Token ids, and the domain of a model with experts."""


def _split_calibration_rows(
    batches: Sequence[CalibrationBatch], domains: Sequence[str]
) -> tuple[list[_Row], list[_Row]]:
    """Split calibration text into rows to train on and held-out rows, which come first in the text.

    Rows are cut to `LENGTH` tokens. A row without a domain is one row per domain for a model with
    experts.

    Args:
        batches: calibration text.
        domains: domains of the model; empty: it has no experts.
    Raises:
        UserError: if there are fewer than two rows of two tokens.
    """
    rows: list[_Row] = []
    for batch in batches:
        for ids, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
            kept = ids[: min(length, LENGTH)].tolist()
            if length < 2:
                continue
            rows += [(kept, d) for d in ([batch.domain] if batch.domain else domains or [None])]
    if len(rows) < 2:
        raise UserError(
            f"align.refine_steps: the calibration text has {len(rows)} rows of two tokens or more; "
            "give at least 2"
        )
    held_out = min(max(len(rows) // HELD_OUT, min(ROWS, len(rows) // 2)), MOST_HELD_OUT)
    return rows[held_out:], rows[:held_out]


def _warn_of_low_memory(state: Mapping[str, Tensor]) -> None:
    """Log a warning if the mapped model and its gradient do not fit into the free memory.

    Args:
        state: weights of a model.
    """
    needed = 2 * sum(tensor.nbytes for tensor in state.values())
    free = psutil.virtual_memory().available
    if needed > free:
        logger.warning(
            "align.refine_steps: refinement needs %.1f GB more memory, and %.1f GB are free",
            *(needed / 1e9, free / 1e9),
        )
