"""What depends on positions beyond one rotation for all: long texts (LongRoPE), and queries that grow (Llama 4)."""
