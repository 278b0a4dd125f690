"""Router rows from text of each domain: the mean of the states that a sparse block reads.

With m the mean over a domain's tokens of the input of a layer's feed-forward, and c the mean of all
domains, an expert's row is s (m - c); s makes the standard deviation of the logits over tokens and
experts the given sharpness. Without centring it is sharpness * m / length(m), and depends on no
other expert. Means come from three quarters of the sequences, s and shares of tokens from the rest.

Source: the hidden-state gates of mergekit's MoE script, which takes states before attention instead
and does not centre.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from megamod.data.corpus.header import HEADER
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.files import hash_file
from megamod.merging.alignment.calibration import read_token_ids
from megamod.merging.merge import merge
from megamod.merging.moe.plan import MoePlan
from megamod.merging.moe.rows import RouterRows, check_router_rows
from megamod.merging.recipe import MergeRecipe
from megamod.models.auto import check_vocabulary_fits
from megamod.models.lm.configuration import LmConfig, get_max_sequence_length, read_lm_config
from megamod.models.lm.load import load_lm
from megamod.models.lm.moe_families import LAYERS
from megamod.progress import show_progress
from megamod.tables import format_table

logger = logging.getLogger(__name__)

LONGEST = 1024  # tokens per sequence by default, fewer if the model or the text has fewer
HELD_OUT = 4  # the last of every four sequences is held out
CONDITION = 5.0  # largest condition number of a layer's rows without a warning, as in mergekit


@dataclass(frozen=True)
class RouterCalibration:
    """Text to compute router rows on.

    Attributes:
        texts: folder of a data-bin, whose valid splits are read, or DOMAIN=FILE for each domain.
        tokens: largest number that is read of each domain.
        sharpness: standard deviation of logits; without `centre` the length of rows.
        centre: subtract the mean of all domains.
        max_seq_length: tokens per sequence; None: `LONGEST`, or the model's limit.
        batch_size: sequences per forward pass.
    """

    texts: Sequence[str]
    tokens: int
    sharpness: float
    centre: bool
    max_seq_length: int | None
    batch_size: int


@dataclass(frozen=True)
class DomainText:
    """Tokens of one domain.

    Attributes:
        ids: [N] int64.
        origin: path of the data-bin or file.
        digest: digest of the data-bin's header, or of the file.
    """

    ids: Tensor
    origin: str
    digest: str


def compute_calibrated_rows(
    plan: MoePlan, recipe: MergeRecipe, calibration: RouterCalibration
) -> RouterRows:
    """Compute router rows [L, E, D] on the average of the experts that the recipe describes.

    Without centring, and for models whose shared weights are equal (`plan.shared` "asserted"), the
    first model takes the place of the average. The average is written to a temporary folder, and
    loaded in float32.

    Args:
        plan: plan of the mixture that gets the rows.
        recipe: average of the experts; each of its inputs has a domain.
        calibration: text and settings.
    Raises:
        UserError: if a domain has no text, the text does not fit the model, or a row is zero.
    """
    domains = [model.domain for model in recipe.inputs]
    if not calibration.centre or plan.shared == "asserted":
        recipe = replace(recipe, inputs=recipe.inputs[:1], align=None)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        merge(recipe, folder, quiet=True)
        texts = read_domain_texts(calibration, domains, folder)
        model = load_lm(folder, dtype=torch.float32)
        of_experts = [texts[domain] for domain in domains]
        return compute_router_rows(
            model, plan.family.feed_forward, of_experts, domains, calibration
        )


def compute_router_rows(
    model: nn.Module,
    block: str,
    texts: Sequence[DomainText],
    domains: Sequence[str],
    calibration: RouterCalibration,
) -> RouterRows:
    """Compute router rows on a dense or sparse model, as the docstring of the module defines them.

    The model is moved to a GPU if there is one, and set to evaluation mode; it stays so. Layers
    whose rows do not separate the domains are logged.

    Args:
        block: path of the feed-forward or sparse block in a layer.
        texts: text of each expert's domain, in the order of the experts.
        domains: domains of the experts, for messages and the record.
        calibration: settings; its `texts` are read already.
    Returns:
        rows [L, E, D] float32 on the CPU, and their record: settings, digests of the texts, per
        layer the share of each domain's tokens on which its own expert is first, and the condition
        number.
    Raises:
        UserError: if a text is too short, or a row is zero, as with a single expert and centring.
    """
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    length = _select_sequence_length(model.config, texts, calibration)
    sequences = [text.ids[: len(text.ids) // length * length].view(-1, length) for text in texts]
    held_out = [torch.arange(len(part)) % HELD_OUT == HELD_OUT - 1 for part in sequences]
    means = torch.stack(
        [
            compute_mean_inputs(model, block, part[~mask], calibration.batch_size)
            for part, mask in zip(sequences, held_out, strict=True)
        ],
        dim=1,
    )  # [L, E, D]
    if calibration.centre:
        rows = means - means.mean(1, keepdim=True)
        _refuse_zero_rows(rows, domains)
    else:
        rows = calibration.sharpness * means / means.norm(dim=-1, keepdim=True)
    check = [part[mask] for part, mask in zip(sequences, held_out, strict=True)]
    spread, own_first = _measure_router_logits(model, block, rows, check, calibration.batch_size)
    if calibration.centre:
        rows = rows * (calibration.sharpness / spread)[:, None, None]
    rows = rows.float()
    check_router_rows(rows, "--calibration")
    condition = [compute_condition_number(layer, calibration.centre) for layer in rows.double()]
    _warn_of_weak_rows(own_first, condition, domains)
    record = {
        "kind": "calibrated",
        "sharpness": calibration.sharpness,
        "centre": calibration.centre,
        "max_seq_length": length,
        "texts": {
            domain: {"path": text.origin, "digest": text.digest, "tokens": part.numel()}
            for domain, text, part in zip(domains, texts, sequences, strict=True)
        },
        "own_first": own_first.tolist(),
        "condition": condition,
    }
    return RouterRows(rows, record)


def read_domain_texts(
    calibration: RouterCalibration, domains: Sequence[str], folder: Path
) -> dict[str, DomainText]:
    """Read the tokens of each domain: from the valid splits of a data-bin, or from a file for each.

    Files are tokenized by the model's tokenizer, with the id that ends a text after each item.

    Args:
        folder: folder of the model, with its tokenizer.
    Returns:
        text by domain, at most `calibration.tokens` tokens of each.
    Raises:
        UserError: if a domain has no text or two, a file cannot be read, or the ids are not those
            of the model.
    """
    texts, config = calibration.texts, read_lm_config(folder)
    if len(texts) == 1 and "=" not in texts[0]:
        where = f"--calibration {texts[0]}"
        return read_databin_texts(DataBin(texts[0]), domains, calibration.tokens, config, where)
    files: dict[str, str] = {}
    for text in texts:
        domain, sign, file = text.partition("=")
        if not sign or domain in files:
            raise UserError(
                f"--calibration {text}: give one data-bin, or DOMAIN=FILE once for each domain"
            )
        files[domain] = file
    _require_domains(domains, files, "--calibration")
    tokenizer = load_tokenizer(folder)
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) else tokenizer.eos_id if end is None else end
    read = {}
    for domain in domains:
        items = read_token_ids(
            Path(files[domain]),
            lambda text: tokenizer.encode_batch([text])[0].tolist(),
            calibration.tokens,
            "--calibration",
        )
        ids = [token for item in items for token in (*item, end)][: calibration.tokens]
        read[domain] = DomainText(torch.tensor(ids), files[domain], hash_file(Path(files[domain])))
    return read


def read_databin_texts(
    data: DataBin, domains: Sequence[str], tokens: int, config: LmConfig, where: str
) -> dict[str, DomainText]:
    """Read the first tokens of each domain's valid split.

    Args:
        tokens: number that is read of each domain, fewer if the split has fewer.
        config: configuration of the model that reads them.
        where: flag and path of the data-bin, for messages.
    Returns:
        text by domain.
    Raises:
        UserError: if it lacks a domain, or the ids are not those of the model.
    """
    _require_domains(domains, data.domains, where)
    check_vocabulary_fits(where, config, data.vocab_size, data.special_ids)
    texts = {}
    for domain in domains:
        ids = data.open_split(domain, "valid").tokens[:tokens]
        ids = torch.tensor(ids.tolist(), dtype=torch.int64)
        texts[domain] = DomainText(ids, str(data.path), hash_file(data.path / HEADER))
    return texts


def _require_domains(domains: Sequence[str], known: Sequence[str] | Mapping, where: str) -> None:
    """Raise UserError for the first domain that is not among the known ones.

    Args:
        known: domains that there is text of.
        where: beginning of the message.
    """
    for domain in domains:
        if domain not in known:
            raise UserError(
                f"{where}: has no text of the domain {domain!r}; there are {', '.join(known)}"
            )


def _select_sequence_length(
    config: LmConfig, texts: Sequence[DomainText], calibration: RouterCalibration
) -> int:
    """Select the tokens per sequence, so that each text has `HELD_OUT` sequences or more.

    It is that of `calibration`, by default `LONGEST`, within the limit of the model.

    Raises:
        UserError: if a text is too short, or --max_seq_length is above the limit.
    """
    limit = get_max_sequence_length(config)
    length = calibration.max_seq_length or min(limit or LONGEST, LONGEST)
    if limit is not None and length > limit:
        raise UserError(f"--max_seq_length {length}: the model has {limit} positions")
    shortest = min(texts, key=lambda text: len(text.ids))
    if len(shortest.ids) < 2 * HELD_OUT:
        raise UserError(
            f"--calibration {shortest.origin}: {len(shortest.ids)} tokens are too few; "
            f"{2 * HELD_OUT} are needed"
        )
    return min(length, len(shortest.ids) // HELD_OUT)


@contextmanager
def hook_block_inputs(
    model: nn.Module, block: str, receive: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `receive` with the layer's number and the block's input in every forward pass.

    This holds for the time of the `with` block.

    Args:
        block: path of the feed-forward or sparse block in a layer.
        receive: takes the number from 0 and states [B, T, D], detached, on the model's device.
    """

    def make_hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Make the forward pre-hook of the block in a layer."""
        return lambda module, inputs: receive(layer, inputs[0].detach())

    handles = [
        layer.get_submodule(block).register_forward_pre_hook(make_hook(number))
        for number, layer in enumerate(model.get_submodule(LAYERS))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_model_on_sequences(model: nn.Module, sequences: Tensor, batch_size: int) -> None:
    """Run a model without its output layer on sequences [N, T], in batches, for the hooks on it.

    Args:
        batch_size: sequences per forward pass.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        starts = range(0, len(sequences), batch_size)
        for start in show_progress(starts, "reading text of a domain"):
            # The final states are enough; logits of a whole batch would need much memory.
            model.base_model(sequences[start : start + batch_size].to(device), use_cache=False)


