"""CA-MTL: one task-conditioned BERT for many tasks."""
