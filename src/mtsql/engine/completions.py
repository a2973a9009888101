"""Complete replies, as the engine hands them out."""

from dataclasses import dataclass
from enum import Enum


class StopReason(Enum):
    """Why a reply ended."""

    STOP_ID = "stop_id"
    REPLY_TOKENS = "reply_tokens"
    TRAJECTORY_TOKENS = "trajectory_tokens"


@dataclass(frozen=True)
class Completion:
    """One complete reply."""

    handle: int
    ids: list[int]  # a stop id included
    logprobs: list[float]  # of `ids` under the distribution that they were sampled from
    reason: StopReason
