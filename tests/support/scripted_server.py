"""``castor`` with the scripted core in its engine processes: the whole front end, without what only torch can do."""

from __future__ import annotations

from functools import partialmethod

from support.scripted_worker import COMMAND

from engine.process.client import ProcessEngine
from server import cli


def main() -> None:
    """The command."""
    ProcessEngine.__init__ = partialmethod(ProcessEngine.__init__, command=COMMAND)  # type: ignore[method-assign, assignment]
    cli.main()


if __name__ == "__main__":
    main()
