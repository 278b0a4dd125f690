"""Finetuning runs on one task or on many."""
