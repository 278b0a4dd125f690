"""Runs that compare models: barriers, soups, sweeps and ensembles."""
