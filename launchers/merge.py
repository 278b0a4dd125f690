"""Merge models into one: any folders with config.json and safetensors that fit each other.

    python launchers/merge.py RECIPE.yaml --output_dir OUT
    python launchers/merge.py --merge_method linear --models A B --weights 0.3 0.7 --output_dir OUT
    python launchers/merge.py --forest forest.json --prior prior.json --topk 4 --output_dir OUT
    python launchers/merge.py --forest runs/demix/model --experts law med --output_dir OUT

The recipe is one of mergekit: see launchers/recipes/merge_linear.yaml and merge_ties.yaml. All
methods (slerp, ties, greedy_soup, ...) are in docs/merging.md; flags alone give averages. A forest
gives its experts, each of a DEMix model together with what is shared, so that a dense model comes
out. Weights are divided by their sum unless told otherwise; without any, all models count alike.
Tensors are streamed: memory does not grow with the models. OUT has the configuration and tokenizer
of the base or first model, and in merge.json its parents.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megamod.errors import UserError, run
from megamod.flags import Arguments, option, parse_args, require

if TYPE_CHECKING:
    from megamod.merging.recipe import Recipe

_SHORT = {"-j": "--num_threads"}  # as mergekit spells it


@dataclass
class MergeArgs(Arguments):
    """What to merge, how, and where to."""

    merge_method: str = option("linear", "without a recipe only linear")
    models: list[str] | None = option(None, "model folders")  # noqa: RUF009
    forest: str | None = option(
        None, "in place of --models: forest.json, or a folder with one, or with DEMix experts"
    )
    experts: list[str] | None = option(  # noqa: RUF009
        None, "domains of the forest to take; none: all"
    )
    weights: list[float] | None = option(None, "a number for each model")  # noqa: RUF009
    prior: str | None = option(None, "file with the weights of a forest's experts")
    topk: int | None = option(None, "keep the models with the largest weights, so many", least=1)
    no_normalize: bool = option(False, "do not divide the weights by their sum")
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = option(
        None, "round weights to it before anything else; none: do not"
    )
    out_dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = option(
        None, "dtype of the result; none: --dtype, else that of the first model"
    )
    max_shard_size: str = option(
        "5GB", "size above which there are several weight files", alias="out_shard_size"
    )
    random_seed: int = option(0, "seed of what methods draw at random", least=0)
    num_threads: int | None = option(
        None, "tensors merged at the same time; none: one per processor, 8 at most", least=1
    )
    copy_tokenizer: bool = option(True, "whether the result gets a tokenizer")
    quiet: bool = option(False, "no progress bar, and not a word unless something is wrong")
    dry_run: bool = option(False, "check everything, say what would be done, write nothing")
    output_dir: str | None = option(None, "folder to make")


def main() -> None:
    """Parse, merge, and say what was made."""
    argv = [_SHORT.get(word, word) for word in sys.argv[1:]]
    recipe_file = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    (args,) = parse_args(MergeArgs, argv=argv, doc=__doc__)
    if not args.dry_run:
        require(args, "output_dir")

    from megamod.merging.average import merge
    from megamod.merging.recipe import GREEDY_SOUP
    from megamod.merging.recipe_file import read_recipe
    from megamod.states.stream import parse_size

    options = {
        "shard_bytes": parse_size(args.max_shard_size, "--max_shard_size"),
        "dry_run": args.dry_run,
        "threads": args.num_threads or min(len(os.sched_getaffinity(0)), 8),
        "copy_tokenizer": args.copy_tokenizer,
        "quiet": args.quiet,
    }
    if recipe_file is None:
        recipe = recipe_of(args)
    else:
        _refuse_beside_recipe(args)
        recipe = read_recipe(recipe_file)
    output = None if args.output_dir is None else Path(args.output_dir)
    if recipe.method == GREEDY_SOUP:
        from megamod.runs.studies.soup import described, greedy_soup

        plan, tasted = greedy_soup(recipe, output, **options)
        told = [plan.describe(), *([described(tasted)] if tasted else [])]
    else:
        told = [merge(recipe, output, seed=args.random_seed, **options).describe()]
    if not args.quiet:
        print(*told, sep="\n")
        print("nothing was written" if args.dry_run else f"written to {args.output_dir}")


def recipe_of(args: MergeArgs) -> "Recipe":
    """The recipe that the flags stand for.

    Raises:
        UserError: naming the flag, for values that do not go together.
    """
    from megamod.btm.parents import forest_sources, strongest
    from megamod.merging.methods import METHODS
    from megamod.merging.recipe import GREEDY_SOUP, weighted
    from megamod.merging.settings import check_word
    from megamod.states.forest import open_forest

    methods = (*METHODS, GREEDY_SOUP)
    check_word(args.merge_method, methods, "--merge_method: there is no")
    if args.merge_method != "linear":
        raise UserError(
            f"--merge_method {args.merge_method}: needs a recipe, as it has more parameters than "
            "there are flags; launchers/recipes/merge_ties.yaml is one"
        )
    if (args.models is None) is (args.forest is None):
        raise UserError("give a recipe, or one of --models and --forest")
    if args.weights is not None and args.prior is not None:
        raise UserError("--weights and --prior both give weights; give one of them")
    origin = f"--prior {args.prior}" if args.prior is not None else "--weights"
    if args.topk is not None and args.weights is None and args.prior is None:
        raise UserError("--topk needs weights to choose by: --weights or --prior")
    domains, count = None, len(args.models or ())
    if args.forest is None:
        for flag in ("experts", "prior"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} goes with --forest, not with --models")
        sources, weights = [(Path(model), None) for model in args.models], args.weights
        if weights is not None and len(weights) == count:
            if (args.topk or 0) > count:
                raise UserError(f"--topk {args.topk}: there are only {count} models")
            kept = strongest(weights, args.topk or 0)
            sources, weights = [sources[n] for n in kept], [weights[n] for n in kept]
    else:
        known = {(one.path, one.member): one.domain for one in open_forest(args.forest).experts}
        parents, weights = forest_sources(
            args.forest,
            only=args.experts,
            weights=args.weights,
            prior=args.prior,
            topk=args.topk or 0,
        )
        sources = [(parent.folder, parent.member) for parent in parents]
        domains = [known[source] for source in sources]
        if args.weights is None and args.prior is None:
            weights = None  # all alike, whatever their sum
    weights = [1.0] * len(sources) if weights is None else weights
    return weighted(
        sources,
        weights,
        normalize=not args.no_normalize,
        domains=domains,
        dtype=args.dtype,
        out_dtype=args.out_dtype,
        origin=origin,
    )


def _refuse_beside_recipe(args: MergeArgs) -> None:
    """Everything but where to write is said in the recipe."""
    for name in ("models", "forest", "experts", "weights", "prior", "topk", "dtype", "out_dtype"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} cannot be added to a recipe; write it there")
    if args.no_normalize:
        raise UserError(
            "--no_normalize cannot be added to a recipe; write `normalize: false` there"
        )


if __name__ == "__main__":
    run(main)
