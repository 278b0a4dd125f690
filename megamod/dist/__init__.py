"""Processes, topology and the DeepSpeed configuration of a run."""
