"""Conversion of dense experts to one mixture, streamed: a piece of a tensor is held at a time."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from megamod.merging.merge import (
    SHARD_BYTES,
    hash_in_background,
    open_merge_plan,
    untie_config_if_needed,
    write_config_and_tokenizer,
    write_merged_weights,
)
from megamod.merging.moe.plan import MoePlan, compute_moe_tensor, make_moe_plan
from megamod.merging.moe.record import ExpertRecord, MoeRecord, write_moe_card, write_moe_record
from megamod.merging.moe.rows import RouterRows
from megamod.merging.recipe import InputModel, MergeRecipe
from megamod.states.output_folder import check_disk_space, check_new_folder, create_new_folder


def convert_to_moe(
    recipe: MergeRecipe,
    output: Path | None,
    make_rows: Callable[[MoePlan], RouterRows],
    data_digests: Sequence[str | None],
    *,
    experts_per_token: int,
    anchor: bool = False,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
    copy_tokenizer: bool = True,
    dry_run: bool = False,
    quiet: bool = False,
) -> MoePlan:
    """Write a mixture whose experts are the feed-forwards of the models of an average.

    Feed-forwards are copied bit by bit. Every other tensor is averaged; with `anchor`, or experts
    of one model, it is the same in all models and copied from the first.

    Args:
        recipe: average of the models, all with a domain; their order is that of the experts.
        output: new folder, complete or absent; None with `dry_run`.
        make_rows: computes the router rows, after all checks and before anything is written.
        data_digests: digest of each expert's data; None: unknown.
        experts_per_token: number of experts that the router selects for a token.
        anchor: see `make_moe_plan`.
        shard_bytes: size above which weights are split into several files.
        threads: tensors written at the same time; does not change the result.
        copy_tokenizer: give the result a tokenizer.
        dry_run: check everything and write nothing.
        quiet: no progress bar.
    Returns:
        the plan that was carried out, or with `dry_run` would be.
    Raises:
        UserError: if the models do not fit each other or the class, the disk is too small, or
            `make_rows` raises it.
    """
    if output is not None:
        check_new_folder(output)
    with ExitStack() as stack:
        dense = open_merge_plan(recipe, shard_bytes, stack)
        # Before the plan, whose configuration classes take seconds to load.
        get_digests = stack.enter_context(hash_in_background([] if dry_run else dense.folders))
        plan = make_moe_plan(dense, experts_per_token, anchor=anchor, shard_bytes=shard_bytes)
        if dry_run:
            return plan
        check_disk_space(output, plan.nbytes)
        rows = make_rows(plan)
        folder = stack.enter_context(create_new_folder(output))
        produce = partial(compute_moe_tensor, plan, rows.rows)
        write_merged_weights(folder, plan.files, plan.specs, produce, threads=threads, quiet=quiet)
        config = untie_config_if_needed(plan.specs, plan.config, folder)
        tokenizer = dense.folders[recipe.tokenizer].folder if copy_tokenizer else None
        write_config_and_tokenizer(replace(dense, config=config), folder, tokenizer)
        shares = dense.compute_shares() if plan.shared == "averaged" else [None] * plan.num_experts
        experts = tuple(
            ExpertRecord(
                domain=model.domain,
                path=_format_model_path(model),
                member=model.member,
                weight=share,
                digest=digest,
                data_digest=data,
            )
            for model, share, digest, data in zip(
                recipe.inputs, shares, get_digests(), data_digests, strict=True
            )
        )
        record = MoeRecord(
            model_type=plan.kind,
            shared=plan.shared,
            aligned=None if recipe.align is None else str(recipe.align["method"]),
            experts=experts,
            router=rows.record,
        )
        write_moe_record(folder, record)
        write_moe_card(folder, record)
    return plan


def _format_model_path(model: InputModel) -> str:
    """Format the folder of a model as FOLDER or FOLDER+ADAPTER."""
    return str(model.path) if model.adapter is None else f"{model.path}+{model.adapter}"
