"""The command ``helo-fast``: train, evaluate, predict, info."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence

USAGE = """usage: helo-fast COMMAND [options]

commands:
  train     train HeLo on every fold of a data set, beside baselines, and write a report
  evaluate  score a checkpoint on a data set
  predict   write a checkpoint's predictions, one row per window
  info      versions, back ends, and which of them is used

helo-fast COMMAND --help explains a command's options. HELO_FAST_DEBUG=1 shows where an error comes from."""

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: done; 1: a fold failed (the others are done); 2: the options or the data are wrong, told in one line on stderr,
    or with a traceback under HELO_FAST_DEBUG=1; 130: interrupted.

    Args:
        argv: Command and options; ``sys.argv[1:]`` where not given.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else MISUSED
    command = COMMANDS.get(argv[0])
    if command is None:
        return _fail(f"{argv[0]!r} is no command; choose from {', '.join(COMMANDS)}")
    try:
        return command(argv[1:])
    except (ArgumentError, ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("HELO_FAST_DEBUG") == "1":
            raise
        return _fail(one_line(str(error) or type(error).__name__))
    except KeyboardInterrupt:
        print("\nhelo-fast: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _fail(message: str) -> int:
    print(f"helo-fast: error: {message}", file=sys.stderr)
    return MISUSED


def one_line(message: str) -> str:
    """An error message as one line; of jsonargparse's trees of attempts, what was wrong with the one that was meant."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type")
    noise += ("Given value: Namespace", "Given value: Nested")
    kept = [line for line in lines if line and not line.startswith(noise)]
    if len(kept) > 1 and kept[0].startswith("Parser key"):
        kept[0] = "--" + kept[0].split('"')[1] + ":"
    return " ".join(kept).replace("Expected a typing.Literal", "expected one of ")


def _train(argv: list[str]) -> int:
    from helo_fast.train.run import train

    return train(argv)


def _evaluate(argv: list[str]) -> int:
    from helo_fast.train.apply import evaluate

    return evaluate(argv)


def _predict(argv: list[str]) -> int:
    from helo_fast.train.apply import predict

    return predict(argv)


def _info(argv: list[str]) -> int:
    import helo_fast

    if argv in (["-h"], ["--help"]):
        print("usage: helo-fast info\n\nVersions, back ends, and which of them is used. It takes no options.")
        return 0
    if argv:
        raise ValueError(f"info takes no options, got {' '.join(argv)}")
    helo_fast.info()
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "info": _info,
}


if __name__ == "__main__":
    sys.exit(main())
