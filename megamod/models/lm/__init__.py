"""Causal language models: dense, DEMix and forests of experts."""
