"""``lowrank_config.json``: which layers a compressed model has, and whether the tensors beside it agree."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import CheckpointError, LowRankError
from lowrank.io import TensorEntry, TensorSource, open_tensors, printable, read_json, require_int
from lowrank.io.digests import ALGORITHM, document_digest, tensor_digest
from lowrank.io.version import PACKAGE
from lowrank.layers import LAYER_KINDS, CompressedLayer, Role
from lowrank.numerics.rounding import LEAST_BITS, MOST_BITS

__all__ = [
    "CERTIFICATE",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Manifest",
    "build_layer",
    "certified_digest",
    "check_documents",
    "check_tensor",
    "enclosing",
    "manifest_limit_bytes",
    "open_checkpoint",
    "prefix_of",
    "roles_of",
    "sealed",
]

log = logging.getLogger("lowrank")

MANIFEST_NAME = "lowrank_config.json"
FORMAT_VERSION = 1
# Of a model that was loaded: what its file says was proved, so that it goes along into the next one.
CERTIFICATE = "lowrank_certificate"
_QUANT_METHOD = PACKAGE
# An entry takes about 300 bytes; the rest is room for long names and `extra`.
_MANIFEST_BYTES = 1 << 20
_MANIFEST_BYTES_PER_TENSOR = 8192
# Fields of config.json that loading takes no notice of.
_PASSED_OVER = ("quantization_config", "auto_map", "_name_or_path", "transformers_version")
# What rebuilding a layer from a configuration that somebody else wrote can raise besides our own errors.
_BUILD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError)


@dataclass(frozen=True)
class Manifest:
    """The checked content of ``lowrank_config.json``.

    Attributes:
        layers: name of each compressed layer -> its ``config()``.
        ties: name of a tensor that is not stored -> name of the stored one that it is.
        buffers: name of a buffer that is not stored -> its dtype, as ``"float32"``.
        folded: names of the BatchNorms that were taken into the convolutions before them.
        digests: name of each stored tensor -> its digest; empty where an older version wrote the directory.
        guard: name of the zero-size tensor that makes other loaders fail, or ``None``.
        raw: the whole document.
        extra_state: what ``get_extra_state`` of modules gave, where it is no tensor, by its name in the ``state_dict``.
    """

    layers: dict[str, dict[str, Any]]
    ties: dict[str, str]
    buffers: dict[str, str]
    guard: str | None
    raw: dict[str, Any]
    folded: tuple[str, ...] = ()
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, name: str) -> str:
        """Give the stored name behind a name: the owner where it is tied."""
        return self.ties.get(name, name)

    def layer_of(self, name: str) -> str | None:
        """Give the compressed layer that a tensor or module of this name lies in."""
        return enclosing(name, self.layers)


def enclosing(name: str, modules: Container[str]) -> str | None:
    """Find the module among ``modules`` that a tensor or module name lies in, the innermost first; ``""`` is the root.

    >>> enclosing("encoder.0.bias", {"encoder.0", "pooler"})
    'encoder.0'
    """
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return None


def prefix_of(name: str) -> str:
    """Say what the tensor names of a module begin with; the root module has no prefix.

    >>> prefix_of("encoder.0"), prefix_of("")
    ('encoder.0.', '')
    """
    return f"{name}." if name else ""


def open_checkpoint(directory: Path) -> tuple[Manifest, TensorSource]:
    """Read the manifest and the headers, and check one against the other; nothing of a model's size is allocated.

    Raises:
        CheckpointError: not a compressed model, written by a newer lowrank, or manifest and tensors disagree.
        ResourceError, StorageError: as the readers of :mod:`lowrank.io`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{printable(directory)}: no such directory; give the one that `save` wrote")
    if not (directory / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"{printable(directory)}: is no compressed model: it has no {MANIFEST_NAME}{_likely(directory)}"
        )
    source = open_tensors(directory)
    size, where = (directory / MANIFEST_NAME).stat().st_size, printable(directory / MANIFEST_NAME)
    if size > manifest_limit_bytes(len(source.names)):
        raise CheckpointError(f"{where}: {size} bytes of layers for {len(source.names)} tensors; it is not theirs")
    manifest = parse_manifest(read_json(directory / MANIFEST_NAME), str(directory / MANIFEST_NAME))
    _check_against(manifest, source.entries, where)
    return manifest, source


