"""Plan a pretraining run before it starts: memory, communication, time, and settings that fit.

    megamod plan launchers/recipes/modern/demix_1.3b_d8.yaml --world_size 64 \\
        --deepspeed ds_configs/demix_zero2_bf16.json
    megamod plan launchers/recipes/modern/btm_125m.yaml --hostfile hostfile \\
        --deepspeed ds_configs/zero1_bf16.json --json plan.json
    megamod plan launchers/recipes/modern/dense_1.3b.yaml --world_size 8 \\
        --deepspeed ds_configs/zero2_bf16.json --search true
    megamod plan launchers/recipes/modern/demix_1.3b_d8.yaml --world_size 64 \\
        --deepspeed ds_configs/demix_zero2_bf16.json --simulate speed.png --step_ms 3100

Recipes and flags are those of megamod pretrain and megamod btm. Nothing is trained and no
weights are allocated; neither data nor GPUs are needed. docs/planning.md has the formulas.
"""

import sys
from pathlib import Path

from megamod.args import DataArgs, LoraArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.btm.campaign import BtmArgs
from megamod.errors import run_main
from megamod.files import write_json
from megamod.flags import parse_args
from megamod.planning.plan_args import PlanArgs


def main() -> None:
    """Parse the flags, plan every job, print the plans and write the files that flags ask for.

    Raises:
        UserError: for flags or a DeepSpeed file that cannot be planned, as `list_jobs`.
    """
    parsed = parse_args(
        *(PlanArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs),
        *(OptimArgs, MuxArgs, DataArgs, BtmArgs),
        doc=__doc__,
    )
    *others, btm = parsed
    args = others[0]
    # transformers imports scikit-learn for assisted generation, a sixth of this command's time.
    # None marks a module that cannot be imported.
    hidden = sys.modules.setdefault("sklearn", None) is None
    # Imported late, so that --help and errors in flags answer at once.
    from megamod.planning import report, scaling
    from megamod.planning.job import list_jobs
    from megamod.planning.plan import plan_job
    from megamod.planning.search import propose_settings

    if hidden:
        del sys.modules["sklearn"]
    jobs = list_jobs((args, btm, *others[1:]))
    records = []
    for plan in [plan_job(job, args) for job in jobs]:
        print(report.format_job_plan(plan), flush=True)
        records.append(plan.make_record())
        if args.search:
            ranked = propose_settings(plan)
            print(report.format_proposals(ranked), flush=True)
            records[-1]["proposals"] = [proposal.make_record() for proposal in ranked]
        if args.simulate is not None and plan.job is jobs[0]:
            step_seconds = None if args.step_ms is None else args.step_ms / 1e3
            curves = scaling.compute_scaling_curves(plan, step_seconds, args.step_world_size)
            print(report.format_curves(curves), flush=True)
            tokens, title = (
                plan.job.steps * plan.job.tokens_per_step,
                f"{plan.job.model.model} on more GPUs",
            )
            scaling.plot_scaling_curves(curves, tokens, title, Path(args.simulate))
            records[-1]["simulation"] = scaling.make_curves_record(curves)
        print()
    if args.json is not None:
        write_json(Path(args.json), {"jobs": records})


if __name__ == "__main__":
    run_main(main)
