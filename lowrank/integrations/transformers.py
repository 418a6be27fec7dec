"""Hugging Face directories: models and tokenizers from local files, and text turned into batches.

Nothing is fetched and no code from a model's directory is run, whatever its ``config.json`` asks for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowrank.errors import CheckpointError
from lowrank.integrations.configuration import (
    CONFIG_NAME,
    bounded_building,
    refuse_sizes,
    refuse_sources,
    without_origins,
)
from lowrank.integrations.library import as_checkpoint_error, local_and_quiet, utf8_name
from lowrank.integrations.text import read_text_samples, token_limit, tokenize
from lowrank.integrations.weights import load_as, load_as_another_class, refuse_changed_kinds
from lowrank.io import TensorSource, open_tensors, printable, read_json
from lowrank.io.version import PACKAGE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "UNSHIFTED",
    "build_from_config",
    "is_model_directory",
    "load_pretrained",
    "load_tokenizer",
    "read_text_samples",
    "shifts_labels",
    "token_limit",
    "tokenize",
]

# Any of these means that the directory means to bring a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)

# Called causal by name or in transformers' list, but judge labels where they stand: read in the sources, and a test reads them again.
UNSHIFTED = frozenset(
    f"{family}ForCausalLM"
    for family in (
        "Bart",
        "BigBirdPegasus",
        "Blenderbot",
        "BlenderbotSmall",
        "CpmAnt",
        "MBart",
        "Marian",
        "Mvp",
        "PLBart",
        "Pegasus",
        "ProphetNet",
        "TrOCR",
        "Whisper",
    )
) | {"XLMWithLMHeadModel", "XLNetLMHeadModel"}
# See the next token too, unless their configuration makes them decoders.
_TWO_WAY = frozenset({"BertGenerationDecoder", "BertLMHeadModel"})


def is_model_directory(path: str | Path) -> bool:
    """Tell whether a path is a directory with a ``config.json``.

    Example:
        >>> is_model_directory("/nonexistent")
        False
    """
    return (Path(path) / CONFIG_NAME).is_file()


def load_pretrained(
    path: str | Path, dtype: torch.dtype | None = None, *, tokenizer: bool = True
) -> tuple[PreTrainedModel, Any | None]:
    """Load a model, in evaluation mode on the CPU, and its tokenizer from a Hugging Face directory.

    The class is the first of ``architectures`` in ``config.json`` where transformers has it, else the one that
    ``AutoModel`` chooses.

    Args:
        path: a directory with ``config.json`` and safetensors weights (one file, or shards with an index).
        dtype: of the loaded model; None keeps the stored one.
        tokenizer: also load the tokenizer, where the directory has one.

    Returns:
        ``(model, tokenizer)``; the tokenizer is None where there is none or it was not asked for.

    Raises:
        CheckpointError: weights in another format than safetensors, damaged files, an architecture that transformers
            does not have, a model that is already quantised, or weights missing from the file (transformers would fill
            them with random numbers).
        StorageError, ResourceError: as :func:`lowrank.io.open_tensors`.

    Example:
        >>> load_pretrained("/nonexistent")
        Traceback (most recent call last):
            ...
        lowrank.errors.CheckpointError: /nonexistent: no such directory; models are read from local directories only
    """
    directory = Path(path)
    config_dict = _read_config(directory)
    _refuse_quantized(config_dict, directory)
    source = open_tensors(directory)
    config, model_class = _resolve(config_dict, source, directory)
    where = printable(directory)
    # Read by us and handed over: transformers would look for an adapter, for other files that the configuration names,
    # and map the file, so that one cut short meanwhile ends the process.
    tensors = {name: source.read(name) for name in source.names}
    model, missing, unexpected = load_as(model_class, config, tensors, source, dtype, directory)
    if missing and not unexpected:
        raise CheckpointError(
            f"{where}: {len(missing)} weights of {model_class.__name__} are not in the file, the first "
            f'{printable(missing[0])!r}; name the class that was saved in "architectures" of config.json'
        )
    if unexpected:
        model = load_as_another_class(model_class, missing, unexpected, config, tensors, source, dtype, directory)
    refuse_changed_kinds(model, source, where)
    model.config._name_or_path = model.name_or_path = str(directory)
    _read_generation_config(model, directory)
    return model.eval(), load_tokenizer(directory) if tokenizer else None


def load_tokenizer(path: str | Path) -> Any | None:
    """Load the tokenizer of a Hugging Face directory, or return None where the directory has no tokenizer files.

    Raises:
        CheckpointError: its files are there but transformers cannot read them, or they need code of their own.

    Example:
        >>> load_tokenizer("/nonexistent") is None
        True
    """
    directory = Path(path)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    failed = f"{printable(directory)}: transformers cannot load the tokenizer"
    with local_and_quiet(), utf8_name(directory) as readable, as_checkpoint_error(failed):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(readable, local_files_only=True, trust_remote_code=False)


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether a model predicts the next token and shifts the labels it is passed: then they are its input ids.

    Said by the names of its classes (also those it derives from) and by transformers' list of causal models, where
    transformers is imported at all. A wrapper that passes attributes on is what it wraps.

    Example:
        >>> shifts_labels(nn.Linear(1, 1))
        False
    """
    kind = _wrapped(model)
    names = {base.__name__ for base in type(kind).__mro__}
    config, loss_type = getattr(kind, "config", None), getattr(kind, "loss_type", None)
    if names & UNSHIFTED or getattr(config, "is_encoder_decoder", False):
        return False
    if names & _TWO_WAY:
        return bool(getattr(config, "is_decoder", False))
    if loss_type is not None and not any(part in str(loss_type) for part in ("CausalLM", "ConditionalGeneration")):
        return False
    return any("CausalLM" in name for name in {*names, str(loss_type)}) or bool(names & _causal_names())


