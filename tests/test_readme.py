# SPDX-License-Identifier: Apache-2.0
"""README.md and CONTRIBUTING.md: the examples run, the commands parse, the paths exist, the figures have their rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from vlmkernels.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
NO_FIGURES = "| - | - | - |"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[tuple[int, str]]:
    """Code blocks of one language, each with the line at which its code begins."""
    text = text_of(document)
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in _BLOCK.finditer(text) if m[1] == language]


def shell_commands(document: str) -> list[str]:
    """What the document's shell blocks run as `vlmkernels ...`."""
    lines = [line for _, block in blocks(document, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("vlmkernels ")]


def inline_code(document: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text_of(document)))


EXAMPLES = blocks("README.md", "python")


def test_there_are_four_examples() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize(("line", "code"), EXAMPLES, ids=[f"line {line}" for line, _ in EXAMPLES])
def test_an_example_runs(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Padded, so that a traceback points into the document.
    exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_commands_parse(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = shell_commands(document)
    assert commands
    for command in commands:
        try:
            build_parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_subcommands_that_are_mentioned_exist(document: str) -> None:
    mentioned = set(re.findall(r"\bvlmkernels ([a-z]\w*)", "\n".join(inline_code(document))))
    assert mentioned <= set(COMMANDS)


def test_readme_mentions_every_subcommand() -> None:
    words = "\n".join([*inline_code("README.md"), *shell_commands("README.md")])
    assert set(re.findall(r"\bvlmkernels ([a-z]\w*)", words)) == set(COMMANDS)


def test_paths_of_the_layout_exist() -> None:
    layout = text_of("README.md").split("## Layout", 1)[1]
    match = _BLOCK.search(layout)
    assert match is not None
    lines = match[2].splitlines()
    assert len(lines) > 8
    parts = [(line.split()[0], re.findall(r"\((\w+/)\)", line)) for line in lines]
    paths = [path for folder, inside in parts for path in (folder, *(folder + name for name in inside))]
    assert [path for path in paths if not (ROOT / path).is_dir()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_are_mentioned_exist(document: str) -> None:
    folders = ("csrc/", "vlmkernels/", "tests/", "benchmarks/", ".ci/")
    words = [
        w for code in inline_code(document) for w in code.split() if w.startswith(folders) and "<" not in w
    ]
    assert words
    assert [word for word in words if not (ROOT / word).exists()] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = text_of(document)
    headings = {
        "#" + re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if not t.startswith("https://")]
    assert [t for t in targets if t not in headings and not (ROOT / t).exists()] == []


# The speed table: `| name | peer | peer, ms | ours, ms | ratio |`, as the committed results give it.


def table_lines() -> list[str]:
    inside = re.search(r"<!-- speed table -->\n(.*?)<!-- end -->", text_of("README.md"), re.DOTALL)
    assert inside is not None
    return [line for line in inside[1].splitlines() if line.startswith("| `")]


def name_of(line: str) -> str:
    return line.split("`")[1]


def three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"


def committed_lines() -> dict[str, list[str]]:
    """By name, the line that each machine's committed results give."""
    lines: dict[str, list[str]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if {"ms", "peer_ms", "ratio"} <= row.keys():
                times = f"{three_digits(row['peer_ms'])} | {three_digits(row['ms'])} | {row['ratio']:.2f}x"
                lines.setdefault(row["name"], []).append(f"| `{row['name']}` | {row['peer']} | {times} |")
    return lines


def test_figures_of_the_speed_table_are_committed_results() -> None:
    committed, shown = committed_lines(), table_lines()
    wanted = [committed.get(name_of(line), []) for line in shown]
    differ = [
        line
        for line, known in zip(shown, wanted, strict=True)
        if line not in known and (known or not line.endswith(NO_FIGURES))
    ]
    table = "\n".join(known[0] if known else line for line, known in zip(shown, wanted, strict=True))
    assert not differ, f"the committed results give this table:\n{table}"


def test_rows_without_figures_are_cases_of_the_suite() -> None:
    from bench_contrastive import CASES

    waiting = {name_of(line) for line in table_lines() if line.endswith(NO_FIGURES)}
    assert waiting <= {case.name for case in CASES}


def test_no_speed_is_claimed_outside_the_table() -> None:
    text = re.sub(r"<!-- speed table -->.*?<!-- end -->", "", text_of("README.md"), flags=re.DOTALL)
    assert re.findall(r"\b\d+(?:\.\d+)?(?:x\b|\s?(?:ms|GFLOP/s|times faster|times as fast))", text) == []
