# SPDX-License-Identifier: Apache-2.0
"""The registries of models (names and builders) and of architectures (classes by which saved folders are read)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vlmkernels.models._config import ModelConfig

__all__ = [
    "Architecture",
    "architecture",
    "architecture_of",
    "create",
    "list_models",
    "pretrained_dir",
    "register_architecture",
    "register_model",
]

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])
_MODELS: dict[str, tuple[str, Callable[..., nn.Module]]] = {}
_ARCHITECTURES: dict[str, Architecture] = {}
_WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Architecture:
    """A class of models, of which saved folders hold the name.

    Attributes:
        name: As it stands in config.json.
        model: Called as `model(config)`.
        config: Class of its configuration.
    """

    name: str
    model: Callable[..., nn.Module]
    config: type[ModelConfig]


def register_architecture(name: str, model: Callable[..., nn.Module], config: type[ModelConfig]) -> None:
    """Enters a class of models, so that `save_pretrained` and `load_checkpoint` know it.

    Raises:
        ValueError: If the name is taken.
    """
    known = _ARCHITECTURES.get(name)
    # The same definition registers again when its module is reloaded.
    if known is not None and known.model.__module__ != model.__module__:
        raise ValueError(f"register_architecture: {name!r} is already registered by {known.model.__module__}")
    _ARCHITECTURES[name] = Architecture(name, model, config)


def architecture(name: str) -> Architecture:
    """Returns an architecture by the name in config.json.

    Raises:
        ValueError: If there is none.
    """
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"load_checkpoint: architecture must be one of {sorted(_ARCHITECTURES)}, got {name!r}"
        )
    return _ARCHITECTURES[name]


def architecture_of(model: nn.Module) -> Architecture | None:
    """Returns the architecture that a model is of; None where its class is not registered."""
    # By the configuration: one class may serve several architectures (a CLIP with another image tower).
    config = getattr(model, "config", None)
    return next((a for a in _ARCHITECTURES.values() if a.config is type(config)), None)


def _key(name: str) -> str:
    # "ViT-L/14@336px" and "ViT-L-14-336" are the same model.
    return name.lower().replace("/", "-").replace("@", "-").removesuffix("px")


def register_model(name: str) -> Callable[[_Builder], _Builder]:
    """Returns a decorator that enters a builder, called as `builder(**overrides)`, under a name.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(builder: _Builder) -> _Builder:
        known = _MODELS.get(_key(name))
        if known is not None and known[1].__module__ != builder.__module__:
            raise ValueError(f"register_model: {name!r} is already registered by {known[1].__module__}")
        _MODELS[_key(name)] = (name, builder)
        return builder

    return decorate


def list_models() -> list[str]:
    """Returns the names that `create` knows, sorted."""
    return sorted((name for name, _ in _MODELS.values()), key=str.lower)


def pretrained_dir(name: str) -> Path:
    """Returns the folder in which the pretrained weights of model `name` ship (it need not exist)."""
    return _WEIGHTS / _key(name)


def create(name: str, pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Builds a model by name, in eval mode.

    Args:
        name: One of `list_models()`; "/" and "@" may stand for "-", as in "ViT-L/14@336px".
        pretrained: Load the weights that ship with the package instead of initialising. Nothing is
            downloaded; weights of your own are loaded by `load_checkpoint`.
        **overrides: Fields of the model's configuration; dicts merge into nested configurations, as in
            `create("ViT-B-32", embed_dim=256, vision={"layers": 6})`.

    Returns:
        The module in eval mode.

    Raises:
        ValueError: If the name, or an override, is unknown.
        FileNotFoundError: If pretrained weights are asked for and none ship for this model.

    Example:
        >>> import vlmkernels as vk
        >>> model = vk.models.create("emoji-clip", text={"layers": 2})
        >>> len(model.transformer.resblocks)
        2
    """
    if _key(name) not in _MODELS:
        raise ValueError(f"create: expected one of {list_models()}, got {name!r}")
    if pretrained:
        folder = pretrained_dir(name)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"create: no pretrained weights of {name!r} ship with this installation (looked for "
                f"{folder / 'model.safetensors'}); load your own with vk.models.load_checkpoint(path)"
            )
        from vlmkernels.models.weights import load_checkpoint

        return load_checkpoint(folder, **overrides)
    return _MODELS[_key(name)][1](**overrides).eval()
