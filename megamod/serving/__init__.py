"""A model served over HTTP: classification and tagging in groups, completions, a page to try it."""
