"""Flags of megamod eval-ensemble."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamod.args import MASK_DOCUMENTS, VERIFY_DATA
from megamod.errors import UserError
from megamod.flags import Arguments, option

FILES = ("prior_output", "output", "jsonl", "plot")
"""Flags that name a file to write, whose folder must exist."""


@dataclass
class EnsembleArgs(Arguments):
    """Experts, text, mixture and output."""

    forest: str | None = option(None, "forest.json, or a folder of experts")
    data: str | None = option(None, "data-bin folder written by megamod preprocess")
    verify_data: Literal["size", "sample", "full"] = option("sample", VERIFY_DATA)
    domain: list[str] | None = option(  # noqa: RUF009
        None, "domains of the data-bin to score", alias="domains"
    )
    experts: list[str] | None = option(None, "experts to mix; none: all")  # noqa: RUF009
    mode: Literal["cached_prior", "updating_prior", "uniform_prior", "simple_average"] = option(
        "cached_prior", "weights of the experts; the table has the other modes too"
    )
    rule: Literal["last_token", "history"] = option(
        "last_token", "tokens the posterior depends on: the previous one, or all previous ones"
    )
    temperature: float = option(1.0, "divisor of the log-likelihoods (history)", least=1e-6)
    forgetting: float = option(
        1.0, "factor per token on earlier log-likelihoods (history)", least=0, most=1
    )
    topk: int | None = option(
        None, "number of experts to mix, those with the largest prior", least=1
    )
    first_over_all: bool = option(
        False, "at the first token count experts outside the top k too, as the DEMix release does"
    )
    prior: str | None = option(None, "JSON file of a prior to use; none: estimate it")
    prior_output: str | None = option(
        None,
        "JSON file for the estimate; none: prior_{domain}.json in the folder of --output, or here",
    )
    prior_sequences: int = option(100, "sequences to estimate the prior on", least=1)
    prior_split: Literal["valid", "train", "test"] = option(
        "valid", "split to estimate the prior on"
    )
    split: Literal["test", "valid", "train"] = option("test", "split to score")
    estimate_only: bool = option(False, "write the prior and stop")
    removal_test: bool = option(False, "also score without each expert in turn")
    in_memory: bool = option(False, "hold all experts in memory at once, also in a single process")
    cache_dir: str | None = option(None, "folder that caches log-probabilities for later runs")
    max_seq_length: int | None = option(
        None, "tokens per sequence; none: the longest all experts have positions for", least=2
    )
    context_window: int = option(0, "unscored tokens of context before each sequence", least=0)
    domain_token: Literal["auto", "true", "false"] = option(
        "auto", "domain token before each sequence; auto: if the experts have domain tokens"
    )
    force_domain_token: str | None = option(None, "domain whose token comes before every sequence")
    mask_documents: Literal["auto", "true", "false"] = option("auto", MASK_DOCUMENTS)
    per_device_eval_batch_size: int = option(8, "sequences per forward pass of an expert", least=1)
    mixing_batch_size: int = option(
        2, "sequences per update of the moving average of the posterior", least=1
    )
    output: str | None = option(None, "JSON file to write")
    jsonl: str | None = option(None, "JSON-lines file to write, one line per batch")
    plot: str | None = option(None, "PNG file to write: the posterior along the first sequence")

    def __post_init__(self):
        """Check the flags, and combinations of flags.

        Raises:
            UserError: naming the flags.
        """
        super().__post_init__()
        if self.domain is None:
            return
        if doubled := [d for d in self.domain if self.domain.count(d) > 1]:
            raise UserError(f"--domain: {doubled[0]!r} is named twice")
        eval_batch, mixing_batch = self.per_device_eval_batch_size, self.mixing_batch_size
        if eval_batch % mixing_batch:
            raise UserError(
                f"--per_device_eval_batch_size {eval_batch}: must be a multiple of "
                f"--mixing_batch_size {mixing_batch}"
            )
        if self.in_memory and self.cache_dir is not None:
            raise UserError(
                f"--cache_dir {self.cache_dir}: --in_memory does not use a cache; give only one"
            )
        if self.estimate_only and self.prior is not None:
            raise UserError(f"--estimate_only and --prior {self.prior}: give one of the two")
        if self.estimate_only and self.plot is not None:
            raise UserError(f"--plot {self.plot}: nothing is scored with --estimate_only")
        estimates = self.estimate_only or self.mode == "cached_prior" or self.topk is not None
        if self.prior_output is not None and (self.prior is not None or not estimates):
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
