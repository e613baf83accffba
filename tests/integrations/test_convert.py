# SPDX-License-Identifier: Apache-2.0
"""convert: what it converts and leaves alone, that results and parameters stay, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlmkernels as vk
from vlmkernels.integrations import _attend, convert
from vlmkernels.nn import linear as fused_linear

pytestmark = pytest.mark.usefixtures("ignored_warnings")

DRAWS = 4  # models that `same_training` runs

CAUSAL = torch.full((6, 6), float("-inf")).triu(1)
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] + [True] * 5])

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"attn_mask": CAUSAL.isinf()},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6)},
    "mask per head": {"attn_mask": torch.linspace(-1, 1, 12 * 36).view(12, 6, 6)},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.linspace(-1, 1, 18).view(3, 6)},
    "padding and mask": {"key_padding_mask": PADDING, "attn_mask": CAUSAL.isinf()},
    "padding and causal hint": {"key_padding_mask": PADDING, "attn_mask": CAUSAL.isinf(), "is_causal": True},
    "float padding and mask": {"key_padding_mask": torch.linspace(-1, 1, 18).view(3, 6), "attn_mask": CAUSAL},
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_multi_head_attention_is_torchs(served, same_training, varied, call, batch_first):
    module = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    nn.init.normal_(module.in_proj_bias)
    x = torch.randn(3, 6, 32) if batch_first else torch.randn(6, 3, 32)

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(module, dtype, draw)
        if ours:
            assert convert(twin).converted == {"": "VkMultiheadAttention"}
        masks = {
            k: m.to(dtype) if m is not True and m.is_floating_point() else m for k, m in CALLS[call].items()
        }
        leaf = x.to(dtype).requires_grad_()
        out, weights = twin(leaf, leaf, leaf, need_weights=False, **masks)
        assert weights is None
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *twin.parameters()])]

    same_training(run, "output and gradients")
    assert len(served) == DRAWS


@pytest.mark.parametrize("kdim", [None, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("same_value", [False, True])
def test_cross_attention_is_torchs(served, same_training, varied, kdim, bias, same_value):
    module = nn.MultiheadAttention(32, 4, bias=bias, kdim=kdim, vdim=kdim, batch_first=True)
    x, context, other = torch.randn(2, 5, 32), torch.randn(2, 7, kdim or 32), torch.randn(2, 7, kdim or 32)

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(module, dtype, draw)
        if ours:
            convert(twin)
        key = context.to(dtype)
        out, _ = twin(x.to(dtype), key, key if same_value else other.to(dtype), need_weights=False)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(twin.parameters()))]

    same_training(run, "output and gradients")
    assert len(served) == DRAWS


def test_calls_with_weights_are_torchs(served):
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(3, 6, 32)
    theirs = module(x, x, x, average_attn_weights=False)
    convert(module)
    ours = module(x, x, x, average_attn_weights=False)
    assert not served
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(3, 6, 32), torch.randn(2, 6, 32), torch.randn(3, 6, 32)),
        (torch.randn(6, 32), torch.randn(6, 32), torch.randn(6, 32)),
        (*[torch.randn(3, 6, 32)] * 3, None, False, torch.zeros(5, 6)),
        (*[torch.randn(3, 6, 32)] * 3, None, False, None, True, True),
    ],
    ids=["batches", "unbatched", "mask shape", "hint without mask"],
)
def test_unusual_calls_are_torchs_with_its_errors(served, arguments):
    module = nn.MultiheadAttention(32, 4, batch_first=True)

    def outcome() -> Any:
        call = arguments if len(arguments) > 3 else (*arguments, None, False)
        try:
            return module(*call)[0]
        except (RuntimeError, AssertionError) as error:
            return str(error)

    theirs = outcome()
    convert(module)
    ours = outcome()
    assert not served
    assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def test_torch_runs_where_only_the_reference_would(monkeypatch):
    """float64 has no kernel anywhere: a converted module must not write its scores."""
    monkeypatch.setattr(_attend.ops, "attention", lambda *args, **options: pytest.fail("the reference ran"))
    module = nn.MultiheadAttention(32, 4, batch_first=True).double()
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    theirs = module(x, x, x, need_weights=False, key_padding_mask=PADDING)[0]
    convert(module)
    torch.testing.assert_close(module(x, x, x, need_weights=False, key_padding_mask=PADDING)[0], theirs)


def test_autocast_decides_the_dtype(served):
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    convert(module)
    x = torch.randn(3, 6, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, x, x, need_weights=False, attn_mask=CAUSAL)[0]
    assert out.dtype == torch.bfloat16 and len(served) == 1


def test_dropout_acts_in_training_only(served):
    module = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    convert(module)
    x = torch.randn(3, 6, 32)
    module(x, x, x, need_weights=False)
    module.eval()(x, x, x, need_weights=False)
    assert [call["dropout_p"] for call in served] == [0.5, 0.0]


def timm_model(timm: Any, name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(4)
    size = {"img_size": 64} if "swin" not in name else {"img_size": 64, "window_size": 4}
    model = timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=7, **size)
    for parameter in model.parameters():  # timm starts gates and some projections at zero
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
    return model, torch.randn(2, 3, 64, 64)


TIMM = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
]


@pytest.mark.parametrize("name", TIMM)
def test_timms_attention_trains_as_before(timm, served, same_training, varied, name):
    """Plain, with an attention pool, with rotary positions, with relative position biases."""
    model, images = timm_model(timm, name)

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(model, dtype, draw).eval()
        if ours:
            report = convert(twin)
            assert {f"blocks.{i}.attn" for i in range(2)} <= set(report.converted)
            assert report.left_alone == {}
        out = twin(images.to(dtype))
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in twin.parameters() if p.grad is not None)]

    same_training(run, "output and gradients")
    assert len(served) >= 2 * DRAWS


def test_timm_modules_that_write_their_scores_are_left_alone(timm):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    model.blocks[1].attn.fused_attn = False
    report = convert(model)
    assert list(report.converted) == ["blocks.0.attn"]
    assert "fused_attn is off" in report.left_alone["blocks.1.attn"]


def open_clip_model(custom: bool = False) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(11)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    block = {"block_type": "custom", "qk_norm": True} if custom else {}
    return CLIP(24, CLIPVisionCfg(**vision, **block), CLIPTextCfg(**text, **block))


def open_clip_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 32, 32), torch.randint(1, 50, (4, 12))


@pytest.mark.parametrize("custom", [False, True])
def test_open_clips_model_trains_as_before(open_clip, served, same_training, varied, custom):
    model = open_clip_model(custom)
    images, ids = open_clip_inputs()

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(model, dtype, draw)
        if ours:
            report = convert(twin)
            kind = "VkAttention" if custom else "VkMultiheadAttention"
            assert list(report.converted.values()) == [kind] * 4 and not report.left_alone
        loss = open_clip.loss.ClipLoss()(*twin(images.to(dtype), ids))
        loss.backward()
        return [p.grad for p in twin.parameters()]

    same_training(run)
    assert len(served) == 4 * DRAWS


def test_cosine_attention_is_left_alone(open_clip):
    module = open_clip.transformer.Attention(32, 4, scaled_cosine=True)
    assert "cosine" in convert(module).left_alone[""]


def test_models_of_transformers_change_their_implementation(transformers, served):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}
    )
    model = nn.ModuleDict({"clip": transformers.CLIPModel(config).eval()})
    inputs = {"input_ids": torch.randint(0, 50, (2, 9)), "pixel_values": torch.randn(2, 3, 16, 16)}
    model.clip.text_model.config._attn_implementation = "eager"
    with torch.no_grad():
        before = model.clip(**inputs).logits_per_image
        report = convert(model)
        assert set(report.converted) == {"clip", "clip.text_model", "clip.vision_model"}
        assert model.clip.config._attn_implementation == "vlmkernels"
        after = model.clip(**inputs).logits_per_image
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)  # two layers of roundings
    assert len(served) == 4
    assert convert(model).converted == {}
    report.undo()
    found = [
        m.config._attn_implementation for m in (model.clip, model.clip.text_model, model.clip.vision_model)
    ]
    assert found == ["sdpa", "eager", "sdpa"]


class Block(nn.Module):
    """Attention of a user's own, a linear layer, and torch's attention under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.other = nn.MultiheadAttention(32, 4, batch_first=True)
        self.same = self.other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.same(x, x, x, need_weights=False)[0] + self.other(x, x, x, need_weights=False)[0]


