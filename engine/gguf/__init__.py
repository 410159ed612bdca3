"""GGUF files: what their header says, and how what they hold becomes a model of transformers."""
