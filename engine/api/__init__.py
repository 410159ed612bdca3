"""The surface of the engine: requests in, events out, errors, and what an engine can do. Free of torch."""
