"""The forward of transformers models: batches, fused operators, recorded steps."""
