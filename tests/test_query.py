"""The limits of a query: which values they may have."""

import pytest

from mtsql.sql.query import QueryConfig

BOUNDED = ("timeout_secs", "max_value_bytes", "max_expr_depth", "max_compound_selects")


@pytest.mark.parametrize("name", list(vars(QueryConfig())))
def test_limits_must_be_positive_numbers(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"env.query.{name}: expected a positive"):
            QueryConfig(**{name: value})


@pytest.mark.parametrize("name", BOUNDED)
def test_limits_beyond_what_sqlite_or_the_system_takes_are_refused(name):
    with pytest.raises(ValueError, match=f"env.query.{name}: expected at most"):
        QueryConfig(**{name: 10**12})


def test_only_seconds_may_have_a_fraction():
    for name in ("max_vm_steps", "max_value_bytes", "max_memory_bytes"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive whole number"):
            QueryConfig(**{name: 33554432.5})
    assert QueryConfig(timeout_secs=2).timeout_secs == 2
    assert QueryConfig(timeout_secs=0.5).timeout_secs == 0.5
