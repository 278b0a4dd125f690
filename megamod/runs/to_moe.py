"""The command `to_moe`: a mixture of experts from a forest, or from model folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megamod.errors import UserError
from megamod.flags import option, refuse_values_without_effect, require_values
from megamod.runs.model_output import ModelOutputArgs

if TYPE_CHECKING:
    from megamod.merging.moe.plan import MoePlan
    from megamod.merging.moe.rows import RouterRows
    from megamod.merging.recipe import MergeRecipe
    from megamod.runs.router_rows import RouterCalibration
    from megamod.states.forest import Expert

CALIBRATION_FLAGS = (
    *("calibration", "calibration_tokens", "sharpness", "no_centre", "max_seq_length"),
    "batch_size",
)
"""Flags of `MoeArgs` that only calibrated router rows use."""


@dataclass
class MoeArgs(ModelOutputArgs):
    """Experts, router and output of a mixture."""

    forest: str | None = option(
        None, "forest.json, a folder with one, a DEMix model, or a folder with a model per domain"
    )
    models: list[str] | None = option(  # noqa: RUF009
        None, "in place of --forest: folders of dense models, or runs", separator=":"
    )
    experts: list[str] | None = option(  # noqa: RUF009
        None, "domains of the forest to take, in this order; none: all"
    )
    domains: list[str] | None = option(  # noqa: RUF009
        None, "with --models: a name for each; none: the domain it was trained on, or its folder"
    )
    weights: list[float] | None = option(  # noqa: RUF009
        None, "weight of each model in the average of the weights outside of experts; none: equal"
    )
    align: bool = option(
        False, "bring the features of all models to those of the first, matched by weights"
    )
    align_method: Literal["weight", "orthogonal"] = option(
        "weight", "with --align: reorder features, or rotate them too, with norms folded"
    )
    anchor: bool = option(
        False, "require equal bits outside of feed-forwards in all models, instead of averaging"
    )
    topk: int | None = option(None, "experts per token; none: 2", least=1)
    router: Literal["calibrated", "random", "file"] | None = option(
        None, "origin of the router rows; none: calibrated with --calibration, else random"
    )
    router_file: str | None = option(
        None, "with --router file: safetensors with `rows` [layers, experts, features]"
    )
    calibration: list[str] | None = option(  # noqa: RUF009
        None, "text of each domain: a data-bin, or DOMAIN=FILE for each"
    )
    calibration_tokens: int = option(65536, "tokens of each domain's text that are read", least=2)
    sharpness: float = option(
        1.0, "standard deviation of the router's logits; without centring, length of rows"
    )
    no_centre: bool = option(
        False, "rows of means alone, so that each depends on its own expert and the first model"
    )
    max_seq_length: int | None = option(
        None, "tokens per sequence of calibration; none: 1024, or fewer if the model has fewer"
    )
    batch_size: int = option(8, "sequences per forward pass of calibration", least=1)
    seed: int = option(0, "seed of random rows", least=0)

    def __post_init__(self):
        """Check the flags.

        Raises:
            UserError: for flags that have no effect with the origin of the router rows or without
                --align, contradict each other, or a sharpness that is not above 0.
        """
        super().__post_init__()
        kind = self.router_kind
        if kind != "calibrated":
            refuse_values_without_effect(self, CALIBRATION_FLAGS, f"--router is {kind}")
        if not self.align:
            refuse_values_without_effect(self, ("align_method",), "there is no --align")
        if self.align_method == "orthogonal" and self.no_centre:
            raise UserError(
                "--no_centre takes rows of the first model as it is, and --align_method orthogonal "
                "folds its norms; give one of the two"
            )
        if kind != "random":
            refuse_values_without_effect(self, ("seed",), f"--router is {kind}")
        if (self.router_file is not None) is not (kind == "file"):
            raise UserError("--router file and --router_file PATH go together")
        if not self.sharpness > 0:
            raise UserError(f"--sharpness {self.sharpness}: must be above 0")

    @property
    def router_kind(self) -> str:
        """Origin of the router rows: "calibrated", "random" or "file".

        Without effect for anchored experts, which bring rows of their own.
        """
        return self.router or ("random" if self.calibration is None else "calibrated")


def run_to_moe(args: MoeArgs) -> None:
    """Convert dense experts to a mixture in --output_dir, and print its plan.

    If the router is calibrated, the share of its domain's tokens on which each expert is first is
    printed, too. With --dry_run everything is checked and nothing is written.

    Args:
        args: flags of the command.
    Raises:
        UserError: for flags or models that do not fit each other, or an output folder that is not
            new.
    """
    if not args.dry_run:
        require_values(args, "output_dir")
    from megamod.merging.moe.anchored import NAME, read_trained_router_rows
    from megamod.merging.moe.convert import convert_to_moe
    from megamod.states.forest import Expert

    experts = select_experts(args)
    anchored = are_all_anchored(args, experts)
    if anchored:
        experts = [Expert(domain=NAME, path=experts[0].path), *experts]
    experts_per_token = _get_experts_per_token(args, len(experts))
    recipe = _make_recipe(args, experts)
    if anchored:
        inputs = tuple(replace(model, beside_anchor=True) for model in recipe.inputs)
        recipe = replace(recipe, inputs=inputs)
    plan = convert_to_moe(
        recipe,
        None if args.output_dir is None else Path(args.output_dir),
        read_trained_router_rows if anchored else _make_router_rows_function(args, recipe),
        [expert.data_digest for expert in experts],
        experts_per_token=experts_per_token,
        anchor=args.anchor or anchored,
        **args.make_merge_arguments(),
    )
    calibrated = not anchored and args.router_kind == "calibrated" and not args.dry_run
    rows = [_format_calibration(Path(args.output_dir))] if calibrated else []
    args.print_report(plan.format_summary(), *rows)


def _format_calibration(folder: Path) -> str:
    """Format the table of a calibrated router from moe.json, see `format_own_expert_shares`.

    Args:
        folder: folder of a mixture whose router was calibrated.
    """
    from megamod.merging.moe.record import read_moe_record
    from megamod.runs.router_rows import format_own_expert_shares

    record = read_moe_record(folder)
    table = format_own_expert_shares(record.router, record.domains)
    return f"share of each domain's tokens on which its own expert is first:\n{table}"


def select_experts(args: MoeArgs) -> "list[Expert]":
    """Select the experts that --forest and --experts, or --models and --domains, name.

    Args:
        args: flags of the command.
    Returns:
        their forest entries in the order of the mixture.
    Raises:
        UserError: for flags that do not go together, an expert that does not exist, or two of one
            name.
    """
    from megamod.btm.parents import select_forest_parents
    from megamod.states.forest import open_forest

    if (args.models is None) is (args.forest is None):
        raise UserError("give one of --forest and --models")
    if args.forest is not None:
        if args.domains is not None:
            raise UserError("--domains goes with --models; a forest has names, see --experts")
        known = {(e.path, e.member): e for e in open_forest(args.forest).experts}
        sources, _ = select_forest_parents(args.forest, only_domains=args.experts)
        experts = [known[source.folder, source.member] for source in sources]
    else:
        if args.experts is not None:
            raise UserError("--experts goes with --forest, not with --models")
        names = args.domains or [None] * len(args.models)
        if len(names) != len(args.models):
            raise UserError(f"--domains: {len(names)} names for {len(args.models)} models")
        experts = [
            expert
            for path, name in zip(args.models, names, strict=True)
            for expert in _make_forest_entries(Path(path), name)
        ]
    domains = [expert.domain for expert in experts]
    for domain in domains:
        if domains.count(domain) > 1:
            raise UserError(
                f"--{'models' if args.forest is None else 'experts'}: two experts are called "
                f"{domain!r}; --domains names them"
            )
    return experts


def are_all_anchored(args: MoeArgs, experts: "Sequence[Expert]") -> bool:
    """Return True if all experts were trained beside an anchor, False if none was.

    The anchor, the frozen seed, is then to be the first expert of the mixture, under the name
    `NAME` of `megamod.merging.moe.anchored`; it is not in `experts` yet.

    Args:
        args: flags of the command.
        experts: forest entries of the experts.
    Raises:
        UserError: if some are anchored and others not, a flag asks for other rows or weights, or an
            expert has the anchor's name.
    """
    from megamod.merging.moe.anchored import NAME, is_anchored

    anchored = [is_anchored(expert.path) for expert in experts]
    if not any(anchored):
        return False
    if not all(anchored):
        dense = experts[anchored.index(False)]
        raise UserError(
            f"{dense.path} is not anchored, and {experts[anchored.index(True)].path} is: their "
            "experts do not make one mixture"
        )
    names = ("router", "router_file", "weights", "align", "seed", *CALIBRATION_FLAGS)
    refuse_values_without_effect(
        args, names, f"{experts[0].path} is anchored, and its rows are trained"
    )
    if NAME in [expert.domain for expert in experts]:
        raise UserError(f"{NAME!r} is the name of the frozen expert; call the domain otherwise")
    return True


def _make_forest_entries(path: Path, name: str | None) -> "list[Expert]":
    """Make the forest entry of a run or model folder, or of each expert of an anchored model.

    Args:
        path: OUT of a run, or a model folder.
        name: name of the expert; None: the domain that it was trained on, or its folder's name if
            that is not a single known domain.
    Raises:
        UserError: if an anchored model has several experts and `name` is given, or there is no
            model.
    """
    from megamod.btm.forest_entry import make_forest_entry
    from megamod.merging.moe.anchored import is_anchored
    from megamod.states.forest import read_model_config
    from megamod.states.model_folder import is_model_folder

    model = path / "model" if is_model_folder(path / "model") else path
    if is_anchored(model):
        domains = read_model_config(model)["domains"]
        if name is not None and len(domains) > 1:
            raise UserError(f"--domains {name}: {model} has the experts {', '.join(domains)}")
        return [make_forest_entry(path, name or domain, domain) for domain in domains]
    whole = path.absolute()
    folder = whole.parent.name if whole.name == "model" else whole.name
    expert = make_forest_entry(path, name or folder)
    if name is not None:
        return [expert]
    try:
        return [make_forest_entry(path)]
    except UserError:  # trained on several domains, or unknown ones
        return [expert]


def _get_experts_per_token(args: MoeArgs, experts: int) -> int:
    """Return the number of experts that compute a token: --topk; without it 2.

    Args:
        args: flags of the command.
        experts: number of experts of the mixture.
    Raises:
        UserError: for a single expert without --topk 1.
    """
    if experts == 1 and args.topk != 1:
        raise UserError("a mixture needs two experts; of a single one it needs --topk 1")
    return min(2, experts) if args.topk is None else args.topk


def _make_recipe(args: MoeArgs, experts: "Sequence[Expert]") -> "MergeRecipe":
    """Build the recipe of the average that the mixture has outside of its feed-forwards.

    Its inputs are in the order of the experts, each with its domain.

    Args:
        args: flags of the command.
        experts: forest entries in the order of the mixture.
    Raises:
        UserError: for flags that do not go with --anchor, or another number of weights than
            experts.
    """
    from megamod.merging.recipe import build_weighted_recipe

    if args.anchor and (args.align or args.weights is not None):
        raise UserError("--anchor takes weights as they are; leave --align and --weights out")
    recipe = build_weighted_recipe(
        [(expert.path, expert.member) for expert in experts],
        [1.0] * len(experts) if args.weights is None else args.weights,
        domains=[expert.domain for expert in experts],
        out_dtype=args.out_dtype,
    )
    if not args.align:
        return recipe
    return replace(recipe, align={"method": args.align_method}, origin="--align")


def _make_router_rows_function(
    args: MoeArgs, recipe: "MergeRecipe"
) -> "Callable[[MoePlan], RouterRows]":
    """Make the function that computes the router rows from the plan of the mixture.

    Args:
        args: flags; --router decides the origin of the rows.
        recipe: recipe of `_make_recipe`, whose average calibrated rows are computed on.
    Raises:
        UserError: if --router calibrated lacks --calibration.
    """
    from megamod.merging.moe.rows import initialise_router_rows, read_router_rows_file

    if args.router_kind == "random":
        return partial(initialise_router_rows, seed=args.seed)
    if args.router_kind == "file":
        return partial(read_router_rows_file, path=Path(args.router_file))
    from transformers.utils.logging import disable_progress_bar

    from megamod.runs.router_rows import compute_calibrated_rows

    disable_progress_bar()
    return partial(compute_calibrated_rows, recipe=recipe, calibration=make_calibration(args))


def make_calibration(args: MoeArgs) -> "RouterCalibration":
    """Make the settings of calibrated router rows from the flags; no text is read.

    Raises:
        UserError: if --calibration is missing.
    """
    from megamod.runs.router_rows import RouterCalibration

    if args.calibration is None:
        raise UserError("--router calibrated needs --calibration: a data-bin, or DOMAIN=FILE")
    return RouterCalibration(
        args.calibration,
        args.calibration_tokens,
        args.sharpness,
        not args.no_centre,
        args.max_seq_length,
        args.batch_size,
    )
