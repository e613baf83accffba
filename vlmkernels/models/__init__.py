# SPDX-License-Identifier: Apache-2.0
"""Reference models, their registry and their checkpoints. Names only."""

from vlmkernels.models._layouts import convert_state_dict
from vlmkernels.models._registry import (
    create,
    list_models,
    pretrained_dir,
    register_architecture,
    register_model,
)
from vlmkernels.models.align import ALIGN, ALIGNConfig, align_loss
from vlmkernels.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from vlmkernels.models.cmd import CMD, CMDConfig
from vlmkernels.models.coca import CoCa, CoCaConfig, coca_loss
from vlmkernels.models.diffusion import DiffusionConfig, LatentDiffusion
from vlmkernels.models.diffusion_classifier import DiffusionClassifier
from vlmkernels.models.grain import Grain, GrainConfig
from vlmkernels.models.knowledge_concentration import KnowledgeConcentration, KnowledgeConcentrationConfig
from vlmkernels.models.mmc import MMC, MMCConfig
from vlmkernels.models.prefix import PrefixCLIP, PrefixCLIPConfig
from vlmkernels.models.selfie import Selfie, SelfieConfig
from vlmkernels.models.siglip import SigLIP, SigLIPConfig
from vlmkernels.models.sycoca import SyCoCa, SyCoCaConfig, attentive_mask
from vlmkernels.models.training import Concept, Trainable, TrainingBatch, TrainingFacts, contrastive_loss
from vlmkernels.models.vitamin import ViTamin, ViTaminCLIPConfig, ViTaminConfig, vitamin
from vlmkernels.models.weights import (
    export_state_dict,
    infer_config,
    load_checkpoint,
    load_state_dict_file,
    save_checkpoint,
    save_pretrained,
)

__all__ = [
    "ALIGN",
    "CLIP",
    "CMD",
    "MMC",
    "ALIGNConfig",
    "CLIPConfig",
    "CMDConfig",
    "CoCa",
    "CoCaConfig",
    "Concept",
    "DiffusionClassifier",
    "DiffusionConfig",
    "Grain",
    "GrainConfig",
    "KnowledgeConcentration",
    "KnowledgeConcentrationConfig",
    "LatentDiffusion",
    "MMCConfig",
    "PrefixCLIP",
    "PrefixCLIPConfig",
    "Selfie",
    "SelfieConfig",
    "SigLIP",
    "SigLIPConfig",
    "SyCoCa",
    "SyCoCaConfig",
    "TextConfig",
    "Trainable",
    "TrainingBatch",
    "TrainingFacts",
    "ViTamin",
    "ViTaminCLIPConfig",
    "ViTaminConfig",
    "VisionConfig",
    "align_loss",
    "attentive_mask",
    "coca_loss",
    "contrastive_loss",
    "convert_state_dict",
    "create",
    "export_state_dict",
    "infer_config",
    "list_models",
    "load_checkpoint",
    "load_state_dict_file",
    "pretrained_dir",
    "register_architecture",
    "register_model",
    "save_checkpoint",
    "save_pretrained",
    "vitamin",
]
