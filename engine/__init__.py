"""The engine: batches requests onto one transformers model. Knows nothing of HTTP or of the Gemini format."""
