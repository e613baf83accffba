# SPDX-License-Identifier: Apache-2.0
"""vk.FlatIndex: answers, ids, filters, range search, files, threads, refusals."""

import copy
import doctest
import json
import math
import os
import pickle
import struct
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vlmkernels as vk
from vlmkernels.ops import _index_store, flat_index
from vlmkernels.ops._index_store import IndexRows
from vlmkernels.ops.reference import topk_scan

METRICS = ("dot", "cosine", "l2")
STORAGES = ("float32", "bfloat16", "int8")
DIM = 32


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(vectors, ids=None, batch=None, **options):
    index = vk.FlatIndex(vectors.shape[1], **options)
    step = batch or max(1, len(vectors))
    for start in range(0, len(vectors), step):
        index.add(vectors[start : start + step], None if ids is None else ids[start : start + step])
    return index


def assert_same(got, wanted):
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


DATABASES = {
    "spread": randn(900, DIM),
    # a column far larger than the rest leaves an int8 row few codes for the others
    "outlier dimension": randn(900, DIM) * torch.cat([torch.full((1,), 300.0), torch.ones(DIM - 1)]),
    # rows that differ by less than a code
    "clustered": randn(1, DIM) + 1e-3 * randn(900, DIM, seed=1),
    "repeated": randn(9, DIM).repeat(100, 1),
    "scaled": randn(900, DIM) * torch.logspace(-20, 20, 900).unsqueeze(1),
    "zeros and NaN": torch.cat(
        [torch.zeros(5, DIM), randn(5, DIM), torch.full((3, DIM), torch.nan), -randn(9, DIM)]
    ),
    "one": randn(1, DIM),
}


