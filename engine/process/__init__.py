"""The engine in a process of its own: client, supervisor, worker and the messages between them."""
