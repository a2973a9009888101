"""Tokens are those of the official tokenizer."""

import pytest

from mtsql.judge.sql_tokens import Unparseable, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("SELECT A.b,c FROM t", ["select", "a.b", ",", "c", "from", "t"]),
        ("a >= 3 b > = 4 c ! = 5", ["a", ">=", "3", "b", ">=", "4", "c", "!=", "5"]),
        ("a>= 3", ["a", ">=", "3"]),
        ("a >=3", ["a", ">", "=3"]),
        ("a=3 b>3", ["a=3", "b", ">", "3"]),
        ("a <> 3 == 4", ["a", "<", ">", "3", "==", "4"]),
        ("a = 'It is' AND b = \"X\"", ["a", "=", '"It is"', "and", "b", "=", '"X"']),
        ("'O''Brien'", ["__val_1____val_3__"]),
        ('a ="x"', ["a", "=__val_1__"]),
        ("in (1,2 ,3)", ["in", "(", "1,2", ",3", ")"]),
        ("a:b,", ["a", ":", "b", ","]),
        ("count(*)--x [y] `z`", ["count", "(", "*", ")", "--", "x", "[", "y", "]", "`", "z", "`"]),
        ("a..b c...d -1 --- e", ["a", "..", "b", "c", "...", "d", "-1", "--", "-", "e"]),
        ("a > 3.", ["a", ">", "3", "."]),
        ("(a > 3.)", ["(", "a", ">", "3", ".", ")"]),
        ("a > 3. AND b", ["a", ">", "3", ".", "and", "b"]),
        ("a > 3. and b", ["a", ">", "3.", "and", "b"]),
        (
            "cannot T1.gonna wanna 'cannot'",
            ["can", "not", "t1.", "gon", "na", "wan", "na", '"cannot"'],
        ),
        ("« a » — b ‘c’", ["«", "a", "»", "—", "b", "‘", "c", "’"]),
        ("", []),
    ],
)
def test_tokens_are_the_official_ones(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


def test_an_odd_number_of_quotes_is_unparseable() -> None:
    with pytest.raises(Unparseable):
        tokenize("a = 'open")
