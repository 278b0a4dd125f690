"""The command `merge`: averages from flags, recipes from files, and extraction of LoRA adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megamod.errors import UserError
from megamod.flags import option, require_values
from megamod.runs.model_output import ModelOutputArgs
from megamod.schemas import check_known_word

if TYPE_CHECKING:
    from megamod.merging.recipe import MergeRecipe


@dataclass
class MergeArgs(ModelOutputArgs):
    """Flags of `merge`: models, method and output."""

    merge_method: str = option("linear", "without a recipe only linear")
    models: list[str] | None = option(  # noqa: RUF009
        None, "model folders; MODEL+ADAPTER merges a LoRA adapter in first", separator=":"
    )
    forest: str | None = option(
        None, "in place of --models: forest.json, or a folder with one, or with DEMix experts"
    )
    experts: list[str] | None = option(  # noqa: RUF009
        None, "domains of the forest to take; none: all"
    )
    weights: list[float] | None = option(None, "a number for each model")  # noqa: RUF009
    prior: str | None = option(None, "file with the weights of a forest's experts")
    topk: int | None = option(None, "keep the models with the largest weights, so many", least=1)
    extract_lora: str | None = option(
        None, "model folder: write a LoRA adapter that makes it from --base_model"
    )
    base_model: str | None = option(None, "with --extract_lora: the model to compare with")
    rank: int = option(16, "with --extract_lora: largest rank of an update", least=1)
    no_normalize: bool = option(False, "do not divide the weights by their sum")
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = option(
        None, "round weights to it before anything else, and the result without --out_dtype"
    )
    random_seed: int = option(0, "seed of what methods draw at random", least=0)


def run_merge(args: MergeArgs, recipe_file: Path | None) -> None:
    """Merge models into --output_dir, or with --extract_lora write an adapter; print a description.

    The recipe's method greedy_soup also evaluates the models. With --dry_run everything is checked
    and nothing is written.

    Args:
        args: flags of the command.
        recipe_file: recipe in YAML; None: the flags alone describe the merge.
    Raises:
        UserError: for flags, recipes or models that do not fit each other.
    """
    if not args.dry_run:
        require_values(args, "output_dir")

    if args.extract_lora is not None:
        _extract_lora(args, recipe_file)
        return
    if args.base_model is not None:
        raise UserError("--base_model goes with --extract_lora; a recipe has base_model of its own")

    from megamod.merging.merge import merge
    from megamod.merging.recipe import GREEDY_SOUP
    from megamod.merging.recipe_file import read_recipe

    if recipe_file is None:
        recipe = build_recipe_from_flags(args)
    else:
        _refuse_flags_with_recipe(args)
        recipe = read_recipe(recipe_file)
    output = None if args.output_dir is None else Path(args.output_dir)
    if recipe.method == GREEDY_SOUP:
        from megamod.runs.studies.soup import format_candidates, write_greedy_soup

        plan, candidates = write_greedy_soup(recipe, output, **args.make_merge_arguments())
        lines = [plan.format_summary(), *([format_candidates(candidates)] if candidates else [])]
    else:
        plan = merge(recipe, output, seed=args.random_seed, **args.make_merge_arguments())
        lines = [plan.format_summary()]
    args.print_report(*lines, is_new=not plan.is_written)


def _extract_lora(args: MergeArgs, recipe_file: Path | None) -> None:
    """Write the LoRA adapter that turns --base_model into --extract_lora; print its description.

    Args:
        args: flags, of which only those of the extraction and the output may be given.
        recipe_file: recipe on the command line, which is refused; None: there is none.
    Raises:
        UserError: for flags or a recipe that do not go with it, without --base_model, or for models
            that do not fit each other.
    """
    for flag in ("models", "forest", "experts", "weights", "prior", "topk", "dtype"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} does not go with --extract_lora")
    if recipe_file is not None:
        raise UserError(f"{recipe_file}: a recipe does not go with --extract_lora")
    if args.base_model is None:
        raise UserError(f"--extract_lora {args.extract_lora}: needs --base_model BASE")
    if args.dry_run:
        raise UserError("--dry_run does not go with --extract_lora, which needs --output_dir")
    # An adapter is one file, computed layer by layer in one process.
    for flag, default in (("num_threads", None), ("max_shard_size", MergeArgs.max_shard_size)):
        if getattr(args, flag) != default:
            raise UserError(f"--{flag} {getattr(args, flag)} does not go with --extract_lora")
    from megamod.merging.extract_lora import extract_lora

    extracted = extract_lora(
        Path(args.base_model),
        Path(args.extract_lora),
        Path(args.output_dir),
        args.rank,
        args.out_dtype,
    )
    args.print_report(extracted.format_summary())


def build_recipe_from_flags(args: MergeArgs) -> "MergeRecipe":
    """Build the recipe of the average of --models, or of experts of --forest.

    Weights are --weights or those of the file --prior; without both all models count alike. Models
    that --topk does not select, and those of weight 0, are skipped. No weights of models are read.

    Raises:
        UserError: naming the flag, for values that do not go together, or a forest or prior that
            cannot be read.
    """
    from megamod.btm.parents import select_forest_parents, select_largest_weights
    from megamod.merging.methods.table import METHODS
    from megamod.merging.recipe import GREEDY_SOUP, build_weighted_recipe
    from megamod.states.forest import open_forest

    methods = (*METHODS, GREEDY_SOUP)
    check_known_word(args.merge_method, methods, "--merge_method: there is no")
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
        if weights is not None and len(weights) == count:  # else `build_weighted_recipe` refuses
            if (args.topk or 0) > count:
                raise UserError(f"--topk {args.topk}: there are only {count} models")
            kept = select_largest_weights(weights, args.topk or 0)
            sources, weights = [sources[n] for n in kept], [weights[n] for n in kept]
    else:
        experts = open_forest(args.forest).experts
        domain_of = {(expert.path, expert.member): expert.domain for expert in experts}
        parents, weights = select_forest_parents(
            args.forest,
            only_domains=args.experts,
            weights=args.weights,
            prior=args.prior,
            topk=args.topk or 0,
        )
        sources = [(parent.folder, parent.member) for parent in parents]
        domains = [domain_of[source] for source in sources]
        if args.weights is None and args.prior is None:
            weights = None  # all alike, whatever their sum
    weights = [1.0] * len(sources) if weights is None else weights
    return build_weighted_recipe(
        sources,
        weights,
        normalize=not args.no_normalize,
        domains=domains,
        dtype=args.dtype,
        out_dtype=args.out_dtype,
        origin=origin,
    )


def _refuse_flags_with_recipe(args: MergeArgs) -> None:
    """Refuse flags that would change a recipe read from a file.

    Raises:
        UserError: naming the first such flag.
    """
    for name in ("models", "forest", "experts", "weights", "prior", "topk", "dtype", "out_dtype"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} cannot be added to a recipe; write it there")
    if args.no_normalize:
        raise UserError(
            "--no_normalize cannot be added to a recipe; write `normalize: false` there"
        )
