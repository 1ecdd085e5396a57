"""Language models in GGUF files: configuration, tokenizer, and weights, which are dequantised as they are loaded."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from torch import nn

from semantic_routing.common.extras import require
from semantic_routing.text.gguf_header import Header, read_header
from semantic_routing.text.quiet import first_line, quiet_transformers
from semantic_routing.text.source import Source

COPY = "model.gguf"


def gguf_file(source: Source) -> Path:
    """Return the path of a GGUF file, downloaded from the hub unless it is in a folder here."""
    assert source.file is not None
    if Path(source.place).is_dir():
        return Path(source.place, source.file)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.place, source.file))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no text encoder at {source.place}:{source.file}; expected a GGUF file of a model on the Hugging Face hub "
            f"({first_line(error)})"
        ) from error


def gguf_config(source: Source) -> Any:
    """Read the configuration of the language model in a GGUF file; ValueError for an unknown architecture."""
    from transformers import AutoConfig

    header = read_header(gguf_file(source))
    with _copied(header, data=False) as folder, quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=COPY)
        # The readers for rare architectures have many ways to fail.
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"transformers cannot read the architecture {header.architecture} of the GGUF file {header.path} "
                f"({first_line(error)})"
            ) from error
    return config


def gguf_tokenizer(source: Source) -> Any:
    """Load the tokenizer in a GGUF file."""
    from transformers import PreTrainedTokenizerFast

    path = gguf_file(source)
    # AutoTokenizer would read the whole file's header twice, and every class of its choice uses the same one.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.init_kwargs.pop("gguf_file", None)
    return tokenizer


def load_gguf(source: Source, stack: Any, keep: int, dtype: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load the first ``keep`` layers, dequantised to ``dtype`` ("auto": float32), and transformers' report.

    ``stack`` is the configuration of these layers.
    """
    from transformers import AutoModel, GgufConfig

    header = read_header(gguf_file(source))
    require("accelerate", what=f"the GGUF file {header.path}", extra="gguf")
    _build_names_once()
    # The progress bar of this conversion has no switch.
    with _copied(header, data=True, keep=keep) as folder, quiet_transformers(), redirect_stderr(StringIO()):
        model, report = AutoModel.from_pretrained(
            folder,
            gguf_file=COPY,
            config=stack,
            dtype="float32" if dtype == "auto" else dtype,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are dense now, and are saved as such
    return model, report


def _build_names_once() -> None:
    """Cache gguf's table of names, which transformers rebuilds for each module: this saves seconds of a load."""
    import gguf

    if not hasattr(gguf.get_tensor_name_map, "cache_clear"):
        gguf.get_tensor_name_map = lru_cache(gguf.get_tensor_name_map)


@contextmanager
def _copied(header: Header, *, data: bool, keep: int = 0) -> Iterator[str]:
    """Yield a temporary folder with a copy of a GGUF file that transformers opens quickly."""

    def wanted(name: str) -> bool:
        layer = re.match(r"blk\.(\d+)\.", name)
        return not data or (int(layer[1]) < keep if layer else not name.startswith("output."))

    with tempfile.TemporaryDirectory(prefix="semroute-gguf-") as folder:
        try:
            header.copy(Path(folder, COPY), wanted, data=data)
        except OSError as error:
            raise ValueError(
                f"cannot copy {header.path} to {folder} ({error.strerror}); set TMPDIR to a folder with more room"
            ) from error
        yield folder
