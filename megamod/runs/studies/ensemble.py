"""`megamod eval-ensemble`: evaluation of a mixture of the experts of a forest."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed as dist

from megamod.errors import UserError
from megamod.evaluation.ensemble import (
    DomainResult,
    MixingProtocol,
    estimate_priors,
    score_mixtures,
)
from megamod.evaluation.ensemble_report import (
    format_json_lines,
    format_priors,
    format_scores,
    make_results_record,
)
from megamod.evaluation.expert_scores import Experts, ParallelScores, SequentialScores
from megamod.evaluation.held_out_data import HeldOut
from megamod.evaluation.plots import plot_posterior
from megamod.files import write_atomic, write_json
from megamod.mixture.ensemble import PosteriorRule
from megamod.mixture.prior import read_prior, write_prior
from megamod.runs.studies.ensemble_args import EnsembleArgs
from megamod.states.forest import open_forest


def evaluate_ensemble(args: EnsembleArgs, device: torch.device) -> dict[str, DomainResult]:
    """Estimate the prior and score the mixture; rank 0 prints and writes the results. Collective.

    Several ranks share the experts. One process runs them one after the other, unless --in_memory
    is given.

    Args:
        args: its `forest`, `data` and `domain` must be set.
        device: device of this rank.
    Returns:
        the results by domain; with --estimate_only they have no scores.
    Raises:
        UserError: if forest, data, prior and flags do not fit each other, before any write.
    """
    held_out = HeldOut(
        args.data,
        args.domain,
        args.split,
        args.max_seq_length,
        args.per_device_eval_batch_size,
        args.domain_token,
        own_only=False,
        context_window=args.context_window,
        force_domain_token=args.force_domain_token,
        mask_documents=args.mask_documents,
        verify=args.verify_data,
    )
    experts = Experts(open_forest(args.forest), held_out, device, args.experts)
    count = len(experts.domains)
    if args.topk is not None and args.topk > count:
        raise UserError(f"--topk {args.topk}: there are {count} experts, give {count} or less")
    protocol = MixingProtocol(
        mode=args.mode,
        rule=PosteriorRule(args.rule, args.temperature, args.forgetting, args.first_over_all),
        topk=args.topk,
        prior_split=args.prior_split,
        prior_sequences=args.prior_sequences,
        split=args.split,
        batch=args.mixing_batch_size,
        removal_test=args.removal_test,
    )
    priors = None
    if args.prior is not None:
        priors = {
            d: read_prior(_fill_in_domain(args.prior, d), experts.domains) for d in args.domain
        }
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    if distributed or args.in_memory:
        source = ParallelScores(experts)
    else:
        source = SequentialScores(
            experts, Path(args.cache_dir) if args.cache_dir is not None else None
        )
    if args.estimate_only:
        results = estimate_priors(experts, source, args.domain, protocol)
    else:
        results = score_mixtures(experts, source, args.domain, protocol, priors)
    if not distributed or dist.get_rank() == 0:
        _write_results(args, protocol, results)
    return results


def _write_results(
    args: EnsembleArgs, protocol: MixingProtocol, results: Mapping[str, DomainResult]
) -> None:
    """Print the tables of priors and scores; write the files that the flags name.

    A prior that was estimated is written to --prior_output, by default prior_DOMAIN.json in the
    folder of --output, without it in the current folder.

    Args:
        args: flags, which name the files.
        protocol: settings of the mixture, for the tables.
        results: results by domain of the text.
    """
    parts = [format_priors(results)]
    if not args.estimate_only:
        parts.append(format_scores(results, protocol))
    print("\n\n".join(part for part in parts if part))
    if args.prior is None:
        for domain, result in results.items():
            if result.estimate is not None:
                folder = Path(args.output).parent if args.output is not None else Path()
                path = _fill_in_domain(args.prior_output or folder / "prior_{domain}.json", domain)
                write_prior(path, result.estimate)
                print(f"prior on {domain}: {path}")
    if args.output is not None:
        record = {
            "forest": args.forest,
            "data": args.data,
            **make_results_record(results, protocol),
        }
        write_json(Path(args.output), record)
    if args.jsonl is not None:
        write_atomic(Path(args.jsonl), format_json_lines(results))
    if args.plot is not None:
        for domain, result in results.items():
            title = f"{args.mode}, {args.rule}: weights along the first {args.split} text of "
            plot_posterior(result.posterior, _fill_in_domain(args.plot, domain), title + domain)


def _fill_in_domain(path: str | Path, domain: str) -> Path:
    """Return the path with `{domain}` replaced by the domain."""
    return Path(str(path).replace("{domain}", domain))
