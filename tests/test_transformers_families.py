"""Pages about transformers: families whose rows are made again, and counts of its tests."""

import re

import pytest
from transformers_families import PAGE, USES, compare, families, words
from transformers_suite import page_of

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


def test_the_page_of_their_tests_counts_what_pytest_wrote(tmp_path):
    cases = {
        "Test_vanilla": ["", "", "<failure message='wrong'/>", "<skipped message='test is slow'/>"],
        "Test_titans-mac": ["", "<error/>", "<skipped message='MemAttnModel has no X.'/>"],
    }
    lines = [
        f"<testcase classname='tests.suite.{system}' name='{i}'>{inner}</testcase>"
        for system, found in cases.items()
        for i, inner in enumerate(found)
    ]
    results = tmp_path / "results.xml"
    results.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    page = page_of(results, {"test_y": "it asks for more"})
    assert "3 passed, 2 failed, 2 skipped." in page and "- `test_y`: it asks for more." in page
    assert "| vanilla | 2 | 1 | 1 |" in page and "| titans-mac | 1 | 1 | 1 |" in page
    assert "- 1: A model has no X\n" in page and "- 1: test is slow\n" in page
