"""Work that must not run on the event loop: child processes with limits, and turns for those who wait."""
