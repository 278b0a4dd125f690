"""Weights of experts at inference, from log-probabilities alone."""
