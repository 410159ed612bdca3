"""The forward of transformers models: batches, recorded steps, and the memory that they take."""
