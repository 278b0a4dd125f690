"""Mix the experts of a forest on held-out text: estimate a prior, then score with it.

    megamod eval-ensemble --forest forest.json --data DATABIN --domain law
    megamod eval-ensemble --forest runs/demix/model --data DATABIN --domain law code \\
        --rule history --topk 4 --output mixed.json --plot "along_{domain}.png"

    megamod eval-ensemble --forest forest.json --data DATABIN --domain novel \\
        --estimate_only --prior_output prior.json
    deepspeed launchers/eval_ensemble.py --forest forest.json --data DATABIN --domain novel \\
        --prior prior.json

A forest is a forest.json or its folder, a DEMix model folder, or a folder with a model folder per
domain. The prior is estimated on the first sequences of the valid split and written as JSON; the
test split is scored completely. One process runs the experts one at a time; several (deepspeed,
torchrun) share the experts. `{domain}` in a file name is replaced by the name of the domain.
docs/mixing.md explains rules and modes.
"""

import os

from megamod.errors import run_main
from megamod.flags import parse_args, require_values
from megamod.runs.studies.ensemble_args import EnsembleArgs


def main() -> None:
    """Parse the flags, estimate the prior, score the mixture, print and write the results.

    Raises:
        UserError: if a flag is missing, or as `join_process_group` and `evaluate_ensemble`.
    """
    (args,) = parse_args(EnsembleArgs, doc=__doc__)
    require_values(args, "forest", "data", "domain")

    import torch
    from transformers.utils.logging import disable_progress_bar

    from megamod.runs.studies.ensemble import evaluate_ensemble

    disable_progress_bar()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from megamod.dist.process import join_process_group

        # This command has no --dist_timeout: half an hour is torch's own default.
        device = join_process_group(timeout_seconds=1800)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluate_ensemble(args, device)


if __name__ == "__main__":
    run_main(main)
