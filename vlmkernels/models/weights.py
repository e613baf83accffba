# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of CLIP models: reading, recognising, saving. Pickled code is never executed.

The package's own folder holds `model.safetensors`, `config.json` and, where there is one, `tokenizer.json`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels._files import write_atomically, write_text_atomically
from vlmkernels.models._config import ModelConfig
from vlmkernels.models._formats import FORMATS, find_format
from vlmkernels.models._layouts import EXTRAS, convert_state_dict, layer_indices, strip_wrappers, to_openai
from vlmkernels.models._registry import Architecture, architecture, architecture_of
from vlmkernels.models._torchscript import is_torchscript, read_torchscript
from vlmkernels.models.clip import CLIPConfig, TextConfig, VisionConfig

__all__ = [
    "export_state_dict",
    "infer_config",
    "load_checkpoint",
    "load_state_dict_file",
    "save_checkpoint",
    "save_pretrained",
]

_LOG = logging.getLogger(__name__)
_FORMAT = "vlmkernels"
# Names that mark a file as part of a folder with its configuration, in order of preference.
_WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# open_clip's largest image towers have heads wider than 64; a state dict does not say so.
_WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16}


def infer_config(state_dict: dict[str, Tensor], *, act: str) -> CLIPConfig:
    """Infers the configuration of a published CLIP from its weights.

    Heads are width / 64, except in open_clip's three widest image towers (1280, 1408, 1664: 16 heads).

    Args:
        state_dict: Weights in any known layout.
        act: Activation of the MLPs, which the weights do not tell.

    Raises:
        ValueError: If the layout is not recognised, or is our convolutional stem, which needs its
            config.json.
    """
    openai = convert_state_dict(state_dict, to="openai")
    if "visual.proj" in openai:
        vision = _infer_vit(openai)
        embed_dim = openai["visual.proj"].shape[1]
    elif "visual.attnpool.c_proj.weight" in openai:
        depths = tuple(len(layer_indices(openai, f"visual.layer{stage}.")) for stage in (1, 2, 3, 4))
        size = 32 * math.isqrt(openai["visual.attnpool.positional_embedding"].shape[0] - 1)
        vision = VisionConfig(size, depths, openai["visual.layer1.0.conv1.weight"].shape[0])  # type: ignore[arg-type]
        embed_dim = openai["visual.attnpool.c_proj.weight"].shape[0]
    else:
        raise ValueError(
            "infer_config: the image tower has neither visual.proj (ViT) nor visual.attnpool (ResNet)"
        )
    vocab_size, width = openai["token_embedding.weight"].shape
    layers = layer_indices(openai, "transformer.resblocks.")
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=openai["positional_embedding"].shape[0],
        width=width,
        layers=len(layers),
        mlp_width=_mlp_width(openai, "transformer.", width),
    )
    bias = openai.get("logit_bias")
    return CLIPConfig(embed_dim, vision, text, act=act, init_logit_bias=None if bias is None else float(bias))


def _infer_vit(openai: dict[str, Tensor]) -> VisionConfig:
    if "visual.conv1.weight" not in openai:
        raise ValueError(
            "infer_config: a convolutional stem cannot be inferred; keep config.json beside the weights"
        )
    width, _, patch, _ = openai["visual.conv1.weight"].shape
    has_class = "visual.class_embedding" in openai
    grid = math.isqrt(openai["visual.positional_embedding"].shape[0] - has_class)
    return VisionConfig(
        image_size=grid * patch,
        layers=len(layer_indices(openai, "visual.transformer.resblocks.")),
        width=width,
        patch_size=patch,
        heads=_WIDE_HEADS.get(width),
        mlp_width=_mlp_width(openai, "visual.transformer.", width),
        pool="class" if has_class else "mean",
    )


