# SPDX-License-Identifier: Apache-2.0
"""The command: every subcommand on a tiny model, files of options, --json, and one sentence with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlmkernels
from vlmkernels import _native
from vlmkernels.cli.main import COMMANDS

Run = Callable[..., tuple[int, str, str]]


def test_python_m_runs_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(vlmkernels.__file__).parents[1])}
    command = [sys.executable, "-m", "vlmkernels", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"vlmkernels {vlmkernels.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--config" in out
    assert "--json" in out


def test_help_shows_defaults(run: Run) -> None:
    _, out, _ = run("train", "--help")
    assert "(default: 256)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: command"),
        (["train", "--epochs", "many"], "invalid float value: 'many'"),
        (["train", "--epochs", "-1"], "epochs must be positive, got -1.0"),
        (["train", "--data", "gone"], "there is nothing at gone"),
        (["train", "--model", "resnet"], "expected one of"),
        (["train", "--model-options", "[1]"], "expected a JSON object"),
        (["train", "--resume"], "resume needs output"),
        (["train", "--config", "gone.json"], "there is no file gone.json"),
        (["eval", "--model", "gone"], "neither a path nor the name of a model"),
        (["classify", "gone.png", "--labels", " , "], "there is no label"),
        (["search", "--index", "gone", "a heart"], "there is no index in gone"),
        (["index", "gone"], "there is no folder gone"),
        (["index", ".", "--shards", "0"], "--shards must be at least 1, got 0"),
        (["bench"], "there are no suites in benchmarks"),
        (["bench", "--peak", "--seconds", "0"], "--seconds must lie between"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run: Run, arguments: list[str], sentence: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert sentence in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_training_leaves_a_run_with_a_report(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {
        "params.json",
        "results.jsonl",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "report.html",
    } <= names
    assert "colours" in (trained / "report.html").read_text()


def test_training_prints_where_things_are(run: Run, trained: Path) -> None:
    code, out, err = run("train", "--resume", "--output", trained)
    assert code == 0
    assert "held-out pairs: image->text R@1/5/10" in out
    assert out.strip().endswith("report.html")
    assert "continuing after step" in err


def test_training_again_into_a_run_is_refused(run: Run, trained: Path) -> None:
    code, _, err = run("train", "--output", trained, "--data", trained)
    assert code == 2
    assert "holds a run already" in err


def test_classify_finds_the_colour(run: Run, trained: Path, pictures: Path) -> None:
    files = [pictures / colour / f"{colour}5.png" for colour in ("red", "green", "blue")]
    code, out, _ = run(
        "classify", *files, "--labels", "red, green, blue", "--model", trained, "--json", "--template", "{}"
    )
    assert code == 0
    results = json.loads(out)["results"]
    assert [r["labels"][0]["label"] for r in results] == ["red", "green", "blue"]
    for result in results:
        assert sum(x["probability"] for x in result["labels"]) == pytest.approx(1.0, abs=1e-4)
    _, text, _ = run("classify", files[0], "--labels", "red,green", "--model", trained, "--top", 1)
    assert text.startswith(f"{files[0]}: red ")


def test_classify_skips_what_cannot_be_read_and_says_so(run: Run, trained: Path, pictures: Path) -> None:
    Path("broken.png").write_bytes(b"no picture")
    good = pictures / "red" / "red1.png"
    code, out, err = run("classify", "broken.png", good, "--labels", "red,blue", "--model", trained)
    assert code == 2
    assert "skipped broken.png: cannot be decoded" in err
    assert str(good) in out
    code, _, err = run("classify", "broken.png", "--labels", "red,blue", "--model", trained)
    assert (code, "no readable picture" in err) == (2, True)


def test_labels_from_a_file_and_templates(run: Run, trained: Path, pictures: Path) -> None:
    Path("labels.txt").write_text("red\n\nblue\n")
    options = ("--labels-file", "labels.txt", "--model", trained, "--json")
    code, out, _ = run("classify", pictures / "blue" / "blue0.png", *options, "--template", "{}")
    assert code == 0
    assert [x["label"] for x in json.loads(out)["results"][0]["labels"]] == ["blue", "red"]
    code, _, err = run("classify", pictures / "blue" / "blue0.png", *options, "--template", "no place")
    assert (code, "expected {}" in err) == (2, True)


@pytest.mark.parametrize(("storage", "shards"), [("float32", 1), ("int8", 1), ("float32", 3)])
def test_what_was_indexed_is_found(
    run: Run, trained: Path, pictures: Path, storage: str, shards: int
) -> None:
    options = ["--model", trained, "--storage", storage, "--shards", shards]
    code, out, _ = run("index", pictures, *options, "--json")
    assert code == 0
    assert (json.loads(out)["pictures"], json.loads(out)["shards"]) == (32, shards)
    assert len(list(Path("vlmkernels-index").rglob("*.index"))) == shards
    code, out, _ = run("search", "green", "--template", "{}", "--top", 6, "--json")
    assert code == 0
    found = json.loads(out)["results"]
    assert len(found) == 6
    assert all(Path(x["picture"]).parent.name == "green" for x in found)
    similarities = [x["similarity"] for x in found]
    assert similarities == sorted(similarities, reverse=True)
    _, text, _ = run("search", "green", "--template", "{}", "--top", 1)
    assert text.strip().endswith(found[0]["picture"])


def test_shards_find_the_same_pictures_in_any_number_of_processes(
    run: Run, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    run("index", pictures, "--model", trained, "--output", "one")
    _, out, _ = run("search", "green", "--index", "one", "--top", 9, "--json")
    expected = json.loads(out)["results"]
    run("index", pictures, "--model", trained, "--output", "three", "--shards", 3)
    assert (
        json.loads(Path("one/index.json").read_text())["files"]
        == (json.loads(Path("three/index.json").read_text())["files"])
    )
    _, out, _ = run("search", "green", "--index", "three", "--top", 9, "--json")
    assert json.loads(out)["results"] == expected


@pytest.mark.slow
def test_torchrun_indexes_and_searches_shards(
    run: Run, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    def torchrun(*arguments: object) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        result = subprocess.run(
            [*command, "-m", "vlmkernels", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert json.loads(torchrun("index", pictures, "--model", trained, "--json"))["shards"] == 2
    found = json.loads(torchrun("search", "green", "--top", 5, "--json"))["results"]
    _, out, _ = run("search", "green", "--top", 5, "--json")  # both shards in one process
    assert json.loads(out)["results"] == found
    run("index", pictures, "--model", trained, "--output", "one")
    _, out, _ = run("search", "green", "--index", "one", "--top", 5, "--json")
    assert json.loads(out)["results"] == found


def test_an_index_leaves_out_what_cannot_be_read(
    run: Run, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(pictures / "red", folder)
    (folder / "broken.jpg").write_bytes(b"no picture")
    code, out, err = run("index", folder, "--model", trained)
    assert code == 0
    assert "8 pictures" in out
    assert "broken.jpg" in err


def test_a_damaged_index_is_refused(run: Run, trained: Path, pictures: Path) -> None:
    run("index", pictures, "--model", trained, "--output", "place")
    Path("place/index.json").write_text('{"model": 1}')
    code, _, err = run("search", "red", "--index", "place")
    assert (code, "is damaged" in err) == (2, True)


def test_search_without_an_index_searches_the_emoji(run: Run, trained: Path) -> None:
    code, out, _ = run("search", "red", "--model", trained, "--json")
    assert code == 0
    content = json.loads(out)
    assert content["index"] == "bundled emoji (twemoji)"
    assert len(content["results"]) == 5


def test_eval_on_pairs(run: Run, trained: Path, pictures: Path) -> None:
    code, out, _ = run("eval", "--model", trained, "--data", pictures, "--json")
    assert code == 0
    content = json.loads(out)
    assert content["image_to_text"]["queries"] == 32
    assert content["text_to_image"]["queries"] == 4
    assert content["image_to_text"]["recall"]["R@1"] > 0.9
    _, text, _ = run("eval", "--model", trained, "--data", pictures)
    assert "image to text" in text
    assert "chance 25.00%" in text


def test_eval_on_emoji(run: Run, trained: Path) -> None:
    code, out, _ = run("eval", "--model", trained)
    assert code == 0
    assert "top-1 of 1,914 names" in out
    assert "subgroup, unseen concepts" in out


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_quantized_models_are_used_like_others(run: Run, trained: Path, pictures: Path, scheme: str) -> None:
    options = ["--group-size", 32] if scheme == "w4a16" else []
    code, out, _ = run(
        "quantize", "--model", trained, "--scheme", scheme, "--output", "small", "--json", *options
    )
    assert code == 0
    content = json.loads(out)
    assert content["converted"]
    assert content["bytes"] < content["bytes_before"]
    assert content["cosine_images"] > 0.9
    picture = pictures / "yellow" / "yellow2.png"
    code, out, _ = run(
        "classify", picture, "--labels", "red,yellow", "--model", "small", "--template", "{}", "--json"
    )
    assert code == 0
    assert json.loads(out)["results"][0]["labels"][0]["label"] == "yellow"
    code, _, err = run("quantize", "--model", trained, "--output", "small")
    assert (code, "holds a model already" in err) == (2, True)


def test_systems_lists_papers(run: Run) -> None:
    code, out, _ = run("systems", "--json")
    assert code == 0
    assert {"CLIP", "SigLIP"} <= {system["name"] for system in json.loads(out)}
    _, text, _ = run("systems", "--kind", "no such kind")
    assert "no system of kind" in text


def test_info_names_backends_and_models(run: Run) -> None:
    code, out, _ = run("info", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["backends"]["reference"]["available"]
    assert "ViT-B-32" in content["models"]["known"]
    assert "ViT-B-32" in run("info")[1]


@pytest.mark.skipif(_native.cpu_reason is not None, reason="the CPU module is not built")
def test_peaks_are_measured(run: Run) -> None:
    code, out, _ = run("bench", "--peak", "--seconds", 0.01, "--threads", 1, "--json")
    assert code == 0
    rates = json.loads(out)["rates"]
    assert set(rates) == {"float32", "bfloat16", "int8", "read"}
    assert all(rate["value"] > 0 for rate in rates.values())


def test_option_files(run: Run, tmp_path: Path) -> None:
    def with_file(content: Any, name: str = "o.json") -> tuple[int, str, str]:
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
        return run("bench", "--config", name)

    for content, sentence in (
        ({"peek": True}, "'peek', which is no option"),
        ({"peak": "yes"}, "peak must be true or false"),
        ({"peak": True, "seconds": "long"}, "seconds: could not convert"),
        ([1, 2], "expected names and values, got a list"),
        ("{", "o.json: "),
    ):
        code, _, err = with_file(content)
        assert code == 2
        assert sentence in err
    code, _, err = with_file("peak = true\nseconds = 0.0\n", "o.toml")
    assert code == 2
    expected = "--seconds must lie" if sys.version_info >= (3, 11) else "TOML needs Python 3.11"
    assert expected in err
    code, _, err = with_file({"peak": True, "seconds": 1000})
    assert (code, "got 1000" in err) == (2, True)
    code, _, err = run("bench", "--config", "o.json", "--seconds", "61")
    assert (code, "got 61" in err) == (2, True)  # the command line wins


def test_caption_writes_a_line_per_picture(run: Run, pictures: Path, tmp_path: Path) -> None:
    """A captioner that has seen coloured squares often enough names their colour."""
    folder = tmp_path / "coca"
    options = {
        "embed_dim": 32,
        "vision": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "heads": 2},
        "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 10},
        "decoder_layers": 1,
        "pool_queries": 3,
        "pool_heads": 2,
    }
    code, _, err = run(
        *("train", "--model", "coca-emoji", "--model-options", json.dumps(options), "--data", pictures),
        *("--output", folder, "--epochs", 60, "--batch-size", 16, "--lr", 3e-3, "--vocab-size", 530),
        *("--augment", 0, "--precision", "float32", "--threads", 1, "--no-report", "--val-share", 0),
    )
    assert code == 0, err
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows[-2]["caption"] < rows[0]["caption"] / 4
    files = [pictures / colour / f"{colour}1.png" for colour in ("red", "blue")]
    for method in ("greedy", "beam"):
        code, out, _ = run("caption", *files, "--model", folder, "--method", method)
        assert code == 0
        assert [line.split(": ")[1] for line in out.splitlines()] == ["red", "blue"]
    code, out, _ = run(
        "caption", files[0], tmp_path / "gone.png", "--model", folder, "--json", "--method", "top_p"
    )
    assert code == 2
    content = json.loads(out)
    assert len(content["results"]) == len(content["skipped"]) == 1
    code, _, err = run("caption", files[0], "--model", folder, "--max-length", 11)
    assert code == 2
    assert "at most the context length 10" in err


def test_caption_needs_a_captioner(run: Run, pictures: Path, trained: Path) -> None:
    code, _, err = run("caption", pictures / "red" / "red1.png", "--model", trained)
    assert code == 2
    assert "is a CLIP, which writes no captions" in err
