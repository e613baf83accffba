# SPDX-License-Identifier: Apache-2.0
"""FAISS's flat indexes and their files: the same vectors, ids and answers on both sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vlmkernels as vk
from vlmkernels.integrations.faiss import from_faiss, read_index, to_faiss, write_index

METRICS = {"dot": "IndexFlatIP", "l2": "IndexFlatL2"}
IDS = torch.tensor([7, 3, 1000, 0, 42, *range(2000, 2095)])


@pytest.fixture
def vectors() -> np.ndarray:
    return torch.randn(100, 24).numpy()


@pytest.fixture
def queries() -> np.ndarray:
    return torch.randn(9, 24).numpy()


def assert_same_answers(index: vk.FlatIndex, peer, queries: np.ndarray, k: int = 5) -> None:
    scores, ids = index.search(queries, k)
    distances, labels = peer.search(queries, k)
    assert ids.tolist() == labels.tolist()
    expected = torch.from_numpy(distances)
    # Sums of 24 products of unit size, in float32 there.
    torch.testing.assert_close(scores, -expected if index.metric == "l2" else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_a_faiss_file_is_read(faiss, tmp_path, vectors, queries, metric, with_ids):
    peer = getattr(faiss, METRICS[metric])(24)
    if with_ids:
        peer = faiss.IndexIDMap(peer)
        peer.add_with_ids(vectors, IDS.numpy())
    else:
        peer.add(vectors)
    faiss.write_index(peer, str(tmp_path / "flat.index"))
    index = read_index(tmp_path / "flat.index")
    assert (index.metric, index.dim, len(index)) == (metric, 24, 100)
    assert index.ids.tolist() == (IDS.tolist() if with_ids else list(range(100)))
    assert torch.equal(index.reconstruct(index.ids), torch.from_numpy(vectors))
    assert_same_answers(index, peer, queries)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_faiss_reads_our_file(faiss, tmp_path, vectors, queries, metric, with_ids):
    index = vk.FlatIndex(24, metric=metric)
    index.add(vectors, IDS if with_ids else None)
    write_index(index, tmp_path / "flat.index")
    peer = faiss.read_index(str(tmp_path / "flat.index"))
    assert type(peer).__name__ == ("IndexIDMap" if with_ids else METRICS[metric])
    assert_same_answers(index, peer, queries)
    assert [path.name for path in tmp_path.iterdir()] == ["flat.index"]


def test_cosine_becomes_inner_products_of_normalised_vectors(faiss, vectors, queries):
    index = vk.FlatIndex(24)
    index.add(vectors)
    normalised = torch.nn.functional.normalize(torch.from_numpy(queries), dim=1).numpy()
    assert_same_answers(index, to_faiss(index), normalised)
    assert_same_answers(from_faiss(to_faiss(index), metric="cosine"), to_faiss(index), normalised)


def test_storage_and_removed_rows_survive(faiss, vectors):
    index = vk.FlatIndex(24, metric="dot", storage="int8")
    index.add(vectors)
    index.remove([0, 50])
    back = from_faiss(to_faiss(index), storage="int8")
    assert back.storage == "int8" and torch.equal(back.ids, index.ids)
    assert torch.equal(back.reconstruct(back.ids), index.reconstruct(index.ids))


def test_more_rows_than_one_batch(faiss, monkeypatch, vectors):
    monkeypatch.setattr("vlmkernels.integrations.faiss._BATCH", 33)
    index = vk.FlatIndex(24, metric="l2")
    index.add(vectors, IDS)
    assert torch.equal(from_faiss(to_faiss(index)).ids, IDS)
    assert torch.equal(from_faiss(to_faiss(index)).reconstruct(IDS), torch.from_numpy(vectors))


def test_an_empty_index(faiss, tmp_path):
    write_index(vk.FlatIndex(24, metric="l2"), tmp_path / "empty.index")
    index = read_index(tmp_path / "empty.index")
    assert len(index) == 0 and index.metric == "l2"


def test_an_old_file_is_replaced_in_one_step(faiss, monkeypatch, tmp_path, vectors):
    path = tmp_path / "flat.index"
    index = vk.FlatIndex(24, metric="dot")
    write_index(index, path)
    before = path.read_bytes()

    def fail(index, where):
        with open(where, "wb") as file:
            file.write(b"half")
        raise RuntimeError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", fail)
        with pytest.raises(RuntimeError, match="no space"):
            write_index(index, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["flat.index"]


def test_other_indexes_are_refused(faiss, vectors):
    peer = faiss.IndexHNSWFlat(24, 8)
    with pytest.raises(TypeError, match="IndexFlatIP or IndexFlatL2"):
        from_faiss(peer)
    with pytest.raises(TypeError, match="IndexIDMap over IndexHNSWFlat"):
        from_faiss(faiss.IndexIDMap(peer))
    with pytest.raises(TypeError, match="has no counterpart"):
        from_faiss(faiss.IndexFlat(24, faiss.METRIC_L1))


def test_a_metric_that_does_not_fit_is_refused(faiss):
    with pytest.raises(ValueError, match=r"metric must be one of \('l2',\)"):
        from_faiss(faiss.IndexFlatL2(24), metric="cosine")


def test_files_that_are_no_index(faiss, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_index(tmp_path / "nothing")
    (tmp_path / "text").write_text("no index at all")
    with pytest.raises(ValueError, match="is no FAISS index"):
        read_index(tmp_path / "text")
