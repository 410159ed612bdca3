"""The version of Castor."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def castor_version() -> str:
    """The version of the installed distribution; "unknown" where it runs from a bare checkout."""
    try:
        return version("castor-serve")
    except PackageNotFoundError:
        return "unknown"
