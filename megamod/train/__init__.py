"""The training loop and what it stands on: engine, objectives, checkpoints, log."""
