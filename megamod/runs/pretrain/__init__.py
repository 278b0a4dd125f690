"""Pretraining and adaptation runs."""
