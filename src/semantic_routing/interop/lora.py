"""LoRA adapters of a pipeline's transformer, by the calls that the pipelines of diffusers share.

Two things are otherwise than there. An adapter's alpha, by which its strength is decided, is never guessed: it is
written beside every pair of matrices, and asked for where it was not. And a transformer in the wrapper of
``torch.compile`` is seen as what it is, where those calls would do nothing.
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
"""What says where an adapter's file is."""
WRAPPERS = ("transformer.", "base_model.model.", "_orig_mod.")
"""What diffusers, peft and torch.compile put before the names of the network's own modules ..."""
NETWORK = "backbone."
"""... which begin with this."""


class _ClassOrInstance:
    """A method whose first argument is the object it is called on, or else the class."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., None]:
        return wraps(self.function)(partial(self.function, owner if instance is None else instance))


class TransformerLora(AuraFlowLoraLoaderMixin):
    """The half of a pipeline that looks after LoRA: that of diffusers for pipelines whose transformer alone has it."""

    transformer: Any
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: Path | str | dict[str, Tensor], **options: Any
    ) -> Any:
        """The tensors of an adapter; with ``return_lora_metadata`` also its configuration. Safetensors only."""
        source, name = pretrained_model_name_or_path_or_dict, options.get("weight_name")
        if unknown := sorted(set(options) - SOURCES - {"return_lora_metadata"}):
            raise ValueError(f"unknown argument {unknown[0]!r}; {nearest(unknown[0], sorted(SOURCES))}")
        if options.get("use_safetensors") is False or (name is not None and not name.endswith(".safetensors")):
            raise ValueError("LoRA is read from .safetensors alone: other files can hold programs")
        source = source if isinstance(source, dict) else str(source)
        try:
            return super().lora_state_dict(source, **(options | {"use_safetensors": True}))
        except SafetensorError as error:
            raise ValueError(f"the LoRA in {source} is no whole safetensors file: {error}") from error

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
        """Add an adapter to the transformer, or with ``hotswap`` put it in the place of the one of that name.

        The source is a folder, a file, a name on the hub, or tensors by name; ``options`` say where in it, as in
        diffusers (``weight_name``, ``subfolder`` ...). ``network_alphas``, one number or one for each module, and
        ``metadata``, the fields of peft's LoraConfig, are for adapters that lack their own. ValueError for one without
        an alpha, or that is of another network.
        """
        require("peft", what="a LoRA")
        options["return_lora_metadata"] = True
        found, told = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **options)
        alphas = {name: float(x) for name, x in found.items() if name.endswith(".alpha")}
        layers = _named({name: x for name, x in found.items() if name not in alphas})
        if isinstance(network_alphas, int | float):
            alphas = {f"{name.split('.lora')[0]}.alpha": float(network_alphas) for name in layers}
        alphas = _named(network_alphas if isinstance(network_alphas, Mapping) else alphas)
        metadata = metadata if metadata is not None else told
        if not alphas and not metadata:
            raise ValueError(
                "this LoRA does not say its alpha, which decides its strength: give network_alphas=, such as 8 for "
                "one trained with lora_alpha=8"
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
                _pipeline=self,  # so that offloaded components are put back
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
        """Write an adapter of the transformer as ``pytorch_lora_weights.safetensors`` or ``weight_name``.

        It is the only one or ``adapter_name``, or else the layers given, whose alpha is in the metadata given.
        """
        if not safe_serialization or (weight_name is not None and not weight_name.endswith(".safetensors")):
            raise ValueError("LoRA is written as .safetensors alone")
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; expected a folder to write the LoRA to")
        layers, metadata = transformer_lora_layers, transformer_lora_adapter_metadata
        if isinstance(layers, str):
            layers, adapter_name = None, layers
        if layers is None:
            if isinstance(owner, type):
                raise ValueError("give transformer_lora_layers, or call save_lora_weights of a pipeline")
            with owner._uncompiled():
                layers, metadata = _adapter(owner.transformer, adapter_name)
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
        """Add the active adapters to the weights; arguments are those of diffusers."""
        kept = [(layer, dict(layer.scaling)) for layer in lora_layers(self.transformer)]
        super().fuse_lora(list(components), *args, **options)
        self._unfused = self.__dict__.get("_unfused") or kept

    def unfuse_lora(self, components: list[str] | tuple[str, ...] = ("transformer",), **options: Any) -> None:
        """Take them out of the weights again, and forget the ``lora_scale`` that they were fused with."""
        super().unfuse_lora(list(components), **options)
        _restore(self.__dict__.pop("_unfused", []))

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """With the transformer itself in place of the wrapper that ``torch.compile`` makes."""
        wrapper = self.transformer
        self.__dict__["transformer"] = getattr(wrapper, "_orig_mod", wrapper)
        try:
            yield
        finally:
            self.__dict__["transformer"] = wrapper


def _seen_uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def seeing(self: TransformerLora, *args: Any, **options: Any) -> Any:
        with self._uncompiled():
            return method(self, *args, **options)

    return seeing


for _name in (
    *("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "enable_lora", "disable_lora"),
    *("set_adapters", "delete_adapters", "get_active_adapters", "get_list_adapters", "set_lora_device"),
    "enable_lora_hotswap",
):
    setattr(TransformerLora, _name, _seen_uncompiled(getattr(TransformerLora, _name)))


@contextmanager
def lora_scaled(transformer: nn.Module, scale: float) -> Iterator[None]:
    """Adapters have ``scale`` times their strength while the context lasts; ValueError where there are none."""
    if scale == 1:
        yield
        return
    kept = [(layer, dict(layer.scaling)) for layer in lora_layers(transformer)]
    if not kept:
        raise ValueError(f"attention_kwargs ask for a LoRA at scale {scale:g}, but no LoRA is loaded")
    try:
        for layer, scaling in kept:
            layer.scaling.update({name: scale * strength for name, strength in scaling.items()})
        yield
    finally:
        _restore(kept)


def lora_layers(transformer: nn.Module) -> list[Any]:
    """The layers of a network that adapters were added to."""
    from peft.tuners.lora import LoraLayer

    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def _restore(kept: list[tuple[Any, dict[str, float]]]) -> None:
    """Give layers the strengths that were kept, of the adapters that they still have."""
    for layer, scaling in kept:
        layer.scaling.update({name: strength for name, strength in scaling.items() if name in layer.scaling})


def _named(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same by the names of this network, after ``transformer.``; ValueError for those of another one."""
    named = {}
    for name, x in tensors.items():
        bare = name
        for wrapper in WRAPPERS:
            bare = bare.removeprefix(wrapper)
        if not bare.startswith(NETWORK):
            raise ValueError(f"this is no LoRA of this transformer, whose names begin with {NETWORK}: it has {name!r}")
        named[f"transformer.{bare}"] = x
    return named


