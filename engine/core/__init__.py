"""The loop that serves requests with one runner, and the life of a candidate in it."""
