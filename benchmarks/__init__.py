"""Programs that measure parts of Castor, the harness of ``./scripts/bench``, and the results of its runs."""
