"""What an adapter is to be: PEFT's names and defaults, checked, to and from PEFT's ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank.errors import AdapterError, LowRankError, RankError, UsageError, is_whole
from lowrank.lora.peft_arguments import NEUTRAL, PEFT_DESCRIPTIVE, PeftArguments, is_neutral

__all__ = ["INITIALISATIONS", "LoRAConfig"]

_LARGEST = sys.float_info.max
INITIALISATIONS = (True, False, "gaussian", "pissa", "residual")
# PEFT's further initialisations that leave the base weight alone: once trained, their adapters are like any other.
_STARTED_ELSEWHERE = ("eva", "mica", "orthogonal")
# Those that take directions out of the base weight, which a file of the adapter alone does not hold.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora")


@dataclass
class LoRAConfig(PeftArguments):
    """An adapter's configuration; arguments and defaults are PEFT's.

    Besides these it takes every further argument of ``peft.LoraConfig``, by keyword: see :class:`PeftArguments`.

    Attributes:
        r: rank of the adapters, ``lora_A (r, in)`` and ``lora_B (out, r)``.
        lora_alpha: the scaling is ``lora_alpha / r``.
        lora_dropout: probability of zeroing an input of ``lora_A`` in training, in [0, 1).
        target_modules: text: ``"all-linear"`` (``None`` means the same), or a regular expression that a full module
            name must match; a list: exact names or suffixes after a dot.
        exclude_modules: the same, for modules to leave alone.
        use_rslora: scaling ``lora_alpha / √r``.
        use_dora: magnitude and direction apart (DoRA): each output's weight row is scaled to a learned norm.
        init_lora_weights: ``True`` (Kaiming ``lora_A``, zero ``lora_B``), ``False`` (both random), ``"gaussian"``,
            ``"pissa"`` (leading singular vectors, taken out of the base weight) or ``"residual"`` (what compression
            removed; :func:`lowrank.add_lora` then needs ``original=``).
        rank_pattern, alpha_pattern: regular expression of a name's end to the rank (or alpha) there.
        modules_to_save: modules that are trained whole and saved with the adapter.
        layers_to_transform: indices of the layers to adapt, where ``target_modules`` is a list.
        layers_pattern: the name before the index, where it is not the first that fits.
        learnable_scale: train one factor on each layer's scaling, starting at 1 (not in PEFT: folded into ``lora_B``
            where the adapter is saved).
        fan_in_fan_out: kept for PEFT; here each layer knows how it stores its weight.
        extra: further fields of a PEFT file that do not change the computation and are no arguments here.

    Raises:
        RankError: ``r`` is not an integer of at least 1.
        AdapterError: ``lora_alpha`` is not finite, ``lora_dropout`` is outside [0, 1), or another field is not what
            it may be.

    Example:
        >>> LoRAConfig(r=4, lora_alpha=8).scaling_of("layer")
        2.0
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    learnable_scale: bool = False
    fan_in_fan_out: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Of 0.3.0, where these were no arguments.
        self.extra = dict(self.extra)
        for name in PEFT_DESCRIPTIVE:
            if name in self.extra:
                setattr(self, name, self.extra.pop(name))
        super().__post_init__()
        _check_rank(self.r, "r")
        _check_alpha(self.lora_alpha, "lora_alpha")
        dropout = self.lora_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise AdapterError(f"lora_dropout: must be a number in [0, 1), got {dropout!r}")
        for name in ("use_rslora", "use_dora", "learnable_scale", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"{name}: must be true or false, got {getattr(self, name)!r}")
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        if not any(self.init_lora_weights is known or self.init_lora_weights == known for known in INITIALISATIONS):
            known = ", ".join(repr(value) for value in INITIALISATIONS)
            raise AdapterError(f"init_lora_weights: must be one of {known}, got {self.init_lora_weights!r}")
        self.target_modules = _patterns(self.target_modules, "target_modules", text=True)
        self.exclude_modules = _patterns(self.exclude_modules, "exclude_modules", text=True)
        modules_to_save = _patterns(self.modules_to_save, "modules_to_save", text=False)
        assert not isinstance(modules_to_save, str)
        self.modules_to_save = modules_to_save
        self._check_layers()
        self.rank_pattern = _pattern_map(self.rank_pattern, "rank_pattern", _check_rank)
        self.alpha_pattern = _pattern_map(self.alpha_pattern, "alpha_pattern", _check_alpha)

    def _check_layers(self) -> None:
        indices = self.layers_to_transform
        if indices is None or indices in ([], ()):
            # PEFT takes an empty list for all layers.
            self.layers_to_transform = None
            if self.layers_pattern:
                raise AdapterError("layers_pattern: needs layers_to_transform, which says which layers")
            return
        if not isinstance(self.target_modules, list):
            raise AdapterError(
                "layers_to_transform: works with a list of target_modules; a regular expression can name the layers"
            )
        wanted: list[Any] = list(indices) if isinstance(indices, (list, tuple, range)) else [indices]
        if not all(is_whole(index, 0) for index in wanted):
            raise AdapterError(f"layers_to_transform: must be layer indices of at least 0, got {indices!r}")
        self.layers_to_transform = wanted

    def rank_of(self, name: str) -> int:
        """Look up the rank for a module of this name.

        Example:
            >>> LoRAConfig(r=4, rank_pattern={"query": 16}).rank_of("layer.0.query")
            16
        """
        key = pattern_key(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """Look up ``lora_alpha`` for a module of this name."""
        key = pattern_key(self.alpha_pattern, name)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling_of(self, name: str) -> float:
        """Compute α/r, or α/√r with ``use_rslora``, for a module of this name."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def trained_whole(self) -> list[str]:
        """Ends of the names of modules that are trained whole: ``modules_to_save``, then the heads of the task.

        Example:
            >>> LoRAConfig(task_type="SEQ_CLS", modules_to_save=["score", "norm"]).trained_whole
            ['score', 'norm', 'classifier']
        """
        return list(dict.fromkeys((*(self.modules_to_save or ()), *self.head_names)))

    def replace(self, **changes: Any) -> LoRAConfig:
        """Make a copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_peft(self) -> dict[str, Any]:
        """Give the fields of PEFT's ``adapter_config.json``, sorted by name.

        ``init_lora_weights="residual"``, which PEFT does not know, is written as ``true``: it matters only where an
        adapter is made, not where one is loaded.
        """
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        for name in ("learnable_scale", "runtime_config"):
            own.pop(name)
        extra = own.pop("extra")
        if own["init_lora_weights"] == "residual":
            own["init_lora_weights"] = True
        # A saved adapter is one to run, whoever trains it further.
        own |= {"inference_mode": True, "modules_to_save": self.trained_whole or None}
        return dict(sorted((own | extra).items()))

    @classmethod
    def from_peft(cls, document: Mapping[str, Any], source: str = "adapter_config.json") -> LoRAConfig:
        """Read the configuration in PEFT's fields.

        A field that only describes is kept. One that changes the computation in a way this package does not have is
        accepted at its neutral value alone, and so is a field that no known PEFT has (neutral: null, false, empty).

        Raises:
            AdapterError: not a LoRA adapter, or a field that would be ignored; names it.

        Example:
            >>> LoRAConfig.from_peft({"peft_type": "LORA", "r": 2, "task_type": "CAUSAL_LM"}).r
            2
        """
        if document.get("peft_type") != "LORA":
            raise AdapterError(f"{source}: peft_type must be 'LORA', got {document.get('peft_type')!r}")
        known = {entry.name for entry in dataclasses.fields(cls)} - {"extra", "learnable_scale", *NEUTRAL}
        own: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in document.items():
            if name in known:
                own[name] = value
            elif name == "eva_config" and value:
                extra[name] = value
            elif name != "inference_mode" and not is_neutral(name, value):
                raise AdapterError(
                    f"{source}: {name} = {value!r} changes what the adapter computes and is not supported here; load it with PEFT, "
                    "merge it there (merge_and_unload), and compress the result"
                )
        start = own.get("init_lora_weights")
        if start in _STARTED_ELSEWHERE:
            own["init_lora_weights"] = True
        elif isinstance(start, str) and start.startswith((*_CHANGES_BASE, "pissa_niter")):
            raise AdapterError(
                f"{source}: init_lora_weights = {start!r} takes directions out of the base weight, which is not supported here; "
                "save it in PEFT as a plain adapter (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or "
                "merge it there and compress the result"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            own[name] = own.get(name) or {}
        try:
            return cls(**own, extra=extra)
        except RankError as error:
            raise RankError(f"{source}: {error}") from error
        except LowRankError as error:
            raise AdapterError(f"{source}: {error}") from error


def pattern_key(patterns: Mapping[str, Any], name: str) -> str | None:
    """Find the first pattern that matches the end of a name, as PEFT does: ``(.*\\.)?(pattern)$``."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", name):
            return pattern
    return None


def _check_rank(value: object, name: str) -> int:
    if not is_whole(value, 1):
        raise RankError(f"{name}: must be an integer of at least 1, got {_shown(value)}")
    return value


def _check_alpha(value: object, name: str) -> float:
    # The bounds also exclude integers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise AdapterError(f"{name}: must be a finite number, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:
        # Python refuses to write integers that long.
        return "an integer of over 4,000 digits"


def _pattern_map(value: object, name: str, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise AdapterError(f"{name}: must map patterns to numbers, got {value!r}")
    for pattern, number in value.items():
        _check_expression(pattern, name)
        check(number, f"{name}[{pattern!r}]")
    return dict(value)


def _patterns(value: Any, name: str, *, text: bool) -> str | list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not text:
            raise UsageError(f"{name}: must be a list of module names, got the string {value!r}; write [{value!r}]")
        _check_expression(value, name)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise AdapterError(f"{name}: must be {'text or ' if text else ''}a list of module names, got {value!r}")
    # A set has no order of its own; sorted, the same configuration gives the same file.
    entries = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise AdapterError(f"{name}: must hold module names, got {value!r}")
    return entries


def _check_expression(pattern: object, name: str) -> None:
    try:
        re.compile(pattern if isinstance(pattern, str) else "(")
    except re.error as error:
        raise AdapterError(f"{name}: {pattern!r} is not a regular expression ({error})") from error
