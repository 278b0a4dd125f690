"""The flags of launchers/eval_ensemble.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamod.errors import UserError
from megamod.flags import Arguments, option

FILES = ("prior_output", "output", "jsonl", "plot")


@dataclass
class EnsembleArgs(Arguments):
    """Experts, text, mixing and results."""

    forest: str | None = option(None, "forest.json, or a folder of experts")
    data: str | None = option(None, "data-bin folder written by launchers/preprocess.py")
    domain: list[str] | None = option(  # noqa: RUF009
        None, "domains of the data-bin to score", alias="domains"
    )
    experts: list[str] | None = option(None, "experts to mix; none: all")  # noqa: RUF009
    mode: Literal["cached_prior", "updating_prior", "uniform_prior", "simple_average"] = option(
        "cached_prior", "where weights come from; the others are in the table too"
    )
    rule: Literal["last_token", "history"] = option(
        "last_token", "what the posterior follows: the token before, or all tokens so far"
    )
    temperature: float = option(1.0, "what log-likelihoods are divided by (history)", least=1e-6)
    forgetting: float = option(
        1.0, "what older log-likelihoods are multiplied by per token (history)", least=0, most=1
    )
    topk: int | None = option(None, "mix so many experts, those with the largest prior", least=1)
    first_over_all: bool = option(
        False, "at the first token count experts outside of the top k too, as the DEMix release"
    )
    prior: str | None = option(None, "JSON file of a prior to use; none: estimate it")
    prior_output: str | None = option(
        None, "JSON file for the estimate; none: prior_{domain}.json beside --output, or here"
    )
    prior_sequences: int = option(100, "sequences to estimate the prior on", least=1)
    prior_split: Literal["valid", "train", "test"] = option("valid", "split to estimate it on")
    split: Literal["test", "valid", "train"] = option("test", "split to score, whole")
    estimate_only: bool = option(False, "write the prior and stop")
    removal_test: bool = option(True, "score without each of the experts as well")
    in_memory: bool = option(False, "hold all experts at once, in one process too")
    cache_dir: str | None = option(None, "folder of log-probabilities that later runs find again")
    max_seq_length: int | None = option(
        None, "tokens per sequence; none: the longest all experts have positions for", least=2
    )
    context_window: int = option(0, "tokens before each sequence to read, not score", least=0)
    domain_token: Literal["auto", "true", "false"] = option(
        "auto", "token of the domain in front of each sequence; auto: if the experts have them"
    )
    force_domain_token: str | None = option(None, "domain whose token to put in front")
    per_device_eval_batch_size: int = option(8, "sequences an expert reads at once", least=1)
    mixing_batch_size: int = option(
        2, "sequences whose posterior the moving average takes in at once", least=1
    )
    output: str | None = option(None, "JSON file to write")
    jsonl: str | None = option(None, "JSON-lines file to write, a line per batch")
    plot: str | None = option(None, "PNG file to write: the posterior along the first sequence")

    def __post_init__(self):
        """Check also what goes together.

        Raises:
            UserError: naming the flags.
        """
        super().__post_init__()
        if self.domain is None:
            return
        if doubled := [d for d in self.domain if self.domain.count(d) > 1]:
            raise UserError(f"--domain: {doubled[0]!r} is named twice")
        read, mixed = self.per_device_eval_batch_size, self.mixing_batch_size
        if read % mixed:
            raise UserError(
                f"--per_device_eval_batch_size {read}: must be a multiple of "
                f"--mixing_batch_size {mixed}"
            )
        if self.in_memory and self.cache_dir is not None:
            raise UserError(
                f"--cache_dir {self.cache_dir}: --in_memory keeps nothing, give one of the two"
            )
        if self.estimate_only and self.prior is not None:
            raise UserError(f"--estimate_only and --prior {self.prior}: give one of the two")
        if self.estimate_only and self.plot is not None:
            raise UserError(f"--plot {self.plot}: nothing is scored with --estimate_only")
        needed = self.estimate_only or self.mode == "cached_prior" or self.topk is not None
        if self.prior_output is not None and (self.prior is not None or not needed):
            raise UserError(f"--prior_output {self.prior_output}: no prior is estimated")
        if self.rule != "history" and (self.temperature, self.forgetting) != (1.0, 1.0):
            raise UserError("--temperature and --forgetting go with --rule history")
        if self.rule == "history" and self.first_over_all:
            raise UserError("--first_over_all goes with --rule last_token")
        for flag in FILES:
            path = getattr(self, flag)
            if path is None:
                continue
            if not Path(path).absolute().parent.is_dir():
                raise UserError(f"--{flag} {path}: there is no folder {Path(path).parent}")
            per_domain = flag in ("plot", "prior_output")
            if per_domain and len(self.domain) > 1 and "{domain}" not in Path(path).name:
                raise UserError(f"--{flag} {path}: several domains need {{domain}} in its name")