# Answers


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", DATABASES)
def test_exact_search_is_topk_similarity_for_every_storage(kind, storage, metric):
    database = DATABASES[kind]
    queries = torch.cat([randn(6, DIM, seed=9), database[:2].nan_to_num()])
    k = min(25, len(database))
    index = filled(database, metric=metric, storage=storage, batch=401)
    scores, ids = index.search(queries, k)
    wanted = vk.topk_similarity(queries, database, k, metric=metric)
    assert torch.equal(ids, wanted[1])
    assert torch.equal(scores.nan_to_num(nan=7.0), wanted[0].nan_to_num(nan=7.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_inexact_search_ranks_what_the_codes_stand_for(storage, metric):
    database, queries = DATABASES["outlier dimension"], randn(6, DIM, seed=9)
    index = filled(database, metric=metric, storage=storage, exact=False)
    decoded = index.reconstruct(index.ids)
    found = index.search(queries, 10)
    assert_same(found, vk.topk_similarity(queries, decoded, 10, metric=metric))
    float32_scores = vk.topk_similarity(queries, database, 10, metric=metric)[0]
    assert torch.equal(found[0], float32_scores) == (storage == "float32")


def test_int8_scan_rescores_few_rows(monkeypatch):
    database, queries = randn(20_000, 64), randn(10, 64, seed=1)
    index = filled(database, storage="int8")
    gathered = 0
    original = IndexRows.gather

    def counting(self, rows):
        nonlocal gathered
        gathered += rows.numel()
        return original(self, rows)

    monkeypatch.setattr(IndexRows, "gather", counting)
    index.search(queries, 10)
    assert gathered < 0.02 * 10 * 20_000


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("exact", [True, False])
def test_search_does_not_depend_on_the_batch(storage, exact):
    index, queries = filled(DATABASES["spread"], storage=storage, exact=exact), randn(7, DIM, seed=2)
    scores, ids = index.search(queries, 12)
    for i in range(7):
        assert_same(index.search(queries[i : i + 1], 12), (scores[i : i + 1], ids[i : i + 1]))


@pytest.mark.parametrize("storage", STORAGES)
def test_chunks_across_segments_do_not_change_the_answer(storage, monkeypatch):
    index, queries = filled(DATABASES["spread"], storage=storage), randn(7, DIM, seed=2)
    monkeypatch.setattr(_index_store, "_SMALLEST_SEGMENT", 8)
    pieces = filled(DATABASES["spread"], storage=storage, batch=37)
    assert len(pieces._snapshot.segments) > 3
    wanted = index.search(queries, 12)
    monkeypatch.setattr(topk_scan, "_CHUNK_ELEMENTS", 50 * DIM)
    assert_same(pieces.search(queries, 12), wanted)


def test_search_for_more_than_there_is_fills_up():
    index = vk.FlatIndex(DIM)
    scores, ids = index.search(randn(2, DIM), 3)
    assert (scores == -math.inf).all() and (ids == -1).all()
    index.add(randn(2, DIM))
    scores, ids = index.search(randn(2, DIM, seed=3), 4)
    assert (ids[:, :2] >= 0).all() and (ids[:, 2:] == -1).all() and (scores[:, 2:] == -math.inf).all()


def test_search_without_queries():
    scores, ids = filled(randn(5, DIM)).search(torch.empty(0, DIM), 2)
    assert scores.shape == ids.shape == (0, 2)


def test_results_carry_no_gradient():
    index = filled(randn(5, DIM).requires_grad_())
    assert not index.search(randn(2, DIM).requires_grad_(), 2)[0].requires_grad


@pytest.mark.parametrize("storage", STORAGES)
def test_adding_inside_and_outside_inference_mode(storage):
    index = vk.FlatIndex(DIM, storage=storage)
    with torch.inference_mode():
        index.add(randn(3, DIM))
        index.add(randn(3, DIM, seed=1))
        index.remove([2])
        inside = index.search(randn(2, DIM), 4)
    index.add(randn(3, DIM, seed=2))
    index.add(randn(3, DIM, seed=3).requires_grad_())
    database = torch.cat([randn(3, DIM)[:2], *(randn(3, DIM, seed=s) for s in (1, 2, 3))])
    assert torch.equal(index.reconstruct(index.ids), database)
    assert_same(inside, index.search(randn(2, DIM), 4, filter=[0, 1, 3, 4, 5]))


# Ids


def test_ids_are_counted_up_and_never_reused():
    index = vk.FlatIndex(DIM)
    assert index.add(randn(3, DIM)).tolist() == [0, 1, 2]
    assert index.add(randn(2, DIM), ids=[10, 5]).tolist() == [10, 5]
    assert index.add(randn(1, DIM)).tolist() == [11]
    assert index.remove([11, 0]) == 2
    assert index.add(randn(1, DIM)).tolist() == [12]
    assert index.ids.tolist() == [1, 2, 10, 5, 12]
    assert index.ntotal == len(index) == 5
    index.reset()
    assert len(index) == 0 and index.add(randn(1, DIM)).tolist() == [0]


def test_add_of_nothing_adds_nothing():
    index = vk.FlatIndex(DIM)
    assert index.add(torch.empty(0, DIM)).shape == (0,)
    assert index.add(torch.empty(0, DIM), ids=[]).dtype == torch.int64
    assert len(index) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_equal_scores_rank_by_id_whatever_the_order_of_adding(metric):
    database = DATABASES["repeated"]
    ids = torch.randperm(900, generator=torch.Generator().manual_seed(4)) * 3
    found = filled(database, ids, metric=metric, batch=100).search(randn(5, DIM, seed=5), 250)
    order = ids.argsort()
    wanted = filled(database[order], ids[order], metric=metric).search(randn(5, DIM, seed=5), 250)
    assert_same(found, wanted)
    same = found[0][:, 1:] == found[0][:, :-1]
    assert same.any() and (found[1][:, 1:] > found[1][:, :-1])[same].all()


@pytest.mark.parametrize("ids", [[3, 4, 3], [7, 1, 8], [5, -1, 6]])
def test_refused_ids_leave_the_index_as_it_was(ids):
    index = filled(randn(2, DIM), ids=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"vk\.FlatIndex\.add: ids must"):
        index.add(randn(3, DIM), ids)
    assert index.ids.tolist() == [1, 2]
    assert index.add(randn(1, DIM)).tolist() == [3]


def test_unknown_ids_are_refused_and_nothing_is_removed():
    index = filled(randn(4, DIM))
    with pytest.raises(ValueError, match=r"vk\.FlatIndex\.remove: ids must be in the index, but 9 is not"):
        index.remove([0, 9])
    with pytest.raises(
        ValueError, match=r"vk\.FlatIndex\.reconstruct: ids must be in the index, but -1 is not"
    ):
        index.reconstruct([-1])
    assert len(index) == 4


@pytest.mark.parametrize("storage", STORAGES)
def test_reconstruct_gives_the_vectors_back(storage):
    database = randn(50, DIM)
    ids = torch.arange(50).flip(0) * 2
    exact = filled(database, ids, storage=storage, batch=7)
    assert torch.equal(exact.reconstruct(ids[[3, 3, 49]]), database[[3, 3, 49]])
    codes = filled(database, ids, storage=storage, exact=False)
    # half a step of a row's int8 grid; bfloat16 rounds to 8 bits
    step = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5001 / 127}[storage]
    error = (codes.reconstruct(ids) - database).abs().amax(1)
    assert (error <= step * database.abs().amax(1)).all()
    assert set(codes._snapshot.layout.columns()) & {"vectors", "residual"} == set()


def test_int8_codes_take_a_quarter_of_the_memory():
    def size(index):
        return sum(x.nbytes for s in index._snapshot.segments for x in s.columns.values())

    database = randn(2000, 512)
    assert size(filled(database, storage="int8", exact=False)) < 0.27 * size(filled(database))


def test_small_batches_copy_nothing():
    index = vk.FlatIndex(DIM)
    index.add(randn(1, DIM))
    first = index._snapshot.segments[0].columns["codes"].data_ptr()
    for start in range(0, 20_000, 50):
        index.add(randn(50, DIM, seed=start))
    segments = index._snapshot.segments
    assert segments[0].columns["codes"].data_ptr() == first
    assert len(segments) < 12
    assert sum(s.columns["ids"].numel() for s in segments) <= 1.6 * len(index)


def test_lookup_of_unordered_ids_keeps_few_runs():
    index = vk.FlatIndex(1)
    ids = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    for part in ids.split(5):
        index.add(part.float().unsqueeze(1), part)
    assert len(index._snapshot.runs) < 13
    assert torch.equal(index.reconstruct(torch.arange(3000)).squeeze(1), torch.arange(3000.0))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_changes_equals_a_dictionary(storage, seed, monkeypatch):
    monkeypatch.setattr(_index_store, "_SMALLEST_SEGMENT", 16)
    generator = torch.Generator().manual_seed(seed)
    index, model, following = vk.FlatIndex(8, storage=storage, metric="dot"), {}, 0
    for step in range(40):
        choice = int(torch.randint(10, (), generator=generator))
        if choice < 6 or not model:
            vectors = randn(int(torch.randint(1, 30, (), generator=generator)), 8, seed=100 * seed + step)
            if choice % 2:
                ids = following + torch.randperm(len(vectors), generator=generator)
                index.add(vectors, ids)
            else:
                ids = index.add(vectors)
            model.update(zip(ids.tolist(), vectors, strict=True))
            following = int(ids.max()) + 1
        elif choice < 9:
            known = torch.tensor(list(model))
            gone = known[torch.rand(len(known), generator=generator) < 0.4]
            assert index.remove(gone) == len(gone)
            for i in gone.tolist():
                del model[i]
        else:
            index = pickle.loads(pickle.dumps(index))
        assert len(index) == len(model) and index.ids.tolist() == list(model)
        ids = torch.tensor(sorted(model), dtype=torch.int64)
        if len(ids):
            vectors = torch.stack([model[i] for i in ids.tolist()])
            assert torch.equal(index.reconstruct(ids), vectors)
            k = min(5, len(ids))
            scores, rows = vk.topk_similarity(vectors[:2], vectors, k)
            assert_same(index.search(vectors[:2], k), (scores, ids[rows]))


# Filters


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("ordered", [True, False])
def test_filters_agree_with_a_mask(storage, ordered, monkeypatch):
    monkeypatch.setattr(_index_store, "_SMALLEST_SEGMENT", 64)
    database, queries = DATABASES["spread"], randn(5, DIM, seed=6)
    ids = (
        torch.arange(900) * 2
        if ordered
        else torch.randperm(900, generator=torch.Generator().manual_seed(1)) * 2
    )
    index = filled(database, ids, storage=storage, batch=170)
    allowed = torch.rand(900, generator=torch.Generator().manual_seed(2)) < 0.1
    scores, rows = vk.topk_similarity(queries, database, 7, metric="cosine", mask=allowed)
    wanted = scores, ids[rows]
    shuffled = ids[allowed][torch.randperm(int(allowed.sum()))]
    for given in (
        allowed,
        allowed.numpy(),
        allowed.expand(5, -1),
        shuffled,
        shuffled.tolist(),
        shuffled.int().numpy(),
    ):
        assert_same(index.search(queries, 7, filter=given), wanted)
    each = torch.rand(5, 900, generator=torch.Generator().manual_seed(3)) < 0.01
    scores, rows = vk.topk_similarity(queries, database, 12, metric="cosine", mask=each)
    assert_same(index.search(queries, 12, filter=each), (scores, ids[rows].masked_fill(rows < 0, -1)))


def test_filter_ignores_unknown_ids_and_may_be_empty():
    index = filled(randn(4, DIM))
    scores, ids = index.search(randn(1, DIM, seed=1), 2, filter=[2, 77, 2])
    assert ids.tolist() == [[2, -1]] and scores[0, 1] == -math.inf
    assert index.search(randn(1, DIM), 1, filter=[])[1].tolist() == [[-1]]
    assert vk.FlatIndex(DIM).search(randn(1, DIM), 1, filter=[0])[1].tolist() == [[-1]]


# Range search


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_range_search_finds_every_score_from_the_threshold_on(storage, metric):
    database, queries = torch.cat([DATABASES["spread"], DATABASES["repeated"]]), randn(6, DIM, seed=8)
    ids = torch.arange(1800).flip(0)
    index = filled(database, ids, metric=metric, storage=storage)
    scores, rows = vk.topk_similarity(queries, database.flip(0), 1800, metric=metric)
    # a score that occurs, so that "at least" is tested
    threshold = scores[0, 100].item()
    lims, found, labels = index.range_search(queries, threshold)
    assert lims[0] == 0 and lims.dtype == labels.dtype == torch.int64
    for i in range(6):
        own = slice(int(lims[i]), int(lims[i + 1]))
        inside = scores[i] >= threshold
        assert torch.equal(found[own], scores[i][inside]) and torch.equal(labels[own], rows[i][inside])


def test_range_search_limits():
    index = filled(torch.cat([torch.full((1, DIM), torch.nan), randn(5, DIM)]))
    lims, scores, ids = index.range_search(randn(2, DIM), -math.inf)
    assert lims.tolist() == [0, 5, 10] and scores.shape == ids.shape == (10,) and (ids > 0).all()
    assert index.range_search(randn(2, DIM), 2)[0].tolist() == [0, 0, 0]
    assert index.range_search(torch.empty(0, DIM), 0.0)[0].tolist() == [0]
    assert vk.FlatIndex(DIM).range_search(randn(2, DIM), 0.0)[0].tolist() == [0, 0, 0]


# Inputs


def test_numpy_arrays_are_accepted():
    database, queries = randn(40, DIM), randn(3, DIM, seed=1)
    wanted = filled(database).search(queries, 5)
    frozen = database.numpy().astype(np.float64)
    frozen.flags.writeable = False
    index = vk.FlatIndex(DIM)
    index.add(frozen, np.arange(40, dtype=np.int32))
    assert_same(index.search(queries.numpy()[::-1], 5), (x.flip(0) for x in wanted))
    assert torch.equal(index.reconstruct(np.array([7])), database[[7]])
    assert index.remove(np.array([7, 7], dtype=np.uint8)) == 1


def test_stored_vectors_are_copies():
    database = randn(10, DIM)
    kept, ids = database.clone(), torch.arange(10)
    index = filled(database, ids)
    database.zero_()
    ids.add_(5)
    assert index.ids.tolist() == list(range(10))
    assert torch.equal(index.reconstruct(range(10)), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_other_dtypes_become_float32(dtype):
    vectors = randn(6, DIM).to(dtype)
    index = filled(vectors)
    assert torch.equal(index.reconstruct(range(6)), vectors.float())
    assert_same(index.search(vectors[:2], 3), index.search(vectors[:2].float(), 3))


def test_views_are_read_as_they_look():
    wide = randn(DIM, 20, 2)
    index = filled(wide[:, :, 1].T)
    assert torch.equal(index.reconstruct(range(20)), wide[:, :, 1].T)
    assert index.search(wide[:, :, 1].T, 1)[1].squeeze(1).tolist() == list(range(20))


def test_to_moves_in_place():
    index = filled(randn(5, DIM), storage="int8")
    wanted = index.search(randn(2, DIM), 3)
    assert index.to("cpu") is index and index.device == torch.device("cpu")
    assert_same(index.search(randn(2, DIM), 3), wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_copies_are_independent(duplicate):
    index = filled(randn(5, DIM), storage="int8")
    other = duplicate(index)
    other.add(randn(1, DIM))
    assert len(index) == 5 and len(other) == 6
    assert_same(index.search(randn(2, DIM), 3), duplicate(index).search(randn(2, DIM), 3))


def test_repr_says_what_it_is():
    text = "FlatIndex(dim=4, metric='l2', storage='int8', exact=False, device='cpu', ntotal=0)"
    assert repr(vk.FlatIndex(4, metric="l2", storage="int8", exact=False)) == text


# Files


@pytest.fixture(params=[False, True], ids=["in memory", "mapped"])
def mmap(request):
    return request.param


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("exact", [True, False])
def test_a_loaded_index_answers_like_the_saved_one(tmp_path, metric, storage, exact, mmap):
    ids = torch.randperm(900, generator=torch.Generator().manual_seed(1)) + 5
    index = filled(DATABASES["clustered"], ids, metric=metric, storage=storage, exact=exact, batch=111)
    index.remove(ids[:50])
    index.save(tmp_path / "database.index")
    loaded = vk.FlatIndex.load(tmp_path / "database.index", mmap=mmap)
    queries = randn(4, DIM, seed=3)
    assert repr(loaded) == repr(index)
    assert_same(loaded.search(queries, 20), index.search(queries, 20))
    assert_same(loaded.range_search(queries, 0.0), index.range_search(queries, 0.0))
    assert torch.equal(loaded.ids, index.ids)
    assert loaded.add(randn(1, DIM)).item() == index.add(randn(1, DIM)).item()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_loaded_index_can_be_changed_and_the_file_stays(tmp_path, mmap, ordered):
    ids = torch.arange(60) if ordered else torch.arange(60).flip(0)
    index = filled(randn(60, DIM), ids, storage="int8")
    path = tmp_path / "database.index"
    index.save(str(path))
    before = path.read_bytes()
    loaded = vk.FlatIndex.load(path, mmap=mmap)
    for changed in (index, loaded):
        changed.add(randn(30, DIM, seed=1))
        changed.remove([0, 17, 59, 70])
        changed.remove([1])
        changed.add(randn(3, DIM, seed=2), [0, 500, 17])
    queries = randn(4, DIM, seed=3)
    assert_same(loaded.search(queries, 88), index.search(queries, 88))
    assert_same(loaded.search(queries, 9, filter=[2, 0, 500]), index.search(queries, 9, filter=[2, 0, 500]))
    assert torch.equal(loaded.reconstruct(index.ids), index.reconstruct(index.ids))
    assert path.read_bytes() == before
    loaded.save(path)
    assert_same(vk.FlatIndex.load(path, mmap=mmap).search(queries, 88), index.search(queries, 88))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc to see what is mapped")
def test_a_mapped_index_reads_its_rows_from_the_file(tmp_path):
    path = tmp_path / "database.index"
    filled(randn(500, DIM), storage="int8").save(path)
    loaded = vk.FlatIndex.load(path, mmap=True)
    loaded.remove([3])
    with open("/proc/self/maps") as maps:
        spans = [line.split()[:2] for line in maps if line.rstrip().endswith(str(path))]
    (columns,) = [s.columns for s in loaded._snapshot.segments]
    for column in columns.values():
        address = column.data_ptr()
        assert any(
            int(span.split("-")[0], 16) <= address < int(span.split("-")[1], 16) and "w" not in rights
            for span, rights in spans
        )


def test_an_empty_index_survives_a_file(tmp_path, mmap):
    index = filled(randn(3, DIM), metric="l2")
    index.remove([0, 1, 2])
    index.save(tmp_path / "empty")
    loaded = vk.FlatIndex.load(tmp_path / "empty", mmap=mmap)
    assert len(loaded) == 0 and loaded.metric == "l2" and loaded.add(randn(1, DIM)).tolist() == [3]


def test_the_file_is_a_safetensors_file(tmp_path):
    database = randn(70, DIM)
    filled(database, storage="int8", batch=9).save(tmp_path / "database.safetensors")
    tensors = load_file(tmp_path / "database.safetensors")
    assert torch.equal(tensors["vectors"], database) and torch.equal(tensors["ids"], torch.arange(70))
    assert tensors["codes"].dtype == torch.int8 and tensors["codes"].shape == (70, DIM)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["writing", "flushing", "renaming"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, error, moment):
    path = tmp_path / "database.index"
    old = filled(randn(20, DIM))
    old.save(path)

    def fail(*args, **kwargs):
        raise error

    def some_blocks(snapshot, name):
        yield b"1234"
        fail()

    new = filled(randn(300, DIM))
    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(_index_store, "_blocks", some_blocks)
        else:
            patch.setattr(os, "fsync" if moment == "flushing" else "replace", fail)
        with pytest.raises(type(error)):
            new.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["database.index"]
    assert_same(vk.FlatIndex.load(path).search(randn(2, DIM), 5), old.search(randn(2, DIM), 5))


def test_a_mapped_index_outlives_the_replacement_of_its_file(tmp_path):
    path = tmp_path / "database.index"
    filled(randn(50, DIM)).save(path)
    mapped = vk.FlatIndex.load(path, mmap=True)
    wanted = mapped.search(randn(3, DIM, seed=1), 5)
    filled(randn(5, DIM, seed=2)).save(path)
    assert_same(mapped.search(randn(3, DIM, seed=1), 5), wanted)


def test_load_refuses_what_save_did_not_write(tmp_path, mmap):
    path = tmp_path / "database.index"
    with pytest.raises(FileNotFoundError):
        vk.FlatIndex.load(path, mmap=mmap)
    for content in (b"", b"abc", b"\xff" * 100, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a file that FlatIndex\.save wrote"):
            vk.FlatIndex.load(path, mmap=mmap)
    filled(randn(40, DIM)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"is cut short: {len(whole) - 1} bytes, expected {len(whole)}"):
        vk.FlatIndex.load(path, mmap=mmap)
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"]["version"] = "2"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    with pytest.raises(ValueError, match="has version 2, this release reads version 1"):
        vk.FlatIndex.load(path, mmap=mmap)


# Threads


def run_together(*functions):
    """Run functions in threads that start at once, and raise what any of them raised."""
    errors, barrier = [], threading.Barrier(len(functions))

    def run(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_searches_see_whole_batches_while_another_thread_adds(monkeypatch):
    monkeypatch.setattr(_index_store, "_SMALLEST_SEGMENT", 64)
    index, batch, rounds = vk.FlatIndex(4, metric="dot", storage="int8"), 7, 150
    done = threading.Event()
    seen = set()

    def write():
        for i in range(rounds):
            index.add(torch.full((batch, 4), float(i + 1)))
        done.set()

    def read():
        while not done.is_set():
            scores, ids = index.search(torch.ones(1, 4), batch * rounds)
            there = ids[0][ids[0] >= 0]
            count = len(there)
            assert count % batch == 0 and sorted(there.tolist()) == list(range(count))
            # Row r of batch i scores 4 (i + 1): the last batch comes first, each in ascending id.
            newest = torch.arange(count // batch, 0, -1).repeat_interleave(batch)
            assert scores[0, :count].tolist() == (4.0 * newest).tolist()
            seen.add(count)

    run_together(write, read, read)
    assert len(index) == batch * rounds and len(seen) > 1


def test_several_threads_add_and_remove_without_loss():
    index = vk.FlatIndex(4)

    def work(worker):
        def run():
            for i in range(40):
                own = torch.arange(5) + 1000 * worker + 10 * i
                index.add(torch.full((5, 4), float(worker + 1)), own)
                index.remove(own[:2])

        return run

    run_together(*(work(w) for w in range(3)))
    expected = [1000 * w + 10 * i + r for w in range(3) for i in range(40) for r in (2, 3, 4)]
    assert sorted(index.ids.tolist()) == expected
    assert torch.equal(index.reconstruct([1002, 2392])[:, 0], torch.tensor([2.0, 3.0]))


def test_automatic_ids_of_several_threads_are_distinct():
    index, given = vk.FlatIndex(4), []
    run_together(
        *(lambda: given.extend(i for _ in range(50) for i in index.add(torch.ones(3, 4)).tolist()),) * 3
    )
    assert sorted(given) == list(range(450)) == index.ids.tolist()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0,), {}, ValueError, "dim must be at least 1, got 0"),
        ((2.0,), {}, TypeError, "dim must be an int, got float"),
        ((2,), {"metric": "euclidean"}, ValueError, "metric must be one of .*, got 'euclidean'"),
        ((2,), {"storage": "int4"}, ValueError, "storage must be one of .*, got 'int4'"),
        ((2,), {"exact": 1}, TypeError, "exact must be a bool, got 1"),
    ],
)
def test_construction_refuses_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=r"vk\.FlatIndex: " + message):
        vk.FlatIndex(*arguments, **options)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("add", ("vectors",), TypeError, "vectors must be a tensor, a NumPy array or a list, got str"),
        ("add", (torch.zeros(2, 3),), ValueError, r"vectors must be \[n, D\] with D = 4, got \[2, 3\]"),
        ("add", (torch.zeros(4),), ValueError, r"vectors must be \[n, D\] with D = 4, got \[4\]"),
        ("add", (torch.zeros(2, 4, dtype=torch.int64),), TypeError, "vectors must be floating"),
        ("add", (torch.zeros(2, 4), [1]), ValueError, r"ids must be \[n\] = \[2\], got \[1\]"),
        ("add", (torch.zeros(2, 4), [1.0, 2.0]), TypeError, "ids must be integers, got torch.float32"),
        ("add", (torch.zeros(2, 4), [[1, 2]]), ValueError, "ids must be one-dimensional"),
        ("remove", ([True],), TypeError, "ids must be integers, got torch.bool"),
        ("search", (torch.zeros(2, 3), 1), ValueError, r"queries must be \[n, D\] with D = 4"),
        ("search", (torch.zeros(2, 4), 0), ValueError, "k must be at least 1, got 0"),
        ("search", (torch.zeros(2, 4), 1.0), TypeError, "k must be an int, got float"),
        ("search", (torch.zeros(2, 4), 1, [0.5]), TypeError, "filter must be integers, got torch.float32"),
        (
            "search",
            (torch.zeros(2, 4), 1, [True]),
            ValueError,
            r"filter must be \[M\] = \[3\] or \[N, M\] = \[2, 3\]",
        ),
        ("range_search", (torch.zeros(2, 4), "0"), TypeError, "threshold must be a number, got str"),
        ("range_search", (torch.zeros(2, 4), math.nan), ValueError, "threshold must be a number, got nan"),
        ("load", ("nowhere", 1), TypeError, "mmap must be a bool, got 1"),
    ],
)
def test_methods_refuse_bad_arguments(method, arguments, error, message):
    index = filled(torch.ones(3, 4))
    with pytest.raises(error, match=rf"vk\.FlatIndex\.{method}: " + message):
        getattr(index, method)(*arguments)
    assert len(index) == 3


def test_automatic_ids_end_at_the_largest_integer():
    index = filled(torch.ones(1, 4), ids=torch.tensor([2**63 - 2]))
    with pytest.raises(ValueError, match="ids must be given, no more follow 9223372036854775806"):
        index.add(torch.ones(2, 4))


def test_docstring_example():
    runner = doctest.DocTestRunner()
    finder = doctest.DocTestFinder(recurse=False)
    for example in finder.find(flat_index.FlatIndex, globs={"torch": torch, "vk": vk}):
        runner.run(example)
    assert runner.summarize(verbose=False) == (0, 3)
