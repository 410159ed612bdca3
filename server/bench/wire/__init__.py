"""How the load generator speaks to a server."""
