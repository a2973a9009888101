"""An embedded world of few databases. It takes a second, where the whole one takes ten."""

from mtsql.sql import datasets
from mtsql.toyworld.world import WorldConfig

SMALL = WorldConfig(num_train_databases=12, num_dev_databases=2)


def use_small_world() -> None:
    """Let this process write and read the small world instead of the whole one."""
    datasets.WorldConfig = lambda: SMALL