def _mlp_width(openai: dict[str, Tensor], tower: str, width: int) -> int | None:
    weight = openai.get(f"{tower}resblocks.0.mlp.c_fc.weight")
    return None if weight is None or weight.shape[0] == 4 * width else weight.shape[0]


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """Loads a model from a file or a folder, in eval mode.

    Recognised are our own folders, of any architecture, and these layouts, as files or folders:

    * OpenAI: CLIP's archives (TorchScript) and state dicts.
    * open_clip: CLIP with any of its towers of `CONFIGS`, custom text layout and training checkpoints included; CoCa;
      ViTamin; SigLIP.
    * transformers: `CLIPModel`, `SiglipModel`, `AlignModel`.

    Containers: safetensors (also sharded), pickles that hold nothing but tensors, TorchScript archives (only their
    tensors are read; their code is neither loaded nor run).

    The activation is not part of the weights. It is taken from the configuration beside them (ours,
    open_clip's, transformers'); OpenAI's archives mean "quick_gelu". Where nothing says, "gelu" is assumed
    and for CLIP logged as a warning: pass `act="quick_gelu"` for weights that descend from OpenAI's.

    Args:
        path: File or folder.
        device: Where to put the model.
        dtype: Dtype of the weights, whatever the file holds.
        **overrides: Fields of the model's configuration, as in `create`. Another `vision={"image_size": ...}` resizes
            the position embeddings (bicubic, antialiased, as open_clip does); a smaller
            `text={"context_length": ...}` cuts the text's.

    Returns:
        The model in eval mode, with `tokenizer_state` set where a tokenizer.json lies beside the weights.

    Raises:
        FileNotFoundError: If the path, or weights in the folder, do not exist.
        ValueError: If the layout is not recognised, the file holds code, or the weights do not fit their configuration;
            the message names what is missing and what is unexpected.
    """
    path = Path(path)
    state_dict, metadata = load_state_dict_file(path)
    folder = path if path.is_dir() else path.parent if path.name in _WEIGHT_FILES else None
    kind, config, state_dict = _recognise(path, folder, metadata, strip_wrappers(state_dict), overrides)
    with torch.device("meta"):
        model: Any = kind.model(config)
    state_dict = _fit_shapes(state_dict, model.state_dict())
    _check_names(path, model.state_dict(), state_dict)
    if any(value.is_meta for name, value in model.named_buffers() if name not in state_dict):
        model = kind.model(config)  # what is computed and not saved needs memory
    state_dict = {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        for name, value in state_dict.items()
    }
    model.load_state_dict(state_dict, strict=True, assign=True)
    if folder is not None:
        model.tokenizer_state = _read_json(folder / "tokenizer.json")
    return model.eval()


def _recognise(
    path: Path,
    folder: Path | None,
    metadata: dict[str, str],
    state_dict: dict[str, Tensor],
    overrides: dict[str, Any],
) -> tuple[Architecture, ModelConfig, dict[str, Tensor]]:
    """Finds out what a checkpoint is: its architecture, its configuration, and its tensors under our names."""
    own = _own_config(folder, metadata)
    if own is not None:
        kind, config = own
        return kind, config.override(**overrides), state_dict
    layout = find_format(state_dict)
    if layout is None:
        clip = _read_config(path, folder, state_dict, act=overrides.get("act")).override(**overrides)
        openai = to_openai(state_dict)
        if clip.init_logit_bias is None:
            openai.pop("logit_bias", None)
        return architecture("CLIP"), clip, openai
    ours, unknown = layout.read(state_dict)
    try:
        config = layout.infer(ours, _beside(folder), overrides.get("act"))
    except KeyError as error:
        raise ValueError(
            f"load_checkpoint: {path} looks like a {layout.architecture} of {layout.layout}, but {error} is missing "
            f"(unexpected: {unknown[:5]})"
        ) from error
    if unknown:
        raise ValueError(
            f"load_checkpoint: {path} does not fit a {layout.architecture} of {layout.layout}: "
            f"unexpected {unknown[:5]}"
        )
    return architecture(layout.architecture), config.override(**overrides), ours


def _beside(folder: Path | None) -> dict[str, Any]:
    """The configuration that open_clip or transformers put beside the weights."""
    if folder is None:
        return {}
    open_clip = _read_json(folder / "open_clip_config.json")
    if open_clip is not None:
        return open_clip["model_cfg"]
    return _read_json(folder / "config.json") or {}


def _check_names(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name in list(wanted):
        # Weights saved before torch counted batches have no counter; it is not used.
        if name.endswith(".num_batches_tracked") and name not in found:
            found[name] = torch.zeros((), dtype=torch.int64)
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"load_checkpoint: {path} does not fit its configuration: missing {missing[:5]}, "
            f"unexpected {unknown[:5]}"
        )
    for name, value in wanted.items():
        if value.shape != found[name].shape:
            raise ValueError(
                f"load_checkpoint: {path}: {name} is {list(found[name].shape)}, the configuration wants "
                f"{list(value.shape)}"
            )


