"""What goes into the scheduler and what happened in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Policy(StrEnum):
    """Who is admitted first and who is preempted first; vLLM's `--scheduling-policy`."""

    FCFS = "fcfs"
    PRIORITY = "priority"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The engine settings that scheduling depends on, under vLLM's names."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    scheduling_policy: Policy = Policy.FCFS
    watermark: float = 0.0  # share of the blocks that admission leaves free while others run
    max_num_queued_reqs: int | None = None  # waiting and running together, as vLLM counts them

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.block_size, self.max_num_seqs) < 1:
            raise ValueError("num_blocks, block_size and max_num_seqs must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to compute. `block_hashes` identify the prompt's full blocks, each with all before it."""

    id: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    block_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """The queue was full when the request arrived."""

    at_s: float
    request: Request


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request is in the batch of the step that starts now; `cached_tokens` of its prompt need no computing."""

    at_s: float
    request: Request
    cached_tokens: int
    again: bool  # it had been preempted


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The prompt is computed and the first token made."""

    at_s: float
    request: Request


@dataclass(frozen=True, slots=True)
class Preempted:
    """The request gave its blocks back; all its tokens will be computed again."""

    at_s: float
    request: Request
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """A preempted request is computed again as far as it was, and has made its next token."""

    at_s: float
    request: Request


@dataclass(frozen=True, slots=True)
class Finished:
    """All output tokens are made."""

    at_s: float
    request: Request
    preemptions: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """`count` equal steps were computed between two moments.

    Each computed `prefill_tokens` and one token of each of `decode_sequences`; `made_tokens` is what one step made:
    those, and one for each prompt whose last part it computed, told by the FirstToken and Resumed that follow.
    """

    start_s: float
    end_s: float
    count: int
    prefill_tokens: int
    decode_sequences: int
    made_tokens: int


Event = Rejected | Admitted | FirstToken | Preempted | Resumed | Finished | Stepped
