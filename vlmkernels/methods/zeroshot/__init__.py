# SPDX-License-Identifier: Apache-2.0
"""Training-free zero-shot systems: classifiers, decision rules, retrieval, anomalies, bounds and probes. "
"Names only."""

from vlmkernels.methods.zeroshot._classifier import (
    Classifier,
    Explanation,
    LinearHead,
    ModelEncoder,
    Prediction,
    PromptClassifier,
    Reason,
    encoder_of,
)
from vlmkernels.methods.zeroshot._descriptions import (
    CachedDescriptions,
    DescriptionSource,
    EmojiDescriptions,
    LanguageModelDescriptions,
    endpoint_generator,
    transformers_generator,
)
from vlmkernels.methods.zeroshot._metrics import (
    assign,
    auroc,
    cluster_accuracy,
    group_accuracy,
    semantic_iou,
    semantic_similarity,
)
from vlmkernels.methods.zeroshot.cased import CaptionBank, CaSED, WordPrediction, emoji_captions
from vlmkernels.methods.zeroshot.description import DescriptorClassifier, descriptor_sentence
from vlmkernels.methods.zeroshot.fudd import FuDD, pair_key
from vlmkernels.methods.zeroshot.gda import GDA, fit_gda, fit_gda_em, fit_gda_new, gda_logits
from vlmkernels.methods.zeroshot.loki import (
    EmbeddingMetric,
    GraphMetric,
    Loki,
    MatrixMetric,
    TreeMetric,
    frechet_predict,
    is_locus_cover,
    loki_cross_entropy,
    loki_surrogate,
    mean_squared_distance,
    next_class,
    tree_locus,
)
from vlmkernels.methods.zeroshot.perception import PerceptionCLIP, attribute_probe, composite_values
from vlmkernels.methods.zeroshot.zpe import ZPE, select_templates, zpe_classifier, zpe_scores, zpe_weights

__all__ = [
    "GDA",
    "ZPE",
    "CaSED",
    "CachedDescriptions",
    "CaptionBank",
    "Classifier",
    "DescriptionSource",
    "DescriptorClassifier",
    "EmbeddingMetric",
    "EmojiDescriptions",
    "Explanation",
    "FuDD",
    "GraphMetric",
    "LanguageModelDescriptions",
    "LinearHead",
    "Loki",
    "MatrixMetric",
    "ModelEncoder",
    "PerceptionCLIP",
    "Prediction",
    "PromptClassifier",
    "Reason",
    "TreeMetric",
    "WordPrediction",
    "assign",
    "attribute_probe",
    "auroc",
    "cluster_accuracy",
    "composite_values",
    "descriptor_sentence",
    "emoji_captions",
    "encoder_of",
    "endpoint_generator",
    "fit_gda",
    "fit_gda_em",
    "fit_gda_new",
    "frechet_predict",
    "gda_logits",
    "group_accuracy",
    "is_locus_cover",
    "loki_cross_entropy",
    "loki_surrogate",
    "mean_squared_distance",
    "next_class",
    "pair_key",
    "select_templates",
    "semantic_iou",
    "semantic_similarity",
    "transformers_generator",
    "tree_locus",
    "zpe_classifier",
    "zpe_scores",
    "zpe_weights",
]
