"""Aligning models that were trained from different seeds, so that their weights can be averaged."""
