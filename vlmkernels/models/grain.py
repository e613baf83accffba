# SPDX-License-Identifier: Apache-2.0
"""GRAIN: a CLIP that learns to ground region descriptions, by a small decoder with queries on its image tokens.

Mahajan et al., "Grounding Descriptions in Images informs Zero-Shot Visual Recognition" (2024); shapes, losses and
their weights as in the authors' code. Learned queries give boxes and region embeddings; each region that is matched to
an annotated box must pick its own description among all descriptions of the batch, and one further query gives the
image embedding for the caption loss. Annotations (boxes of an open-vocabulary detector, descriptions of a multimodal
language model) are made offline; `collage` makes exact ones of plain pairs.

Shapes: images `[B, 3, S, S]` float, normalised; ids `[B, L]`; boxes `[B, T, 4]` as (centre x, centre y, width,
height) in [0, 1], T at most the number of queries Q; descriptions `[B, T, L]`; available `[B, T]` bool.

As in the code, and not as one would guess: the image embedding is a decoder query, not the class token; the matching
weighs 5 and 2, the loss 1 and 1, times 1.5 (the code divides by two thirds); box losses of the intermediate layers
never enter the sum (`auxiliary_loss` adds them); the mean of a class's descriptions is not normalised again.
Degenerate boxes are dropped once, before boxes and descriptions are counted: the code drops them from the boxes only,
and its description indices slip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._checks import check_images, freeze_lists, require_positive, require_share
from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_model
from vlmkernels.models._text import TextTower
from vlmkernels.models._vit import PlainViT
from vlmkernels.models.clip import TextConfig, VisionConfig
from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import LayerNorm
from vlmkernels.ops.contrastive import clip_loss, info_nce
from vlmkernels.ops.topk import topk_similarity
from vlmkernels.systems import register_system

__all__ = [
    "Grain",
    "GrainConfig",
    "best_boxes",
    "box_iou",
    "collage",
    "description_prompt",
    "generalized_iou",
    "match_boxes",
    "region_description_loss",
]


@dataclass(frozen=True)
class GrainConfig(ModelConfig):
    """GRAIN's sizes and losses; the defaults are the published ViT-B/16.

    Attributes:
        embed_dim: Width E of the joint space.
        vision: Image tower (a plain ViT with a norm on queries and keys).
        text: Text tower, for captions and descriptions.
        num_queries: Region queries Q; the image query comes on top.
        decoder_width: Width of the decoder.
        decoder_layers: Its layers.
        decoder_heads: Its heads.
        decoder_mlp_width: Hidden width of its MLPs.
        dropout: Dropout in the decoder.
        match_weights: Weights of L1 and -GIoU in the matching.
        contrastive_weight: Weight of the image-caption loss.
        box_weight: Weight of the box losses.
        description_weight: Weight of the region-description loss.
        box_factor: Factor of the box losses in the code, 1 / (2 / 3).
        auxiliary_loss: Add the box losses of the intermediate layers, which the code computes and drops.
        init_logit_scale: Initial `logit_scale`, in log.
        name: Name of the configuration, for reports.
    """

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(224, 12, 768, 16))
    text: TextConfig = field(default_factory=TextConfig)
    num_queries: int = 5
    decoder_width: int = 512
    decoder_layers: int = 6
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    dropout: float = 0.1
    match_weights: tuple[float, float] = (5.0, 2.0)
    contrastive_weight: float = 1.0
    box_weight: float = 1.0
    description_weight: float = 1.0
    box_factor: float = 1.5
    auxiliary_loss: bool = False
    init_logit_scale: float = 2.659260036932778  # ln(1 / 0.07)
    name: str = ""

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "embed_dim", "num_queries", "decoder_width", "decoder_layers", "decoder_heads")
        require_share(self, "dropout")


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return centre - half, centre + half


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection, union and smallest enclosing area of boxes that broadcast against each other."""
    (a0, a1), (b0, b1) = _corners(first), _corners(second)
    inner = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
    outer = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
    return inner, first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - inner, outer


