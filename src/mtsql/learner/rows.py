"""The rows of a flat training batch as indices, for attention that is computed row by row: side by
side (varlen), or padded to similar lengths.

Legend: T tokens of the flat batch, N rows of a part.
"""

from typing import NamedTuple

import torch

PADDED_SCORES = 1 << 26
"""Most scores of a head in one call for padded rows. Their mask takes 0.3 GB in float32."""
Span = tuple[int, int]
"""First token and the token after the last, in the flat batch."""


class Row(NamedTuple):
    """Queries that see each other causally, and all of the keys `before` them."""

    queries: Span
    before: Span


class VarlenRows(NamedTuple):
    """What flash-attn's varlen function wants to know about the rows."""

    keys: torch.Tensor
    """Flat indices of each row's keys, one row after the other."""
    query_edges: torch.Tensor
    key_edges: torch.Tensor
    longest_queries: int
    longest_keys: int


class PaddedPart(NamedTuple):
    """N rows of similar length, as indices into the flat batch."""

    queries: torch.Tensor
    """(N, queries of the longest)"""
    keys: torch.Tensor
    """(N, keys of the longest)"""
    is_seen: torch.Tensor
    """(N, 1, queries, keys)"""


class PaddedRows(NamedTuple):
    """All rows of a batch, padded in parts."""

    parts: list[PaddedPart]
    found: torch.Tensor
    """Where the outputs of the T tokens stand among those of all parts: (T,)."""


def varlen_rows(rows: list[Row], device: torch.device) -> VarlenRows:
    """The rows of a batch for a varlen function."""
    keys = [torch.arange(*span) for row in rows for span in (row.before, row.queries)]
    num_queries = [_num_queries(row) for row in rows]
    num_keys = [_num_keys(row) for row in rows]
    return VarlenRows(
        torch.cat(keys).to(device),
        torch.tensor([0, *num_queries]).cumsum(0).to(device, torch.int32),
        torch.tensor([0, *num_keys]).cumsum(0).to(device, torch.int32),
        max(num_queries),
        max(num_keys),
    )


def padded_rows(rows: list[Row], device: torch.device) -> PaddedRows:
    """Rows whose numbers of queries and of keys have the same next power of two make a part, unless
    it would have too many scores."""
    alike: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        num_queries, num_keys = _num_queries(row), _num_keys(row)
        kind = ((num_queries - 1).bit_length(), (num_keys - 1).bit_length())
        alike.setdefault(kind, []).append(row)
    parts = []
    found = torch.empty(sum(map(_num_queries, rows)), dtype=torch.long)
    num_outputs = 0
    for (log_queries, log_keys), members in alike.items():
        at_once = max(1, PADDED_SCORES >> (log_queries + log_keys))
        for i in range(0, len(members), at_once):
            some = members[i : i + at_once]
            part, is_query = _padded_part(some)
            found[part.queries[is_query]] = num_outputs + is_query.flatten().nonzero()[:, 0]
            num_outputs += is_query.numel()
            parts.append(PaddedPart(*(x.to(device) for x in part)))
    return PaddedRows(parts, found.to(device))


def _padded_part(rows: list[Row]) -> tuple[PaddedPart, torch.Tensor]:
    """Rows side by side, and which of their padded queries (N, queries) are real. Padding repeats
    the first token of the batch."""
    num_queries = torch.tensor([_num_queries(row) for row in rows])[:, None]  # (N, 1)
    num_keys = torch.tensor([_num_keys(row) for row in rows])[:, None]
    query = torch.arange(int(num_queries.max()))
    key = torch.arange(int(num_keys.max()))
    queries = torch.zeros(len(rows), len(query), dtype=torch.long)
    keys = torch.zeros(len(rows), len(key), dtype=torch.long)
    for i, row in enumerate(rows):
        own = torch.arange(*row.queries)
        queries[i, : len(own)] = own
        before = torch.arange(*row.before)
        keys[i, : len(before) + len(own)] = torch.cat([before, own])
    last_seen = num_keys - num_queries + query  # (N, queries)
    is_seen = key <= last_seen[:, :, None]  # (N, queries, keys)
    return PaddedPart(queries, keys, is_seen[:, None]), query < num_queries


def _num_queries(row: Row) -> int:
    return row.queries[1] - row.queries[0]


def _num_keys(row: Row) -> int:
    return row.before[1] - row.before[0] + _num_queries(row)
