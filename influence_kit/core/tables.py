"""Tables as plain text, for terminals and notebooks."""

from collections.abc import Sequence

from influence_kit.core.arguments import check_sequence, check_texts
from influence_kit.errors import InvalidArgumentError


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their longest cell; a column of numbers ("-": none) stands to the right.

    Args:
        header: the names of the columns.
        rows: the cells of each row, as many as the header has; shown by ``str``.

    Raises:
        InvalidArgumentError: for a row with more or fewer cells than the header.

    Example:
        >>> print(text_table(["score", "AUC"], [["loss", 0.98], ["self-influence", 0.997]]))
        score             AUC
        --------------  -----
        loss             0.98
        self-influence  0.997
    """
    header = check_texts(header, "header", "names of columns")
    for place, row in enumerate(check_sequence(rows, "rows", "rows")):
        check_sequence(row, f"rows[{place}]", "cells")
        if len(row) != len(header):
            raise InvalidArgumentError(
                f"row {place} of the table has {len(row)} cells where the header has "
                f"{len(header)}: {list(row)}"
            )
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [_are_numbers([line[i] for line in lines[1:]]) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        [
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(line, widths, numeric, strict=True)
        ]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _are_numbers(cells: Sequence[str]) -> bool:
    known = [cell for cell in cells if cell != "-"]
    return bool(known) and all(map(_is_number, known))


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%"))
    except ValueError:
        return False
    return True
