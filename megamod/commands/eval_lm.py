"""Perplexity and bits per byte of language models, by domain and expert.

    megamod eval-lm --model runs/demix/model --data DATABIN
    megamod eval-lm --model runs/dense/model runs/demix/model --data DATABIN \\
        --split valid --domains law code --own_only --output scores.json --plot scores.png

    megamod eval-lm --model runs/demix/model --experts law --data OTHER \\
        --domains novel --context_window 512 --jsonl scores.jsonl

A model is the folder that megamod pretrain wrote: dense, with experts (DEMix), or with a
folder per independent model (BTM); or a forest.json. Any domain of a data-bin with the model's
vocabulary can be scored, also one the model never saw. Splits are scored whole, in one process, on
the GPU if there is one. A model whose vocabulary has room for domain tokens is given them (see
--domain_token). A perplexity that overflows is null in the files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamod.args import MASK_DOCUMENTS, VERIFY_DATA
from megamod.errors import UserError, run_main
from megamod.flags import Arguments, option, parse_args, require_values


@dataclass
class EvalArgs(Arguments):
    """Models, text and results."""

    model: list[str] | None = option(  # noqa: RUF009
        None, "model folders to score", alias="model_name_or_path", separator=":"
    )
    data: str | None = option(None, "data-bin folder written by megamod preprocess")
    verify_data: Literal["size", "sample", "full"] = option("sample", VERIFY_DATA)
    domains: list[str] | None = option(  # noqa: RUF009
        None, "domains to score, in this order; none: all of the data-bin"
    )
    split: Literal["test", "valid", "train"] = option("test", "split to score")
    experts: list[str] | None = option(  # noqa: RUF009
        None, "experts to score, of models that have several; none: all"
    )
    own_only: bool = option(False, "score each expert on its own domain only")
    max_seq_length: int | None = option(
        None, "tokens per sequence; none: the model's maximum", least=2
    )
    domain_token: Literal["auto", "true", "false"] = option(
        "auto", "start each sequence with the token of its domain; auto: if the model has them"
    )
    force_domain_token: str | None = option(
        None, "start every sequence with the token of this domain"
    )
    context_window: int = option(
        0, "unscored tokens of context at the start of each sequence", least=0
    )
    mask_documents: Literal["auto", "true", "false"] = option("auto", MASK_DOCUMENTS)
    per_device_eval_batch_size: int = option(8, "sequences per batch", least=1)
    output: str | None = option(None, "JSON file to write")
    jsonl: str | None = option(None, "JSON-lines file to write, one line per score")
    plot: str | None = option(None, "PNG file to write: experts by domains")


def main() -> None:
    """Parse the flags, score one model after the other, print and write the results.

    Raises:
        UserError: if a flag is missing, the folder of an output file does not exist, or models and
            data do not fit each other.
    """
    (args,) = parse_args(EvalArgs, doc=__doc__)
    require_values(args, "model", "data")
    for flag in ("output", "jsonl", "plot"):
        path = getattr(args, flag)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{flag} {path}: there is no folder {Path(path).parent}")

    import torch
    from transformers.utils.logging import disable_progress_bar

    from megamod.data.lm.databin import DataBin
    from megamod.evaluation.held_out_data import HeldOut
    from megamod.evaluation.model_folders import find_saved_models, score_models
    from megamod.evaluation.perplexity_report import (
        format_comparison,
        format_score_lines,
        make_comparison_record,
        make_heat_map,
    )
    from megamod.evaluation.plots import plot_matrix
    from megamod.files import write_atomic, write_json

    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out = HeldOut(
        path=args.data,
        domains=args.domains or DataBin(args.data).domains,
        split=args.split,
        block_size=args.max_seq_length,
        batch_size=args.per_device_eval_batch_size,
        domain_token=args.domain_token,
        own_only=args.own_only,
        experts=args.experts,
        context_window=args.context_window,
        force_domain_token=args.force_domain_token,
        mask_documents=args.mask_documents,
        verify=args.verify_data,
    )
    folders = {model: find_saved_models(Path(model), held_out) for model in args.model}
    models = {model: score_models(parts, held_out, device) for model, parts in folders.items()}
    print(format_comparison(models, held_out.domains, args.split))
    for model, matrix in models.items():
        if len(matrix) > 1 and not args.own_only:
            print(
                f"\nhow much each expert of {model} helps the others:\n  "
                f"megamod eval-ensemble --forest {model} --data {args.data} "
                f"--domain {held_out.domains[0]}"
            )
    if args.output is not None:
        record = {"data": args.data, "split": args.split, "models": make_comparison_record(models)}
        write_json(Path(args.output), record)
    if args.jsonl is not None:
        write_atomic(Path(args.jsonl), format_score_lines(models, args.split))
    if args.plot is not None:
        plot_matrix(make_heat_map(models), Path(args.plot), f"{args.split} perplexity")


if __name__ == "__main__":
    run_main(main)
