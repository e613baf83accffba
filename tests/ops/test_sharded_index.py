# SPDX-License-Identifier: Apache-2.0
"""vk.ShardedIndex: the bits of one index, in one process and in several; files; refusals; ranks that die."""

from __future__ import annotations

import doctest
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from group_programs import run_group, start_ranks
from index_ranks import (
    DIM,
    KINDS,
    answers,
    answers_of_a_rank,
    database,
    ids,
    parts,
    queries,
    randn,
    refusals_of_a_rank,
    search_beside_a_dying_rank,
)

import vlmkernels as vk
from vlmkernels.ops import sharded_index


def whole(**options: object) -> vk.FlatIndex:
    index = vk.FlatIndex(DIM, **options)
    index.add(database(), ids())
    return index


def in_shards(count: int, **options: object) -> vk.ShardedIndex:
    shards = [vk.FlatIndex(DIM, **options) for _ in range(count)]
    for shard, rows in zip(shards, parts(count), strict=True):
        shard.add(database()[rows], ids()[rows])
    return vk.ShardedIndex(shards)


def assert_same_bits(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        bits = f"u{x.dtype.itemsize}"
        # NaN compares by its bits too
        np.testing.assert_array_equal(np.nan_to_num(x, nan=7.0), np.nan_to_num(y, nan=7.0))
        same = (x.view(bits) == y.view(bits)) | (x != x)
        assert same.all()


@pytest.mark.parametrize("options", KINDS, ids=lambda o: f"{o['metric']}-{o['storage']}-{o['exact']}")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_of_one_process_answer_as_one_index(count: int, options: dict[str, object]) -> None:
    assert_same_bits(answers(in_shards(count, **options)), answers(whole(**options)))


def check_ranks(size: int, folder: Path) -> None:
    ranks = run_group(size, answers_of_a_rank, str(folder))
    for number, options in enumerate(KINDS):
        wanted = answers(whole(**options))
        for rank in ranks:
            assert_same_bits(rank[number], wanted)
    last = whole(**KINDS[-1])
    for rank in ranks:
        assert_same_bits(rank[-2], answers(last))  # written and read again
    assert last.remove(ids()[:20]) == 20
    added = [torch.from_numpy(rank[-1][1]) for rank in ranks]
    assert torch.equal(torch.cat(added), torch.arange(len(torch.cat(added))) + int(ids().max()) + 1)
    for number, own in enumerate(added):
        last.add(randn(3 + number, DIM, seed=number + 50), own)
    for rank in ranks:
        assert rank[-1][0].tolist() == [20, len(last)]
        assert_same_bits(rank[-1][2:], [x.numpy() for x in last.search(queries(), 9)])
    # another number of processes reads the same files
    alone = vk.ShardedIndex.load(folder)
    assert len(alone.shards) == size
    assert_same_bits(answers(alone), answers(whole(**KINDS[-1])))


def test_ranks_answer_as_one_index(tmp_path: Path) -> None:
    check_ranks(3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_other_numbers_of_ranks_answer_as_one_index(size: int, tmp_path: Path) -> None:
    check_ranks(size, tmp_path)


@pytest.mark.slow
def test_all_ranks_hear_of_a_mistake_and_go_on() -> None:
    first, second = run_group(2, refusals_of_a_rank)
    for heard in (first, second):
        assert "all ranks of the group must pass the same arguments" in heard[0]
        assert "all ranks of the group must pass the same arguments" in heard[1]
        assert "is in the index already" in heard[2]
        assert "ids must be distinct, got 77 more than once" in heard[3]
        assert "vectors must be [n, D] with D = 16" in heard[4]
        assert "ids must be given on every rank or on none" in heard[5]
        assert "ids must be in the index, but 500 is not" in heard[6]
        assert "all shards must be of one kind" in heard[7]
        assert heard[8:] == ["8", "8"]


@pytest.mark.slow
def test_a_rank_that_dies_raises_in_the_others() -> None:
    processes, results = start_ranks(3, search_beside_a_dying_rank)
    try:
        heard = [results.get(timeout=120) for _ in range(2)]
    finally:
        for process in processes:
            process.join(timeout=60)
            if process.is_alive():
                process.kill()
    assert processes[1].exitcode == -signal.SIGKILL
    assert sorted(rank for rank, _, _ in heard) == [0, 2]
    for _, message, error in heard:
        assert error is None and message != "no error"


def test_vectors_go_to_the_smallest_shard_and_ids_count_on() -> None:
    index = vk.ShardedIndex([vk.FlatIndex(DIM), vk.FlatIndex(DIM)])
    assert index.add(randn(3, DIM)).tolist() == [0, 1, 2]
    assert index.add(randn(2, DIM)).tolist() == [3, 4]
    assert index.add(randn(1, DIM), ids=[40]).tolist() == [40]
    assert index.add(randn(1, DIM)).tolist() == [41]
    assert [len(shard) for shard in index.shards] == [4, 3]
    assert len(index) == 7
    with pytest.raises(ValueError, match="ids must be new, but 2 is in the index already"):
        index.add(randn(1, DIM), ids=[2])  # which the larger shard holds
    with pytest.raises(ValueError, match="ids must not be negative"):
        index.add(randn(1, DIM), ids=[-2])
    assert len(index) == 7


def test_a_folder_holds_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    in_shards(3).save(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    index = in_shards(2)
    index.save(tmp_path)
    after = {path.name for path in tmp_path.iterdir()}
    assert len(after) == 3
    assert before & after == {sharded_index.CONTENT}
    assert_same_bits(answers(vk.ShardedIndex.load(tmp_path, mmap=True)), answers(whole()))


def test_folders_that_hold_no_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no sharded index"):
        vk.ShardedIndex.load(tmp_path)
    in_shards(2).save(tmp_path)
    content = json.loads((tmp_path / sharded_index.CONTENT).read_text())
    for wrong in ({"version": 2}, {"files": []}, {"files": ["../x.index"]}, {"ntotal": None}):
        (tmp_path / sharded_index.CONTENT).write_text(json.dumps(content | wrong))
        with pytest.raises(ValueError, match="is damaged or of another version"):
            vk.ShardedIndex.load(tmp_path)
    (tmp_path / sharded_index.CONTENT).write_text(json.dumps(content | {"ntotal": 5}))
    with pytest.raises(ValueError, match=r"lists 5 vectors, but its files hold \d+"):
        vk.ShardedIndex.load(tmp_path)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="shards must be a non-empty list of FlatIndex"):
        vk.ShardedIndex([])
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group, got int"):
        vk.ShardedIndex([vk.FlatIndex(2)], group=3)
    with pytest.raises(ValueError, match="all shards must be of one kind"):
        vk.ShardedIndex([vk.FlatIndex(2), vk.FlatIndex(2, metric="dot")])
    index = vk.ShardedIndex([vk.FlatIndex(DIM)])
    with pytest.raises(ValueError, match=r"vk.ShardedIndex.search: queries must be \[n, D\]"):
        index.search(torch.zeros(2, 3), 1)
    with pytest.raises(TypeError, match=r"vk\.ShardedIndex\.search: filter must be integers"):
        index.search(torch.zeros(2, DIM), 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="k must be"):
        index.search(torch.zeros(2, DIM), 0)


def test_a_candidate_is_twelve_bytes() -> None:
    packed = sharded_index._pack(torch.randn(2, 5), torch.randint(2**62, (2, 5)))
    assert packed.nbytes == 2 * 5 * 12


def test_docstring_examples() -> None:
    results = doctest.testmod(sharded_index, extraglobs={"torch": torch, "vk": vk})
    assert results.attempted >= 4 and not results.failed