def _fit_shapes(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resizes the image positions, cuts the text positions, and makes scalars 0-d, where the model wants it so."""
    out = dict(state)
    for name, value in state.items():
        target = wanted[name].shape if name in wanted else value.shape
        if target == value.shape:
            continue
        if value.numel() == 1 and not target:
            out[name] = value.reshape(())
        elif name.endswith("positional_embedding") and value.ndim == 2 and value.shape[1] == target[1]:
            if name.startswith("visual."):
                out[name] = _resize_positions(value, target[0])
            elif value.shape[0] > target[0]:
                # CoCa's last position is the class token's, wherever the text ends.
                last = (
                    value[-1:]
                    if name == "text.positional_embedding" and "text.cls_emb" in state
                    else value[:0]
                )
                out[name] = torch.cat([value[: target[0] - len(last)], last])
    return out


def _resize_positions(positions: Tensor, wanted: int) -> Tensor:
    """Resizes a square grid of positions; a first row that is no square's is the class token's and stays."""
    count = positions.shape[0]
    has_class = int(math.isqrt(count) ** 2 != count)
    old, grid = math.isqrt(count - has_class), math.isqrt(wanted - has_class)
    if old**2 != count - has_class or grid**2 != wanted - has_class:
        return positions
    first, patches = positions[:has_class], positions[has_class:]
    image = patches.float().t().reshape(1, -1, old, old)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, image.flatten(2)[0].t().to(positions.dtype)])


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_checkpoint: {path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _own_config(folder: Path | None, metadata: dict[str, str]) -> tuple[Architecture, ModelConfig] | None:
    """Architecture and configuration of what `save_pretrained` wrote: beside the weights, or in their header."""
    content = (_read_json(folder / "config.json") if folder else None) or {}
    if content.get("format") != _FORMAT:
        if "vlmkernels_config" not in metadata:
            return None
        content = json.loads(metadata["vlmkernels_config"])
        if "architecture" not in content:
            content = {"config": content}
    kind = architecture(content.get("architecture", "CLIP"))
    return kind, kind.config.from_dict(content["config"])


def _read_config(
    path: Path, folder: Path | None, state_dict: dict[str, Tensor], act: str | None
) -> CLIPConfig:
    """Finds the configuration: open_clip's or transformers' beside the weights, or the weights."""
    beside = (_read_json(folder / "config.json") if folder else None) or {}
    open_clip = _read_json(folder / "open_clip_config.json") if folder else None
    if open_clip is not None:
        return _open_clip_config(open_clip["model_cfg"], state_dict)
    if "vision_config" in beside or beside.get("model_type") == "clip":
        return _transformers_config(beside, state_dict)
    if act is None:
        act = "quick_gelu" if _looks_like_openai(state_dict) else "gelu"
        if act == "gelu":
            _LOG.warning(
                "load_checkpoint: nothing beside the weights in %s says which activation they need; assuming "
                'gelu (pass act="quick_gelu" for weights that descend from OpenAI\'s)',
                path,
            )
    return infer_config(state_dict, act=act)


def _open_clip_config(model: dict[str, Any], state_dict: dict[str, Tensor]) -> CLIPConfig:
    config = infer_config(state_dict, act="quick_gelu" if model.get("quick_gelu") else "gelu")
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    heads = config.vision.heads
    if not config.vision.is_resnet and "head_width" in vision:
        heads = config.vision.width // vision["head_width"]
    return config.override(vision={"heads": heads}, text={"heads": text.get("heads")})


def _transformers_config(hf: dict[str, Any], state_dict: dict[str, Tensor]) -> CLIPConfig:
    """Reads heads and activation; fields that transformers leaves out have its defaults."""
    vision, text = hf.get("vision_config") or {}, hf.get("text_config") or {}
    act = vision.get("hidden_act", "quick_gelu")
    if act != text.get("hidden_act", "quick_gelu"):
        raise ValueError(
            f"load_checkpoint: the towers have different activations: {act} and {text.get('hidden_act')}"
        )
    names = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    config = infer_config(state_dict, act=names.get(act, act))
    return config.override(
        vision={"heads": vision.get("num_attention_heads", 12)},
        text={"heads": text.get("num_attention_heads", 8)},
    )


def _looks_like_openai(state_dict: dict[str, Tensor]) -> bool:
    """OpenAI's files hold three scalars beside the weights, and half-precision weights with float32 norms."""
    if any(name in state_dict for name in EXTRAS):
        return True
    proj, norm = state_dict.get("text_projection"), state_dict.get("ln_final.weight")
    return (
        proj is not None and norm is not None and (proj.dtype, norm.dtype) == (torch.float16, torch.float32)
    )


def load_state_dict_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a checkpoint file or folder without executing anything in it.

    Args:
        path: A safetensors file, a torch pickle that loads with `weights_only=True` (a state dict, or a
            training checkpoint with one under "state_dict" or "model"), a TorchScript archive, or a folder
            with one of model.safetensors, open_clip_model.safetensors, pytorch_model.bin,
            open_clip_pytorch_model.bin or an index of safetensors shards.

    Returns:
        The tensors by name, on CPU, and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: If the path, or weights in the folder, do not exist.
        ValueError: If the file holds anything but tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            return _read_shards(index), {}
        files = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"load_checkpoint: {path} holds none of {', '.join(_WEIGHT_FILES)}")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: no such file or folder: {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if is_torchscript(path):
        return read_torchscript(path), {}
    return _read_pickle(path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"load_checkpoint: {path} is no valid safetensors file: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    state_dict: dict[str, Tensor] = {}
    for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        if Path(name).name != name:
            raise ValueError(f"load_checkpoint: {index} names a shard outside its folder: {name!r}")
        state_dict.update(_read_safetensors(index.parent / name)[0])
    return state_dict


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_checkpoint: {path} holds more than tensors, and pickled code is never executed here. If "
            "you trust the file, load it with torch.load(path, weights_only=False) and save its state dict "
            "with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"load_checkpoint: {path} is neither safetensors nor a torch file: {error}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"load_checkpoint: {path} holds a {type(content).__name__}, expected a state dict")
    state_dict = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state_dict:
        raise ValueError(f"load_checkpoint: {path} holds no tensors at its top level")
    return state_dict


def save_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, layout: str, dtype: torch.dtype | None = None
) -> Path:
    """Saves the weights under the names of another program, as one safetensors file, replaced atomically.

    Args:
        model: A CLIP, CoCa, ViTamin, SigLIP or ALIGN.
        path: The file.
        layout: For a CLIP "openai", "open_clip", "open_clip_custom" or "transformers"; otherwise "open_clip" or
            "transformers", whichever has the architecture.
        dtype: Dtype of the stored floating tensors; None = as they are.

    Returns:
        The path.

    Raises:
        ValueError: If the layout does not hold this architecture or this configuration.
    """
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().to(
            device="cpu", dtype=dtype if dtype and value.is_floating_point() else value.dtype
        )
        for name, value in export_state_dict(model, layout).items()
    }
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    path = Path(path)
    write_atomically(path, lambda place: save_file(tensors, place, metadata={"format": "pt"}))
    return path