def box_iou(first: Tensor, second: Tensor) -> Tensor:  # [..., 4], [..., 4]
    """Intersection over union of boxes (cx, cy, w, h), which broadcast; 0 where both are empty."""
    inner, union, _ = _overlap(first, second)
    return inner / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:  # [..., 4], [..., 4]
    """`IoU - (enclosing - union) / enclosing`, in (-1, 1] (Rezatofighi et al. 2019); boxes broadcast.

    Differentiable where the boxes do not overlap, too.
    """
    inner, union, outer = _overlap(first, second)
    tiny = torch.finfo(union.dtype).tiny
    return inner / union.clamp(min=tiny) - (outer - union) / outer.clamp(min=tiny)


def match_boxes(cost: Tensor) -> Tensor:  # [T, Q]
    """Assigns each of T rows its own of Q >= T columns so that the summed cost is smallest (Hungarian algorithm).

    Shortest augmenting paths with potentials (Kuhn 1955, Munkres 1957), O(T^2 Q); not differentiable.

    Returns:
        int64 `[T]`, the column of every row.

    Raises:
        ValueError: If there are more rows than columns, or the cost is not finite.

    Example:
        >>> match_boxes(torch.tensor([[1.0, 2.0, 9.0], [1.0, 4.0, 9.0]])).tolist()
        [1, 0]
    """
    rows, columns = cost.shape
    if rows > columns or not bool(cost.isfinite().all()):
        raise ValueError(
            f"match_boxes: cost must be finite [T, Q] with T at most Q, got {list(cost.shape)}"
            f"{'' if rows > columns else ' with values that are not finite'}"
        )
    costs: list[list[float]] = cost.tolist()
    # Rows and columns count from 1; column 0 holds the row that is being placed.
    row_potential, column_potential = [0.0] * (rows + 1), [0.0] * (columns + 1)
    row_of, before = [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        distance, done = [float("inf")] * (columns + 1), [False] * (columns + 1)
        while row_of[column] != 0:
            done[column] = True
            here, nearest, step = row_of[column], 0, float("inf")
            for j in range(1, columns + 1):
                if done[j]:
                    continue
                reduced = costs[here - 1][j - 1] - row_potential[here] - column_potential[j]
                if reduced < distance[j]:
                    distance[j], before[j] = reduced, column
                if distance[j] < step:
                    step, nearest = distance[j], j
            for j in range(columns + 1):
                if done[j]:
                    row_potential[row_of[j]] += step
                    column_potential[j] -= step
                else:
                    distance[j] -= step
            column = nearest
        while column:
            row_of[column], column = row_of[before[column]], before[column]
    found = torch.zeros(rows, dtype=torch.int64)
    for j in range(1, columns + 1):
        if row_of[j]:
            found[row_of[j] - 1] = j - 1
    return found.to(cost.device)


def region_description_loss(
    regions: Tensor,  # [m, E]
    descriptions: Tensor,  # [M, E]
    index: Tensor,  # [m]
    logit_scale: Tensor | float,
) -> Tensor:
    """Cross-entropy of `scale * norm(regions) norm(descriptions)^t`, region to description only.

    Args:
        regions: Matched regions `[m, E]`.
        descriptions: All descriptions of this process `[M, E]`.
        index: int64 `[m]`, each region's own description.
        logit_scale: Number or 0-d tensor, already exponentiated.

    Returns:
        The mean over regions; NaN without regions.
    """
    regions = F.normalize(regions.float(), dim=-1)
    descriptions = F.normalize(descriptions.float(), dim=-1)
    return info_nce(regions, descriptions, logit_scale, positives=index)


def best_boxes(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    limit: int = 5,
    threshold: float = 0.3,
) -> Tensor:
    """Indices of a detector's at most `limit` best boxes with a score of at least `threshold`, best first."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"best_boxes: expected boxes [N, 4] and scores [N], got {list(boxes.shape)} and {list(scores.shape)}"
        )
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    # One query against N one-dimensional rows: equal scores keep the detector's order.
    values, order = topk_similarity(scores.new_ones(1, 1), scores.view(-1, 1), min(limit, len(scores)))
    return order[0][values[0] >= threshold]


def description_prompt(template: str, name: str, description: str) -> str:
    """Words "template(name) which has/is description".

    The code asks `startswith("a")`, which takes "antlers" for an article; here the article must be a word.

    Example:
        >>> description_prompt("a photo of a {}", "deer", "antlers")
        'a photo of a deer which has antlers'
        >>> description_prompt("a photo of a {}", "deer", "a forest animal")
        'a photo of a deer which is a forest animal'
    """
    verb = "is" if description.split(" ", 1)[0].lower() in ("a", "an", "the") else "has"
    return f"{template.format(name)} which {verb} {description}"


class DecoderLayer(nn.Module):
    """DETR's pre-norm decoder layer: self-attention, cross-attention, MLP.

    The learned query embedding is added to queries and keys of the self-attention and to the queries of the
    cross-attention; the memory has no positions added.

    Args:
        width: Width D.
        heads: Heads of both attentions.
        mlp_width: Hidden width of the ReLU MLP.
        dropout: Dropout on attention weights, hidden units and branches.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.self_attn = MultiheadAttention(width, heads, dropout=dropout)
        self.cross_attn = MultiheadAttention(width, heads, dropout=dropout)
        self.linear1, self.linear2 = Linear(width, mlp_width), Linear(mlp_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, query: Tensor) -> Tensor:  # [B, Q, D], [B, N, D], [B, Q, D]
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y + query, y + query, y))
        x = x + self.dropout(self.cross_attn(self.norm2(x) + query, memory))
        y = self.dropout(F.relu(self.linear1(self.norm3(x))))
        return x + self.dropout(self.linear2(y))


