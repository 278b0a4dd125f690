"""What a run would need, before it runs: parameters, memory, traffic, time, and what fits."""
