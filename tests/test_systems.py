# SPDX-License-Identifier: Apache-2.0
"""The registry of systems."""

import ast
import dataclasses
import json
import pathlib

import pytest

import vlmkernels.models
from vlmkernels import systems
from vlmkernels.cli.systems import register_all
from vlmkernels.nn import SigLipLoss


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(systems, "_SYSTEMS", {})


def test_models_are_registered():
    clip, siglip = systems.get_system("clip"), systems.get_system("SigLIP")
    assert clip.entry is vlmkernels.models.CLIP
    assert clip.kind == "model + pretraining objective + zero-shot inference method"
    assert clip.entry_point == "vlmkernels.models.clip:CLIP"
    assert siglip.entry is SigLipLoss
    assert {"CLIP", "SigLIP"} <= {system.name for system in systems.list_systems()}


def test_register_returns_the_entry_and_lists_by_name(registry):
    @systems.register_system("Zeta", "A paper", "method")
    def zeta(features):
        return features

    @systems.register_system("alpha", "Another paper", "model + method")
    class Alpha:
        """An entry."""

    assert zeta(3) == 3
    assert [system.name for system in systems.list_systems()] == ["alpha", "Zeta"]
    assert [system.name for system in systems.list_systems(kind="Model")] == ["alpha"]
    assert systems.list_systems()[0].entry is Alpha


def test_a_name_is_registered_once(registry):
    def first():
        return 1

    def second():
        return 2

    systems.register_system("One", "P", "k")(first)
    systems.register_system("One", "P", "k")(first)
    with pytest.raises(ValueError, match=r"'ONE' is already registered by .*first"):
        systems.register_system("ONE", "P", "k")(second)


def test_bad_arguments_are_named(registry):
    with pytest.raises(ValueError, match="paper must be a non-empty string, got ''"):
        systems.register_system("X", "", "k")
    with pytest.raises(ValueError, match=r"expected one of \[\], got 'Y'"):
        systems.get_system("Y")


def test_imports_nothing_of_ours():
    tree = ast.parse(pathlib.Path(systems.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not [name for name in imported if name.startswith("vlmkernels")]


def recorded():
    return sorted(systems.claims_file("x").parent.glob("*.json"))


@pytest.mark.parametrize("path", recorded(), ids=lambda path: path.stem)
def test_recorded_claims_belong_to_a_system_and_a_test_that_exists(path):
    register_all()
    rows = json.loads(path.read_text())
    claims = systems.recorded_claims(rows[0]["system"])
    assert [dataclasses.asdict(c) | {"seeds": list(c.seeds)} for c in claims] == rows
    root = pathlib.Path(__file__).parents[1]
    for claim in claims:
        assert systems.claims_file(claim.system) == path
        assert systems.get_system(claim.system)
        file, _, name = claim.test.partition("::")
        assert f"def {name.split('::')[-1].partition('[')[0]}(" in (root / file).read_text()
        assert claim.claim and claim.expected and claim.seen and claim.seeds


def test_a_claim_is_recorded_and_read_back(monkeypatch, tmp_path, pytestconfig, record_claim):
    monkeypatch.setattr(systems, "_RESULTS", tmp_path)
    monkeypatch.setattr(pytestconfig.option, "record_claims", True)
    for seen in ("1 of 2", "2 of 2"):
        record_claim(
            system="A system (v2)",
            claim="it works",
            expected="2 of 2",
            seen=seen,
            holds=seen[0] == "2",
            seeds=[3],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a-system-v2.json"]
    (claim,) = systems.recorded_claims("A system (v2)")
    assert (claim.seen, claim.holds, claim.seeds) == ("2 of 2", True, (3,))
    assert claim.test.endswith("test_systems.py::test_a_claim_is_recorded_and_read_back")
