"""Data: text to a data-bin, a data-bin to batches, and labelled rows to batches."""
