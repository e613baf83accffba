# SPDX-License-Identifier: Apache-2.0
"""The BPE tokenizer: OpenAI's ids where its merges file is installed, own vocabularies everywhere."""

import gzip
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from vlmkernels import data, models
from vlmkernels.data import Tokenizer, clean_text, find_openai_merges, tokenizer_for

CAPTIONS = ["a red heart", "a red car", "the red heart of a card", "cards and hearts", "12 cards \u2764"] * 3


@pytest.fixture(scope="module")
def own():
    return Tokenizer.train(CAPTIONS, vocab_size=530)


@pytest.fixture(scope="module")
def openai():
    if find_openai_merges() is None:
        pytest.skip("OpenAI's merges file is not installed (it comes with open_clip)")
    return Tokenizer.openai()


GOLDEN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "Hello World! It's 2024.": [3306, 1002, 256, 585, 568, 273, 271, 273, 275, 269],
    "skin-tone": [3575, 268, 8408],
    "\U0001f600": [7334],
    "a diagram": [320, 22697],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_openai_golden_ids(openai, text):
    assert openai.encode(text) == GOLDEN[text]


def test_openai_vocabulary(openai):
    assert (openai.vocab_size, openai.start_id, openai.end_id) == (49408, 49406, 49407)
    assert openai.encode("!") == [256]
    assert openai._tokens[0] == "!"


def test_openai_special_tokens_in_a_text(openai):
    # OpenAI's pattern finds them only where a word may start.
    assert openai.encode("cat<|endoftext|>dog") == [*openai.encode("cat"), 49407, *openai.encode("dog")]
    assert openai.encode("<|startoftext|> cat") == [49406, *openai.encode("cat")]
    assert 49407 not in openai.encode("cat!<|endoftext|>")


def test_openai_reads_plain_and_compressed_files(openai, tmp_path):
    raw = gzip.decompress(find_openai_merges().read_bytes())
    (tmp_path / "merges.txt").write_bytes(raw)
    assert Tokenizer.openai(tmp_path / "merges.txt").merges == openai.merges
    (tmp_path / "short.gz").write_bytes(gzip.compress(b'"version"\na b\n'))
    with pytest.raises(ValueError, match="must hold a version line and 48894 merges"):
        Tokenizer.openai(tmp_path / "short.gz")


def test_openai_missing_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"bpe_simple_vocab_16e6.txt.gz.*no such file: .*absent.gz"):
        Tokenizer.openai(tmp_path / "absent.gz")
    monkeypatch.setattr(data.tokenizer, "find_openai_merges", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"no installed open_clip or clip .*Tokenizer\.train"):
        Tokenizer.openai()


def test_cleaning():
    assert clean_text("  A&amp;amp;B \t\n <b>C\u2019s ") == "a&b <b>c's"
    assert clean_text("\uff21\uff22 \ufb01sh\x00") == "ab fish"
    assert clean_text("It\u2019s", fix_text=False) == "it\u2019s"


def test_cleaning_is_the_same_without_ftfy(monkeypatch):
    pytest.importorskip("ftfy", reason="compares with ftfy")
    texts = [
        "\u201cA\u201d \u2018b\u2019",
        "\ufb03 \u0132",
        "\uff28\uff49\u3000!",
        "\x85\x93",
        "e\u0301",
        "a\ufeffb\x07",
    ]
    with_ftfy = [clean_text(text) for text in texts]
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert [clean_text(text) for text in texts] == with_ftfy


def test_own_vocabulary_has_the_scheme(own):
    assert own.vocab_size == 530
    assert (own.start_id, own.end_id) == (528, 529)
    assert own.merges[0] == ("a", "r")  # the most frequent pair: heart, car, card, hearts
    assert len(own.encode("red")) == 1
    assert own._tokens[own.encode("red")[0]] == "red</w>"
    assert own.encode("!") == [256]


def test_own_vocabulary_stops_when_nothing_repeats():
    assert Tokenizer.train(["ab ab"], vocab_size=600).merges == [("a", "b</w>")]


