"""Whole runs: data, model, objective and evaluation put together around the one loop."""
