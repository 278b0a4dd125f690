"""A Branch-Train-Merge campaign: flags, rounds of experts, their steps, batches and tokens.

Source: Li et al. 2022 (Branch-Train-Merge), section 2 for the loop, section 4.1 for equal cost: of
E experts, each trains for the steps of the dense run with 1/E of its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.corpus.header import read_databin_domains
from megamod.errors import UserError
from megamod.flags import Arguments, find_origin, option, require_values
from megamod.tables import format_table

RESERVED = ("seed", "world", "average", "evaluation")
"""Names of jobs and folders; no domain may have one of them."""


@dataclass
class BtmArgs(Arguments):
    """Branch-Train-Merge: rounds, seed share, slots of the jobs."""

    seed_share: float = option(
        0.5, "fraction of --max_steps for which the seed is trained; 0: no seed", least=0, most=1
    )
    seed_domains: list[str] | None = option(  # noqa: RUF009
        None, "domains of the seed; none: those of the first round"
    )
    rounds: list[str] | None = option(  # noqa: RUF009
        None,
        'domains of each round, one text per round, as in "law med" "cs"; none: one round',
    )
    topk: int | None = option(
        None,
        "largest number of experts that an expert of a later round starts from; none: all",
        least=1,
    )
    prior_sequences: int = option(
        100, "sequences of a new domain from which the prior over experts is estimated", least=1
    )
    gpus_per_expert: int = option(1, "slots of an expert's job", least=1)
    seed_gpus: int | None = option(
        None, "slots of the seed's job; none: as many as its batch fills", least=1
    )
    hostfile: str | None = option(None, "machines, in DeepSpeed's format; none: this one")
    slots: int | None = option(
        None, "slots of this machine to use; none: its GPUs, or 1 without any", least=1
    )
    max_restarts: int = option(3, "largest number of restarts of a job", least=0)
    in_one_world: bool = option(
        False, "train the experts of a round in one job of independent models"
    )
    average: bool = option(False, "average all experts into OUT/average at the end")
    evaluate: bool = option(False, "score the forest and the average on each domain at the end")
    dry_run: bool = option(False, "print jobs, slots and tokens, then stop")


@dataclass(frozen=True)
class Campaign:
    """A validated campaign.

    Attributes:
        rounds: domains by round.
        seed_domains: domains that the seed trains on.
        total_steps: steps of the schedule, including those of the seed.
        seed_steps: steps of the seed; 0: none.
        batch: sequences per step of the seed, and of all experts together.
        expert_batch: sequences per step of one expert: an equal share of `batch`.
        length: tokens per sequence.
        output: output folder of the campaign.
        adapters: the experts are LoRA adapters of the seed, with optimizers of their own.
    """

    rounds: tuple[tuple[str, ...], ...]
    seed_domains: tuple[str, ...]
    total_steps: int
    seed_steps: int
    batch: int
    expert_batch: int
    length: int
    output: Path
    adapters: bool = False

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains, in the order of their rounds."""
        return tuple(domain for round_ in self.rounds for domain in round_)

    def get_first_step(self, round_index: int) -> int:
        """Return the step at which the experts of a round (from 0) start: the seed's last, or 0.

        It is 0 for adapters and in rounds after the first, whose experts start from an average,
        because neither has an optimizer state to continue.
        """
        return 0 if round_index or self.adapters else self.seed_steps

    def get_last_step(self, round_index: int) -> int:
        """Return the last step of the experts of a round (from 0).

        Every expert trains for `total_steps - seed_steps` steps.
        """
        return self.total_steps - self.seed_steps + self.get_first_step(round_index)

    def format_token_counts(self) -> str:
        """Format the tokens of a campaign as text for the top of its log.

        A table has steps x sequences x tokens per sequence of the seed and of each expert; the line
        below it has their sum and the tokens of a dense run of all steps and the whole batch.
        """
        rows = []
        if self.seed_steps:
            rows.append(("seed", self.seed_steps, self.batch))
        for domain in self.domains:
            rows.append((domain, self.total_steps - self.seed_steps, self.expert_batch))
        products = [
            f"{steps:,} steps x {batch:,} sequences x {self.length:,} = "
            f"{steps * batch * self.length:,} tokens"
            for _, steps, batch in rows
        ]
        names = [name for name, *_ in rows]
        lines = [format_table(list(zip(names, products, strict=True)))]
        total = sum(steps * batch * self.length for _, steps, batch in rows)
        dense = self.total_steps * self.batch * self.length
        lines.append(
            f"all together {total:,} tokens; a dense run of {self.total_steps:,} steps x "
            f"{self.batch:,} sequences has {dense:,}"
        )
        return "\n".join(lines)


Parsed = tuple[BtmArgs, RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs]
"""All arguments of megamod btm."""


