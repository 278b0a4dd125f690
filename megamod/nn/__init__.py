"""Layers: tensors in, tensors out. No tokenizer, no files, no DeepSpeed."""