def sealed(
    document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Add the digests to a manifest: of each tensor, of ``config.json`` without what points here, and of itself.

    A certificate that is for other tensors is left out, with a message on the logger "lowrank".
    """
    digests: dict[str, Any] = {
        "algorithm": ALGORITHM,
        "tensors": {name: tensor_digest(tensor) for name, tensor in sorted(tensors.items())},
    }
    if config is not None:
        digests["config"] = _config_digest(config)
    certificate = document.get("certificate")
    if certificate is not None and certificate.get("tensors") != certified_digest(
        digests["tensors"], document.get("guard")
    ):
        log.warning(
            "save: the model was changed after it was measured: its certificate is for other tensors and is left out"
        )
        document = {key: value for key, value in document.items() if key != "certificate"}
    whole = {**document, "digests": digests}
    return {**whole, "digest": document_digest(whole)}


def certified_digest(digests: Mapping[str, str], guard: str | None = None) -> str:
    """Digest the digests of a model's tensors, whose guard is none of its own: what a certificate names.

    Example:
        >>> certified_digest({"a": "1", "guard": "2"}, "guard") == certified_digest({"a": "1"})
        True
    """
    return document_digest({name: digest for name, digest in digests.items() if name != guard})


def _config_digest(config: Mapping[str, Any]) -> str:
    return document_digest({key: value for key, value in config.items() if key not in _PASSED_OVER})


def check_tensor(manifest: Manifest, name: str, tensor: torch.Tensor, where: str) -> None:
    """Compare a tensor that was read with the digest it was saved with.

    Raises:
        CheckpointError: it is another one.
    """
    expected = manifest.digests.get(name)
    if expected is not None and tensor_digest(tensor) != expected:
        raise CheckpointError(
            f"{where}: tensor {printable(name)!r} is not the one that was saved ({ALGORITHM} differs); the file is damaged or "
            "was changed: copy it anew"
        )


def check_documents(manifest: Manifest, directory: Path) -> None:
    """Compare the manifest and ``config.json`` with the digests in the manifest; older directories have none.

    Raises:
        CheckpointError: one of them is not what was saved.
    """
    where, raw = printable(directory / MANIFEST_NAME), manifest.raw
    if "digest" not in raw and "digests" not in raw:
        return
    changed = "is not what was saved ({} differs): it was edited or damaged; change the model and save it again"
    own = {key: value for key, value in raw.items() if key != "digest"}
    if raw.get("digest") != document_digest(own):
        raise CheckpointError(f"{where}: {changed.format(ALGORITHM)}")
    expected, path = raw.get("digests", {}).get("config"), directory / "config.json"
    if expected is not None and path.exists() and _config_digest(read_json(path)) != expected:
        raise CheckpointError(f"{printable(path)}: {changed.format(ALGORITHM)}")


def _likely(directory: Path) -> str:
    """What a directory without a manifest holds instead, and what to do with it."""
    if (directory / "adapter_config.json").is_file():
        return " but an adapter; load the model it belongs to, and it with lowrank.load_adapter (or `lowrank merge`)"
    if (directory / "config.json").is_file():
        return " but the config.json of a model that is not compressed; transformers loads that"
    return "; give a directory that `save` or `lowrank compress` wrote"


def manifest_limit_bytes(tensors: int) -> int:
    """Give the largest manifest that is believed (and written) for a file of so many tensors."""
    return _MANIFEST_BYTES + _MANIFEST_BYTES_PER_TENSOR * tensors


def parse_manifest(document: Mapping[str, Any], origin: str) -> Manifest:
    """Check the shape of the document itself; see :func:`open_checkpoint` for what the tensors add."""
    where = printable(origin)
    if document.get("quant_method") != _QUANT_METHOD:
        found = _shown(document.get("quant_method"))
        raise CheckpointError(f"{where}: quant_method must be {_QUANT_METHOD!r}; got {found}")
    version = require_int(document.get("format_version"), f"{where}: format_version", 1)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: written by a newer lowrank (format_version {_shown(version)}; this one reads {FORMAT_VERSION}); "
            "upgrade lowrank"
        )
    layers = _mapping(document, "layers", dict, where)
    guard = document.get("guard")
    if guard is not None and not isinstance(guard, str):
        raise CheckpointError(f"{where}: guard must be a tensor name; got {_shown(guard)}")
    ties, buffers = _mapping(document, "ties", str, where), _mapping(document, "buffers", str, where)
    folded = document.get("folded", [])
    if not isinstance(folded, list) or not all(isinstance(name, str) and name for name in folded):
        raise CheckpointError(f"{where}: folded must be a list of module names; got {_shown(folded)}")
    extra_state = _mapping(document, "extra_state", object, where)
    digests = _digests(document, where)
    return Manifest(layers, ties, buffers, guard, dict(document), tuple(folded), extra_state, digests)


def _digests(document: Mapping[str, Any], where: str) -> dict[str, str]:
    found = document.get("digests")
    if found is None:
        return {}
    if not isinstance(found, dict) or found.get("algorithm") != ALGORITHM:
        raise CheckpointError(f"{where}: digests must be an object with algorithm {ALGORITHM!r}; got {_shown(found)}")
    return _mapping(found, "tensors", str, f"{where}: digests")


def _mapping(document: Mapping[str, Any], key: str, kind: type, where: str) -> dict[str, Any]:
    value = document.get(key, {} if key != "layers" else None)
    if not isinstance(value, dict) or not all(isinstance(item, kind) for item in value.values()):
        raise CheckpointError(f"{where}: {key} must map names to {'objects' if kind is dict else 'text'}")
    return value


def _shown(value: object) -> str:
    return printable(repr(value)[:60])


def _check_against(manifest: Manifest, entries: Mapping[str, TensorEntry], where: str) -> None:
    if len(manifest.layers) > len(entries) + len(manifest.ties):
        raise CheckpointError(f"{where}: lists {len(manifest.layers)} layers, but there are {len(entries)} tensors")
    for alias, owner in manifest.ties.items():
        if owner not in entries or alias in entries:
            raise CheckpointError(
                f"{where}: tie {printable(alias)!r} -> {printable(owner)!r} must lead from a tensor that is not stored "
                "to one that is"
            )
    for name, entry in entries.items():
        if entry.torch_dtype is None:
            found = printable(entry.dtype)
            raise CheckpointError(f"{where}: tensor {printable(name)!r} has dtype {found}, unknown here")
    if manifest.guard is not None and entries.get(manifest.guard, TensorEntry("F32", (1,), 0, 4)).nbytes:
        raise CheckpointError(f"{where}: guard {printable(manifest.guard)!r} must be a stored tensor of zero size")
    expected = {manifest.guard}
    for name, config in manifest.layers.items():
        expected |= _check_layer(name, config, manifest, entries, where)
    for name in entries:
        if name not in expected and manifest.layer_of(name) is not None:
            raise CheckpointError(f"{where}: tensor {printable(name)!r} is not one that its layer has")
    if manifest.digests and manifest.digests.keys() != entries.keys():
        name = min(manifest.digests.keys() ^ entries.keys())
        fault = "is missing from the file" if name in manifest.digests else "was not there when the model was saved"
        raise CheckpointError(f"{where}: tensor {printable(name)!r} {fault}")


def _check_layer(
    name: str, config: Mapping[str, Any], manifest: Manifest, entries: Mapping[str, TensorEntry], where: str
) -> set[str]:
    """Check one layer against its tensors and return the names they are stored under."""
    label = f"{where}: layer {printable(name)!r}"
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in LAYER_KINDS:
        raise CheckpointError(f"{label}: kind {_shown(kind)} is unknown: written by a newer lowrank; upgrade")
    shape = config.get("shape")
    if not isinstance(shape, list) or len(shape) < 2:
        raise CheckpointError(f"{label}: shape must be a list of at least two sizes; got {_shown(shape)}")
    sizes = [require_int(size, f"{label}: a size in shape", 1, 1 << 40) for size in shape]
    if config.get("rank") is not None:
        most = LAYER_KINDS[kind].rank_limit(sizes, config.get("scheme"))
        require_int(config["rank"], f"{label}: rank", 1, most)
    if config.get("bits") is not None:
        require_int(config["bits"], f"{label}: bits", LEAST_BITS, MOST_BITS)
    options = config.get("options")
    if isinstance(options, dict) and "num_layers" in options:
        require_int(options["num_layers"], f"{label}: num_layers", 1, len(entries))
    names: set[str] = set()
    for leaf, expected in layer_tensors(name, config, where).items():
        stored = manifest.resolve(prefix_of(name) + leaf)
        names.add(stored)
        entry = entries.get(stored)
        if entry is None:
            raise CheckpointError(f"{label}: its tensor {printable(stored)!r} is missing")
        if entry.shape != tuple(expected.shape) or entry.torch_dtype != expected.dtype:
            raise CheckpointError(
                f"{label}: tensor {printable(stored)!r} is {entry.torch_dtype} {list(entry.shape)}; the configuration "
                f"says {expected.dtype} {list(expected.shape)}"
            )
    return names


def layer_tensors(name: str, config: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """Give the tensors that a layer of this configuration stores, on the meta device."""
    return dict(build_layer(name, config, where, torch.device("meta")).state_dict())


def roles_of(manifest: Manifest, origin: str) -> dict[str, Role]:
    """Say what each stored tensor of a compressed layer is, by the name it is stored under.

    Args:
        manifest: one that was checked against its tensors.
        origin: of the manifest, for messages.
    """
    roles: dict[str, Role] = {}
    for name, config in manifest.layers.items():
        layer = build_layer(name, config, printable(origin), torch.device("meta"))
        for leaf, role in layer.roles().items():
            roles[manifest.resolve(prefix_of(name) + leaf)] = role
    return roles


def build_layer(name: str, config: Mapping[str, Any], where: str, device: torch.device | None) -> CompressedLayer:
    """Make a layer of the configured kind and shape; its values are unimportant.

    Raises:
        CheckpointError: the configuration lacks something or contradicts itself.
    """
    try:
        return LAYER_KINDS[config["kind"]].from_config(dict(config), device=device)
    except LowRankError as error:
        raise CheckpointError(f"{where}: layer {printable(name)!r}: {error}") from error
    except _BUILD_ERRORS as error:
        reason = printable(f"{type(error).__name__}: {error}".splitlines()[0])
        label = f"{where}: layer {printable(name)!r}"
        raise CheckpointError(f"{label} cannot be built from its configuration ({reason})") from error
