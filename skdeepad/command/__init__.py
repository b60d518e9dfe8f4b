"""The command `skdeepad`: detectors without a line of Python."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Run the command."""
    try:
        from ._commands import skdeepad
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit('The command needs click. Install it: pip install "skdeepad[cli]".')
    # its advice is for Python; bars show progress in a terminal
    logging.getLogger("skdeepad").setLevel(logging.ERROR)
    skdeepad(prog_name="skdeepad")
