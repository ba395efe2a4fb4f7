"""The command ``helo-fast``, also as ``python -m helo_fast``; ``info`` works without the ``train`` extra."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``helo-fast`` and returns its exit code: 1, and a line that names the mend, where the train extra is missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["info"]:
        from helo_fast import info

        info()
        return 0
    try:
        from helo_fast.train import cli
    except ImportError as error:
        print(f"helo-fast: error: {error}", file=sys.stderr)
        return 1
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
