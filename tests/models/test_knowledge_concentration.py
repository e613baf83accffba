# SPDX-License-Identifier: Apache-2.0
"""Knowledge Concentration: counts, identities and memory of the head; distillation from specialists on emoji."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from emoji_runs import Pictures, fit
from largest_tensor import LargestTensor

from vlmkernels.data import emoji
from vlmkernels.models.knowledge_concentration import (
    CONFIG_EMOJI,
    KnowledgeConcentration,
    SparseTargets,
    StructurallyConnectedHead,
    average_precision,
    concentrated_targets,
    multi_teacher_bce,
)
from vlmkernels.models.training import Concept, TrainingFacts

SIZES = (5, 3, 7)


@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ({"s1": 4096, "shared": 512}, 57_491_456),  # (a)
        ({"s1": 4096}, 97_337_344),  # (b)
        ({"s1": 512, "first": "sc"}, 66_928_640),  # (c)
        ({"s1": 4096, "shared": 256}, 77_414_400),  # (d)
    ],
)
def test_weight_counts_of_the_four_layouts(layout, count, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", lambda weight, std: weight)  # counts need no values
    head = StructurallyConnectedHead(1024, s2=512, vertical_sizes=(5000,) * 20, bias=False, **layout)
    assert head.weight_count() == count


@pytest.mark.parametrize("first", ["fc", "sc"])
def test_structural_connection_is_a_dense_layer_with_a_block_mask(first):
    head = StructurallyConnectedHead(6, 8, 4, SIZES, first=first, pace=None)
    x = torch.randn(5, 6)
    hidden = head.hidden(x)
    assert hidden.shape == (3, 5, 4)
    dense = torch.block_diag(
        *[head.weight[a:b].detach() for a, b in zip(head.offsets, head.offsets[1:], strict=False)]
    )
    assert torch.allclose(head(x), hidden.transpose(0, 1).flatten(1) @ dense.T, atol=1e-5)
    if first == "sc":
        blocks = torch.block_diag(*head.layer2_weight.detach())
        expected = F.relu(F.relu(head.layer1(x)) @ blocks.T + head.layer2_bias.flatten())
        assert torch.allclose(hidden.transpose(0, 1).flatten(1), expected, atol=1e-5)


def test_one_vertical_and_all_shared_are_fully_connected():
    whole = StructurallyConnectedHead(6, 8, 4, (9,), pace=None)
    shared = StructurallyConnectedHead(6, 8, 4, (9,), shared=4, pace=None)
    assert whole.weight_count() == shared.weight_count()
    x = torch.randn(5, 6)
    hidden = StructurallyConnectedHead(6, 8, 4, SIZES, shared=4).hidden(x)
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])
    partly = StructurallyConnectedHead(6, 8, 4, SIZES, shared=1).hidden(x)
    assert torch.equal(partly[0, :, 0], partly[1, :, 0]) and not torch.equal(partly[0, :, 1], partly[1, :, 1])


def test_golden_value_of_the_cross_entropy():
    loss = multi_teacher_bce(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.9, 0.0, 0.4]]))
    assert loss.item() == pytest.approx(1.41426668, rel=1e-6)
    logits, hard = torch.randn(4, 6), F.one_hot(torch.tensor([0, 2, 5, 1]), 6).float()
    expected = F.binary_cross_entropy_with_logits(logits, hard, reduction="sum") / 4
    assert torch.allclose(multi_teacher_bce(logits, hard), expected)


def test_targets_keep_the_largest_inside_the_vertical():
    probs = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.2, 0.99, 0.99], [0.4, 0.6, 0.5, 0.99, 0.99, 0.99, 0.99]])
    offsets = torch.tensor([0, 5, 8, 15])
    found = concentrated_targets(probs, torch.tensor([0, 1]), offsets, 2).dense(15)
    expected = torch.zeros(2, 15)
    expected[0, 0], expected[0, 2], expected[1, 6], expected[1, 7] = 0.9, 0.8, 0.6, 0.5
    assert torch.equal(found, expected)


def test_a_large_k_keeps_all_scores_of_the_vertical():
    probs, offsets = torch.rand(4, 7), torch.tensor([0, 5, 8, 15])
    found = concentrated_targets(probs, torch.tensor([2, 0, 1, 2]), offsets, 100).dense(15)
    assert torch.equal(found[0, 8:], probs[0]) and found[0, :8].abs().max() == 0
    assert torch.equal(found[2, 5:8], probs[2, :3]) and found[2].count_nonzero() == 3


@pytest.mark.parametrize("pace", ["vertical", "class"])
def test_scaled_logits_have_unit_mean_square(pace):
    head = StructurallyConnectedHead(6, 8, 4, SIZES, pace=pace)
    y = head(torch.randn(3, 6))
    for a, b in zip(head.offsets, head.offsets[1:], strict=False):
        assert torch.allclose(y[:, a:b].square().mean(1), torch.ones(3), atol=5e-3)
    assert head.gamma.requires_grad and head.gamma.numel() == (3 if pace == "vertical" else 15)
    ten = StructurallyConnectedHead(6, 8, 4, SIZES, pace_init="10")
    assert torch.allclose(ten.gamma, torch.full((3,), 10.0), atol=0.01)


@pytest.mark.parametrize("options", [{}, {"shared": 2, "class_bias": True}, {"first": "sc", "pace": None}])
def test_the_loss_by_verticals_equals_the_dense_one(options):
    torch.manual_seed(0)
    head = StructurallyConnectedHead(6, 8, 4, SIZES, **options)
    x, vertical = torch.randn(5, 6), torch.tensor([0, 2, 1, 2, 0])
    targets = concentrated_targets(torch.rand(5, 7), vertical, torch.tensor(head.offsets), 3)
    gradients = []
    for loss in (head.loss(x, targets), multi_teacher_bce(head(x), targets.dense(15))):
        head.zero_grad()
        loss.backward()
        gradients.append((loss.detach(), [p.grad.clone() for p in head.parameters()]))
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-5)
    for one, other in zip(gradients[0][1], gradients[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_logits_of_all_classes_never_exist():
    sizes, batch = (250,) * 20, 256
    head = StructurallyConnectedHead(16, 16, 8, sizes)
    x, vertical = torch.randn(batch, 16), torch.arange(batch) % 20
    targets = concentrated_targets(torch.rand(batch, 250), vertical, torch.tensor(head.offsets), 10)
    with LargestTensor() as seen:
        head.loss(x, targets).backward()
    assert seen.elements <= batch * 250  # a twentieth of [B, N]
    with LargestTensor() as dense:
        multi_teacher_bce(head(x), targets.dense(5000)).backward()
    assert dense.elements >= batch * 5000


_MEASURE = """
import resource, sys, torch
from vlmkernels.models.knowledge_concentration import *
torch.set_num_threads(1)
torch.manual_seed(0)
batch, sizes = 256, (5000,) * 20
head = StructurallyConnectedHead(64, 64, 32, sizes)
x, vertical = torch.randn(batch, 64), torch.arange(batch) % 20
targets = concentrated_targets(torch.rand(batch, 5000), vertical, torch.tensor(head.offsets), 100)
small = StructurallyConnectedHead(64, 64, 32, (50,) * 20)  # what torch loads at its first step is no part of this
small.loss(x, concentrated_targets(torch.rand(batch, 50), vertical, torch.tensor(small.offsets), 10)).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "verticals":
    loss = head.loss(x, targets)