@register_system(
    "GRAIN",
    "Grounding Descriptions in Images informs Zero-Shot Visual Recognition",
    "model + pretraining objective",
)
class Grain(nn.Module):
    """Image tower, query decoder, text tower.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("grain-emoji")
        >>> boxes, regions = model.detect(torch.zeros(2, 3, 64, 64))
        >>> boxes.shape, regions.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5, 128]))
    """

    def __init__(self, config: GrainConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GrainConfig()
        self.tokenizer_state: dict[str, Any] | None = None
        width = config.decoder_width
        self.visual = PlainViT(config.vision, qk_norm=True)
        self.memory_proj = nn.Linear(config.vision.width, width, bias=False)
        self.memory_norm = LayerNorm(width)
        self.query_embed = nn.Parameter(torch.randn(config.num_queries + 1, width))
        self.decoder = nn.ModuleList(
            DecoderLayer(width, config.decoder_heads, config.decoder_mlp_width, config.dropout)
            for _ in range(config.decoder_layers)
        )
        self.decoder_norm = LayerNorm(width)
        self.box_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        self.region_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        self.image_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))

    def decode(self, images: Tensor) -> list[Tensor]:  # [B, 3, S, S]
        """Returns each decoder layer's normalised output `[B, Q + 1, D]`, the image query last."""
        check_images("Grain.decode", images, self.config.vision.image_size)
        memory = self.memory_norm(self.memory_proj(self.visual(images)))
        query = self.query_embed.expand(len(images), -1, -1)
        x, outputs = torch.zeros_like(query), []
        for layer in self.decoder:
            x = layer(x, memory, query)
            outputs.append(self.decoder_norm(x))
        return outputs

    def _boxes(self, hidden: Tensor) -> Tensor:
        # Coordinates need more than the eight bits that bfloat16 has.
        return self.box_head(hidden[:, :-1]).float().sigmoid()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Encodes images to `[B, E]`: the last query of the decoder, projected."""
        features = self.decode(images)[-1][:, -1] @ self.image_projection
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Encodes captions or descriptions `[B, L]` to `[B, E]`."""
        features = self.text(ids)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns boxes `[B, Q, 4]` (cx, cy, w, h) and normalised region embeddings `[B, Q, E]`."""
        hidden = self.decode(images)[-1]
        regions = hidden[:, :-1] @ self.region_projection
        return self._boxes(hidden), F.normalize(regions.float(), dim=-1)

    @torch.no_grad()
    def match(self, boxes: Tensor, targets: Tensor, available: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matches predicted boxes `[B, Q, 4]` to the available targets `[B, T, 4]`, image by image.

        Returns:
            int64 `(image, query, target)`, `[m]` each, targets in their order.
        """
        l1_weight, iou_weight = self.config.match_weights
        l1 = (boxes[:, None] - targets[:, :, None]).abs().sum(-1)
        cost = (l1_weight * l1 - iou_weight * generalized_iou(boxes[:, None], targets[:, :, None])).cpu()
        image, target = available.nonzero().unbind(1)
        query = [
            match_boxes(cost[b][real]) for b, real in enumerate(available.cpu()) if bool(real.any())
        ] or [torch.zeros(0, dtype=torch.int64)]
        return image, torch.cat(query).to(boxes.device), target

    def forward(
        self,
        images: Tensor,  # [B, 3, S, S]
        caption_ids: Tensor,  # [B, L]
        description_ids: Tensor,  # [B, T, L]
        boxes: Tensor,  # [B, T, 4]
        available: Tensor,  # [B, T]
        *,
        group: Any = None,
    ) -> dict[str, Tensor]:
        """Computes the three losses of a batch with region annotations.

        Args:
            images: Normalised `[B, 3, S, S]`.
            caption_ids: `[B, L]`.
            description_ids: `[B, T, L]`, one description per slot.
            boxes: `[B, T, 4]`, (cx, cy, w, h) in [0, 1], transformed together with the image's crop.
            available: Bool `[B, T]`, True = the slot holds an annotation.
            group: Process group over which captions are compared; descriptions stay on their rank.

        Returns:
            `loss` and its parts `l_ic`, `l_box`, `l_rd`, and `logit_scale`.

        Raises:
            ValueError: If shapes do not fit, or an image has more annotations than there are queries.
        """
        count, slots = available.shape
        shapes = (tuple(boxes.shape) == (count, slots, 4), description_ids.shape[:2] == available.shape)
        if not all(shapes) or len(images) != count or slots > self.config.num_queries:
            raise ValueError(
                f"Grain: expected boxes [B, T, 4], description_ids [B, T, L] and available [B, T] with T at most "
                f"{self.config.num_queries}, got {list(boxes.shape)}, {list(description_ids.shape)} and "
                f"{list(available.shape)} for {len(images)} images"
            )
        # Once, before boxes and descriptions are counted, so that indices of descriptions cannot slip.
        available = available & (boxes[..., 2:] > 0).all(-1)
        outputs = self.decode(images)
        scale = self.logit_scale.exp()
        image = F.normalize((outputs[-1][:, -1] @ self.image_projection).float(), dim=-1)
        caption = self.encode_text(caption_ids, normalize=True)
        losses = {"l_ic": clip_loss(image, caption, scale, group=group)}

        predicted = self._boxes(outputs[-1])
        where, query, target = self.match(predicted, boxes, available)
        losses["l_box"] = self._box_loss(predicted[where, query], boxes[where, target])
        if self.config.auxiliary_loss:
            for hidden in outputs[:-1]:
                earlier = self._boxes(hidden)
                where_, query_, target_ = self.match(earlier, boxes, available)
                losses["l_box"] = losses["l_box"] + self._box_loss(
                    earlier[where_, query_], boxes[where_, target_]
                )
        if len(where):
            descriptions = self.encode_text(description_ids[available])
            regions = outputs[-1][where, query] @ self.region_projection
            # `match` lists the targets in the order in which `available` lists the descriptions.
            own = torch.arange(len(where), device=images.device)
            losses["l_rd"] = region_description_loss(regions, descriptions, own, scale)
        else:
            losses["l_rd"] = 0.0 * outputs[-1].float().sum()
        c = self.config
        total = c.contrastive_weight * losses["l_ic"] + c.box_weight * losses["l_box"]
        return {
            "loss": total + c.description_weight * losses["l_rd"],
            **losses,
            "logit_scale": scale.detach(),
        }

    def _box_loss(self, predicted: Tensor, targets: Tensor) -> Tensor:  # [m, 4], [m, 4]
        count = max(len(targets), 1)
        l1 = (predicted - targets).abs().sum() / count
        return self.config.box_factor * (l1 + (1 - generalized_iou(predicted, targets)).sum() / count)

    @torch.no_grad()
    def class_features(self, ids: Sequence[Tensor], *, renormalize: bool = False) -> Tensor:
        """Zero-shot classifier: per class the mean of the normalised features of its prompts.

        Args:
            ids: Per class `[P, L]`: every template with every description (`description_prompt`); P may differ.
            renormalize: Bring the means to length 1, which the paper's code does not: a class whose descriptions
                disagree then counts less.

        Returns:
            `[C, E]`, for `vk.topk_similarity` with the normalised image embeddings.
        """
        means = torch.stack([self.encode_text(prompts, normalize=True).mean(0) for prompts in ids])
        return F.normalize(means, dim=-1) if renormalize else means

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamps `logit_scale` to [0, ln 100] in place."""
        self.logit_scale.clamp_(0.0, 4.6052)


@dataclass
class Collage:
    """Canvases made of pictures: what `Grain.forward` takes, but for the texts.

    Attributes:
        images: `[C, 3, S, S]`.
        boxes: `[C, G, 4]`, (cx, cy, w, h) in [0, 1].
        members: int64 `[C, G]`, which picture each box shows.
        available: Bool `[C, G]`.
    """

    images: Tensor
    boxes: Tensor
    members: Tensor
    available: Tensor


def collage(images: Tensor, background: Tensor, *, scale: tuple[float, float] = (0.3, 0.5)) -> Collage:
    """Pastes pictures by fours into the quarters of canvases of their own size, at random sizes and places.

    A region annotation of plain image-text pairs that is exact: boxes are those of the pasted pictures. One picture
    in six is left out, so that canvases differ in their number of objects. Draws from torch's generator.

    Args:
        images: Normalised `[B, 3, S, S]`; what does not fill a canvas of four is left out.
        background: Normalised colour of the canvases, `[3]`.
        scale: Smallest and largest side of a picture, as a share of the canvas; at most a half.

    Raises:
        ValueError: If there are fewer than four pictures, or a scale is above a half.
    """
    if len(images) < 4 or not 0 < scale[0] <= scale[1] <= 0.5:
        raise ValueError(
            f"collage: expected at least 4 images and a scale within (0, 0.5], got {len(images)} and {scale}"
        )
    canvases = len(images) // 4
    device, side = images.device, images.shape[-1]
    members = torch.randperm(len(images), device=device)[: 4 * canvases].view(canvases, 4)
    available = torch.rand(canvases, 4, device=device) > 1 / 6
    available[:, 0] |= ~available.any(1)
    size = scale[0] + (scale[1] - scale[0]) * torch.rand(canvases, 4, 1, device=device)
    quarter = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]], device=device)
    corner = quarter + (0.5 - size) * torch.rand(canvases, 4, 2, device=device)
    boxes = torch.cat([corner + size / 2, size, size], -1)
    canvas = background.view(1, 3, 1, 1).expand(canvases, 3, side, side).to(images.dtype)
    for slot in range(4):
        centre, extent = boxes[:, slot, :2], boxes[:, slot, 2:]
        # From the canvas's coordinates in [-1, 1] to the picture's: u = (x - (2 c - 1)) / extent.
        theta = torch.zeros(canvases, 2, 3, device=device)
        theta[:, 0, 0], theta[:, 1, 1] = 1 / extent[:, 0], 1 / extent[:, 1]
        theta[:, :, 2] = -(2 * centre - 1) / extent
        grid = F.affine_grid(theta, [canvases, 3, side, side], align_corners=False)
        picture = F.grid_sample(
            images[members[:, slot]], grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        inside = (grid.abs() <= 1).all(-1) & available[:, slot].view(-1, 1, 1)
        canvas = torch.where(inside.unsqueeze(1), picture, canvas)
    return Collage(canvas, boxes, members, available)


CONFIG_EMOJI = GrainConfig(
    embed_dim=128,
    vision=VisionConfig(image_size=64, layers=3, width=128, patch_size=8, heads=4),
    text=TextConfig(vocab_size=4096, context_length=48, width=96, layers=2, heads=4),
    decoder_width=128,
    decoder_layers=2,
    decoder_heads=4,
    decoder_mlp_width=256,
    dropout=0.0,
    name="grain-emoji",
)


@register_model("grain-ViT-B-16")
def _published(**overrides: Any) -> Grain:
    return Grain(replace(GrainConfig(), name="grain-ViT-B-16").override(**overrides))


@register_model("grain-emoji")
def _emoji(**overrides: Any) -> Grain:
    return Grain(CONFIG_EMOJI.override(**overrides))
