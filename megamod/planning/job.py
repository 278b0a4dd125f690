"""Jobs of a plan, built from a recipe, a DeepSpeed file and a number of ranks.

Batch sizes, precision and ZeRO stage are resolved by the code that resolves them in a run.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megamod.args import DataArgs, LoraArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.btm.campaign import BtmArgs
from megamod.btm.placement import allocate_slots, check_job_fits
from megamod.data.corpus.header import HEADER, read_databin_header
from megamod.dist.ds_config import get_offload_device
from megamod.dist.hostfile import Host, HostSlots, read_hostfile
from megamod.dist.scope import Sharing, parse_sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.flags import find_origin
from megamod.models.auto import resolve_model_folder
from megamod.models.build import FAMILIES
from megamod.models.lm.configuration import read_lm_config
from megamod.models.presets import PRESETS
from megamod.planning.memory import BUCKET, LIVE, PERSISTENT, TrainingSetting
from megamod.planning.plan_args import PlanArgs
from megamod.states.config_file import read_config_file
from megamod.train.compiled import check_compile_stage
from megamod.train.deepspeed_settings import resolve_settings

VOCABULARY = {"causal_lm": 50264, "masked_lm": 30522, "replaced_token": 30522}
"""Vocabulary sizes without a data-bin: GPT-2's in fairseq's dictionary, and BERT's."""

ONE_JOB = ("hostfile",)  # fields of BtmArgs that other runs have too


@dataclass(frozen=True)
class JobVocabulary:
    """Vocabulary size and special ids that a job is planned with.

    Attributes:
        size: number of ids.
        bos, pad, eos, mask: special ids; bos is 0 if the data-bin has none, mask that of BERT or
            the last id of a smaller vocabulary, because no data-bin records one.
        assumed: True if neither a data-bin nor --vocab_size gives the size.
    """

    size: int
    bos: int
    pad: int
    eos: int
    mask: int = 103
    assumed: bool = True


