"""Text from a saved language model, one of its experts, or a mixture of several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

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
from megamod.states.adapter import is_adapter
from megamod.states.config_file import read_config_file
from megamod.states.forest import FILE, find_expert_index, open_forest
from megamod.states.hub import find_or_download_folder
from megamod.states.model_folder import is_model_folder
from megamod.states.tokenizer_files import find_tokenizer_folder, list_tokenizer_files


@dataclass(frozen=True)
class Sampling:
    """Rules of a continuation.

    Attributes:
        max_new_tokens: longest continuation.
        temperature: divisor of the logits; 0 selects the most probable token each time.
        top_p: total probability of the tokens to sample from.
        sequences: continuations per prompt.
        seed: seed of the random numbers.
        stop: texts that end a continuation, which is cut before the first of them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    sequences: int = 1
    seed: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """A prompt with its continuation.

    Attributes:
        text: prompt and continuation, without special tokens.
        new_text: text of the continuation alone.
        weights: posterior of the experts after the last token, by domain, of those with prior above
            0; None if there is only one.
        prompt_tokens, new_tokens: tokens of the prompt, and those that the model wrote.
        finished: True if the model ended the text, or a stop text did; False if it is cut off.
    """

    text: str
    new_text: str
    weights: Mapping[str, float] | None
    prompt_tokens: int
    new_tokens: int
    finished: bool


class TextGenerator:
    """A model and its tokenizer; `generate` continues a prompt.

    Args:
        model: a language model, whose expert is selected, or a forest; on its device.
        tokenizer: tokenizer of the model; its eos ends a text, as does that of the generation
            config.
    """

    def __init__(
        self, model: LanguageModel | ForestForCausalLM, tokenizer: PreTrainedTokenizerBase
    ):
        """Collect the ids that end a text; see the class for the arguments."""
        self.model = model
        self.tokenizer = tokenizer
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._end_ids = torch.tensor(sorted(ends), dtype=torch.long, device=model.device)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the experts that are mixed, in the order of the weights; none for one."""
        used = self.model.used_domains if isinstance(self.model, ForestForCausalLM) else ()
        return used if len(used) > 1 else ()

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
        limit = self._get_position_limit()
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"prompt of {len(ids)} tokens: the model has {limit} positions, which leaves "
                "none for a continuation"
            )
        return torch.tensor([ids], device=self.model.device)

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_text: Callable[[str], bool] | None = None,
    ) -> list[Continuation]:
        """Continue a prompt; the same arguments give the same texts.

        Args:
            prompt: text to continue; "" begins a document.
            sampling: rules of the continuation and number of continuations.
            on_text: called after every token of the first continuation with its text so far,
                without an end that later tokens can still change. It returns False to stop.
        Raises:
            UserError: if the prompt is too long.
        """
        prompt_ids, limit = self.encode_prompt(prompt), self._get_position_limit()
        length = prompt_ids.shape[1] + sampling.max_new_tokens
        settings: dict[str, object] = {"do_sample": False}
        if sampling.temperature:
            settings = dict(
                do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0
            )
        if sampling.stop or on_text is not None:
            watch = _StopTextCriteria(self, prompt_ids.shape[1], sampling.stop, on_text)
            settings["stopping_criteria"] = StoppingCriteriaList([watch])
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
        return [self._make_continuation(row, prompt_ids.shape[1], sampling.stop) for row in rows]

    def decode_continuation(self, ids: Tensor, prompt_length: int) -> str:
        """Decode the continuation in ids [L] of prompt and continuation, with its first blank.

        Decoded alone, the continuation would lose that blank in some tokenizers.

        Args:
            ids: [L] ids of prompt and continuation.
            prompt_length: number of ids of the prompt.
        """
        text, prompt = self._decode_ids(ids), self._decode_ids(ids[:prompt_length])
        return (
            text[len(prompt) :]
            if text.startswith(prompt)
            else self._decode_ids(ids[prompt_length:])
        )

    def _decode_ids(self, ids: Tensor) -> str:
        """Decode ids [L] without special tokens, and with every blank.

        A tokenizer may else remove blanks before punctuation, to clean up the text for display.
        """
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _make_continuation(
        self, ids: Tensor, prompt_length: int, stop: Sequence[str]
    ) -> Continuation:
        """Make the `Continuation` of a row of ids, its text cut before a stop text.

        Args:
            ids: [L] of prompt and continuation, perhaps with eos and padding after them.
            prompt_length: ids of the prompt.
            stop: see `Sampling`.
        """
        ends = torch.isin(ids[prompt_length:], self._end_ids).nonzero()
        if len(ends):
            ids = ids[: prompt_length + int(ends[0])]
        whole = self.decode_continuation(ids, prompt_length)
        new_text = whole[: _find_stop_text(whole, stop)]
        return Continuation(
            self._decode_ids(ids[:prompt_length]) + new_text,
            new_text,
            self._compute_expert_weights(ids),
            prompt_length,
            len(ids) - prompt_length,
            len(ends) > 0 or len(new_text) < len(whole),
        )

    def _compute_expert_weights(self, ids: Tensor) -> dict[str, float] | None:
        """Compute `Continuation.weights` after the last of the ids [L]."""
        if not self.domains:
            return None
        shares = self.model(ids[None], logits_to_keep=1).log_weights[:, 0, -1].exp()
        return dict(zip(self.domains, shares.tolist(), strict=True))

    def _get_position_limit(self) -> int | None:
        """Return the number of positions of the model, the least of its experts; None: no limit."""
        parts = getattr(self.model, "parts", [self.model])
        limits = [get_max_sequence_length(part.config) for part in parts]
        return min((limit for limit in limits if limit is not None), default=None)


class _StopTextCriteria(StoppingCriteria):
    """Stops a row whose continuation has a stop text, and shows the text of the first row.

    Args:
        text_generator: decodes the rows.
        prompt_length: tokens of the prompt.
        stop: see `Sampling`.
        on_text: see `TextGenerator.generate`.
    """

    def __init__(
        self,
        text_generator: TextGenerator,
        prompt_length: int,
        stop: Sequence[str],
        on_text: Callable[[str], bool] | None,
    ):
        """Store the arguments, see the class."""
        self.text_generator, self.prompt_length = text_generator, prompt_length
        self.stop, self.on_text = stop, on_text

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Return a mask [B] bool of rows that are to stop; transformers calls it after each token.

        Args:
            input_ids: [B, L] ids of prompts and continuations so far.
            scores: logits of the last token, not used.
        """
        texts = [
            self.text_generator.decode_continuation(row, self.prompt_length) for row in input_ids
        ]
        done = [_find_stop_text(text, self.stop) is not None for text in texts]
        if self.on_text is not None:
            done[0] |= not self.on_text(_cut_unsettled_end(texts[0], self.stop))
        return torch.tensor(done, device=input_ids.device)


