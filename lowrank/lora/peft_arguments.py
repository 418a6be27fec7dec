"""What ``peft.LoraConfig`` takes besides: arguments that only describe, and those that this package has at one value alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from lowrank.errors import AdapterError

__all__ = ["HEADS", "NEUTRAL", "PEFT_DESCRIPTIVE", "PeftArguments", "is_neutral"]

# PEFT's tasks, and the modules that it trains whole for them: every module whose name ends in one of these.
HEADS: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}

# Arguments that say where an adapter comes from, or that count only beside one which is refused: kept and written back.
PEFT_DESCRIPTIVE = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
)

_IN_PEFT = "train it with PEFT, merge it there (merge_and_unload), and compress the result"
_PLAIN_START = "leave it out, with init_lora_weights=True"
# The values at which an argument changes nothing, the first being PEFT's default, and what to do instead of another.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None,), _IN_PEFT),
    "arrow_config": ((None,), _IN_PEFT),
    "bias": (
        ("none",),
        "the biases are the base model's, which every adapter shares; name the modules whose biases are to train in modules_to_save",
    ),
    "corda_config": ((None, {}), _PLAIN_START),
    "ensure_weight_tying": ((False, None), "name one end of a tied pair alone, or untie the two before"),
    "eva_config": ((None, {}), _PLAIN_START),
    "inference_mode": (
        (False, None),
        "add_lora makes adapters to be trained; freeze them afterwards by model.requires_grad_(False)",
    ),
    "kasa_config": ((None, {}), _IN_PEFT),
    "layer_replication": ((None, []), "repeat the layers before compressing, and adapt the model that comes out"),
    "loftq_config": (({}, None), 'start from what compression removed: init_lora_weights="residual"'),
    "lora_bias": ((False, None), _IN_PEFT),
    "lora_ga_config": ((None, {}), _PLAIN_START),
    "megatron_config": ((None, {}), _IN_PEFT),
    "monteclora_config": ((None, {}), _IN_PEFT),
    "runtime_config": ((None, {}, {"ephemeral_gpu_offload": False}), "leave it out"),
    "target_parameters": (
        (None, []),
        "adapters go on modules here, not on single parameters; name the modules in target_modules, or train it with PEFT and "
        "merge it there",
    ),
    "trainable_token_indices": (
        (None, [], {}),
        "put the embedding into target_modules (an adapter on it), or into modules_to_save (the whole table)",
    ),
    "use_bdlora": ((None, False, {}), _IN_PEFT),
    "use_qalora": ((False, None), _IN_PEFT),
    "velora_config": ((None, {}), _IN_PEFT),
}


def is_neutral(name: str, value: object) -> bool:
    """Tell whether an argument of this name changes nothing at this value; of an unknown name: null, false or empty.

    Example:
        >>> is_neutral("bias", "none"), is_neutral("bias", "all"), is_neutral("not_yet_invented", 3)
        (True, False, False)
    """
    allowed = NEUTRAL[name][0] if name in NEUTRAL else (None, False, {}, [])
    # By type as well: 0 is no false here.
    return any(type(value) is type(known) and value == known for known in allowed)


@dataclass(kw_only=True)
class PeftArguments:
    """Arguments of ``peft.LoraConfig`` by keyword; those not described here are taken at the value that changes nothing alone.

    Attributes:
        task_type: ``"SEQ_CLS"`` and ``"TOKEN_CLS"`` also train the modules named ``classifier`` and ``score`` whole,
            ``"QUESTION_ANS"`` those named ``qa_outputs``, as PEFT does; the other tasks are only written down.
        base_model_name_or_path, revision, auto_mapping, peft_version: where an adapter comes from; written down.
        peft_type: ``"LORA"``.

    Raises:
        AdapterError: an argument at a value that would be ignored; says what to do instead.
    """

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    bias: str = "none"
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.task_type, kind = _plain(self.task_type), _plain(self.peft_type)
        self.peft_type = "LORA"
        if kind not in (None, "LORA"):
            raise AdapterError(f"peft_type: must be 'LORA', got {kind!r}")
        if self.task_type is not None and self.task_type not in HEADS:
            raise AdapterError(f"task_type: must be one of {', '.join(HEADS)}, or None, got {self.task_type!r}")
        offload = getattr(self.runtime_config, "ephemeral_gpu_offload", None)
        if offload is False:
            # PEFT's own object of options, as they are by default.
            self.runtime_config = None
        for name, (values, instead) in NEUTRAL.items():
            value = getattr(self, name)
            if not is_neutral(name, value):
                raise AdapterError(
                    f"{name}: must be {values[0]!r}, got {value!r}, which is not supported here; {instead}"
                )
            setattr(self, name, values[0])

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the heads that the task trains whole."""
        return HEADS.get(self.task_type or "", ())


def _plain(value: object) -> Any:
    """PEFT's enumerations as the text that files hold."""
    return value.value if isinstance(value, Enum) else value
