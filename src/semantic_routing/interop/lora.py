"""LoRA adapters of a pipeline's transformer, with the methods that all diffusers pipelines share.

Two things differ from diffusers. An adapter's alpha, which determines its strength, is never guessed: it is written
beside every pair of matrices, and loading an adapter without one is an error. And the methods also work if the
transformer is wrapped by ``torch.compile``, where those of diffusers would have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders import AuraFlowLoraLoaderMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from semantic_routing.common.config import nearest
from semantic_routing.common.extras import require

SOURCES = {"weight_name", "subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token"}
SOURCES |= {"proxies", "use_safetensors"}
"""Options that locate an adapter's file."""
WRAPPERS = ("transformer.", "base_model.model.", "_orig_mod.")
"""Prefixes of the network's module names, added by diffusers, peft and torch.compile."""
NETWORK = "backbone."
"""The prefix of all of the network's module names."""


class _ClassOrInstance:
    """A method whose first argument is the instance, or the class if it is called on the class."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., None]:
        return wraps(self.function)(partial(self.function, owner if instance is None else instance))


class TransformerLora(AuraFlowLoraLoaderMixin):
    """Mixin with a pipeline's LoRA methods, from diffusers' mixin for pipelines with LoRA in the transformer only."""

    transformer: Any
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Path | str | dict[str, Tensor], **options: Any
    ) -> Any:
        """Read the tensors of a safetensors adapter; with ``return_lora_metadata`` also its configuration."""
        source, name = pretrained_model_name_or_path_or_dict, options.get("weight_name")
        if unknown := sorted(set(options) - SOURCES - {"return_lora_metadata"}):
            raise ValueError(f"unknown argument {unknown[0]!r}; {nearest(unknown[0], sorted(SOURCES))}")
        if options.get("use_safetensors") is False or (name is not None and not name.endswith(".safetensors")):
            raise ValueError("a LoRA is only read from .safetensors, because other files can run code: convert it")
        source = source if isinstance(source, dict) else str(source)
        try:
            return super().lora_state_dict(source, **(options | {"use_safetensors": True}))
        except SafetensorError as error:
            raise ValueError(f"the LoRA in {source} is not a complete safetensors file: {error}") from error

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Path | str | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        network_alphas: int | float | Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        """Add an adapter to the transformer, or replace the one of that name with ``hotswap``.

        The source is a folder, a file, a name on the hub, or a dictionary of tensors; ``options`` are diffusers'
        (``weight_name``, ``subfolder`` ...). Adapters without an alpha need ``network_alphas`` (one number, or one per
        module) or ``metadata`` (fields of peft's LoraConfig). Raises ValueError for a missing alpha or another network.
        """
        require("peft", what="a LoRA")
        options["return_lora_metadata"] = True
        tensors, saved = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **options)
        layers, alphas = _layers_and_alphas(tensors, network_alphas)
        metadata = metadata if metadata is not None else saved
        if not alphas and not metadata:
            raise ValueError(
                "this LoRA has no alpha: give network_alphas=, such as 8 if it was trained with lora_alpha=8"
            )
        try:
            self.transformer.load_lora_adapter(
                layers,
                prefix="transformer",
                adapter_name=adapter_name,
                hotswap=hotswap,
                network_alphas=None if metadata else alphas,
                metadata=metadata and {f"transformer.{k.removeprefix('transformer.')}": v for k, v in metadata.items()},
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,  # so that offloading hooks are restored
            )
        except RuntimeError as error:
            raise ValueError(f"this LoRA does not fit the transformer: {error}") from error

    @_ClassOrInstance
    def save_lora_weights(
        owner: Any,
        save_directory: Path | str,
        transformer_lora_layers: dict[str, Tensor] | nn.Module | str | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Write an adapter to ``pytorch_lora_weights.safetensors`` or ``weight_name``.

        The adapter is the transformer's only one, the one called ``adapter_name``, or ``transformer_lora_layers`` with
        its alpha in ``transformer_lora_adapter_metadata``.
        """
        if not safe_serialization or (weight_name is not None and not weight_name.endswith(".safetensors")):
            raise ValueError("a LoRA is only written as .safetensors")
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; expected a folder to write the LoRA to")
        layers, metadata = transformer_lora_layers, transformer_lora_adapter_metadata
        if isinstance(layers, str):
            layers, adapter_name = None, layers
        if layers is None:
            if isinstance(owner, type):
                raise ValueError("give transformer_lora_layers, or call save_lora_weights of a pipeline")
            with owner._uncompiled():
                layers, metadata = adapter_of(owner.transformer, adapter_name)
        layers = layers.state_dict() if isinstance(layers, nn.Module) else layers
        layers = {name.removeprefix("transformer."): x for name, x in _named(layers).items()}
        layers |= _alphas(layers, metadata) if metadata else {}
        if is_main_process:
            owner._save_lora_weights(
                str(save_directory),
                {"transformer": layers},
                {"transformer": metadata},
                weight_name=weight_name,
                save_function=save_function,
            )

    def fuse_lora(self, components: list[str] | tuple[str, ...] = ("transformer",), *args: Any, **options: Any) -> None:
        """Merge the active adapters into the weights; arguments are those of diffusers."""
        kept = [(layer, dict(layer.scaling)) for layer in lora_layers(self.transformer)]
        super().fuse_lora(list(components), *args, **options)
        self._unfused = self.__dict__.get("_unfused") or kept

    def unfuse_lora(self, components: list[str] | tuple[str, ...] = ("transformer",), **options: Any) -> None:
        """Remove the adapters from the weights again, and reset their strengths from before ``fuse_lora``."""
        super().unfuse_lora(list(components), **options)
        _restore(self.__dict__.pop("_unfused", []))

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """Replace the wrapper of ``torch.compile`` by the transformer itself while the context lasts."""
        wrapper = self.transformer
        self.__dict__["transformer"] = getattr(wrapper, "_orig_mod", wrapper)
        try:
            yield
        finally:
            self.__dict__["transformer"] = wrapper


def _without_compile(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def unwrapped(self: TransformerLora, *args: Any, **options: Any) -> Any:
        with self._uncompiled():
            return method(self, *args, **options)

    return unwrapped


for _name in (
    *("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "enable_lora", "disable_lora"),
    *("set_adapters", "delete_adapters", "get_active_adapters", "get_list_adapters", "set_lora_device"),
    "enable_lora_hotswap",
):
    setattr(TransformerLora, _name, _without_compile(getattr(TransformerLora, _name)))


@contextmanager
def lora_scaled(transformer: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the adapters' strengths by ``scale`` while the context lasts; raise ValueError if there are none."""
    if scale == 1:
        yield
        return
    kept = [(layer, dict(layer.scaling)) for layer in lora_layers(transformer)]
    if not kept:
        raise ValueError(f"attention_kwargs have scale {scale:g}, but no LoRA is loaded: call load_lora_weights first")
    try:
        for layer, scaling in kept:
            layer.scaling.update({name: scale * strength for name, strength in scaling.items()})
        yield
    finally:
        _restore(kept)


def lora_layers(transformer: nn.Module) -> list[Any]:
    """List the layers of a network with adapters."""
    from peft.tuners.lora import LoraLayer

    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def _restore(kept: list[tuple[Any, dict[str, float]]]) -> None:
    """Reset the strengths of the adapters that are still there."""
    for layer, scaling in kept:
        layer.scaling.update({name: strength for name, strength in scaling.items() if name in layer.scaling})


def _layers_and_alphas(
    tensors: Mapping[str, Tensor], given: int | float | Mapping[str, float] | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Separate an adapter's matrices from the alphas saved beside them, which ``given`` replaces."""
    alphas: Mapping[str, float] = {name: float(x) for name, x in tensors.items() if name.endswith(".alpha")}
    layers = _named({name: x for name, x in tensors.items() if name not in alphas})
    if isinstance(given, Mapping):
        alphas = given
    elif given is not None:
        alphas = {f"{name.split('.lora')[0]}.alpha": float(given) for name in layers}
    return layers, _named(alphas)


def _named(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the prefixes of names by ``transformer.``; raise ValueError for names of another network."""
    named = {}
    for name, x in tensors.items():
        bare = name
        for wrapper in WRAPPERS:
            bare = bare.removeprefix(wrapper)
        if not bare.startswith(NETWORK):
            raise ValueError(f"this LoRA is of another network: {name!r} does not begin with {NETWORK}")
        named[f"transformer.{bare}"] = x
    return named


def adapter_of(transformer: Any, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and configuration of an adapter; ``name`` may be None if there is one, or one called default."""
    from peft.utils import get_peft_model_state_dict

    names = list(getattr(transformer, "peft_config", {}))
    if not names:
        raise ValueError("the transformer has no LoRA to save; add one with transformer.add_adapter")
    if name is None:
        name = names[0] if len(names) == 1 else "default"
        if name not in names:
            raise ValueError(f"the transformer has the LoRAs {', '.join(names)}; choose one with adapter_name")
    if name not in names:
        raise ValueError(f"the transformer has no LoRA {name!r}; {nearest(name, names)}")
    config = transformer.peft_config[name].to_dict()
    metadata = {key: sorted(x) if isinstance(x, set) else x for key, x in config.items()}  # JSON lacks sets
    return get_peft_model_state_dict(transformer, adapter_name=name), metadata


def _alphas(layers: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the alpha of each pair of matrices as a tensor, for programs that only read tensors."""
    from peft.utils.other import get_pattern_key

    alphas = {}
    for name, x in layers.items():
        if name.endswith(".lora_A.weight"):
            module, patterns = name.removesuffix(".lora_A.weight"), config.get("alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
            rank_stabilised = len(x) ** 0.5 if config.get("use_rslora") else 1
            alphas[f"{module}.alpha"] = torch.tensor(float(alpha * rank_stabilised))
    return alphas
