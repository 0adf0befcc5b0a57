"""What a family's reader makes of a config.json: the layers, and what surrounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from enova_recommender.shape.fields import Fields
from enova_recommender.types import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The layers of a model and what the family adds around them."""

    hidden_size: int
    blocks: tuple[Block, ...]
    extra_parameters: int                # final norm, learnt positions, bias of the head
    tied_embeddings: bool = False        # where config.json does not say
    not_modelled: tuple[str, ...] = ()


Reader = Callable[[Fields], Body]
