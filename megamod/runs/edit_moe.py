"""Changes of single experts of a mixture of experts: the flags of `to_moe` with --base."""

from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from megamod.errors import UserError
from megamod.flags import Arguments, option, require_values
from megamod.runs.to_moe import CALIBRATION_FLAGS, MoeArgs, make_calibration

_BESIDE_BASE = {*CALIBRATION_FLAGS, "max_shard_size", "quiet", "output_dir"}
"""Flags of `MoeArgs` that have an effect with --base."""


@dataclass
class EditArgs(Arguments):
    """Changes of one expert of an existing mixture."""

    base: str | None = option(
        None, "mixture to change, with moe.json, in place of --forest and --models"
    )
    drop: str | None = option(None, "with --base: write it without the expert of this domain")
    upgrade: str | None = option(
        None, "with --base: give the expert of this domain the feed-forwards of --path"
    )
    path: str | None = option(None, "with --upgrade: a run, or folder of a dense model")
    member: str | None = option(None, "with --upgrade: a domain, of a model that holds several")
    refresh: str | None = option(
        None, "with --base: compute the router row of this domain's expert anew, by --calibration"
    )
    keep_influence: bool = option(
        False, "with --drop: allow mixtures whose other weights contain the expert"
    )


def run_edit(args: MoeArgs, edit: EditArgs) -> None:
    """Write a mixture with one expert changed to --output_dir, and print its experts.

    --drop removes an expert, --upgrade replaces its feed-forwards, --refresh computes its router
    row anew. --upgrade keeps the row unless --calibration is given. The mixture --base is not
    changed, and the new folder is complete or absent.

    Args:
        args: calibration and output; its other flags must be defaults.
        edit: the mixture, which must be set, and the change.
    Raises:
        UserError: for flags that do not go together, a folder that is no mixture with moe.json, or
            an expert that cannot be changed so.
    """
    changes = [flag for flag in ("drop", "upgrade", "refresh") if getattr(edit, flag) is not None]
    if len(changes) != 1:
        raise UserError(f"--base {edit.base}: give one of --drop, --upgrade and --refresh")
    for field in fields(args):
        if field.name not in _BESIDE_BASE and getattr(args, field.name) != field.default:
            raise UserError(f"--{field.name} does not go with --base, whose settings are kept")
    require_values(args, "output_dir")
    from megamod.merging.moe.edit import drop_expert, upgrade_expert
    from megamod.merging.moe.record import format_experts, read_moe_record

    folder, output = Path(edit.base), Path(args.output_dir)
    shard_bytes, note = args.make_merge_arguments()["shard_bytes"], []
    if edit.drop is not None:
        influence = drop_expert(
            folder, edit.drop, output, keep_influence=edit.keep_influence, shard_bytes=shard_bytes
        )
        note = [f"what is left of {edit.drop}: {influence or 'nothing'}"]
    elif edit.upgrade is not None:
        require_values(edit, "path")
        from megamod.btm.forest_entry import make_forest_entry

        expert = make_forest_entry(Path(edit.path), edit.upgrade, edit.member)
        if args.calibration is None:
            upgrade_expert(folder, edit.upgrade, expert, output, shard_bytes=shard_bytes)
        else:
            with TemporaryDirectory(dir=output.absolute().parent, prefix=".") as temporary:
                # With the new feed-forwards, but still with the row of the earlier ones.
                upgraded = Path(temporary) / "model"
                upgrade_expert(folder, edit.upgrade, expert, upgraded, shard_bytes=shard_bytes)
                _write_calibrated_row(upgraded, edit.upgrade, args, output, shard_bytes)
    else:
        require_values(args, "calibration")
        _write_calibrated_row(folder, edit.refresh, args, output, shard_bytes)
    args.print_report(format_experts(read_moe_record(output)), *note)


def _write_calibrated_row(
    folder: Path, domain: str, args: MoeArgs, output: Path, shard_bytes: int
) -> None:
    """Write a mixture with a new router row of one expert, computed from text by the mixture.

    Args:
        folder: folder of the mixture, which is not changed.
        domain: domain of the expert.
        args: its calibration flags are used.
        output: new folder, complete or absent.
        shard_bytes: size above which weights are split into several files.
    Raises:
        UserError: if there is no such expert, or the calibration does not fit the mixture.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from megamod.merging.moe.edit import open_mixture, refresh_router_rows
    from megamod.models.lm.load import load_lm
    from megamod.runs.router_rows import compute_router_rows, read_domain_texts

    calibration = make_calibration(args)
    with ExitStack() as stack:
        mixture = open_mixture(folder, stack)
        number = mixture.record.find_expert_number(domain, folder)
    # Centred rows are differences from the mean of all domains.
    domains = mixture.record.domains if calibration.centre else [domain]
    texts = read_domain_texts(calibration, domains, folder)
    disable_progress_bar()
    model = load_lm(folder, dtype=torch.float32)
    rows = compute_router_rows(
        model, mixture.family.module, [texts[name] for name in domains], domains, calibration
    )
    # "own_first" and "condition" describe all rows computed here; only one of them is written.
    refresh_router_rows(
        folder, domain, rows.rows[:, number if calibration.centre else 0],
        {key: rows.record[key] for key in ("kind", "sharpness", "centre", "texts")},
        output, shard_bytes=shard_bytes,
    )  # fmt: skip