def export_state_dict(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Returns a model's weights under the names of another program; see `save_checkpoint`."""
    kind = architecture_of(model)
    if kind is not None and kind.name == "CLIP":
        return convert_state_dict(model.state_dict(), to=layout)
    formats = {f.layout: f for f in FORMATS if kind is not None and f.architecture == kind.name}
    if layout not in formats:
        name = type(model).__name__ if kind is None else kind.name
        raise ValueError(
            f"save_checkpoint: layout of a {name} must be one of {sorted(formats)}, got {layout!r}"
        )
    try:
        return formats[layout].write(model.state_dict())
    except ValueError as error:
        raise ValueError(f"save_checkpoint: {error}") from error


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Saves a model as `model.safetensors`, `config.json` and `tokenizer.json`, each replaced atomically.

    Args:
        model: The model.
        folder: Created where it does not exist; other files in it stay.
        tokenizer: Anything with `save(path)`; None = the tokenizer that came with the model, if any.
        dtype: Dtype of the stored floating tensors; None = as they are.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is of no registered architecture.
    """
    kind = architecture_of(model)
    if kind is None:
        raise TypeError(
            f"save_pretrained: expected a model of a registered architecture, got {type(model).__name__}"
        )
    config: ModelConfig = model.config  # type: ignore[assignment]
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.detach().to(
            device="cpu", dtype=dtype if dtype and value.is_floating_point() else value.dtype
        )
        tensors[name] = value.contiguous()
    # A file alone is loadable too: it carries its configuration. One entry only, because safetensors writes
    # several in random order and equal models should give equal files.
    entry = (
        config.to_dict() if kind.name == "CLIP" else {"architecture": kind.name, "config": config.to_dict()}
    )
    metadata = {"vlmkernels_config": json.dumps(entry)}
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=metadata))
    if tokenizer is not None:
        write_atomically(folder / "tokenizer.json", tokenizer.save)
    elif getattr(model, "tokenizer_state", None) is not None:
        text = json.dumps(model.tokenizer_state, ensure_ascii=False)
        write_text_atomically(folder / "tokenizer.json", text)
    content = {"format": _FORMAT, "version": 1, "architecture": kind.name, "config": config.to_dict()}
    text = json.dumps(content, indent=2) + "\n"
    write_text_atomically(folder / "config.json", text)
    return folder