def _wrapped(model: nn.Module) -> nn.Module:
    """The outermost model of transformers that has the very configuration the wrapper shows; else the model itself."""
    # A module that merely holds a language model shows its loss_type no more than any other attribute.
    if "transformers" not in sys.modules or not hasattr(model, "loss_type"):
        return model
    from transformers import PreTrainedModel

    config = getattr(model, "config", None)
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((module for module in inner if module.config is config), model)


def _causal_names() -> frozenset[str]:
    # No model of transformers is there before transformers is.
    return _listed_causal_names() if "transformers" in sys.modules else frozenset()


@cache
def _listed_causal_names() -> frozenset[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LISTED

    return frozenset(name for entry in LISTED.values() for name in ([entry] if isinstance(entry, str) else entry))


def build_from_config(
    config: Mapping[str, Any] | str | Path,
    *,
    source: TensorSource | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build a model from its configuration on the CPU, in evaluation mode; its parameters are allocated but not filled.

    Args:
        config: the content of ``config.json``, or the directory it is in (then ``generation_config.json`` is read
            too).
        source: the tensors that will fill it; sizes in the configuration that no tensor has are refused before anything
            is allocated.
        dtype: of the parameters; None takes the one in the configuration.

    Raises:
        CheckpointError: no such architecture in transformers, or a configuration it refuses.

    Example:
        >>> build_from_config({"model_type": "no-such-thing"})
        Traceback (most recent call last):
            ...
        lowrank.errors.CheckpointError: config.json: transformers has no model type 'no-such-thing'
    """
    directory = None if isinstance(config, Mapping) else Path(config)
    config_dict = _read_config(directory) if directory is not None else dict(config)  # type: ignore[arg-type]
    resolved, model_class = _resolve(config_dict, source, directory)
    chosen = dtype or getattr(resolved, "dtype", None) or torch.float32
    where = printable(directory) if directory is not None else CONFIG_NAME
    bounds: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if source is not None:
        bounds = bounded_building(len(source.names), source.tensor_bytes, where)
    with local_and_quiet(), as_checkpoint_error(f"{where}: transformers cannot build {model_class.__name__}"), bounds:
        from transformers.initialization import no_init_weights

        with _default_dtype(chosen), no_init_weights():
            model: PreTrainedModel = model_class(resolved)
            model.tie_weights()  # which the constructor leaves out together with the random numbers
    if directory is not None:
        _read_generation_config(model, directory)
    model.eval()
    return model


def _read_generation_config(model: PreTrainedModel, directory: Path) -> None:
    name = "generation_config.json"
    if (directory / name).is_file() and model.can_generate():
        content = read_json(directory / name)
        with local_and_quiet(), as_checkpoint_error(f"{printable(directory / name)}: transformers refuses it"):
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_dict(without_origins(content))


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.exists():
        raise CheckpointError(f"{printable(directory)}: no such directory; models are read from local directories only")
    if not is_model_directory(directory):
        raise CheckpointError(f"{printable(directory)}: not a Hugging Face model directory (it holds no {CONFIG_NAME})")
    config: dict[str, Any] = _with_floats(read_json(directory / CONFIG_NAME))
    return config


def _with_floats(value: Any) -> Any:
    """What transformers spells ``{"__float__": "Infinity"}``, since JSON has no word for it, as the number."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _refuse_quantized(config: Mapping[str, Any], directory: Path) -> None:
    found = config.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    how = "compressed by lowrank" if method == PACKAGE else f"quantised ({printable(str(method))})"
    remedy = "; lowrank.load_model reads it" if method == PACKAGE else ""
    raise CheckpointError(f"{printable(directory)}: is already {how}, and the original model is needed here{remedy}")


def _resolve(
    config: Mapping[str, Any], source: TensorSource | None, directory: Path | None
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The configuration object and the model class, chosen only among transformers' own."""
    where = printable(directory / CONFIG_NAME) if directory is not None else CONFIG_NAME
    refuse_sources(without_origins(config, ("quantization_config",)), where)
    if source is not None:
        refuse_sizes(config, [entry.shape for entry in source.entries.values()], where)
    with local_and_quiet():
        import transformers

        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
            remote = "; it needs code of its own (auto_map), which lowrank never runs" if "auto_map" in config else ""
            raise CheckpointError(f"{where}: transformers has no model type {printable(model_type)!r}{remote}")
        plain = without_origins(config, ("quantization_config", "auto_map", "use_pretrained_backbone"))
        with as_checkpoint_error(f"{where}: transformers refuses the configuration"):
            resolved = transformers.CONFIG_MAPPING[model_type].from_dict(plain)
        named = config.get("architectures")
        name = named[0] if isinstance(named, list) and named else None
        model_class = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return resolved, model_class
        found: Any = transformers.MODEL_MAPPING.get(type(resolved), None)
        if found is None:
            raise CheckpointError(
                f"{where}: transformers has neither the architecture {printable(name)!r} nor a plain model of type "
                f"{model_type!r}"
            )
        return resolved, found[0] if isinstance(found, tuple) else found


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
