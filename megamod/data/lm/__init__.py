"""Data-bins to batches: blocks of tokens, sample order and masking."""
