"""Merge models into one: any folders with config.json and safetensors that fit each other.

    megamod merge RECIPE.yaml --output_dir OUT
    megamod merge --merge_method linear --models A B --weights 0.3 0.7 --output_dir OUT
    megamod merge --forest forest.json --prior prior.json --topk 4 --output_dir OUT
    megamod merge --forest runs/demix/model --experts law med --output_dir OUT
    megamod merge --models BASE+ADAPTER --output_dir OUT
    megamod merge --extract_lora TUNED --base_model BASE --rank 16 --output_dir OUT

The recipe is one of mergekit: see launchers/recipes/merge_linear.yaml and merge_ties.yaml. All
methods (slerp, ties, greedy_soup, ...) are in docs/merging.md; flags alone give averages. A forest
gives its experts, each of a DEMix model together with what is shared, so that a dense model comes
out. BASE+ADAPTER is a model with a LoRA adapter of peft; --extract_lora makes such an adapter from
the difference of two models. Weights are divided by their sum without --no_normalize; without any,
all models count alike. Tensors are streamed: memory does not grow with the models. OUT has the
configuration and tokenizer of the base or first model, and in merge.json its parents.
"""

import sys
from pathlib import Path

from megamod.errors import run_main
from megamod.flags import parse_args

_SHORT = {"-j": "--num_threads"}  # the short flag of mergekit


def main() -> None:
    """Parse the flags, merge, and print a description of the result.

    Raises:
        UserError: as `megamod.runs.merge.run_merge`.
    """
    from megamod.runs.merge import MergeArgs, run_merge

    argv = [_SHORT.get(word, word) for word in sys.argv[1:]]
    recipe_file = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    (args,) = parse_args(MergeArgs, argv=argv, doc=__doc__)
    run_merge(args, recipe_file)


if __name__ == "__main__":
    run_main(main)
