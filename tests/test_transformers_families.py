"""The page of families of transformers: its form, and rows that are made again."""

import re

import pytest
from transformers_families import PAGE, USES, compare, families, words

pytestmark = pytest.mark.filterwarnings("ignore")  # models of others warn
ROWS = {
    name: cells
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and "`" in line
    for name, *cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def test_no_family_is_silently_different():
    assert set(ROWS) <= set(families())
    kinds = [{re.sub(r" \d+$", "", cell) for cell in cells[1:]} for cells in ROWS.values()]
    assert set().union(*kinds) <= {"match", "refused", "–", "not built"}
    assert sum("match" in kind for kind in kinds) >= 50


# every layer, layers that share keys beside windows, a decoder without its encoder, sparse choices
@pytest.mark.parametrize("name", ["llama", "gemma4_text", "bart", "deepseek_v32"])
def test_a_row_made_again_is_the_same(name):
    row = compare(name)
    assert "unbuilt" not in row
    shown, *cells = ROWS[name]
    assert shown == f"`{row['class']}`" and len(cells) == len(USES)
    assert [re.sub(r" \d+$", "", cell) for cell in cells] == words(row)
