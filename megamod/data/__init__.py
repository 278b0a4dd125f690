"""Data: text to a data-bin, and a data-bin to batches."""
