"""Start of an adaptation: selection of an expert and its model.

Source: Gururangan et al. 2022 (DEMix), section 6.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megamod.data.lm.databin import DataBin
from megamod.data.lm.pretraining import LmData
from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.evaluation.ensemble import MixingProtocol, estimate_priors
from megamod.evaluation.expert_scores import Experts, ParallelScores, SequentialScores
from megamod.evaluation.held_out_data import HeldOut, check_tokenizer_matches
from megamod.flags import refuse_values_without_effect
from megamod.merging.lora import open_weights
from megamod.mixture.prior import read_prior
from megamod.models.auto import check_host_family, check_vocabulary_fits
from megamod.models.lm.configuration import (
    SEQUENCE,
    DemixConfig,
    LmConfig,
    get_default_sequence_length,
    get_domains,
    get_max_sequence_length,
    get_untie,
    make_part_config,
    read_lm_config,
)
from megamod.models.lm.feed_forward import list_feed_forward_names
from megamod.models.lm.load import LanguageModel, select_lm_class
from megamod.runs.pretrain.adapt_args import AdaptArgs
from megamod.schemas import Schema, read_checked_file
from megamod.states.dense import make_dense_config
from megamod.states.forest import Expert, Forest, open_forest
from megamod.states.stream import ModelFolder

RECORD = "start.json"  # in OUT


@dataclass(frozen=True)
class AdaptationStart:
    """Expert that an adaptation starts from, and the reason for it.

    Attributes:
        reason: clause for messages, such as "as --start says".
        posterior: weight of each expert on the new domain, by which it was selected; None: it was
            selected otherwise.
    """

    expert: Expert
    reason: str
    posterior: dict[str, float] | None = None


class StartRecord(Schema):
    """Content of start.json.

    Attributes:
        forest: path of the forest.
        start: domain of the expert.
        why: `reason` of `AdaptationStart`.
        weights: digest of the expert's weights.
        posterior: see `AdaptationStart`.
    """

    forest: str
    start: str
    why: str
    weights: str
    posterior: dict[str, float] | None


def open_forest_of_candidates(args: AdaptArgs) -> Forest:
    """Open the forest of experts to start from; the dense model of --model is a forest of one.

    Raises:
        UserError: if there is no expert, --model has experts, --start is none of them, or a flag
            has no effect because there is a single one.
    """
    if args.model is None:
        forest = open_forest(Path(args.forest))
    else:
        folder = Path(args.model).absolute()
        if get_untie(read_lm_config(folder, "--model")) != "none":
            raise UserError(f"--model {args.model} has experts: give it as --forest")
        forest = Forest(folder, (Expert(domain="dense", path=folder),))
    if len(forest.experts) == 1:
        single = f"{forest.path} has a single expert"
        refuse_values_without_effect(args, ("prior", "prior_sequences"), single)
    if args.start is not None and args.start not in forest.domains:
        raise UserError(
            f"--start {args.start}: {forest.path} has no such expert; choose of "
            f"{', '.join(forest.domains)}"
        )
    return forest


def open_domain_data(args: AdaptArgs, forest: Forest) -> LmData:
    """Open the train, valid and evaluation splits of the new domain, for all experts of the forest.

    Raises:
        UserError: if domain, split, tokenizer, vocabulary or sequence length do not fit.
    """
    databin = DataBin(args.data, args.verify_data)
    if args.domain not in databin.domains:
        raise UserError(
            f"--domain {args.domain} is not in the data-bin {args.data}; it holds "
            f"{', '.join(databin.domains)}"
        )
    flag = "--model" if args.forest is None else "--forest"
    configs = {e.path: read_lm_config(e.path, flag) for e in forest.experts}
    expected = {"vocab_size": databin.vocab_size, **databin.special_ids}
    for path, config in configs.items():
        check_tokenizer_matches(path, databin, flag)
        if config.model_type != DemixConfig.model_type:
            check_vocabulary_fits(f"{flag} {path}", config, databin.vocab_size, databin.special_ids)
            continue
        for field in ("vocab_size", "pad_token_id", "eos_token_id"):
            if getattr(config, field) != expected[field]:
                raise UserError(
                    f"{flag}: {path} has {field} {getattr(config, field)}, --data {args.data} has "
                    f"{expected[field]}: their vocabularies differ"
                )
    limits = [limit for config in configs.values() if (limit := get_max_sequence_length(config))]
    positions = min(limits, default=SEQUENCE)
    if limits and args.max_seq_length is not None and args.max_seq_length > positions:
        raise UserError(
            f"--max_seq_length {args.max_seq_length}: the experts have {positions} positions"
        )
    block_size = args.max_seq_length or min(map(get_default_sequence_length, configs.values()))
    data = LmData(
        args.data,
        domains=[args.domain],
        block_size=block_size,
        domain_token=False,
        verify=args.verify_data,
    )
    for split in dict.fromkeys(("train", "valid", args.eval_split)):
        data.open_split_of_every_domain(split)
    return data


def select_start_expert(
    forest: Forest,
    args: AdaptArgs,
    output: Path,
    resume: str,
    estimate: Callable[[], Sequence[float]],
) -> AdaptationStart:
    """Select the expert to start from.

    It is the only one, else --start, else the one of the highest weight in --prior, else the one
    that an earlier call of this run recorded in start.json, else the one of the highest estimated
    weight.

    Args:
        forest: experts to select from.
        args: flags of the adaptation.
        output: OUT, folder of the run.
        resume: value of --resume; with "none" start.json is not read.
        estimate: computes the weights [E] of all experts in the order of the forest; called only if
            nothing else decides, on every rank.
    Raises:
        UserError: if --prior or start.json cannot be used.
    """
    if len(forest.experts) == 1:
        return AdaptationStart(forest.experts[0], "the only one")
    if args.start is not None:
        return AdaptationStart(forest.experts[forest.domains.index(args.start)], "as --start says")
    if args.prior is not None:
        weights, why = read_prior(Path(args.prior), forest.domains).weights, f"by {args.prior}"
    elif (
        resume != "none" and (recorded := _read_recorded_start(output / RECORD, forest)) is not None
    ):
        return recorded
    else:
        weights, why = estimate(), "of the highest posterior"
    best = max(range(len(weights)), key=lambda number: weights[number])
    posterior = dict(zip(forest.domains, map(float, weights), strict=True))
    return AdaptationStart(forest.experts[best], f"{why} ({weights[best]:.3f})", posterior)


def estimate_expert_weights(
    forest: Forest, data: LmData, sequences: int, batch_size: int, device: torch.device
) -> Sequence[float]:
    """Estimate the prior of the experts on the new domain's valid split; collective.

    Args:
        forest: the experts.
        data: data of the new domain alone.
        sequences: number of sequences, from the first one.
        batch_size: sequences per forward pass, rounded up to whole batches of the protocol.
        device: device of this rank; experts are loaded there.
    Returns:
        [E] weights of sum 1, in the order of the forest.
    """
    protocol = MixingProtocol(prior_sequences=sequences)
    # Whole batches of the protocol, so that ranks mix the same ones as one process.
    rows = -(-batch_size // protocol.batch) * protocol.batch
    domain, path = data.domains[0], str(data.databin.path)
    held_out = HeldOut(path, [domain], "valid", data.block_size, rows, "false", False)
    experts = Experts(forest, held_out, device)
    source = ParallelScores(experts) if dist.get_world_size() > 1 else SequentialScores(experts)
    return estimate_priors(experts, source, [domain], protocol)[domain].prior.weights


def build_dense_config(expert: Expert, args: AdaptArgs) -> LmConfig:
    """Build the configuration of the dense model that is trained from an expert.

    A configuration of type demix has the new domain as its only one; stock ones name none.

    Args:
        expert: expert to start from, whole or a member of a model.
        args: flags of the adaptation.
    Raises:
        UserError: if the new name is invalid or taken, the experts own no feed-forward network, or
            --method feedforward does not know the model's family.
    """
    saved = read_lm_config(expert.path)
    if expert.member is not None and args.domain in get_domains(saved):
        raise UserError(f"--domain {args.domain}: {expert.path} has an expert of that name already")
    if saved.model_type != DemixConfig.model_type:
        if args.method == "feedforward":
            check_host_family(f"--method feedforward: {expert.path}", saved)
        config = make_part_config(make_dense_config(saved.to_dict()))
        config._attn_implementation = args.attn_implementation
        return config
    fields = saved.to_dict()
    if args.method == "feedforward" and fields["untie"] == "input_output":
        raise UserError(
            f"--method feedforward: the experts of {expert.path} own no feed-forward network "
            "(untie input_output); use full"
        )
    fields |= {"domains": [args.domain], "untie": "none"}
    try:
        return DemixConfig(**fields, attn_implementation=args.attn_implementation or "sdpa")
    except ValueError as error:
        raise UserError(f"--domain {args.domain}: {error}") from error


def build_dense_model(expert: Expert, config: LmConfig, method: str) -> LanguageModel:
    """Build the expert as a dense model with its weights, in float32 on the CPU.

    Args:
        expert: expert to start from.
        config: see `build_dense_config`.
        method: "full", or "feedforward": only feed-forward networks are trained, of an expert in a
            model with experts only the weights that are its own.
    Raises:
        UserError: if its weights do not fit its configuration.
    """
    model = select_lm_class(config)(config)
    with open_weights(expert.path, expert.member) as folder:
        for name, parameter in model.named_parameters():
            spec = folder.tensors.get(name)
            if spec is None or spec.shape != tuple(parameter.shape):
                stored_shape = "none" if spec is None else spec.shape
                raise UserError(
                    f"{expert.path}: {name} has shape {stored_shape}, its configuration says "
                    f"{tuple(parameter.shape)}"
                )
            parameter.data.copy_(folder.read(name))
    model.tie_weights()
    if method == "feedforward":
        expert_parameters = _list_expert_parameters(expert)
        feed_forward_names = list_feed_forward_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                name in feed_forward_names
                and (expert_parameters is None or name in expert_parameters)
            )
    return model


def make_start_record(forest: Forest, start: AdaptationStart, digest: str) -> dict[str, object]:
    """Return the content of OUT/start.json, which a resumed run reads.

    Args:
        forest: the forest that `start` was selected from.
        digest: see `compute_weights_digest`.
    """
    return StartRecord(
        forest=str(forest.path),
        start=start.expert.domain,
        why=start.reason,
        weights=digest,
        posterior=start.posterior,
    ).model_dump()


def compute_weights_digest(expert: Expert) -> str:
    """Compute the digest of the weights that an expert is read from, for start.json."""
    with open_weights(expert.path, expert.member) as folder:
        return folder.compute_digest()


def _read_recorded_start(path: Path, forest: Forest) -> AdaptationStart | None:
    """Read the start that an earlier call of this run recorded.

    Args:
        path: start.json of the run.
        forest: the forest that this call selects from.
    Returns:
        the start; None if there is no file, or its forest is another one or lacks the expert now.
    Raises:
        UserError: if the file is malformed.
    """
    if not path.is_file():
        return None
    try:
        saved = read_checked_file(path, StartRecord)
    except UserError as error:
        raise UserError(f"{error}; remove it to choose anew") from error
    if saved.forest != str(forest.path) or saved.start not in forest.domains:
        return None
    expert = forest.experts[forest.domains.index(saved.start)]
    return AdaptationStart(expert, saved.why, saved.posterior)


def _list_expert_parameters(expert: Expert) -> set[str] | None:
    """List the parameters that belong to an expert alone, by their names in a dense model.

    None for a whole model, whose parameters all belong to it.
    """
    if expert.member is None:
        return None
    names = ModelFolder(expert.path).tensors
    return {
        convert_to_dense_name(name) for name in names if parse_expert_domain(name) == expert.member
    }
