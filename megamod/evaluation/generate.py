"""Text from a saved language model, one of its experts, or a mixture of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megamod.errors import UserError
from megamod.mixture.prior import read_prior
from megamod.models.lm.configuration import (
    ForestConfig,
    get_max_sequence_length,
    get_untie,
    read_lm_config,
)
from megamod.models.lm.forest import ForestForCausalLM
from megamod.models.lm.load import LanguageModel, load_lm
from megamod.states.adapter import is_adapter, is_model
from megamod.states.config_file import read_config_file
from megamod.states.forest import FILE, find_expert_index, open_forest
from megamod.states.hub import find_in_hub
from megamod.states.tokenizer_files import find_tokenizer_folder, list_tokenizer_files


@dataclass(frozen=True)
class Sampling:
    """Rules of a continuation.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: divisor of the logits; 0 selects the most probable token each time.
        top_p: total probability of the tokens to sample from.
        sequences: continuations per prompt.
        seed: of the random numbers.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    sequences: int = 1
    seed: int = 1


@dataclass(frozen=True)
class Continuation:
    """A prompt with its continuation.

    Attributes:
        text: of both, without special tokens.
        weights: posterior of the experts after the last token, by domain, of those with prior above
            0; None if there is only one.
    """

    text: str
    weights: Mapping[str, float] | None


class TextWriter:
    """A model and its tokenizer; `write` continues a prompt."""

    def __init__(
        self, model: LanguageModel | ForestForCausalLM, tokenizer: PreTrainedTokenizerBase
    ):
        self.model = model
        self.tokenizer = tokenizer

    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode a prompt as ids [1, L]; an empty one is the token between two documents.

        Raises:
            UserError: if the model has no position for a further token.
        """
        ids = list(self.tokenizer(prompt).input_ids)
        while ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
            ids.pop()
        if not ids:
            starts = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
            ids = [next(token for token in starts if token is not None)]
        limit = self._get_limit()
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"--prompt of {len(ids)} tokens: the model has {limit} positions, which leaves "
                "none for a continuation"
            )
        return torch.tensor([ids], device=self.model.device)

    @torch.no_grad()
    def write(self, prompt: str, sampling: Sampling) -> list[Continuation]:
        """Continue a prompt; the same arguments give the same texts.

        Raises:
            UserError: if the prompt is too long.
        """
        prompt_ids, limit = self.encode_prompt(prompt), self._get_limit()
        length = prompt_ids.shape[1] + sampling.max_new_tokens
        settings: dict[str, object] = {"do_sample": False}
        if sampling.temperature:
            settings = dict(
                do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0
            )
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            rows = self.model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_length=min(length, limit or length),
                num_return_sequences=sampling.sequences,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **settings,
            )
        return [self._read_continuation(row, prompt_ids.shape[1]) for row in rows]

    def _read_continuation(self, ids: Tensor, prompt_length: int) -> Continuation:
        """Decode a row of `generate`.

        Args:
            ids: [L] of prompt and continuation, perhaps with eos and padding after them.
            prompt_length: ids of the prompt.
        """
        ends = (ids[prompt_length:] == self.tokenizer.eos_token_id).nonzero()
        if len(ends):
            ids = ids[: prompt_length + int(ends[0])]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Continuation(text, self._compute_weights(ids))

    def _compute_weights(self, ids: Tensor) -> dict[str, float] | None:
        """Compute `Continuation.weights` after the last of the ids [L]."""
        if not isinstance(self.model, ForestForCausalLM):
            return None
        prior = self.model.config.prior or [1.0] * len(self.model.domains)
        used = [d for d, weight in zip(self.model.domains, prior, strict=True) if weight > 0]
        if len(used) < 2:
            return None
        shares = self.model(ids[None], logits_to_keep=1).log_weights[:, 0, -1].exp()
        return dict(zip(used, shares.tolist(), strict=True))

    def _get_limit(self) -> int | None:
        """Return the number of positions of the model, the least of its experts; None: no limit."""
        parts = getattr(self.model, "parts", [self.model])
        limits = [get_max_sequence_length(part.config) for part in parts]
        return min((limit for limit in limits if limit is not None), default=None)


def load_writer(
    model: str,
    domain: str | None = None,
    prior: Path | None = None,
    device: torch.device | str = "cpu",
) -> TextWriter:
    """Load a model, an expert or a forest with its tokenizer.

    Args:
        model: folder or hub name; of a run's folder, its model is meant.
        domain: expert to use alone; None for all of them, mixed.
        prior: file of `write_prior` with the weights of the experts at the first token; None: those
            that the model names, or equal ones. Not used with `domain`.
        device: that the model runs on.
    Raises:
        UserError: if there is no such model or expert, it has no tokenizer, `prior` does not fit
            the experts, or `domain` or `prior` is set for a model without experts.
    """
    folder = _find_folder(model)
    kind = _get_kind(folder)
    if kind == "dense":
        if domain is not None or prior is not None:
            flag = f"--domain {domain}" if domain is not None else f"--prior {prior}"
            raise UserError(f"{flag}: --model {model} is one model, without experts to select")
        single = load_lm(folder, flag="--model").eval().to(device)
        return TextWriter(single, _load_tokenizer([folder]))
    if kind == "saved forest":
        mixture, folders = ForestForCausalLM.from_pretrained(folder), [folder]
    else:
        forest = open_forest(folder)
        folders = [folder, *(expert.path for expert in forest.experts)]
        if domain is not None:  # the others are not read
            index = find_expert_index(list(forest.experts), domain, folder)
            forest = replace(forest, experts=(forest.experts[index],))
        mixture = ForestForCausalLM.from_experts(forest)
    if domain is not None:
        mixture.set_prior({domain: 1.0})
    elif prior is not None:
        mixture.set_prior(read_prior(prior, mixture.domains).weights)
    return TextWriter(mixture.eval().to(device), _load_tokenizer(folders))


def _find_folder(model: str) -> Path:
    """Find the folder of a model, in the hub if there is none; of a run, its model's.

    Raise UserError if the hub has none either.
    """
    path = Path(model)
    if not path.exists():
        downloaded, reason = find_in_hub(model)
        if downloaded is None:
            reason = reason and f"; {reason}"
            raise UserError(f"--model {model}: is no folder and no repository of the hub{reason}")
        return downloaded
    is_run = (path / "model").is_dir() and not is_model(path) and not (path / FILE).is_file()
    return path / "model" if is_run else path


def _get_kind(folder: Path) -> str:
    """Return "dense" for one model, "saved forest" for a forest in one folder, else "experts"."""
    if folder.is_file() or (folder / FILE).is_file() or not is_model(folder):
        return "experts"
    if is_adapter(folder):
        return "dense"
    if read_config_file(folder).get("model_type") == ForestConfig.model_type:
        return "saved forest"
    return "dense" if get_untie(read_lm_config(folder, "--model")) == "none" else "experts"


def _load_tokenizer(folders: Sequence[Path]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first folder that has one; raise UserError if none has."""
    for folder in folders:
        source = find_tokenizer_folder(folder)
        if list_tokenizer_files(source):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    raise UserError(f"--model {folders[0]}: there is no tokenizer in it; copy one into the folder")
