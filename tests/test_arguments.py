"""Short spellings of flags: lists of words, and switches without a value."""

from dataclasses import dataclass

import pytest

from mtsql.commands.arguments import positional, spelled_out
from mtsql.run.config import parse_config


@dataclass(frozen=True)
class Config:
    """Flags of this test."""

    databases: tuple[str, ...] = ("all",)
    """Folders."""
    is_fast: bool = False
    """A switch."""
    name: str = "x"
    """A text."""


def parsed(line: list[str]) -> Config:
    return parse_config(Config, spelled_out(line, Config), "")


@pytest.mark.parametrize(
    ("line", "databases"),
    [
        (["--databases", "one"], ("one",)),
        (["--databases", "one", "two"], ("one", "two")),
        (["--databases", "a, b", "c [d]", "é", "7"], ("a, b", "c [d]", "é", "7")),
        (["--databases=one"], ("one",)),
        (["--databases", "one", "two", "--name", "y"], ("one", "two")),
        (["--databases", "[one, two]"], ("one", "two")),
        (["--databases=[one, two]"], ("one", "two")),
        (["--name", "y"], ("all",)),
        (["one", "two", "--name", "y"], ("one", "two")),  # it is the first field
    ],
)
def test_a_list_is_given_as_words_or_as_yaml(line, databases):
    assert parsed(line).databases == databases


@pytest.mark.parametrize(
    ("line", "is_fast"),
    [
        (["--is_fast"], True),
        (["--is_fast", "--name", "y"], True),
        (["--is_fast", "true"], True),
        (["--is_fast", "false"], False),
        (["--is_fast=false"], False),
        ([], False),
    ],
)
def test_a_switch_may_leave_out_true(line, is_fast):
    assert parsed(line).is_fast is is_fast


def test_a_list_without_a_value_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="--databases needs a value"):
        parsed(["--databases", "--name", "y"])


def test_other_words_stay_as_they_are():
    line = ["--name", "--databases", "--config", "a.yaml", "--name=[x]", "stray"]
    assert spelled_out(line[2:], Config) == line[2:]
    with pytest.raises(ValueError, match="'stray' belongs to no flag"):
        parsed(["--name", "y", "stray"])


def test_positional_words_are_one_or_many_or_none():
    assert positional(["a", "b"], "", "FILE") == ["a", "b"]
    assert positional(["a"], "", "FILE", is_one=True) == ["a"]
    assert positional([], "") == []
    for words, name, is_one in ([], "FILE", False), (["a", "b"], "FILE", True), (["a"], "", False):
        with pytest.raises(ValueError):
            positional(words, "", name, is_one)
    with pytest.raises(ValueError, match="unknown flag --out"):
        positional(["--out", "x"], "", "FILE")
