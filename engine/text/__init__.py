"""Token ids to text that may be shown: each processor takes pieces with feed() and ends with flush()."""
