"""The models that are served, by name."""
