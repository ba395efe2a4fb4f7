"""The command ``helo-fast``, also as ``python -m helo_fast``. Only ``info`` works without the ``train`` extra."""

import sys


def main() -> int:
    try:
        from .train.cli import main as command
    except ImportError as error:
        if sys.argv[1:2] == ["info"]:
            from ._registry import info

            info()
            return 0
        print(f"helo-fast: error: {error}", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(main())
