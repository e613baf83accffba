# SPDX-License-Identifier: Apache-2.0
"""Referring expressions: a small parser for "the cat left of the dog", and what its relations mean between boxes.

The paper parses dependencies with spaCy. This parser knows the patterns of ReCLIP's heuristics and no more: a head
noun phrase, relations to other noun phrases, superlatives. Any callable `expression -> Entity` can stand in for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_RELATIONS = {
    "left": r"(?:to|on|at) the left(?: side)? of|left of|left from",
    "right": r"(?:to|on|at) the right(?: side)? of|right of|right from",
    "above": r"above|over|on top of|higher than|atop",
    "below": r"below|beneath|underneath|under|lower than",
    "bigger": r"bigger than|larger than|taller than",
    "smaller": r"smaller than|tinier than|shorter than",
    "inside": r"inside of|inside|within|contained in",
    "between": r"between",
}
_SUPERLATIVES = {
    "left": r"leftmost|left most|furthest left|far left|on the left|left",
    "right": r"rightmost|right most|furthest right|far right|on the right|right",
    "above": r"topmost|uppermost|highest|on the top|on top|top|upper",
    "below": r"lowest|bottommost|on the bottom|at the bottom|bottom|lower",
    "bigger": r"biggest|largest|tallest|big|large",
    "smaller": r"smallest|tiniest|shortest|small|tiny|little",
}


@dataclass
class Entity:
    """A noun phrase with what is said about it.

    Attributes:
        text: the phrase without its superlatives and relations.
        relations: (kind, other entity).
        superlatives: kinds.
    """

    text: str
    relations: list[tuple[str, Entity]] = field(default_factory=list)
    superlatives: list[str] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is said about it but its name."""
        return not self.relations and not self.superlatives


Parser = Callable[[str], Entity]


def parse_expression(expression: str) -> Entity:
    """Parses an expression: head, first relation, rest (parsed in turn); superlatives are taken out of the head.

    >>> parse_expression("the biggest cat left of the small dog").relations[0][1].superlatives
    ['smaller']
    """
    text = re.sub(r"\s+", " ", expression.lower().strip().rstrip("."))
    first: tuple[int, int, str] | None = None
    for kind, pattern in _RELATIONS.items():
        found = re.search(rf"\b(?:that is |which is |is )?(?:{pattern})\b (?=\w)", text)
        # the earliest wins, the longer one among those that begin together
        if (
            found
            and found.start() > 0
            and (first is None or (found.start(), -found.end()) < (first[0], -first[1]))
        ):
            first = (found.start(), found.end(), kind)
    head = text if first is None else text[: first[0]]
    entity = Entity(head)
    for kind, pattern in _SUPERLATIVES.items():
        shorter = re.sub(rf"\b(?:{pattern})\b", " ", entity.text)
        if shorter != entity.text and re.sub(r"\b(?:the|a|an)\b|\W", "", shorter):
            entity.superlatives.append(kind)
            entity.text = shorter
    entity.text = re.sub(r"\s+", " ", entity.text).strip()
    if first is not None:
        entity.relations.append((first[2], parse_expression(text[first[1] :])))
    return entity


def relation_matrix(kind: str, boxes: Tensor) -> Tensor:
    """Returns Rel[i, j] between boxes [n, 4]: how far "i is <kind> j" holds.

    left, right, above and below compare centres (strictly), bigger and smaller areas, inside gives the share of i that
    lies in j. "between", which ReCLIP's code has and leaves off, gives all ones.

    Raises:
        ValueError: An unknown kind.
    """
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if kind == "left":
        return (x[:, None] < x).float()
    if kind == "right":
        return (x[:, None] > x).float()
    if kind == "above":
        return (y[:, None] < y).float()
    if kind == "below":
        return (y[:, None] > y).float()
    if kind == "bigger":
        return (area[:, None] > area).float()
    if kind == "smaller":
        return (area[:, None] < area).float()
    if kind == "inside":
        low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        return (high - low).clamp(min=0).prod(2) / area[:, None].clamp(min=1e-9)
    if kind == "between":
        return torch.ones(len(boxes), len(boxes))
    raise ValueError(f"relation_matrix: unknown relation {kind!r}")


def entity_distribution(entity: Entity, score: Callable[[str], Tensor], boxes: Tensor) -> Tensor:
    """Returns how likely each box is the entity, [n].

    ```
    q = softmax_i(score(phrase));  relation: q_i <- q_i sum_j q2_j Rel[i,j];  superlative: q_i <- q_i sum_j q_j Rel[i,j]
    ```

    each renormalised; where nothing satisfies a relation, it is passed over.

    Args:
        entity: what is meant.
        score: a phrase to logits [n].
        boxes: [n, 4].
    """
    q = score(entity.text).softmax(0)
    for kind, other in entity.relations:
        weight = relation_matrix(kind, boxes).to(q) @ entity_distribution(other, score, boxes)
        q = _renormalised(q * weight, q)
    for kind in entity.superlatives:
        q = _renormalised(q * (relation_matrix(kind, boxes).to(q) @ q), q)
    return q


def _renormalised(new: Tensor, old: Tensor) -> Tensor:
    total = new.sum()
    return new / total if total > 0 else old
