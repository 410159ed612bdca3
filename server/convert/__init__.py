"""What a request means: chat messages, token ids and sampling parameters."""
