"""Text to a data-bin: documents, tokenizers and binary token files."""
