"""What ``scripts/fuzz_schemas`` is made of: random and hostile schemas, and a watch over the server that gets them."""
