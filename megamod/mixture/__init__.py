"""Experts at inference: who is believed how much, from log-probabilities alone."""
