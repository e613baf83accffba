# SPDX-License-Identifier: Apache-2.0
"""ShardedIndex: one database in several FlatIndexes, in this process and over a process group.

Every rank searches its own rows; the ranks exchange the k best of each query, 12 bytes a candidate, and all of them
merge these by the order of `FlatIndex`. Scores are the same bits wherever a row is, so the answer is that of one index.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmkernels._files import write_text_atomically

from . import _check
from .flat_index import FlatIndex, _array, _as_ids
from .reference.topk_scan import rank_keys

if TYPE_CHECKING:
    from .flat_index import ArrayLike, IdsLike

CONTENT = "shards.json"
_FORMAT = "vlmkernels.sharded_index"


class ShardedIndex:
    """A `FlatIndex` whose rows are spread over shards: of this process, and of every rank of a process group.

    Answers are those of one `FlatIndex` with all rows, bit for bit and ties included, for every storage: a score does
    not depend on the shard, and equal scores come in ascending id.

    With a group every method is collective: all ranks call it, in the same order. Queries, filters of ids, and ids to
    remove or to reconstruct are the same on every rank (which is checked); vectors to add are each rank's own. All
    ranks get the same answer. A search sends N x k x 12 bytes from each rank to each, whatever the database's size. If
    a rank dies or calls something else, the others raise when the group's timeout is over, or at once where its
    backend notices.

    Args:
        shards: indexes of one dim, metric, storage and exactness; empty ones are welcome, and a rank needs at least
            one. Ids must be distinct over all shards of all ranks; `add` checks that.
        group: the process group; its backend must move tensors of the shards' device. None: this process alone.

    Raises:
        TypeError, ValueError: arguments of another kind, or shards that differ.

    Example:
        >>> index = vk.ShardedIndex([vk.FlatIndex(2), vk.FlatIndex(2)])
        >>> _ = index.add(torch.tensor([[1.0, 0.0]]))
        >>> _ = index.add(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> index.search(torch.tensor([[0.0, 3.0]]), k=3)[1].tolist()
        [[1, 2, 0]]

        Under torchrun, each rank with its part of the vectors:

        >>> def serve(vectors, queries):
        ...     index = vk.ShardedIndex([vk.FlatIndex(vectors.shape[1])], group=torch.distributed.group.WORLD)
        ...     index.add(vectors)
        ...     return index.search(queries, k=10)
    """

    def __init__(self, shards: Sequence[FlatIndex], *, group: Any = None) -> None:
        self.shards = list(shards)
        if not self.shards or not all(isinstance(shard, FlatIndex) for shard in self.shards):
            raise TypeError("vk.ShardedIndex: shards must be a non-empty list of FlatIndex")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"vk.ShardedIndex: group must be a torch.distributed process group, got {type(group).__name__}"
            )
        self.group = group
        kinds = [_kind(shard) for shard in self.shards]
        kinds = [kind for given in self._from_all(kinds) for kind in given]
        if len(set(kinds)) > 1:
            raise ValueError(f"vk.ShardedIndex: all shards must be of one kind, got {sorted(set(kinds))}")
        if len({shard.device for shard in self.shards}) > 1:
            raise ValueError("vk.ShardedIndex: the shards of a process must be on one device")
        self._total = self._sum(sum(len(shard) for shard in self.shards))

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return self.shards[0].dim

    @property
    def metric(self) -> str:
        """ "cosine", "dot" or "l2"."""
        return self.shards[0].metric

    @property
    def device(self) -> torch.device:
        """Where this process's rows are."""
        return self.shards[0].device

    @property
    def ntotal(self) -> int:
        """Number of vectors in all shards of all ranks, as of the last collective call."""
        return self._total

    def __len__(self) -> int:
        return self._total

    def __repr__(self) -> str:
        ranks = "" if self.group is None else f", {dist.get_world_size(self.group)} ranks"
        return f"ShardedIndex({self.shards[0]!r} and others: {len(self.shards)} here{ranks}, ntotal={self._total})"

    def add(self, vectors: ArrayLike, ids: IdsLike | None = None) -> Tensor:
        """Append vectors, each rank its own, to its smallest shard.

        Args:
            vectors: [n, D], n may differ from rank to rank and be 0.
            ids: int64 [n], not negative, new, and distinct over all ranks; default: counted up from the largest id
                there has been, in the order of the ranks. All ranks give ids or none does.

        Returns:
            This rank's ids, int64 [n].

        Raises:
            TypeError, ValueError: as `FlatIndex.add`, on every rank where one of them has a reason; nothing is added
                then.
        """
        op, smallest = "ShardedIndex.add", min(self.shards, key=len)
        # What one rank cannot do the others must not have done.
        rows, given, problem = torch.empty(0, self.dim), None, None
        try:
            rows = smallest._vectors(op, "vectors", vectors)
            given = None if ids is None else smallest._ids(op, ids)
            if given is not None and given.numel() != rows.shape[0]:
                raise ValueError(
                    f"vk.{op}: ids must be [n] = [{rows.shape[0]}], got {_check.describe(given)}"
                )
        except (TypeError, ValueError) as error:
            problem = error
        facts = (rows.shape[0], given is not None, max(s._snapshot.last_id for s in self.shards), problem)
        everybody = self._from_all(facts)
        self._raise_first([fact[3] for fact in everybody], problem)
        with_ids = {fact[1] for fact in everybody if fact[0]}
        if len(with_ids) > 1:
            raise ValueError(f"vk.{op}: ids must be given on every rank or on none")
        if with_ids != {True}:
            first = 1 + max(fact[2] for fact in everybody)
            before = sum(fact[0] for fact in everybody[: self._rank])
            given = torch.arange(first + before, first + before + rows.shape[0])
        else:
            # A shard would notice that an id is its own already; that ids repeat between shards, nobody would.
            given = torch.empty(0, dtype=torch.int64) if given is None else given.cpu()
            new = torch.cat([torch.from_numpy(x) for x in self._from_all(given.numpy())])
            distinct, counts = new.unique(return_counts=True)
            problem = None
            if distinct.numel() != new.numel():
                problem = ValueError(
                    f"vk.{op}: ids must be distinct, got {int(distinct[counts > 1][0])} more than once"
                )
            elif new.numel() and int(new.min()) < 0:
                problem = ValueError(f"vk.{op}: ids must not be negative, got {int(new.min())}")
            else:
                taken = distinct[self._holds(distinct)]
                if taken.numel():
                    problem = ValueError(
                        f"vk.{op}: ids must be new, but {int(taken[0])} is in the index already"
                    )
            self._raise_first(self._from_all(problem), problem)
        added = smallest.add(rows, given)
        self._total += sum(fact[0] for fact in everybody)
        return added

    def remove(self, ids: IdsLike) -> int:
        """Remove vectors, wherever they are.

        Args:
            ids: int64 [n], the same on every rank, each in one of the shards; repetition is allowed.

        Returns:
            How many vectors were removed.

        Raises:
            TypeError: ids are not integers.
            ValueError: an id is in no shard (nothing is removed then), or ranks gave different ids.
        """
        op = "ShardedIndex.remove"
        wanted = self._known(op, ids)
        for shard in self.shards:
            shard.remove(wanted[_has(shard, wanted)])
        removed = int(wanted.unique().numel())
        self._total -= removed
        return removed

    def reconstruct(self, ids: IdsLike) -> Tensor:
        """The vectors of ids: int64 [n], the same on every rank -> [n, D] float32, as `FlatIndex.reconstruct`.

        Raises:
            TypeError, ValueError: as `remove`.
        """
        wanted = self._known("ShardedIndex.reconstruct", ids)
        rows = torch.zeros(wanted.numel(), self.dim, device=self.device)
        for shard in self.shards:
            here = _has(shard, wanted)
            rows[here] = shard.reconstruct(wanted[here])
        if self.group is not None:
            # One rank has each row and the others zeros; as integers the sum keeps every bit.
            dist.all_reduce(rows.view(torch.int32), group=self.group)
        return rows

    def search(self, queries: ArrayLike, k: int, filter: IdsLike | None = None) -> tuple[Tensor, Tensor]:
        """The k best vectors of all shards for every query.

        Args:
            queries: [N, D], floating, the same on every rank.
            k: at least 1; may exceed `ntotal`.
            filter: the allowed ids, int64 [F], in any order; ids that are nowhere are ignored. (Positions, which a
                bool filter of a FlatIndex speaks of, have no meaning here.)

        Returns:
            `(scores, ids)`, float32 and int64 [N, k], descending, the same on every rank; the rest of what cannot be
            found is id -1 with score -inf.

        Raises:
            TypeError: queries are not floating, k is no int, the filter is not integer.
            ValueError: shapes that do not fit, k < 1, or arguments that differ between the ranks.
        """
        op = "ShardedIndex.search"
        wanted = self.shards[0]._vectors(op, "queries", queries).to(self.device)
        _check.count(op, "k", k, 1)
        allowed = None if filter is None else _as_ids(op, "filter", _array(op, "filter", filter))
        self._check_same(op, wanted, k, allowed)
        found = [shard.search(wanted, k, allowed) for shard in self.shards]
        scores, ids = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        scores, ids = _best(scores, ids, k)
        if self.group is None:
            return scores, ids
        parts = self._gather(_pack(scores, ids))
        scores, ids = (torch.cat(parts, 1) for parts in zip(*map(_unpack, parts), strict=True))
        return _best(scores, ids, k)

    def range_search(self, queries: ArrayLike, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Every vector of all shards whose score is at least a threshold; as `FlatIndex.range_search`.

        Args:
            queries: [N, D], floating, the same on every rank.
            threshold: smallest score to report, the same on every rank.

        Returns:
            `(lims, scores, ids)`: int64 [N + 1], float32 [R], int64 [R], the same on every rank.

        Raises:
            TypeError, ValueError: as `FlatIndex.range_search`, and where arguments differ between the ranks.
        """
        op = "ShardedIndex.range_search"
        wanted = self.shards[0]._vectors(op, "queries", queries).to(self.device)
        self._check_same(op, wanted, threshold, None)
        found = [shard.range_search(wanted, threshold) for shard in self.shards]
        counts = torch.stack([lims.diff() for lims, _, _ in found])
        scores, ids = torch.cat([x[1] for x in found]), torch.cat([x[2] for x in found])
        if self.group is not None:
            # Ranks found unequal numbers: the lengths first, then rows padded to the longest.
            counts = torch.cat(self._gather(counts.sum(0, keepdim=True)))
            order = _by_query(torch.stack([lims.diff() for lims, _, _ in found])).argsort(stable=True)
            mine = scores.new_zeros(int(counts.sum(1).max())), ids.new_zeros(int(counts.sum(1).max()))
            mine[0][: scores.numel()], mine[1][: ids.numel()] = scores[order], ids[order]
            parts = [_unpack(part) for part in self._gather(_pack(*mine))]
            lengths = counts.sum(1).tolist()
            scores = torch.cat([part[0][:n] for part, n in zip(parts, lengths, strict=True)])
            ids = torch.cat([part[1][:n] for part, n in zip(parts, lengths, strict=True)])
        query = _by_query(counts)
        # Least significant key first; a stable sort keeps the order of those before it.
        order = ids.argsort(stable=True)
        order = order[scores[order].argsort(stable=True, descending=True)]
        order = order[query[order].argsort(stable=True)]
        total = counts.sum(0)
        return torch.cat([total.new_zeros(1), total.cumsum(0)]), scores[order], ids[order]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write every shard to a file of its own in a folder, and what belongs together to ``shards.json``.

        The list is written last and in one step, and shards of an earlier list are not overwritten: a folder holds the
        old index or the new one.

        Args:
            folder: is made where it is missing; every rank must see the same one.

        Raises:
            OSError: the folder cannot be written.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        before = self._sum_before(len(self.shards))
        count = self._sum(len(self.shards))
        old = read_content(place)["files"] if (place / CONTENT).is_file() else []
        generation = max((int(name.split(".")[1]) for name in old), default=-1) + 1
        names = [f"shard-{i:05d}-of-{count:05d}.{generation}.index" for i in range(count)]
        for i, shard in enumerate(self.shards):
            shard.save(place / names[before + i])
        self._wait()
        if self._rank == 0:
            content = {"format": _FORMAT, "version": 1, "files": names, "ntotal": self._total}
            write_text_atomically(place / CONTENT, json.dumps(content, indent=1) + "\n")
            for name in old:
                (place / name).unlink(missing_ok=True)
        self._wait()

    @classmethod
    def load(cls, folder: str | os.PathLike[str], mmap: bool = False, *, group: Any = None) -> ShardedIndex:
        """Read an index that `save` wrote; with a group, each rank its consecutive share of the shards.

        Args:
            folder: the folder.
            mmap: leave the rows in the files, as `FlatIndex.load`.
            group: the process group; it need not have as many ranks as wrote the index. A rank for which there is no
                shard holds an empty one.

        Raises:
            FileNotFoundError: there is no such index.
            ValueError: the folder holds no index, or a file is damaged, cut short or of another index.
        """
        place = Path(folder)
        content = read_content(place)
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        names = content["files"]
        mine = names[rank * len(names) // size : (rank + 1) * len(names) // size]
        shards = [FlatIndex.load(place / name, mmap) for name in mine]
        if not mine:
            like = FlatIndex.load(place / names[0], mmap=True)
            shards = [FlatIndex(like.dim, metric=like.metric, storage=like.storage, exact=like.exact)]
        index = cls(shards, group=group)
        if index.ntotal != content["ntotal"]:
            raise ValueError(
                f"vk.ShardedIndex.load: {place} lists {content['ntotal']} vectors, but its files hold {index.ntotal}"
            )
        return index

    @property
    def _rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def _from_all(self, value: Any) -> list[Any]:
        """Everybody's small Python value, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _gather(self, x: Tensor) -> list[Tensor]:
        """Everybody's tensor of the same shape, in the order of the ranks."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def _sum(self, count: int) -> int:
        return sum(self._from_all(count))

    def _sum_before(self, count: int) -> int:
        return sum(self._from_all(count)[: self._rank])

    def _wait(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def _raise_first(self, problems: list[Exception | None], own: Exception | None) -> None:
        """Raises on every rank where one has a reason: its own, or the first rank's."""
        found = next((problem for problem in problems if problem is not None), None)
        if own is not None or found is not None:
            raise own or found  # type: ignore[misc]

    def _check_same(self, op: str, queries: Tensor, number: float, ids: Tensor | None) -> None:
        """Ranks that ask different questions would merge answers that do not belong together."""
        if self.group is None:
            return
        digest = tuple(queries.shape), _digest(queries), number, None if ids is None else _digest(ids)
        if len(set(self._from_all(digest))) > 1:
            raise ValueError(f"vk.{op}: all ranks of the group must pass the same arguments")

    def _holds(self, ids: Tensor) -> Tensor:
        """Which ids are in a shard of any rank: bool [n]."""
        here = torch.stack([_has(shard, ids) for shard in self.shards]).any(0).to(torch.uint8)
        if self.group is not None:
            dist.all_reduce(here, dist.ReduceOp.MAX, group=self.group)
        return here.bool()

    def _known(self, op: str, ids: IdsLike) -> Tensor:
        wanted = self.shards[0]._ids(op, ids).to(self.device)
        self._check_same(op, wanted.new_empty(0), 0, wanted)
        unknown = wanted[~self._holds(wanted)]
        if unknown.numel():
            raise ValueError(f"vk.{op}: ids must be in the index, but {int(unknown[0])} is not")
        return wanted


def read_content(place: Path) -> dict[str, Any]:
    """What ``shards.json`` of a folder says: "files" and "ntotal".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another file, of a later version, or damaged.
    """
    if not (place / CONTENT).is_file():
        raise FileNotFoundError(f"vk.ShardedIndex.load: there is no sharded index in {place}")
    try:
        content = json.loads((place / CONTENT).read_text(encoding="utf-8"))
        known = content["format"] == _FORMAT and content["version"] == 1
        files, total = [str(name) for name in content["files"]], int(content["ntotal"])
    except (ValueError, KeyError, TypeError):
        known = False
    if not known or not files or any(Path(name).name != name for name in files):
        raise ValueError(f"vk.ShardedIndex.load: {place / CONTENT} is damaged or of another version")
    return {"files": files, "ntotal": total}


def _kind(shard: FlatIndex) -> tuple[Any, ...]:
    return shard.dim, shard.metric, shard.storage, shard.exact


def _has(shard: FlatIndex, ids: Tensor) -> Tensor:
    return shard._snapshot.find(ids.to(shard.device)) >= 0


def _digest(x: Tensor) -> int:
    return zlib.crc32(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates [N, k] of [N, c] in the order of an index; c is at least k."""
    ids, order = ids.sort(dim=1, stable=True)
    scores = scores.gather(1, order)
    order = rank_keys(scores, ids < 0).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


def _pack(scores: Tensor, ids: Tensor) -> Tensor:
    """Candidates as they travel: int32 [..., 3], 12 bytes each."""
    return torch.cat([ids.unsqueeze(-1).view(torch.int32), scores.unsqueeze(-1).view(torch.int32)], -1)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    ids, scores = (
        packed[..., :2].contiguous().view(torch.int64),
        packed[..., 2:].contiguous().view(torch.float32),
    )
    return scores.squeeze(-1), ids.squeeze(-1)


def _by_query(counts: Tensor) -> Tensor:
    """Whose each entry is where every row of counts [S, N] lists its queries' entries in turn: int64 [sum]."""
    sources, queries = counts.shape
    return torch.arange(queries, device=counts.device).repeat(sources).repeat_interleave(counts.reshape(-1))
