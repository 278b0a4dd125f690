"""State dicts as plain data: files of weights, and pure functions on them. No modules."""
