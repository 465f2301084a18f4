"""Every cell of the table of misuse: the error and its text, or the value that is documented."""

import re
from collections import Counter

import pytest

from tests.helpers.misuse import CELLS, ROWS, parameters_of, public
from tests.helpers.misuse_kinds import ERROR, KINDS


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_misuse_is_an_error_or_gives_what_is_documented(cell):
    if not isinstance(cell.expected, type):
        assert cell.expected(cell.call())
        return
    with pytest.raises(cell.expected) as caught:
        cell.call()
    assert caught.type is cell.expected
    text = str(caught.value)
    assert cell.expected is AssertionError or re.fullmatch(ERROR, text, re.DOTALL), text
    for mention in cell.mentions:
        assert str(mention) in text


def test_the_table_holds_every_public_callable():
    assert Counter(row.name for row in ROWS) == Counter(public())


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_every_parameter_is_misused(row):
    assert parameters_of(row.name) <= set(row.wrong)


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_every_kind_of_misuse_is_in_the_table_or_does_not_apply(row):
    kinds = {cell.kind for cell in row.cells()}
    assert kinds | row.not_applicable == set(KINDS)
    assert not kinds & row.not_applicable


def test_no_cell_stands_twice():
    assert len(set(map(str, CELLS))) == len(CELLS)
