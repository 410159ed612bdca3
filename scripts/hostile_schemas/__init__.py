"""The parts of ``scripts/fuzz_schemas``: random and hostile schemas, and a watch over the server that gets them."""
