"""Measures Castor and its peers in turn on this machine."""
