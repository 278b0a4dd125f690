"""Labelled rows: task specifications, file formats and batches."""
