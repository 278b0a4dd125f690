"""Flags of attribution: model, text and output."""

from dataclasses import dataclass

from megamod.flags import Arguments, option


@dataclass
class AttributionArgs(Arguments):
    """Model, text and output."""

    model: str | None = option(None, "folder of a mixture of experts, with moe.json")
    text: str | None = option(None, "file with a document per line, or JSON lines with `text`")
    max_documents: int = option(16, "documents that are read, the first ones", least=1)
    max_seq_length: int | None = option(
        None, "tokens of a document that are read; none: 1024, or fewer if the model has fewer"
    )
    output_dir: str | None = option(
        None, "folder for attribution.json, tokens.txt and attribution.png; none: print alone"
    )
