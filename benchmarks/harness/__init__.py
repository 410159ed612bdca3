"""The harness of ``./scripts/bench``: starts Castor and its peers in turn on this machine and compares them."""
