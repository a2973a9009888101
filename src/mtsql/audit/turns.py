"""Work on many turns at the same time, because their queries run in worker processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from mtsql.sql.dialogues import Turn
from mtsql.sql.worker_pool import query_threads, the_pool

Found = TypeVar("Found")


def over_turns(
    look: Callable[[Turn], Found], turns: Sequence[Turn], title: str
) -> Iterator[tuple[Turn, Found]]:
    """Call a function on each turn in a few threads; yield (turn, result) in the turns' order.

    There is one thread more than there are workers, which prepares the next query meanwhile.
    """
    console = Console(stderr=True)
    with query_threads(the_pool().size + 1, "audit") as threads:
        found = zip(turns, threads.map(look, turns), strict=True)
        yield from track(found, title, len(turns), console=console, transient=True)
