"""``castor`` with a scripted engine and a thread that never ends: what is looked at is how the process ends.

``HANGING`` says how: ``sleeping`` outside of Python, ``spinning`` in Python, or the path of a file: when that is there,
nothing of Python runs any more.
"""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

from support.scripted_server import main


def hang() -> None:
    """For longer than any test waits."""
    how = os.environ["HANGING"]
    while how == "spinning":
        pass
    while how == "sleeping" or not Path(how).exists():
        time.sleep(0.1)
    re.match("(a+)+$", "a" * 99 + "b")


if __name__ == "__main__":
    threading.Thread(target=hang).start()
    main()
