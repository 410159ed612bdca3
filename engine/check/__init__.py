"""What is known of a model before its weights are loaded, or even fetched. Runs as a process of its own."""
