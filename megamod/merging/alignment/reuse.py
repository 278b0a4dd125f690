"""Alignments kept in a folder under a digest of models, text and options, to be used again."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megamod.merging.alignment.calibration import CalibrationBatch
from megamod.merging.alignment.options import AlignmentOptions
from megamod.merging.alignment.record import Alignment, load_alignment

_VERSION = 1  # of the computation; alignments of another one are not used again
_NAME_DIGITS = 32  # hexadecimal digits of the digest that name a subfolder


def load_or_compute_alignment(
    options: AlignmentOptions,
    states: Sequence[Mapping[str, Tensor]],
    batches: Sequence[CalibrationBatch],
    compute: Callable[[Path | None], Alignment],
    descent_rounds: int,
) -> Alignment:
    """Read the alignment of two models from the folder `options.maps`, or compute and store it.

    It is stored in a subfolder named by a digest of all inputs. Without `options.maps` it is
    computed, and nothing is read or written.

    Args:
        options: options of the alignment; those of the result.
        states: weights of both models by name, on any device.
        batches: calibration text; empty: none.
        compute: computes the alignment. It gets the file for the state of an unfinished refinement,
            which is deleted once the alignment is stored; None without `options.maps`.
        descent_rounds: rounds of descent on the weights that `compute` makes after the text; part
            of the digest.
    Raises:
        UserError: if a stored alignment cannot be read, or `compute` raises it.
        OSError: if the alignment cannot be stored.
    """
    if options.maps is None:
        return compute(None)
    folder = (
        Path(options.maps)
        / _compute_input_digest(options, states, batches, descent_rounds)[:_NAME_DIGITS]
    )
    if folder.is_dir():
        return replace(load_alignment(folder), options=options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    progress_file = folder.with_name(f"{folder.name}.progress.safetensors")
    alignment = compute(progress_file)
    alignment.save(folder)
    progress_file.unlink(missing_ok=True)
    return alignment


def _compute_input_digest(
    options: AlignmentOptions,
    states: Sequence[Mapping[str, Tensor]],
    batches: Sequence[CalibrationBatch],
    descent_rounds: int,
) -> str:
    """Compute a SHA-256, in hexadecimal, of everything that the alignment depends on.

    Args:
        options, states, batches, descent_rounds: see `load_or_compute_alignment`.
    """
    # The text itself counts, not where it lies.
    settings = options.model_dump(exclude={"maps": True, "calibration": {"path"}})
    digest = hashlib.sha256(
        json.dumps([_VERSION, descent_rounds, settings], sort_keys=True).encode()
    )
    for state in states:
        for name in sorted(state):
            digest.update(f"{name} {state[name].dtype} {list(state[name].shape)}".encode())
            flat = state[name].detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    for batch in batches:
        digest.update(f"{batch.domain} {list(batch.input_ids.shape)}".encode())
        digest.update(memoryview(batch.input_ids.contiguous().numpy()))
        digest.update(memoryview(batch.lengths.contiguous().numpy()))
    return digest.hexdigest()