def test_training_is_deterministic_across_processes(own):
    program = (
        "import sys, json; from vlmkernels.data import Tokenizer;"
        "print(json.dumps(Tokenizer.train(json.loads(sys.argv[1]), vocab_size=530).to_dict()))"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program, json.dumps(CAPTIONS)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert json.loads(run.stdout) == own.to_dict()


@pytest.mark.parametrize(
    "text", ["a red heart", "\u2764 caf\u00e9 \U0001f600", "\u65e5\u672c\u8a9e", "it's 12 o'clock", ""]
)
def test_any_text_survives(own, text):
    assert own.decode(own(text))[0].replace(" ", "") == text.replace(" ", "")


def test_rows(own):
    rows = own(["a red heart", ""], context_length=6)
    assert rows.dtype == torch.int64
    ids = own.encode("a red heart")
    assert rows.tolist() == [[528, *ids, 529, 0][:6], [528, 529, 0, 0, 0, 0]]
    assert own("a").shape == (1, 77)
    assert own([]).shape == (0, 77)


def test_long_texts_are_cut_and_end_in_the_end_token(own):
    row = own("red " * 50, context_length=8)[0].tolist()
    assert row == [528, *own.encode("red") * 6, 529]


def test_decode_stops_at_the_end_token(own):
    row = own("a card", context_length=12)
    assert own.decode(row) == ["a card"]
    assert own.decode(row[0]) == "a card"
    assert own.decode([*row[0].tolist()[:-1], 999][:3]) == own.decode(row[0][:3])
    with pytest.raises(ValueError, match=r"ids must be in \[0, 530\), got 999"):
        own.decode([999])


def test_save_and_load(own, tmp_path):
    own.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.to_dict() == own.to_dict()
    assert torch.equal(loaded(CAPTIONS), own(CAPTIONS))
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert torch.equal(pickle.loads(pickle.dumps(own))(CAPTIONS), own(CAPTIONS))


def test_load_reads_the_file_of_transformers(own, tmp_path):
    content = {
        "model": {
            "type": "BPE",
            "end_of_word_suffix": "</w>",
            "vocab": {token: i for i, token in enumerate(own._tokens)},
            "merges": [" ".join(merge) for merge in own.merges],
        }
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path / "tokenizer.json").merges == own.merges
    content["model"]["vocab"]["!"] = 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="orders its vocabulary in another way"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"type": "WordPiece"}}', "not json"])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"Tokenizer\.load"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_bad_arguments_are_named(own):
    with pytest.raises(ValueError, match="vocab_size must be at least 514"):
        Tokenizer.train(CAPTIONS, vocab_size=513)
    with pytest.raises(ValueError, match="at least one text"):
        Tokenizer.train([])
    with pytest.raises(ValueError, match="context_length must be at least 2, got 1"):
        own("a", context_length=1)
    with pytest.raises(TypeError, match="texts must be strings, got int"):
        own(["a", 3])
    with pytest.raises(ValueError, match="joins unknown symbols or repeats"):
        Tokenizer([("a", "bc")])


def test_tokenizer_for_a_saved_model(own, tmp_path):
    model = models.create("emoji-clip", vision={"layers": 1}, text={"layers": 1, "vocab_size": 530})
    with pytest.raises(ValueError, match=r"vocabulary of its own \(530 ids\)"):
        tokenizer_for(model)
    loaded = models.load_checkpoint(models.save_pretrained(model, tmp_path, own))
    tokenizer = tokenizer_for(loaded)
    assert tokenizer("a red heart").shape == (1, 32)
    assert tokenizer.merges == own.merges
    assert loaded.encode_text(tokenizer(["a red heart"])).shape == (1, 256)


def test_tokenizer_for_refuses_a_wrong_vocabulary(own, tmp_path):
    model = models.create("emoji-clip", vision={"layers": 1}, text={"layers": 1})
    loaded = models.load_checkpoint(models.save_pretrained(model, tmp_path, own))
    with pytest.raises(ValueError, match="has 530 ids, the model's vocabulary 4096"):
        tokenizer_for(loaded)
    with pytest.raises(TypeError, match=r"expected a model with config\.text, got Linear"):
        tokenizer_for(torch.nn.Linear(1, 1))


def test_tokenizer_for_openai_models(openai):
    with torch.device("meta"):
        model = models.create("ViT-B-32", text={"context_length": 20})
    row = tokenizer_for(model)("a photo of a cat")[0].tolist()
    assert row[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer_for(model)("a").shape == (1, 20)