def build_campaign(parsed: Parsed) -> Campaign:
    """Build a campaign from parsed arguments; reads the domains of the data-bin and writes nothing.

    Args:
        parsed: instances of all dataclasses of flags of megamod btm, in the order of `Parsed`.
    Raises:
        UserError: for a value that is missing or not allowed, flags that contradict each other, or
            batches that the experts cannot share equally; naming the flag and what is allowed.
    """
    btm, run, _, model, lora, _, data = parsed
    require_values(run, "output_dir")
    require_values(data, "data")
    _refuse_unsupported_flags(parsed)
    available = read_databin_domains(Path(data.data))
    rounds = _parse_rounds(btm, data, available)
    domains = [domain for round_ in rounds for domain in round_]
    seed_domains = tuple(btm.seed_domains or rounds[0])
    _check_known_domains(seed_domains, available, "--seed_domains", data.data)
    lora.check_model_flags(model)
    if lora.lora_rank is not None and len(rounds) > 1:
        raise UserError(
            f"--lora_rank {lora.lora_rank}: adapters of one seed are trained in one round, not "
            f"{len(rounds)}; later rounds start from averages, which would be other seeds"
        )
    if btm.in_one_world and len(rounds) > 1:
        raise UserError(f"--in_one_world: has one round of experts, not {len(rounds)}")
    if run.global_batch_size is None:
        raise UserError(
            "--global_batch_size is missing: sequences per step of the seed; the "
            f"{len(domains)} experts share it equally"
        )
    if run.global_batch_size % len(domains):
        raise UserError(
            f"--global_batch_size {run.global_batch_size} is not a multiple of the "
            f"{len(domains)} experts that share it"
        )
    share = run.global_batch_size // len(domains)
    at_once = run.per_device_train_batch_size * btm.gpus_per_expert
    if share % at_once:
        raise UserError(
            f"--global_batch_size {run.global_batch_size} over {len(domains)} experts leaves each "
            f"{share} sequences a step, which is not a multiple of {at_once} = "
            f"--per_device_train_batch_size {run.per_device_train_batch_size} x "
            f"--gpus_per_expert {btm.gpus_per_expert}"
        )
    seed_steps = round(btm.seed_share * run.max_steps)
    if seed_steps >= run.max_steps:
        raise UserError(
            f"--seed_share {btm.seed_share} of --max_steps {run.max_steps} leaves the experts no "
            "step to train"
        )
    return Campaign(
        rounds=rounds,
        seed_domains=seed_domains,
        total_steps=run.max_steps,
        seed_steps=seed_steps,
        batch=run.global_batch_size,
        expert_batch=share,
        length=data.max_seq_length,
        output=Path(run.output_dir),
        adapters=lora.lora_rank is not None,
    )


def check_campaign_data(campaign: Campaign, parsed: Parsed) -> None:
    """Open every split that a job of the campaign will read, so that faults show before any starts.

    Args:
        parsed: all arguments of megamod btm; the data-bin and --evaluate are read from them.
    Raises:
        UserError: if one is missing, malformed or empty.
    """
    from megamod.data.lm.databin import DataBin  # with numpy, not for --help

    btm, data = parsed[0], parsed[-1]
    everything = dict.fromkeys((*campaign.seed_domains, *campaign.domains))
    splits = {domain: {"train", data.eval_split} for domain in everything}
    for domain in campaign.domains:
        if btm.evaluate:
            splits[domain] |= {"valid", "test"}
        elif domain not in campaign.rounds[0]:
            splits[domain].add("valid")  # decides which experts it branches off
    databin = DataBin(data.data)
    for domain, names in splits.items():
        for name in sorted(names):
            databin.open_split(domain, name)


def _refuse_unsupported_flags(parsed: Parsed) -> None:
    """Refuse flags that the driver sets itself or that independent jobs cannot use.

    Args:
        parsed: all arguments of megamod btm.
    Raises:
        UserError: naming the first such flag that is set.
    """
    _, run, safety, model, _, _, data = parsed
    for args, name in ((run, "stop_step"), (safety, "resume"), (safety, "print_groups")):
        if find_origin(args, name) != "default":
            raise UserError(f"--{name}: is set by the driver for each of its jobs")
    if model.untie not in ("none", "all"):
        raise UserError(
            f"--untie {model.untie}: experts of Branch-Train-Merge are whole models; leave it out"
        )
    if data.domain_token:
        raise UserError("--domain_token: has no effect on experts of one domain each; leave it out")
    if safety.nonfinite == "rollback" and parsed[0].in_one_world:
        raise UserError(
            "--nonfinite rollback: cannot be combined with --in_one_world; use skip or stop"
        )


def _parse_rounds(
    btm: BtmArgs, data: DataArgs, available: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the domains of each round: --rounds, else one round of --domains, else one of all.

    Args:
        btm: holds --rounds, one text of domain names per round.
        data: holds --domains and the path of the data-bin.
        available: domains of the data-bin.
    Raises:
        UserError: for an empty round, unknown, repeated or reserved domains, or if --domains names
            others than --rounds.
    """
    if btm.rounds is None:
        rounds: tuple[tuple[str, ...], ...] = (tuple(data.domains or available),)
        flag = "--domains"
    else:
        rounds, flag = tuple(tuple(text.split()) for text in btm.rounds), "--rounds"
    domains = [domain for round_ in rounds for domain in round_]
    _check_known_domains(domains, available, flag, data.data)
    for round_, name in zip(rounds, btm.rounds or ("",), strict=True):
        if not round_:
            raise UserError(f"--rounds: {name!r} contains no domain")
    for domain in domains:
        if domains.count(domain) > 1:
            raise UserError(f"{flag}: {domain!r} is named twice")
        if domain in RESERVED:
            raise UserError(f"{flag}: {domain!r} is reserved by the driver; rename the domain")
    if btm.rounds and data.domains and set(data.domains) != set(domains):
        raise UserError(
            f"--rounds and --domains name different domains: {', '.join(domains)}; "
            f"{', '.join(data.domains)}"
        )
    return rounds


def _check_known_domains(
    domains: Sequence[str], available: Sequence[str], flag: str, data_folder: str
) -> None:
    """Raise UserError, naming the flag, for a domain that the data-bin does not have.

    Args:
        domains: names to check.
        available: domains of the data-bin.
        flag: flag that named `domains`, for the message.
        data_folder: path of the data-bin, for the message.
    """
    for domain in domains:
        if domain not in available:
            raise UserError(
                f"{flag}: {domain!r} is not in {data_folder}, which holds {', '.join(available)}"
            )
