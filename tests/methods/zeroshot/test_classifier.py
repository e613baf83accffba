# SPDX-License-Identifier: Apache-2.0
"""The shared shape: the head's probabilities, encoders of any model, bad input, and sources of descriptions."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest
import torch

from vlmkernels.methods.zeroshot import (
    CachedDescriptions,
    EmojiDescriptions,
    LanguageModelDescriptions,
    LinearHead,
    PromptClassifier,
    encoder_of,
    endpoint_generator,
)
from vlmkernels.methods.zeroshot._descriptions import bullets
from vlmkernels.methods.zeroshot._metrics import assign, auroc, cluster_accuracy, group_accuracy, semantic_iou
from vlmkernels.ops.topk import topk_similarity


@pytest.mark.parametrize("kind", ["equal rows", "unequal rows", "bias"])
def test_head_gives_the_softmax_of_its_logits(unit_rows, kind: str) -> None:
    x, weight = unit_rows(50, 24), 30 * unit_rows(17, 24, seed=1)
    if kind != "equal rows":
        weight = weight * torch.linspace(0.1, 1, 17, dtype=torch.float64)[:, None]
    bias = torch.linspace(-3, 2, 17, dtype=torch.float64) if kind == "bias" else None
    head = LinearHead(weight, bias)
    logits = x @ weight.T + (0 if bias is None else bias)
    got = head(x, k=5)
    expected = logits.softmax(1).sort(1, descending=True)
    torch.testing.assert_close(got.scores, expected.values[:, :5], rtol=1e-9, atol=1e-12)
    assert torch.equal(got.indices, expected.indices[:, :5])
    torch.testing.assert_close(got.lse, logits.logsumexp(1))
    torch.testing.assert_close(head.logits(x), logits)
    torch.testing.assert_close(head.top(x, 2)[0], logits.topk(2).values)


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_nearest_rows_are_those_of_the_search(unit_rows, monkeypatch, metric: str) -> None:
    import vlmkernels.methods.zeroshot._classifier as module

    queries, bank = (unit_rows(n, 40, seed=n, dtype=torch.float32) for n in (70, 90))
    bank[7] = bank[3]  # the smaller index wins
    expected = topk_similarity(queries, bank, 1, metric=metric)
    for worth in (0, 10**9):  # by codes, and by the vectors
        monkeypatch.setattr(module, "_WORTH_CODES", worth)
        scores, rows = module.nearest_rows(queries, bank, metric)
        assert torch.equal(scores, expected[0][:, 0]) and torch.equal(rows, expected[1][:, 0])


def test_head_of_zeros_is_uniform(unit_rows) -> None:
    got = LinearHead(torch.zeros(4, 3))(unit_rows(2, 3, dtype=torch.float32), k=2)
    assert got.indices.tolist() == [[0, 1]] * 2
    torch.testing.assert_close(got.scores, torch.full((2, 2), 0.25))


class Foreign:
    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :4]

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids[:, 0] % 4, 4).float()


def test_any_model_with_two_encoders_works() -> None:
    encoder = encoder_of(
        Foreign(), preprocess=lambda x: x.float(), tokenize=lambda t: torch.tensor([[ord(a[0])] for a in t])
    )
    pictures = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    pictures[0, 0, 0, 0] = pictures[1, 0, 0, 1] = 9
    classifier = PromptClassifier(encoder, ["d", "e"], ["{}"])  # ord("d") = 100
    assert classifier.predict(pictures).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: encoder_of(object()), "encode_image"),
        (lambda: encoder_of(Foreign()), "preprocess and tokenize"),
        (lambda: LinearHead(torch.zeros(3, 2), torch.zeros(2)), "bias must be"),
        (lambda: LinearHead(torch.ones(3, 2))(torch.zeros(2, 5)), "features must be"),
        (lambda: LinearHead(torch.ones(3, 2, dtype=torch.int64)), "floating"),
        (lambda: assign(torch.zeros(3, 2)), "at most C"),
        (lambda: auroc(torch.zeros(3), torch.ones(3)), "positives and negatives"),
        (lambda: CachedDescriptions("gone.json"), "no file"),
        (lambda: endpoint_generator("ftp://x", "m"), "http"),
    ],
)
def test_bad_input_says_what_was_expected(make, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=sentence):
        make()


def test_classifier_refuses_what_it_cannot_read(unit_rows, encoder) -> None:
    classifier = PromptClassifier(encoder, ["cat", "dog"])
    with pytest.raises(ValueError, match="k must lie"):
        classifier.predict(unit_rows(2, 256, dtype=torch.float32), k=3)
    with pytest.raises(ValueError, match="pictures must be"):
        classifier.predict(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected \{\}"):
        PromptClassifier(encoder, ["cat"], ["a photo"])


def test_emoji_descriptions_contrast() -> None:
    source = EmojiDescriptions()
    assert "meow" not in source.descriptors("unknown thing")
    keywords = source.descriptors("raised fist")
    assert "fist" not in keywords and "solidarity" in keywords
    (kind, mine, theirs), *_ = source.differences("raised fist", "oncoming fist")
    assert kind == "keyword" and "solidarity" in mine and "solidarity" not in theirs
    first, second = source.discriminate(["raised fist", "oncoming fist"])
    assert not set(first) & set(second)


def test_answers_are_asked_once_and_kept(tmp_path: Path) -> None:
    asked = []

    def generate(prompt: str) -> str:
        asked.append(prompt)
        return "Sure:\n- cold | a hot dog | a chilly cat\n* warm | hot Dog here | cat there\n2) x | y | z"

    path = tmp_path / "cache.json"
    cached = CachedDescriptions(path, LanguageModelDescriptions(generate))
    first = cached.differences("dog", "cat")
    assert [kind for kind, _, _ in first] == ["cold", "warm"]
    assert cached.differences("cat", "dog") == [(kind, b, a) for kind, a, b in first]
    assert CachedDescriptions(path).differences("dog", "cat") == first
    assert len(asked) == 1
    assert CachedDescriptions(path).descriptors("dog") == []


def test_repeated_phrases_weigh_and_shared_ones_go() -> None:
    answers = iter(["- red\n- round\n- dog", "- round\n- long"] * 2)
    source = LanguageModelDescriptions(lambda _: next(answers), repetitions=2)
    assert source.discriminate(["cat", "dog"]) == [["red", "red"], ["long", "long"]]
    assert bullets("1. one\nno\n- two.") == ["one", "two"]


def test_endpoint_speaks_the_chat_protocol() -> None:
    seen = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), path=self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "- striped"}}]}).encode())

        def log_message(self, *_: object) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        generate = endpoint_generator(f"http://127.0.0.1:{server.server_port}/v1", "small")
        assert LanguageModelDescriptions(generate).descriptors("zebra") == ["striped"]
        thread.join()
    assert seen["path"] == "/v1/chat/completions" and seen["model"] == "small"


@pytest.mark.parametrize("columns", [5, 7])
def test_assignment_is_the_best_of_all_permutations(columns: int) -> None:
    import itertools

    for seed in range(5):
        profit = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(sum(profit[i, p[i]] for i in range(5)) for p in itertools.permutations(range(columns), 5))
        chosen = assign(profit)
        assert len(set(chosen.tolist())) == 5
        torch.testing.assert_close(profit[torch.arange(5), chosen].sum(), best)


def test_cluster_accuracy_ignores_names() -> None:
    true = list("aabbcc")
    assert cluster_accuracy(list("xxyyzz"), true) == 1
    assert cluster_accuracy(list("xxyyzw"), true) == pytest.approx(5 / 6)
    assert cluster_accuracy(list("pqrstu"), true) == pytest.approx(3 / 6)


def test_other_measures_on_small_cases() -> None:
    assert semantic_iou(["red fox", "a"], ["red cat", "A!"]) == pytest.approx((1 / 3 + 1) / 2)
    assert auroc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    average, worst, cells = group_accuracy(
        torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    )
    assert (average, worst) == (pytest.approx(2 / 3), 0.0)
    assert set(cells) == {(0, 0), (0, 1), (1, 1)}  # the empty cell (1, 0) does not exist
