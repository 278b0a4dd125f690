"""Settings of a training run that a run which resumes it must repeat."""

from collections.abc import Sequence
from dataclasses import fields

from megamod.flags import Arguments

FREE_ON_RESUME = frozenset(
    (
        *("output_dir", "data", "verify_data", "init_from", "from_scratch", "resume", "deepspeed"),
        *("stop_step", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
        *("per_device_eval_batch_size", "eval_batches", "eval_split", "dataloader_num_workers"),
        *("nonfinite", "max_nonfinite_steps", "spike_factor", "save_failure", "dist_timeout"),
        *(
            "precision",
            "report_to",
            "print_groups",
            "allow_unknown_ds_keys",
            "gradient_checkpointing",
        ),
        *("attn_implementation", "torch_compile"),
    )
)
"""Fields that may differ in a resumed run: they change none of its numbers, or (precision) only
their rounding. The product of the batch sizes is compared separately."""


def list_settings_to_repeat(
    parsed: Sequence[Arguments], data_digest: str, global_batch: int
) -> dict[str, object]:
    """List the settings that a resumed run must repeat, since they decide its numbers.

    They are the arguments outside of `FREE_ON_RESUME` and of `free_on_resume` of their class, the
    digest of the data and the sequences per step.

    Args:
        parsed: all arguments of the command.
        data_digest: digest of the training data.
        global_batch: sequences per step of all ranks.
    Returns:
        value by name, as state.json stores them.
    """
    kept = {
        field.name: getattr(args, field.name)
        for args in parsed
        for field in fields(args)
        if field.name not in FREE_ON_RESUME | args.free_on_resume
    }
    return {**kept, "data digest": data_digest, "sequences per step": global_batch}