@pytest.fixture
def block() -> nn.Sequential:
    return nn.Sequential(Block(), nn.Linear(32, 32))


X = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(8))


def test_any_forward_that_calls_torchs_function_is_routed(served, block):
    before = block(X)
    report = convert(block)
    assert report.converted == {"0": "VkBlock", "0.other": "VkMultiheadAttention"}
    torch.testing.assert_close(block(X), before)
    assert len(served) == 3
    assert isinstance(block[0], Block) and isinstance(block[0].same, nn.MultiheadAttention)


def test_parameters_hooks_and_state_stay(served, block):
    before = dict(block.named_parameters())
    states = list(block.state_dict())
    seen = []
    block[0].register_forward_hook(lambda *_: seen.append(1))
    report = convert(block, linear=True)
    block(X)
    assert seen == [1]
    assert list(block.state_dict()) == states
    assert all(parameter is before[name] for name, parameter in block.named_parameters())
    report.undo()
    assert all(parameter is before[name] for name, parameter in block.named_parameters())


def test_undoing_gives_the_classes_back(block):
    before = [type(m) for m in block.modules()]
    report = convert(block, linear=True)
    assert [type(m) for m in block.modules()] != before
    report.undo()
    report.undo()
    assert [type(m) for m in block.modules()] == before


