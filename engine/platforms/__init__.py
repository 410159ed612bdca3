"""What differs between a CPU and a GPU when a model is started, and the one recipe that starts it on either."""