else:
    loss = multi_teacher_bce(head(x), targets.dense(100_000))
loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, float(loss.detach()))
"""


@pytest.mark.slow
def test_a_hundred_thousand_classes_fit_in_bounded_memory(record_claim):
    seen = {}
    for way in ("verticals", "dense"):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, way], capture_output=True, text=True, check=True, timeout=300
        )
        seen[way] = [float(x) for x in done.stdout.split()]
    (ours, loss), (dense, dense_loss) = seen["verticals"], seen["dense"]
    assert loss == pytest.approx(dense_loss, rel=1e-4)
    holds = ours < dense / 5
    record_claim(
        system="Knowledge Concentration",
        claim="a step over 100,000 classes needs no [B, N] memory",
        expected="less than a fifth of the memory of the dense loss, batch 256, 20 verticals of 5,000 classes",
        seen=f"{ours:.0f} MiB beside {dense:.0f} MiB for forward and backward, equal losses ({loss:.1f})",
        holds=holds,
        seeds=[0],
    )
    assert holds


def test_average_precision_equals_sklearn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    scores, relevant = torch.rand(30, 4), torch.rand(30, 4) > 0.6
    expected = [
        metrics.average_precision_score(relevant[:, c].numpy(), scores[:, c].numpy()) for c in range(4)
    ]
    assert average_precision(scores, relevant).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def model() -> KnowledgeConcentration:
    torch.manual_seed(0)
    return KnowledgeConcentration(CONFIG_EMOJI.override(vertical_sizes=(4, 3), with_specialists=True))


def test_specialists_teach_only_their_vertical_and_are_not_taught(model):
    images, vertical = torch.randn(3, 3, 32, 32), torch.tensor([1, 0, 1])
    classes = torch.tensor([[4, 6], [0, 2], [4, -1]])
    model.student_loss(images, vertical, classes).backward()
    assert all(p.grad is None for p in model.specialists.parameters())
    assert all(p.grad is not None for p in model.visual.parameters())
    model.zero_grad(set_to_none=True)
    model.specialist_loss(images[:1], vertical[:1], classes[:1]).backward()
    assert all(p.grad is None for p in model.specialists[0].parameters())
    assert all(p.grad is not None for p in model.specialists[1].parameters())


def test_specialist_loss_is_the_sigmoid_cross_entropy_of_nested_labels(model):
    model.eval()
    images, vertical = torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    classes = torch.tensor([[4, 6], [0, 2]])
    parts = [
        F.binary_cross_entropy_with_logits(
            model.specialists[v](images[i : i + 1]), torch.tensor([hard]), reduction="sum"
        )
        for i, (v, hard) in enumerate([(1, [1.0, 0.0, 1.0]), (0, [1.0, 0.0, 1.0, 0.0])])
    ]
    found = model.specialist_loss(images, vertical, classes)
    assert torch.allclose(found, torch.stack(parts).mean(), rtol=1e-4)


def test_hard_targets_ask_no_specialist(model):
    hard = KnowledgeConcentration(CONFIG_EMOJI.override(vertical_sizes=(4, 3), targets="hard"))
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([[4, 6], [0, -1]])
    hard.eval()
    dense = torch.zeros(2, 7)
    dense[0, 4] = dense[0, 6] = dense[1, 0] = 1.0
    expected = multi_teacher_bce(hard(images), dense)
    assert torch.allclose(hard.student_loss(images, torch.tensor([1, 0]), classes), expected, rtol=1e-4)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="shared units need first='fc'"):
        StructurallyConnectedHead(4, 4, 4, SIZES, first="sc", shared=2)
    with pytest.raises(ValueError, match=r"shared lie in \[0, s2\]"):
        StructurallyConnectedHead(4, 4, 4, SIZES, shared=5)
    with pytest.raises(ValueError, match="expected teacher_probs"):
        concentrated_targets(torch.rand(2, 3), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="expected targets of 2 rows, got 1"):
        model.head.loss(torch.zeros(2, 128), SparseTargets(torch.zeros(1, 1).long(), torch.zeros(1, 1)))
    with pytest.raises(ValueError, match="vertical_sizes are not known"):
        KnowledgeConcentration(CONFIG_EMOJI)(torch.zeros(1, 3, 32, 32))


def facts_of_emoji(entries) -> TrainingFacts:
    data = emoji.load("noto")
    concepts = [
        Concept(e.index, emoji.spoken_name(e), data.groups.index(e.group), data.subgroups.index(e.subgroup))
        for e in {e.index: e for e in entries}.values()
    ]
    return TrainingFacts(1, 1, 1, tuple(concepts), data.groups, data.subgroups)


def test_verticals_come_from_the_groups_of_the_data():
    entries = [e for e in emoji.load("noto").emojis if e.base == e.index]
    model = KnowledgeConcentration(CONFIG_EMOJI)
    model.prepare_training(facts_of_emoji(entries))
    config = model.config
    assert len(config.vertical_sizes) == len(emoji.load("noto").groups) == len(model.specialists)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, len(config.class_names))
    wave = next(e for e in entries if e.name == "waving hand")
    subgroup, name = model.label_classes[wave.index].tolist()
    assert config.class_names[subgroup] == wave.subgroup and config.class_names[name] == "waving hand"
    again = KnowledgeConcentration(config.override(with_specialists=False))
    assert again.head.classes == model.head.classes and len(again.specialists) == 0


@pytest.mark.slow
def test_soft_targets_and_self_pacing_on_an_unseen_style(record_claim):
    emojis = emoji.load()
    train = Pictures(emojis.select(styles=("noto", "openmoji"), base_only=True), 32)
    test = Pictures(emojis.select(styles="twemoji", base_only=True), 32)
    facts = facts_of_emoji([*train.entries, *test.entries])

    def new(**options) -> KnowledgeConcentration:
        torch.manual_seed(0)
        model = KnowledgeConcentration(CONFIG_EMOJI.override(**options))
        model.prepare_training(facts)
        return model

    teacher = new()
    labels = torch.tensor([e.index for e in train.entries])
    starts = torch.tensor(teacher.head.offsets)

    def learn(model: KnowledgeConcentration, steps: int, phase: str) -> None:
        generator = torch.Generator().manual_seed(1)

        def losses(step: int):
            rows = torch.randint(len(train), (128,), generator=generator)
            classes = model.label_classes[labels[rows]]
            vertical = torch.bucketize(classes[:, 1].contiguous(), starts, right=True) - 1
            return {"loss": getattr(model, phase)(train.views(rows, generator), vertical, classes)}

        fit(model, losses, steps, lr=2e-3)

    learn(teacher, 220, "specialist_loss")
    truth = teacher.label_classes[torch.tensor([e.index for e in test.entries])]
    relevant = torch.zeros(len(test), teacher.head.classes, dtype=torch.bool)
    relevant.scatter_(1, truth, True)
    images = test.plain()
    precision = {}
    for name, options in (
        ("soft, paced", {}),
        ("hard, paced", {"targets": "hard"}),
        ("soft, not paced", {"pace": "none"}),
    ):
        student = new(**options)
        student.specialists = teacher.specialists
        learn(student, 200, "student_loss")
        with torch.no_grad():
            scores = torch.cat([student(part) for part in images.split(300)])
        found = average_precision(scores, relevant)
        offsets = student.head.offsets
        precision[name] = torch.stack([found[a:b].nanmean() for a, b in itertools.pairwise(offsets)])
    seen = "; ".join(f"{n}: {100 * p.mean():.1f}% +- {100 * p.std():.1f}" for n, p in precision.items())
    seen = f"mean average precision over {len(starts) - 1} groups and its deviation: {seen}"
    soft, hard, plain = precision.values()
    record_claim(
        system="Knowledge Concentration",
        claim="soft targets of specialists teach more than hard labels",
        expected="higher average precision on a held-out drawing style",
        seen=seen,
        holds=bool(soft.mean() > hard.mean()),
        seeds=[0],
    )
    record_claim(
        system="Knowledge Concentration",
        claim="self-pacing narrows the spread between verticals",
        expected="a smaller deviation of average precision across groups, relative to its mean",
        seen=seen,
        holds=bool(soft.std() / soft.mean() < plain.std() / plain.mean()),
        seeds=[0],
    )
    assert soft.mean() > 2 * relevant.float().mean()
