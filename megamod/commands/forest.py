"""List, add, remove, upgrade and branch the experts of a forest.

    megamod forest list   --forest runs/btm
    megamod forest add    --forest runs/btm --path runs/btm/law
    megamod forest remove --forest runs/btm --domain law
    megamod forest upgrade --forest runs/btm --domain law --path runs/law-v2
    megamod forest branch --parents runs/seed --share 0.5 --domain law \\
        --output_dir runs/btm/law
    megamod forest branch --forest runs/btm --prior prior.json --topk 4 --domain tax \\
        --output_dir runs/btm/tax

`branch` writes the first checkpoint of a run; this command trains it from there:

    megamod pretrain RECIPE.yaml --data DATABIN --domains law --output_dir runs/btm/law

With one parent that has optimizer state, the optimizer, its step and the position in the
learning-rate schedule are kept, and the data start over. The average of several parents starts at
step 0.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError, run_main
from megamod.flags import Arguments, option, parse_args, require_values

VERBS = ("list", "add", "remove", "upgrade", "branch")


@dataclass
class ForestArgs(Arguments):
    """Forest and experts."""

    forest: str | None = option(None, "forest.json, or the folder that holds it")
    domain: list[str] | None = option(  # noqa: RUF009
        None, "name of the expert; remove, and branch --one_world: one or several"
    )
    path: str | None = option(None, "add, upgrade: a finished run, or a model folder")
    member: str | None = option(None, "a domain, of a model or run that holds several")


@dataclass
class BranchArgs(Arguments):
    """Parents of a new expert."""

    parents: list[str] | None = option(  # noqa: RUF009
        None, "runs, checkpoints or model folders; none: the experts of --forest", separator=":"
    )
    experts: list[str] | None = option(None, "experts of --forest to use; none: all")  # noqa: RUF009
    weights: list[float] | None = option(  # noqa: RUF009
        None, "weight of each parent in the average; none: equal"
    )
    prior: str | None = option(
        None, "JSON file of megamod eval-ensemble: weights of the experts of --forest"
    )
    topk: int = option(0, "average the experts with the largest weights only; 0: all", least=0)
    step: int | None = option(None, "checkpoint nearest to this step; -1: the last", least=-1)
    share: float | None = option(
        None, "checkpoint nearest to this share of the run's last step", least=0, most=1
    )
    one_world: bool = option(
        False, "write the layout of independent models in one job (--untie all)"
    )
    learning_rate: float | None = option(
        None, "peak learning rate of the new run; none: that of the parent"
    )
    output_dir: str | None = option(None, "folder of the new run")

    def __post_init__(self):
        """Check the flags; raise UserError for two that exclude each other."""
        super().__post_init__()
        if self.step is not None and self.share is not None:
            raise UserError(f"--step {self.step} and --share {self.share}: give one of the two")
        if self.weights is not None and self.prior is not None:
            raise UserError("--weights and --prior: give one of the two")


def main() -> None:
    """Run the verb on the command line: list, add, remove, upgrade or branch.

    All but `branch` print the forest; `add`, `remove` and `upgrade` change forest.json before.

    Raises:
        UserError: for a verb or flag that is missing or unknown, or an expert that does not fit.
    """
    known = " ".join(VERBS)
    verb = ""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        verb = sys.argv.pop(1)
    elif not {"-h", "--help"} & set(sys.argv):
        raise UserError(f"a verb is missing: {known}")
    if verb and verb not in VERBS:
        raise UserError(f"{verb!r} is none of {known}")
    args, start = parse_args(ForestArgs, BranchArgs, doc=__doc__)

    if verb == "branch":
        branch_expert(args, start)
        return
    require_values(args, "forest")

    from megamod.btm.forest_entry import format_forest, make_forest_entry
    from megamod.models.lm.configuration import read_lm_config
    from megamod.states.forest import check_new_expert, edit_forest, find_expert_index, open_forest

    if verb in ("add", "upgrade"):
        require_values(args, "path", *(["domain"] if verb == "upgrade" else []))
        domain, *others = args.domain or [None]
        if others:
            raise UserError(f"--domain {' '.join(args.domain)}: {verb} takes one name")
        replaced = domain if verb == "upgrade" else None
        if replaced is not None:
            open_forest(args.forest)  # refuses a forest that does not exist
        new = make_forest_entry(Path(args.path), domain, args.member)
        read_lm_config(new.path, "--path")
        check_new_expert(args.forest, new, replaced)
        with edit_forest(args.forest) as experts:
            if replaced is None:
                experts.append(new)
            else:
                experts[find_expert_index(experts, replaced, args.forest)] = new
    elif verb == "remove":
        require_values(args, "domain")
        open_forest(args.forest)
        with edit_forest(args.forest) as experts:
            for domain in args.domain:
                del experts[find_expert_index(experts, domain, args.forest)]
            if not experts:
                raise UserError(
                    f"--domain {' '.join(args.domain)}: these are all of its experts; delete "
                    "the folder instead"
                )
    print(format_forest(open_forest(args.forest)))


def branch_expert(args: ForestArgs, start: BranchArgs) -> None:
    """Write the first checkpoint and branch.json of a new expert; print the next command.

    The parents are --parents, each found by --step, --share and --member, or experts of --forest.

    Raises:
        UserError: unless exactly one of --parents and --forest is given, if --domain or
            --output_dir is missing, or as `write_branch_checkpoint`, `find_parent`,
            `select_forest_parents` and `resolve_parent_weights`.
    """
    require_values(args, "domain")
    require_values(start, "output_dir")
    if (start.parents is None) is (args.forest is None):
        raise UserError("branch: give one of --parents and --forest")

    from megamod.btm.branch import write_branch_checkpoint
    from megamod.btm.parents import find_parent, resolve_parent_weights, select_forest_parents

    if start.parents is None:
        sources, weights = select_forest_parents(
            args.forest,
            only_domains=start.experts,
            weights=start.weights,
            prior=start.prior,
            topk=start.topk,
        )
    else:
        sources = [
            find_parent(path, step=start.step, step_share=start.share, member=args.member)
            for path in start.parents
        ]
        weights = resolve_parent_weights(start.weights, len(sources))
    checkpoint = write_branch_checkpoint(
        sources,
        weights,
        args.domain,
        start.output_dir,
        in_one_job=start.one_world,
        learning_rate=start.learning_rate,
    )
    print(f"{checkpoint}: megamod pretrain --output_dir {start.output_dir} resumes from here")


if __name__ == "__main__":
    run_main(main)
