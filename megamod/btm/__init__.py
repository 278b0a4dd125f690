"""Branch-Train-Merge: which jobs a recipe means, where they run, and keeping them running."""
