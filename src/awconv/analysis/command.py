"""What the commands of this package have in common: how they answer bad input, and how they lay out numbers."""

import argparse
from collections.abc import Sequence
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print its usage first."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def aligned_table(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> str:
    """Lays out an aligned Markdown table, whose first ``left`` columns hold text and the others numbers."""
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]

    def aligned(cells: Sequence[str]) -> str:
        justified = [
            c.ljust(w) if column < left else c.rjust(w) for column, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(justified)} |"

    rule = [("-" * w) if column < left else "-" * (w - 1) + ":" for column, w in enumerate(widths)]
    return "\n".join([aligned(head), aligned(rule), *map(aligned, body)])
