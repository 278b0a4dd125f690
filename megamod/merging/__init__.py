"""Merging of several models into one: recipes, methods, and streaming of model folders."""
