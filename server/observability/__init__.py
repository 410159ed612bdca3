"""What the operator sees: the log, the record of each request, the metrics."""
