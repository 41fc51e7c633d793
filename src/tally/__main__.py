"""``python -m tally`` is the ``tally`` command."""

import os
import sys

if __name__ == "__main__":
    # "-m" has put the current folder first. Nothing more is imported from there, unless Tally itself is.
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
        del sys.path[0]

    from tally.cli.main import command

    command()
