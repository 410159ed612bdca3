"""The memory of the engine: blocks of keys and values, who holds them, how many fit."""