def compute_mean_inputs(model: nn.Module, block: str, sequences: Tensor, batch_size: int) -> Tensor:
    """Compute the mean input of each layer's block over all tokens of `sequences` [N, T] int64.

    The model runs where it is and in its mode, without gradients.

    Args:
        block: path of the feed-forward or sparse block in a layer.
        batch_size: sequences per forward pass.
    Returns:
        [L, D] float64 on the CPU.
    """
    sums: dict[int, Tensor] = {}

    def add_states(layer: int, states: Tensor) -> None:
        """Add the sum of the states [B, T, D] over tokens to that of the layer, in float64."""
        total = states.double().sum((0, 1))
        sums[layer] = sums[layer] + total if layer in sums else total

    with hook_block_inputs(model, block, add_states):
        _run_model_on_sequences(model, sequences, batch_size)
    return torch.stack([sums[layer] for layer in sorted(sums)]).cpu() / sequences.numel()


def _measure_router_logits(
    model: nn.Module, block: str, rows: Tensor, texts: Sequence[Tensor], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Measure the router's logits on held-out text.

    Args:
        block: path of the feed-forward or sparse block in a layer.
        rows: [L, E, D] float64.
        texts: sequences [N, T] of each expert's domain.
    Returns:
        the standard deviation of each layer's logits [L], and the share of the tokens of each
        domain on which its own expert has the largest logit [L, E].
    """
    layers, experts, _ = rows.shape
    moments = torch.zeros(layers, 3, dtype=torch.float64)  # count, sum, sum of squares
    first = torch.zeros(layers, experts, dtype=torch.float64)
    rows = rows.to(next(model.parameters()).device)
    expert = 0

    def add_logits(layer: int, states: Tensor) -> None:
        """Add one batch of a layer's block inputs, `states` [B, T, D], to `moments` and `first`."""
        logits = states.flatten(0, -2).double() @ rows[layer].T
        numbers = (logits.new_tensor(logits.numel()), logits.sum(), logits.square().sum())
        moments[layer] += torch.stack(numbers).cpu()
        first[layer, expert] += float((logits.argmax(-1) == expert).sum())

    with hook_block_inputs(model, block, add_logits):
        for expert, sequences in enumerate(texts):  # noqa: B007  (read in `add_logits`)
            _run_model_on_sequences(model, sequences, batch_size)
    count, total, squares = moments.unbind(1)
    spread = (squares / count - (total / count) ** 2).clamp_min(0).sqrt()
    return spread, first / torch.tensor([sequences.numel() for sequences in texts])


def compute_condition_number(rows: Tensor, centred: bool) -> float:
    """Compute the condition number of a layer's rows [E, D]: largest over smallest singular value.

    Centred rows sum to zero, so the smallest value, zero, does not count; then E must be above 1.
    """
    values = torch.linalg.svdvals(rows)
    return float(values[0] / values[len(rows) - 1 - centred])


def _refuse_zero_rows(rows: Tensor, domains: Sequence[str]) -> None:
    """Refuse centred rows [L, E, D] that are zero or not finite, such as those of a single expert.

    Raises:
        UserError: naming --calibration.
    """
    if len(domains) == 1:
        raise UserError(
            "--calibration: the row of a single expert is zero after centring; give --no_centre or "
            "--router random"
        )
    check_router_rows(rows, "--calibration")


def _warn_of_weak_rows(
    own_first: Tensor, condition: Sequence[float], domains: Sequence[str]
) -> None:
    """Log a warning for each layer and each expert whose router rows separate the domains badly.

    That is a condition number above `CONDITION`, and an expert that has the largest logit on fewer
    tokens of its own domain than by chance.

    Args:
        own_first: [L, E], see `_measure_router_logits`.
        condition: condition number of each layer's rows.
        domains: domains of the E experts.
    """
    for layer, value in enumerate(condition):
        if value > CONDITION:
            logger.warning(
                "layer %d: the router's rows have condition number %.3g, above %g: some experts' "
                "rows point in almost the same direction",
                layer,
                value,
                CONDITION,
            )
    for layer, expert in (own_first < 1 / len(domains)).nonzero().tolist():
        logger.warning(
            "layer %d: %s comes first on %.0f %% of the tokens of its own domain, fewer than by "
            "chance",
            layer,
            domains[expert],
            100 * own_first[layer, expert],
        )


def format_own_expert_shares(record: Mapping[str, object], domains: Sequence[str]) -> str:
    """Format a table with a line per layer: how well the router's rows separate the domains.

    Columns are the share in percent of each domain's tokens on which its own expert has the largest
    logit, and the condition number of the rows.

    Args:
        record: record of the rows, see `compute_router_rows`.
        domains: domains of the experts, in order.
    """
    rows = [("layer", *domains, "condition")]
    for layer, (shares, condition) in enumerate(
        zip(record["own_first"], record["condition"], strict=True)
    ):
        shown = (f"{100 * share:.1f} %" for share in shares)
        rows.append((str(layer), *shown, f"{condition:.3g}"))
    return format_table(rows, right_aligned_columns=range(len(rows[0])))