def _find_stop_text(text: str, stop: Sequence[str]) -> int | None:
    """Find the index at which the first of the stop texts begins in `text`; None: it has none."""
    return min((text.index(end) for end in stop if end in text), default=None)


def _cut_unsettled_end(text: str, stop: Sequence[str]) -> str:
    """Return a continuation without the end that later tokens can still change.

    It is cut before a stop text, and before an end that may be the beginning of one or a character
    of which bytes are missing.
    """
    text = text[: _find_stop_text(text, stop)].rstrip("\N{REPLACEMENT CHARACTER}")
    beginnings = [end[:size] for end in stop for size in range(1, len(end))]
    held = max((len(start) for start in beginnings if text.endswith(start)), default=0)
    return text[: len(text) - held]


def load_text_generator(
    model: str,
    domain: str | None = None,
    prior: Path | None = None,
    device: torch.device | str = "cpu",
) -> TextGenerator:
    """Load a model, an expert or a forest with its tokenizer.

    Args:
        model: folder or hub name; of a run's folder, its model is meant.
        domain: expert to use alone; None for all of them, mixed.
        prior: file of `write_prior` with the weights of the experts at the first token; None: the
            prior in the model's configuration, or else equal weights. Not used with `domain`.
        device: device that the model runs on.
    Raises:
        UserError: if there is no such model or expert, it has no tokenizer, `prior` does not fit
            the experts, or `domain` or `prior` is set for a model without experts.
    """
    folder = find_model_folder(model)
    kind = _detect_folder_kind(folder)
    if kind == "dense":
        if domain is not None or prior is not None:
            flag = f"--domain {domain}" if domain is not None else f"--prior {prior}"
            raise UserError(f"{flag}: --model {model} is one model, without experts to select")
        single = load_lm(folder, flag="--model").eval().to(device)
        return TextGenerator(single, _load_tokenizer([folder]))
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
    return TextGenerator(mixture.eval().to(device), _load_tokenizer(folders))


def find_model_folder(model: str) -> Path:
    """Find the folder of a model: a folder, the model in the folder of a run, or a hub repository.

    A repository of the hub is downloaded if it is not in the cache.

    Args:
        model: value of --model.
    Raises:
        UserError: if there is no such folder or repository.
    """
    path = find_or_download_folder(model, "--model")
    is_run = (path / "model").is_dir() and not is_model_folder(path) and not (path / FILE).is_file()
    return path / "model" if is_run else path


def _detect_folder_kind(folder: Path) -> str:
    """Detect the kind of a folder, which decides how it is loaded.

    Returns:
        "dense" for one model, "saved forest" for a forest in one model folder (`ForestConfig`),
            else "experts": a forest.json, independent models, or a model with experts.
    """
    if folder.is_file() or (folder / FILE).is_file() or not is_model_folder(folder):
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
