"""Requests that real clients sent, each spoilt in one place: for ``scripts/fuzz``."""
