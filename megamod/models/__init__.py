"""Configurations and models, registered with the Auto classes of transformers."""
