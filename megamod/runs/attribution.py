"""Attribution of text to experts: the share of each in the feed-forwards of every token.

A token's share of an expert is the router's weight, zero where the expert was not selected,
averaged over the layers. A document's is the mean over its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.evaluation.plots import plot_attribution
from megamod.files import write_atomic, write_json
from megamod.flags import require_values
from megamod.merging.alignment.calibration import read_token_ids
from megamod.merging.moe.configuration import read_moe_config
from megamod.merging.moe.record import MoeRecord, format_experts, read_moe_record
from megamod.models.lm.configuration import get_max_sequence_length
from megamod.models.lm.load import load_lm
from megamod.models.lm.routing import record_routing
from megamod.progress import show_progress
from megamod.runs.attribution_args import AttributionArgs
from megamod.states.output_folder import check_new_folder, create_new_folder
from megamod.tables import format_table

LONGEST = 1024  # tokens of a document, in place of the model's limit or the flag if one is missing


@dataclass(frozen=True)
class AttributedDocument:
    """Tokens of a document and the shares of the experts.

    Attributes:
        tokens: text of each of T tokens.
        shares: [T][E] of each token, in the order of moe.json; they sum to 1 if the router's
            weights do.
    """

    tokens: list[str]
    shares: list[list[float]]

    @property
    def mean_shares(self) -> list[float]:
        """Return the share of each expert in the whole document, [E]."""
        return torch.tensor(self.shares).mean(0).tolist()


def attribute_texts(args: AttributionArgs) -> None:
    """Print the experts with their digests, and their shares in every document.

    The mixture runs in float32, on a GPU if there is one. With --output_dir the shares are also
    written there, in a new folder: see `_write_files`.

    Args:
        args: flags of the command; `model` and `text` must be set.
    Raises:
        UserError: if a flag is missing, the model is no mixture with moe.json or cannot be loaded,
            the output folder is not new, or the text cannot be read.
    """
    require_values(args, "model", "text")
    folder = Path(args.model)
    read_moe_config(folder)
    record = read_moe_record(folder)
    if args.output_dir is not None:
        check_new_folder(Path(args.output_dir))
    tokenizer = load_tokenizer(folder)
    model = load_lm(folder, flag="--model", dtype=torch.float32).eval()
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    limit = min(get_max_sequence_length(model.config) or LONGEST, args.max_seq_length or LONGEST)
    items = read_token_ids(
        Path(args.text), lambda text: tokenizer.encode_batch([text])[0].tolist(), limit, "--text"
    )[: args.max_documents]
    documents = []
    for ids in show_progress(items, "attributing", unit="document"):
        shares = compute_shares(model, torch.tensor([ids]))
        documents.append(
            AttributedDocument([tokenizer.decode([token]) for token in ids], shares.tolist())
        )
    print(format_experts(record), "", format_documents(record, documents), sep="\n")
    if args.output_dir is not None:
        with create_new_folder(Path(args.output_dir)) as output:
            _write_files(output, args, record, documents)
        print(f"written to {args.output_dir}")


def compute_shares(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Compute the shares of the experts in the tokens of one document, without gradients.

    Args:
        model: mixture of E experts, in evaluation mode.
        ids: [1, T] int64, on any device.
    Returns:
        [T, E] float32 on the CPU, the mean over the layers.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), record_routing(model) as layers:
        model.base_model(ids.to(device), use_cache=False)
    return torch.stack([routing.shares for routing in layers]).mean(0).cpu()


def format_documents(record: MoeRecord, documents: Sequence[AttributedDocument]) -> str:
    """Format a table with a line per document, for the console.

    Columns are the number of tokens, the share of each expert in percent, and how the text begins.

    Args:
        record: content of moe.json, for the names of the experts.
    """
    rows = [("document", "tokens", *record.domains, "begins")]
    for number, document in enumerate(documents, start=1):
        shown = (f"{100 * share:.1f} %" for share in document.mean_shares)
        begins = " ".join("".join(document.tokens[:12]).split())[:32]
        rows.append((str(number), str(len(document.tokens)), *shown, begins))
    return format_table(rows, right_aligned_columns=range(len(record.domains) + 2))


def format_tokens(record: MoeRecord, documents: Sequence[AttributedDocument]) -> str:
    """Format a table with a line per token, for tokens.txt.

    Columns are document from 1, position from 0, the share of each expert, the expert of the
    largest share (first), and the text.

    Args:
        record: content of moe.json, for the names of the experts.
    """
    rows = [("document", "token", *record.domains, "first", "text")]
    for number, document in enumerate(documents, start=1):
        for position, (token, shares) in enumerate(
            zip(document.tokens, document.shares, strict=True)
        ):
            first = record.domains[shares.index(max(shares))]
            shown = (f"{share:.3f}" for share in shares)
            rows.append((str(number), str(position), *shown, first, repr(token)))
    return format_table(rows, right_aligned_columns=range(len(record.domains) + 2))


def _write_files(
    folder: Path, args: AttributionArgs, record: MoeRecord, documents: Sequence[AttributedDocument]
) -> None:
    """Write attribution.json, tokens.txt and attribution.png into the folder.

    The plot has the shares of all documents, and of the tokens of the first one.

    Args:
        folder: folder to write into, which exists.
        args: flags, of which the paths of model and text are recorded.
        record: content of moe.json of the mixture.
    """
    content = {
        "model": args.model,
        "text": args.text,
        "experts": [expert.model_dump() for expert in record.experts],
        "documents": [
            {
                "shares": document.mean_shares,
                "tokens": document.tokens,
                "token_shares": document.shares,
            }
            for document in documents
        ],
    }
    write_json(folder / "attribution.json", content)
    write_atomic(folder / "tokens.txt", format_tokens(record, documents) + "\n")
    plot_attribution(
        record.domains,
        [document.mean_shares for document in documents],
        documents[0].tokens,
        documents[0].shares,
        folder / "attribution.png",
    )