def test_a_second_call_converts_what_is_new(block):
    first = convert(block)
    assert convert(block).converted == convert(block).left_alone == {}
    block.append(nn.MultiheadAttention(32, 4))
    second = convert(block)
    assert list(second.converted) == ["2"]
    second.undo()
    assert type(block[0]).__name__ == "VkBlock" and type(block[2]) is nn.MultiheadAttention
    first.undo()
    assert type(block[0]) is Block


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_converted_models_are_copied_and_stored_whole(served, block, how):
    report = convert(block, linear=True)
    if how == "deepcopy":
        twin = copy.deepcopy(block)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(block))
    else:
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    report.undo()
    assert [type(m).__name__ for m in twin.modules()] == [
        "Sequential",
        "VkBlock",
        "VkLinear",
        "VkMultiheadAttention",
        "VkNonDynamicallyQuantizableLinear",
        "VkLinear",
    ]
    torch.testing.assert_close(twin(X), block(X))
    assert len(served) == 3


def test_the_filter_decides(block):
    report = convert(block, linear=True, filter_fn=lambda module, name: name != "0.other")
    assert set(report.converted) == {"0", "0.qkv", "0.other.out_proj", "1"}
    assert report.left_alone == {"0.other": "filter_fn said no"}


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def replaced_forward() -> nn.Module:
    module = nn.MultiheadAttention(32, 4)
    module.forward = lambda *args: None  # type: ignore[method-assign]
    return module


LEFT_ALONE = {
    "appends keys": lambda: nn.MultiheadAttention(32, 4, add_bias_kv=True),
    "appends keys (": lambda: nn.MultiheadAttention(32, 4, add_zero_attn=True),
    "whose forward is its own": lambda: OwnForward(32, 4),
    "is parametrized": lambda: nn.utils.parametrizations.weight_norm(
        nn.MultiheadAttention(32, 4), "in_proj_weight"
    ),
    "replaced on the instance": replaced_forward,
    "is not initialised yet": lambda: nn.LazyLinear(3),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_cannot_be_converted_says_why(reason):
    module = LEFT_ALONE[reason]()
    kind = type(module)
    report = convert(module, linear=True, filter_fn=lambda module, name: name == "")
    assert reason in report.left_alone[""] and type(module) is kind
    assert str(report).splitlines()[0].startswith("0 modules converted")
    assert reason in str(report)


def test_a_module_changed_since_stays(block, caplog):
    report = convert(block, linear=True)
    nn.utils.parametrizations.weight_norm(block[1])
    report.undo()
    assert "VkLinear" in type(block[1]).__name__ and "has been changed since" in caplog.text
    assert type(block[0]) is Block


def test_it_takes_modules_only():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        convert("ViT-B-32")  # type: ignore[arg-type]


def test_linear_layers_run_on_ours_where_it_has_a_kernel(monkeypatch, same_training, varied):
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8, bias=False))
    calls = []
    monkeypatch.setattr(fused_linear, "outruns_torch", lambda x, weight: calls.append(x) or True)

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(model, dtype, draw)
        if ours:
            assert convert(twin, linear=True).converted == {"0": "VkLinear", "2": "VkLinear"}
        out = twin(X.to(dtype))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(twin.parameters()))]

    same_training(run, "output and gradients")
    assert len(calls) == 2 * DRAWS


def test_linear_layers_of_this_machine(block):
    """Whatever kernels there are: the facts that they ask for are given, and results stay."""
    before = block(X)
    convert(block, linear=True)
    torch.testing.assert_close(block(X), before)


def test_torchs_encoder_trains_as_before(served, same_training, varied):
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(model, dtype, draw)
        if ours:
            convert(twin)
        out = twin(X.to(dtype), src_key_padding_mask=PADDING)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(twin.parameters()))]

    same_training(run, "output and gradients")
    assert len(served) == 2 * DRAWS


def test_converted_models_compile_into_one_graph(block):
    before = block(X)
    convert(block, linear=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), before)


def test_quantizing_comes_first(block):
    convert(block, linear=True)
    vk.quantize_(block, "w8a8")
    assert all("forward is its own" in reason for reason in block.quantization_report.left_alone.values())