def _adapter(transformer: Any, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of an adapter of the transformer."""
    from peft.utils import get_peft_model_state_dict

    names = list(getattr(transformer, "peft_config", {}))
    if not names:
        raise ValueError("the transformer has no LoRA to save; add one with transformer.add_adapter")
    if name is None:
        name = names[0] if len(names) == 1 else "default"
        if name not in names:
            raise ValueError(f"the transformer has the LoRAs {', '.join(names)}; say which by adapter_name")
    if name not in names:
        raise ValueError(f"the transformer has no LoRA {name!r}; {nearest(name, names)}")
    config = transformer.peft_config[name].to_dict()
    metadata = {key: sorted(x) if isinstance(x, set) else x for key, x in config.items()}  # JSON lacks sets
    return get_peft_model_state_dict(transformer, adapter_name=name), metadata


def _alphas(layers: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The alpha of each pair of matrices, for readers that see tensors alone."""
    from peft.utils.other import get_pattern_key

    alphas = {}
    for name, x in layers.items():
        if name.endswith(".lora_A.weight"):
            module, patterns = name.removesuffix(".lora_A.weight"), config.get("alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
            rank_stabilised = len(x) ** 0.5 if config.get("use_rslora") else 1
            alphas[f"{module}.alpha"] = torch.tensor(float(alpha * rank_stabilised))
    return alphas
