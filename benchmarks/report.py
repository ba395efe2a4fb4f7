"""The numbers and plots of docs/performance.md from a saved run: ``python -m benchmarks.report .benchmarks/performance.json docs``.

Rewrites what stands between the markers in performance.md, and the SVG files beside it; everything else there is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import ratios, scaling

BEGIN, END = "<!-- numbers: `make performance` writes from here -->", "<!-- to here -->"
NEEDED = {1, 2}  # threads of the scaling plots


def markdown_table(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [ratios.HEAD, ("---",) * len(ratios.HEAD), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") or " " for cell in row) + " |" for row in lines]


def numbers(run: ratios.Run, found: list[scaling.Point]) -> str:
    """What stands between the markers."""
    lines = ["", *(f"{line}  " for line in ratios.heading(run))]
    for title, rows, note in ratios.tables(run):
        lines += ["", f"### {title}", "", *markdown_table(rows)]
        if note:
            lines += ["", note.replace("\n", "  \n")]
    lines += ["", "### Scaling", "", *(f"{line}  " for line in scaling.sentences(found)), ""]
    for name, what in (
        ("batch", "time against batch size"),
        ("size", "time of a problem against its size"),
        ("threads", "speed-up of threads"),
    ):
        lines.append(f"![sinkhorn: {what}](scaling_{name}.svg)")
    return "\n".join([*lines, ""])


def rewrite(document: str, text: str) -> str:
    """The document with ``text`` between its markers.

    Raises:
        ValueError: a marker is missing, or they are not in order.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"performance.md must hold {BEGIN!r} and, after it, {END!r}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m benchmarks.report RUN.json FOLDER_OF_performance.md", file=sys.stderr)
        return 2
    try:
        saved = json.loads(Path(arguments[0]).read_text())
        run, found = ratios.Run(saved), scaling.points(saved)
        document = Path(arguments[1]) / "performance.md"
        if {point.threads for point in found} < NEEDED:
            raise ValueError("no scaling rows: run pytest benchmarks with -m 'large or not large'")
        text = rewrite(document.read_text(), numbers(run, found))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"report: nothing written: {error!r}", file=sys.stderr)
        return 1
    document.write_text(text)
    for path in (document, *scaling.write(found, document.parent)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
