# SPDX-License-Identifier: Apache-2.0
"""CaSED's extension to segmentation: words for regions, or for the cells of a picture; and its measures.

Conti et al., "Vocabulary-free Image Classification and Semantic Segmentation" (released code altndrr/vicss). Two ways:
`name_regions` runs CaSED on each detected region, with candidates from the region's own captions or from the whole
picture's; `name_cells` encodes crops on 2 x 2, 4 x 4 and 8 x 8 grids, adds their unit features up on a map of 16 x 16
cells, and runs CaSED on every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import TextImageEncoder, unit
from vlmkernels.methods.zeroshot._metrics import semantic_iou
from vlmkernels.methods.zeroshot._proposals import (
    Proposer,
    check_picture,
    clip_boxes,
    mask_boxes,
    propose_components,
)
from vlmkernels.methods.zeroshot._words import candidate_words
from vlmkernels.methods.zeroshot.cased import CaSED, WordPrediction

__all__ = ["dense_features", "name_cells", "name_regions", "segmentation_scores"]

GRIDS = (2, 4, 8)
CELLS = 16
CROP = 128


def name_regions(
    system: CaSED,
    picture: Tensor,
    *,
    masks: Tensor | None = None,
    propose: Proposer = propose_components,
    vocabulary: str = "region",
    background: Sequence[int] | None = None,
) -> tuple[Tensor, list[WordPrediction]]:
    """Names each region of a picture.

    Args:
        system: the classifier.
        picture: uint8 [3, H, W].
        masks: bool [n, H, W]; None: proposed.
        propose: finds masks where none are given.
        vocabulary: "region": candidates from each region's captions; "picture": from those of the whole picture.
        background: colour painted outside of a mask within its box; None: the picture stays as it is.

    Returns:
        `(masks, predictions)`, one prediction per mask.

    Raises:
        ValueError: Shapes or options that do not fit.
    """
    check_picture("name_regions", picture)
    if vocabulary not in ("region", "picture"):
        raise ValueError(f"name_regions: vocabulary must be 'region' or 'picture', got {vocabulary!r}")
    masks = propose(picture, None) if masks is None else masks
    if masks.ndim != 3 or masks.shape[1:] != picture.shape[1:]:
        raise ValueError(f"name_regions: masks must be [n, {picture.shape[1]}, {picture.shape[2]}]")
    crops = []
    for mask, box in zip(masks, clip_boxes(mask_boxes(masks), *picture.shape[1:]).tolist(), strict=True):
        left, top, right, bottom = box
        crop = picture[:, top:bottom, left:right]
        if background is not None:
            paint = torch.tensor(background, dtype=torch.uint8)[:, None, None].expand_as(crop)
            crop = torch.where(mask[top:bottom, left:right], crop, paint)
        crops.append(_resized(crop, CROP))
    features = system.encoder.images(torch.stack(crops))
    if vocabulary == "region":
        return masks, system.predict(features)
    found, _ = system._retrieve(system.encoder.images(picture[None]))
    words = candidate_words([system.bank.captions[i] for i, _ in found[0]], tagger=system.tagger)
    regions, centroids = system._retrieve(features)
    return masks, system.rank(features, centroids, [words] * len(features), regions)


def _resized(picture: Tensor, side: int) -> Tensor:
    x = F.interpolate(
        picture[None].float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return x.round().clamp(0, 255).to(torch.uint8)[0]


def dense_features(
    encoder: TextImageEncoder,
    picture: Tensor,
    *,
    grids: Sequence[int] = GRIDS,
    cells: int = CELLS,
    crop: int = CROP,
    overlap: bool = False,
) -> Tensor:
    """Returns unit features of the cells of a picture, [cells, cells, D].

    Every cell is the mean of the unit features of the crops that cover its centre, normalised again.

    Args:
        encoder: the model.
        picture: uint8 [3, H, W].
        grids: crops per side: g x g crops of 1/g of the picture.
        cells: side of the map.
        crop: crops are resized to this side before the model's own preprocessing.
        overlap: crops move by half their size.

    Raises:
        ValueError: Not such a picture, or a grid finer than the cells.
    """
    check_picture("dense_features", picture)
    if not grids or max(grids) > cells or min(grids) < 1:
        raise ValueError(f"dense_features: grids must lie between 1 and {cells}, got {list(grids)}")
    h, w = picture.shape[1:]
    spans, crops = [], []
    for g in grids:
        steps = 2 * g - 1 if overlap else g
        for i in range(steps):
            for j in range(steps):
                # in fractions of the picture
                top, left = (i / (2 * g), j / (2 * g)) if overlap else (i / g, j / g)
                y, x = int(top * h), int(left * w)
                piece = picture[
                    :, y : max(y + 1, round((top + 1 / g) * h)), x : max(x + 1, round((left + 1 / g) * w))
                ]
                crops.append(_resized(piece, crop))
                spans.append((top, left, 1 / g))
    features = encoder.images(torch.stack(crops))
    total = torch.zeros(cells, cells, features.shape[1])
    centres = (torch.arange(cells) + 0.5) / cells
    for (top, left, size), feature in zip(spans, features, strict=True):
        rows = (centres >= top) & (centres < top + size)
        columns = (centres >= left) & (centres < left + size)
        total[rows.nonzero(), columns.nonzero().T] += feature
    return unit(total)  # dividing by the counts first would not change the direction


def name_cells(system: CaSED, picture: Tensor, **options: object) -> list[list[WordPrediction]]:
    """Names every cell of a picture; `options` as in `dense_features`.

    Returns:
        Rows of cells.
    """
    features = dense_features(system.encoder, picture, **options)  # type: ignore[arg-type]
    side = features.shape[1]
    found = system.predict(features.flatten(0, 1))
    return [found[i * side : (i + 1) * side] for i in range(len(features))]


def segmentation_scores(
    predicted: Sequence[str], true: Sequence[str], *, encoder: TextImageEncoder | None = None
) -> dict[str, float]:
    """Returns the measures of words for pixels (or cells), macro-averaged over the true classes (reconstructed).

    With a similarity s(word, class) in [0, 1], intersection is the sum of s over the class's pixels, the predicted mass
    that over all pixels, and Jaccard is intersection / (mass + class - intersection), recall intersection / class. s is
    equality ("hard"), overlap of words ("overlap"), cosine of sentence embeddings clamped at 0 ("soft"), or 1 for the
    class whose embedding is nearest to the word ("nearest"); the last two need an encoder.

    Args:
        predicted: a word per pixel.
        true: a class name per pixel.
        encoder: anything with `texts`.

    Raises:
        ValueError: The lists are empty or of different lengths.
    """
    if not predicted or len(predicted) != len(true):
        raise ValueError(f"segmentation_scores: got {len(predicted)} words for {len(true)} pixels")
    words, classes = list(dict.fromkeys(predicted)), list(dict.fromkeys(true))
    word = torch.tensor([words.index(p) for p in predicted])
    label = torch.tensor([classes.index(t) for t in true])
    counts = torch.zeros(len(words), len(classes), dtype=torch.float64)
    counts.index_put_((word, label), torch.ones(len(word), dtype=torch.float64), accumulate=True)

    def table(similar: Callable[[str, str], float]) -> Tensor:
        return torch.tensor([[similar(w, c) for c in classes] for w in words], dtype=torch.float64)

    tables = {
        "hard": table(lambda w, c: float(w == c)),
        "overlap": table(lambda w, c: semantic_iou([w], [c])),
    }
    if encoder is not None:
        cosine = (encoder.texts(words) @ encoder.texts(classes).T).double()
        tables["soft"] = cosine.clamp(0, 1)
        tables["nearest"] = F.one_hot(cosine.argmax(1), len(classes)).double()
    out = {}
    for name, s in tables.items():
        inside = (s * counts).sum(0)
        mass, size = (s * counts.sum(1, keepdim=True)).sum(0), counts.sum(0)
        out[f"jaccard_{name}"] = float((inside / (mass + size - inside)).mean())
        if name in ("hard", "soft"):
            out[f"recall_{name}"] = float((inside / size).mean())
    return out