@dataclass(frozen=True)
class Job:
    """Ranks that train together.

    Attributes:
        name: for the report.
        job_names: names of all jobs with the same requirements, including this one.
        topology: its ranks and domains.
        run, model, lora, mux, data: its arguments, with the values of the DeepSpeed file.
        vocabulary: vocabulary of the data.
        setting: training settings that determine memory and communication.
        steps: optimizer steps of the schedule.
        placements: slots of each job in `job_names`, ranks in order; empty for a job that has to
            wait.
    """

    name: str
    job_names: tuple[str, ...]
    topology: DomainTopology
    run: RunArgs
    model: ModelArgs
    lora: LoraArgs
    mux: MuxArgs
    data: DataArgs
    vocabulary: JobVocabulary
    setting: TrainingSetting
    steps: int
    placements: tuple[HostSlots, ...]

    @property
    def sequences_per_step(self) -> int:
        """Number of sequences in an optimizer step, over all ranks."""
        return self.setting.micro_batch * self.setting.micro_steps * self.topology.world_size

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in an optimizer step, over all ranks, padding included."""
        return self.sequences_per_step * self.data.max_seq_length


Parsed = tuple[
    PlanArgs, BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, MuxArgs, DataArgs
]
"""All arguments of a plan."""


def list_jobs(parsed: Parsed) -> list[Job]:
    """List the jobs of a run, with all that the plan of each needs.

    With a flag of Branch-Train-Merge set, and not `--in_one_world`, they are the campaign's: its
    seed, if it trains one, and one job that stands for all experts. Otherwise there is one job,
    called "run".

    Args:
        parsed: all arguments of the plan; the header of the data-bin and the model's configuration
            are read from the files that they name.
    Raises:
        UserError: for arguments that a run refuses, and if the number of ranks is missing.
    """
    plan, btm, run, _, model, lora, _, mux, data = parsed
    lora.check_model_flags(model)
    hosts = _list_hosts(plan, btm)
    ranks = sum(len(host.slots) for host in hosts)
    vocabulary, data_domains = _read_vocabulary(plan, mux, data)
    domains = tuple(data.domains or data_domains)
    if mux.objective != "causal_lm" and model.untie != "none":
        raise UserError(f"--untie {model.untie}: goes with --objective causal_lm")
    if _is_campaign(btm) and not btm.in_one_world:
        return _list_campaign_jobs(parsed, hosts, domains, vocabulary)
    sharing = Sharing.BTM if btm.in_one_world else parse_sharing(model.untie)
    if sharing is not Sharing.DENSE and not domains:
        raise UserError("--domains is missing: without a data-bin, experts need their names")
    steps = run.max_steps
    return [_make_job(parsed, "run", ("run",), sharing, domains, ranks, vocabulary, steps, [hosts])]


def _list_hosts(plan: PlanArgs, btm: BtmArgs) -> HostSlots:
    """List the hosts of the run with their slots, one for each rank: those of --hostfile.

    Without one, --world_size ranks fill made-up hosts node-1, node-2, ... of --ranks_per_node
    slots, the last with the rest.

    Args:
        plan, btm: flags; `btm` has --hostfile.
    Raises:
        UserError: if both are missing, --world_size contradicts --hostfile, or the hostfile cannot
            be read.
    """
    if btm.hostfile is not None:
        hosts = read_hostfile(btm.hostfile)
        slots = sum(len(host.slots) for host in hosts)
        if plan.world_size not in (None, slots):
            raise UserError(
                f"--world_size {plan.world_size}: --hostfile {btm.hostfile} has {slots} slots"
            )
        return hosts
    if plan.world_size is None:
        raise UserError("--world_size is missing: the number of ranks; or give a --hostfile")
    full, rest = divmod(plan.world_size, plan.ranks_per_node)
    sizes = [plan.ranks_per_node] * full + [rest] * (rest > 0)
    return tuple(Host(f"node-{i}", tuple(range(size))) for i, size in enumerate(sizes, start=1))


def _read_vocabulary(
    plan: PlanArgs, mux: MuxArgs, data: DataArgs
) -> tuple[JobVocabulary, tuple[str, ...]]:
    """Read vocabulary and domains of the data-bin, or assume a vocabulary without one.

    --vocab_size overrides the size in both cases. A data-bin's size includes a token per domain
    with --domain_token.

    Args:
        plan, mux, data: flags: --vocab_size, --objective, and those of the data-bin.
    Returns:
        the vocabulary, and the domains of the data-bin; () without one.
    Raises:
        UserError: if the data-bin's header cannot be read.
    """
    causal = mux.objective == "causal_lm"
    if data.data is not None and (Path(data.data) / HEADER).is_file():
        header = read_databin_header(Path(data.data))
        domains, size = tuple(header.domains), header.vocab_size
        ids = header.bos_id or 0, header.pad_id, header.eos_id
        extra = len(data.domains or domains) if data.domain_token else 0
        mask = min(103, size - 1)
        return JobVocabulary(plan.vocab_size or size + extra, *ids, mask, assumed=False), domains
    size = plan.vocab_size or VOCABULARY[mux.objective]
    ids = (0, 1, 2) if causal else (min(101, size - 1), 0, min(102, size - 1))
    return JobVocabulary(size, *ids, min(103, size - 1), plan.vocab_size is None), ()


def _is_campaign(btm: BtmArgs) -> bool:
    """Return True if a flag of Branch-Train-Merge has another origin than its default."""
    names = [field.name for field in fields(btm) if field.name not in ONE_JOB]
    return any(find_origin(btm, name) != "default" for name in names)


def _list_campaign_jobs(
    parsed: Parsed, hosts: HostSlots, domains: Sequence[str], vocabulary: JobVocabulary
) -> list[Job]:
    """List the jobs of a Branch-Train-Merge campaign: its seed, if it has one, and its experts.

    All experts are one job, with the names of their domains in `job_names`. The seed trains
    `--seed_share` of the steps without an adapter, on `--seed_gpus` ranks, else on the most that
    divide its micro-batches.

    Args:
        parsed: all arguments of the plan; not changed.
        hosts: hosts that the jobs share, with their slots.
        domains: domains of the experts, unless the campaign has rounds that name them.
        vocabulary: result of `_read_vocabulary`, the same for all jobs.
    Raises:
        UserError: for another --untie than "none" and "all", if domains are missing, the batch is
            not shared evenly, or a job does not fit the hosts.
    Source: Li et al. 2022, section 4.1.
    """
    _, btm, run, _, model, *_ = parsed
    domains = [d for text in btm.rounds for d in text.split()] if btm.rounds else list(domains)
    if model.untie not in ("none", "all"):
        raise UserError(
            f"--untie {model.untie}: experts of Branch-Train-Merge are whole models; leave it out"
        )
    if not domains:
        raise UserError("--domains is missing: without a data-bin, experts need their names")
    batch = run.global_batch_size
    if batch is None or batch % len(domains):
        raise UserError(
            f"--global_batch_size {batch}: is shared by {len(domains)} experts; give a multiple"
        )
    seed_steps = round(btm.seed_share * run.max_steps)
    jobs = []
    if seed_steps:
        full_micro_batches = batch // run.per_device_train_batch_size
        total = sum(len(host.slots) for host in hosts)
        ranks = btm.seed_gpus or next(
            n
            for n in range(total, 0, -1)
            if full_micro_batches % n == 0 and allocate_slots(hosts, (), n)
        )
        check_job_fits(hosts, ranks, "--seed_gpus")
        seed_placements = [allocate_slots(hosts, (), ranks)]
        of_seed = (*parsed[:5], LoraArgs(), *parsed[6:])
        jobs.append(
            _make_job(
                of_seed, "seed", ("seed",), Sharing.DENSE, domains, ranks, vocabulary, seed_steps,
                seed_placements,
            )
        )  # fmt: skip
    check_job_fits(hosts, btm.gpus_per_expert, "--gpus_per_expert")
    expert_placements: list[HostSlots] = []
    for _ in domains:
        busy = [host for placement in expert_placements for host in placement]
        expert_placements.append(allocate_slots(hosts, busy, btm.gpus_per_expert) or ())
    expert_run = copy.copy(run)
    expert_run.global_batch_size = batch // len(domains)
    jobs.append(
        _make_job(
            (*parsed[:2], expert_run, *parsed[3:]), "expert", tuple(domains), Sharing.DENSE,
            domains[:1], btm.gpus_per_expert, vocabulary, run.max_steps - seed_steps,
            expert_placements,
        )
    )  # fmt: skip
    return jobs


def _make_job(
    parsed: Parsed,
    name: str,
    job_names: Sequence[str],
    sharing: Sharing,
    domains: Sequence[str],
    ranks: int,
    vocabulary: JobVocabulary,
    steps: int,
    placements: Sequence[HostSlots],
) -> Job:
    """Make a job with the batch, precision and stage that a run resolves.

    The arguments in `parsed` are copied, not changed.

    Args:
        parsed: all arguments of the plan.
        name, job_names, steps, placements: see `Job`.
        sharing: parameters that domains share.
        domains: domains of the topology; empty: one called "text".
        ranks: number of ranks of the topology.
        vocabulary: result of `_read_vocabulary`.
    Raises:
        UserError: where a run raises it.
    """
    _, _, run, safety, model, lora, optim, mux, data = (copy.copy(args) for args in parsed)
    topology = DomainTopology(ranks, tuple(domains) or ("text",), sharing)
    settled = resolve_settings(run, optim, safety, topology, _read_hidden_size(model, mux))
    run, config = settled.run, settled.ds_config
    if model.torch_compile:
        check_compile_stage(config)
    zero = config["zero_optimization"]
    stage = zero["stage"]
    overlap = zero.get("overlap_comm", stage == 3)
    sums_in_fp32 = (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32"
    setting = TrainingSetting(
        stage=stage,
        precision=run.precision or "fp32",
        micro_batch=run.per_device_train_batch_size,
        micro_steps=settled.plan.micro_steps,
        checkpointing=model.gradient_checkpointing,
        offload=get_offload_device(zero, "optimizer"),
        offload_param=get_offload_device(zero, "param"),
        sum_in_fp32=sums_in_fp32 and run.precision not in (None, "fp32"),
        bucket=int(zero.get("reduce_bucket_size", BUCKET)),
        buffers=2 if overlap and stage < 3 else 1,
        live=min(
            int(zero.get("stage3_max_live_parameters", LIVE)),
            int(zero.get("stage3_max_reuse_distance", LIVE)),
        ),
        persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
        muon=settled.optim.optim == "muon",
    )
    return Job(
        name=name,
        job_names=tuple(job_names),
        topology=topology,
        run=run,
        model=model,
        lora=lora,
        mux=mux,
        data=data,
        vocabulary=vocabulary,
        setting=setting,
        steps=steps,
        placements=tuple(placements),
    )


def _read_hidden_size(model: ModelArgs, mux: MuxArgs) -> int:
    """Read the hidden size D of the model before it is built.

    The first that exists: --hidden_size, the configuration of the folder (or, for a causal language
    model, the hub repository) in --model, the preset that --model names.

    Args:
        model, mux: flags: --model and --hidden_size, and --objective.
    Raises:
        UserError: if there is none of these, or the configuration has no such field.
    """
    if model.hidden_size is not None:
        return model.hidden_size
    config_file = Path(model.model) / "config.json"
    if mux.objective == "causal_lm" and (folder := resolve_model_folder(model.model)) is not None:
        return read_lm_config(folder, "--model").hidden_size  # families name the field differently
    if config_file.is_file():
        fields = read_config_file(config_file.parent)
        if not isinstance(fields.get("hidden_size"), int):
            raise UserError(f"{config_file}: hidden_size is missing, a whole number")
        return fields["hidden_size"]
    sizes = PRESETS["demix"]
    if mux.objective != "causal_lm":
        sizes = PRESETS[FAMILIES[mux.objective]]
    if model.model not in sizes:
        raise UserError(
            f"--model {model.model!r} is no folder with config.json and none of {', '.join(sizes)}"
        )
    return sizes[model.model]["hidden_size"]
