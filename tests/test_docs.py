"""The pages and the README: tables are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables(text: str) -> list[list[str]]:
    """Rows of all tables of a page, outside blocks of code."""
    found: list[list[str]] = [[]]
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def width(row: str) -> int:
    """Number of cells of a row; a bar in code or in an equation parts none."""
    return len(re.sub(r"`[^`]*`|\$[^$]*\$", "", row).strip().strip("|").split("|"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_rows_of_a_table_have_as_many_cells_as_its_head(page):
    for table in tables(page.read_text(encoding="utf-8")):
        assert set(table[1]) <= set("|-: ")
        assert {row: width(row) for row in table if width(row) != width(table[0])} == {}


def test_a_row_that_lost_its_cells_is_found():
    (whole,), (cut,) = (
        tables("| a | `b\\|c` |\n|---|---|\n| 1 | $|x|$ |\n"),
        tables("| a | b |\n| --- | --- |\n| 1 |\n\n"),
    )
    assert [width(row) for row in whole] == [2, 2, 2]
    assert [width(row) for row in cut] == [2, 2, 1]
