"""Scores and plots."""
