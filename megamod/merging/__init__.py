"""Several models made one: recipes, methods, and the streaming of folders through them."""
