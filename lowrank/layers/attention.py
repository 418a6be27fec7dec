"""``nn.MultiheadAttention`` with int8 projections, and encoder layers made to call the layers they are built of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.checks import INTEGER_ACTIVATIONS, check_activations, check_size
from lowrank.layers.linear_codes import QuantizedLinear
from lowrank.layers.weights import joined, split

__all__ = ["QuantizedMultiheadAttention", "call_every_layer"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_OPTIONS = ("embed_dim", "num_heads", "dropout", "bias", "kdim", "vdim", "batch_first")


class QuantizedMultiheadAttention(CompressedLayer):
    """``nn.MultiheadAttention`` whose four projections are :class:`QuantizedLinear`; the attention itself is in float.

    A packed ``in_proj_weight`` becomes three layers; scales belong to rows, so the rounding is the same.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first: as of ``nn.MultiheadAttention``.
        n_bits: bits of a code, 2 to 8.
        activations: ``"int8"`` (integer products in the projections) or ``"float"`` (weight-only). May be set at any
            time.
        device: of all tensors.
        dtype: of the biases.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: the projections, (embed_dim, embed_dim, kdim, vdim, embed_dim) wide inputs.

    Raises:
        RankError: a size or number of bits out of range.
        UsageError: ``embed_dim`` is not a multiple of ``num_heads``, a dropout outside [0, 1], unknown activations.

    Example:
        >>> layer = QuantizedMultiheadAttention.from_module(nn.MultiheadAttention(8, 2, batch_first=True))
        >>> x = torch.zeros(3, 5, 8)
        >>> output, weights = layer(x, x, x)
        >>> output.shape, weights.shape, layer.q_proj.codes.dtype
        (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]), torch.int8)
    """

    is_one_weight: ClassVar[bool] = False
    # Read by nn.TransformerEncoderLayer, whose fast path takes weights without calling this layer: it stands aside
    # where there is no packed bias.
    in_proj_bias: None = None
    _qkv_same_embed_dim: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        n_bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size(embed_dim, "embed_dim")
        self.num_heads = check_size(num_heads, "num_heads")
        self.kdim = check_size(embed_dim if kdim is None else kdim, "kdim")
        self.vdim = check_size(embed_dim if vdim is None else vdim, "vdim")
        if embed_dim % num_heads:
            raise UsageError(f"embed_dim: must be a multiple of num_heads={num_heads}, got {embed_dim}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
            raise UsageError(f"dropout: must be a probability from 0 to 1, got {dropout!r}")
        self.head_dim = embed_dim // num_heads
        self.dropout = float(dropout)
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.dtype = dtype or torch.get_default_dtype()
        for name, inputs in zip(_PROJECTIONS, (embed_dim, self.kdim, self.vdim, embed_dim), strict=True):
            setattr(self, name, QuantizedLinear(inputs, embed_dim, self.bias, n_bits, activations, device, self.dtype))
        self.n_bits = self.out_proj.n_bits

    q_proj: QuantizedLinear
    k_proj: QuantizedLinear
    v_proj: QuantizedLinear
    out_proj: QuantizedLinear

    @classmethod
    def from_module(
        cls, module: nn.Module, *, bits: int = 8, activations: str = INTEGER_ACTIVATIONS
    ) -> QuantizedMultiheadAttention:
        """Round the projections of an ``nn.MultiheadAttention``; biases, dtype, device and mode are carried over.

        Raises:
            UsageError: another module, or one with ``add_bias_kv`` or ``add_zero_attn``.
            RankError: bits outside 2 to 8.
            NumericsError: NaN or Inf in a weight.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise UsageError(f"module: must be an nn.MultiheadAttention, got {type(module).__name__}")
        for option in ("add_bias_kv", "add_zero_attn"):
            if module.bias_k is not None if option == "add_bias_kv" else module.add_zero_attn:
                raise UsageError(f"module: nn.MultiheadAttention with {option}=True is not taken; leave it dense")
        out = module.out_proj
        options = {name: getattr(module, name) for name in _OPTIONS if name != "bias"}
        layer = cls(**options, bias=out.bias is not None, n_bits=bits, activations=activations, device="meta")
        packed = module._parameters["in_proj_weight"]
        separate = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        weights = separate if packed is None else list(packed.chunk(3))
        biases: list[Tensor | None] = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))
        layer.dtype = out.weight.dtype
        for name, weight, bias in zip(_PROJECTIONS, [*weights, out.weight], [*biases, out.bias], strict=True):
            setattr(layer, name, QuantizedLinear.from_linear(_linear(weight, bias), bits=bits, activations=activations))
        return layer.train(module.training)

    @property
    def activations(self) -> str:
        """``"int8"`` or ``"float"``."""
        return self.out_proj.activations

    @activations.setter
    def activations(self, value: str) -> None:
        for name in _PROJECTIONS:
            getattr(self, name).activations = check_activations(value)

    @property
    def _is_packed(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

    @property
    def shape(self) -> tuple[int, int]:
        """Of the first weight: (3 · embed_dim, embed_dim) where the dense module packs three in one."""
        return (3 if self._is_packed else 1) * self.embed_dim, self.embed_dim

    @property
    def original_key(self) -> str:
        """See :meth:`CompressedLayer.original_key`."""
        return "in_proj_weight" if self._is_packed else "q_proj_weight"

    @property
    def weight_names(self) -> tuple[str, ...]:
        """None of its own: the projections hold them."""
        return ()

    @property
    def _projections(self) -> list[QuantizedLinear]:
        return [getattr(self, name) for name in _PROJECTIONS]

    def dense_weights(self) -> dict[str, Tensor]:
        """Float32 weights by their names in the dense module."""
        parts = [getattr(self, name).dense_weight() for name in _PROJECTIONS]
        if self._is_packed:
            return {"in_proj_weight": torch.cat(parts[:3]), "out_proj.weight": parts[3]}
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
        return dict(zip(names, parts, strict=True))

    def dense_weight(self) -> Tensor:
        """Join all weights, flattened, in the order of :meth:`dense_weights`: (1, elements) float32."""
        return joined(self.dense_weights().values())

    def exact_weight(self) -> Tensor:
        """See :meth:`CompressedLayer.exact_weight`."""
        return joined(projection.exact_weight() for projection in self._projections)

    def with_weight(self, weight: Tensor) -> QuantizedMultiheadAttention:
        """Round other weights, joined as by :meth:`exact_weight`; see :meth:`CompressedLayer.with_weight`."""
        parts = split(weight, [projection.shape for projection in self._projections], self.kind)
        layer = self._like(None, weight.device)
        for name, projection, part in zip(_PROJECTIONS, self._projections, parts, strict=True):
            setattr(layer, name, projection.with_weight(part))
        return layer

    def error_bound(self) -> float:
        """Bound ‖W − W'‖_F over all four projections; see :meth:`IntegerLinear.error_bound`."""
        return math.sqrt(sum(getattr(self, name).error_bound() ** 2 for name in _PROJECTIONS))

    def dequantize(self) -> nn.MultiheadAttention:
        """Make a dense module of the rounded weights, in the dtype of the model."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        module = nn.MultiheadAttention(**options, device="meta", dtype=self.dtype)
        module = module.to_empty(device=self.out_proj.codes.device)
        with torch.no_grad():
            for name, weight in self.dense_weights().items():
                module.get_parameter(name).copy_(weight)
            if self.bias:
                biases = [getattr(self, name).bias for name in _PROJECTIONS]
                module.in_proj_bias.copy_(torch.cat(biases[:3])).requires_grad_(biases[0].requires_grad)
                module.out_proj.bias.copy_(biases[3]).requires_grad_(biases[3].requires_grad)
        return module.train(self.training)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {
            "activations": self.activations,
            "options": {name: getattr(self, name) for name in _OPTIONS},
            "error_bounds": [getattr(self, name).error_bound_value for name in _PROJECTIONS],
        }

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        how = {"n_bits": config["bits"], "activations": config["activations"]}
        return super()._arguments(config) | how | dict(config["options"])

    def _restore(self, config: Mapping[str, Any]) -> None:
        for projection, bound in zip(self._projections, config["error_bounds"], strict=True):
            projection.error_bound_value = bound

    def forget_source(self) -> None:
        """See :meth:`CompressedLayer.forget_source`."""
        for projection in self._projections:
            projection.forget_source()

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        return ", ".join([f"{name}={getattr(self, name)}" for name in _OPTIONS])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: (steps, batch, features), batch first where so configured, or unbatched.

        Args:
            key_padding_mask: (batch, source), bool (True is left out) or float (added).
            need_weights: return the attention weights; without them ``scaled_dot_product_attention`` computes.
            attn_mask: (target, source) or (batch · heads, target, source), bool or float.
            average_attn_weights: over the heads.
            is_causal: says that ``attn_mask`` is the causal one.

        Returns:
            output like the query, and weights (batch, target, source), one per head unless averaged, or ``None``.

        Raises:
            UsageError: shapes that do not belong together.
        """
        batched = self._check(query, key, value, attn_mask, is_causal)
        heads_of = (0, 2, 1, 3) if self.batch_first and batched else (1, 2, 0, 3)
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).permute(heads_of)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if is_causal and key_padding_mask is None and not need_weights:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            mask = self._merged(attn_mask, key_padding_mask, q, k)
            if need_weights:
                scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
                weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
                weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
                mixed = weights @ v
                weights = weights.mean(dim=1) if average_attn_weights else weights
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        # (batch, heads, steps, features) back to the order that the query came in.
        back = (0, 2, 1, 3) if self.batch_first and batched else (2, 0, 1, 3)
        output = self.out_proj(mixed.permute(back).flatten(-2))
        if not batched:
            output, weights = output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> bool:
        """Whether the input is batched."""
        if any(x.is_nested for x in (query, key, value)):
            raise UsageError(f"query: {self.kind} takes padded tensors and a key_padding_mask, not nested tensors")
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise UsageError(
                f"query, key, value: must all be 3-d, or 2-d where unbatched, got {query.ndim}-d, {key.ndim}-d and "
                f"{value.ndim}-d"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise UsageError(
                f"value: must be as long as key, got {tuple(value.shape[:-1])} and {tuple(key.shape[:-1])}"
            )
        if is_causal and attn_mask is None:
            raise UsageError("is_causal: says that attn_mask is causal, but there is none; pass attn_mask too")
        return query.ndim == 3

    def _merged(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one to add, over (batch, heads, target, source)."""
        batch, heads, target, source = *q.shape[:3], k.shape[2]
        if attn_mask is not None:
            if attn_mask.shape not in ((target, source), (batch * heads, target, source)):
                raise UsageError(
                    f"attn_mask: must be {(target, source)} or {(batch * heads, target, source)}, "
                    f"got {tuple(attn_mask.shape)}"
                )
            attn_mask = _added(attn_mask, "attn_mask", q.dtype)
            attn_mask = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (batch, heads))
        if key_padding_mask is None:
            return attn_mask
        if key_padding_mask.shape != (batch, source):
            raise UsageError(f"key_padding_mask: must be {(batch, source)}, got {tuple(key_padding_mask.shape)}")
        padding = _added(key_padding_mask, "key_padding_mask", q.dtype)[:, None, None, :]
        return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A mask in the form that is added to the scores."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise UsageError(f"{name}: must be bool or floating, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of a slice of a packed weight."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear


def call_every_layer(model: nn.Module) -> None:
    """Make the encoders of torch that hold compressed layers call them.

    In eval mode ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` read the weights of their layers and call
    torch's fused kernel instead; that is switched off for those with a compressed layer inside. The encoder's fast path
    also leaves zeros (before its last norm) at padded positions: these are kept.

    Args:
        model: changed in place; nothing happens to encoders without compressed layers. May be called again.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> layer.linear1 = QuantizedLinear.from_linear(layer.linear1)
        >>> call_every_layer(layer)
        >>> with torch.no_grad():
        ...     layer(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if not any(isinstance(child, CompressedLayer) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            # Says which activations the fused kernel has; 0 is none of them. The layer itself calls `activation`.
            module.activation_relu_or_gelu = 0
        elif module.use_nested_tensor:
            module.use_nested_tensor = False
            module.register_forward_hook(_clear_padding, with_kwargs=True)


def _clear_padding(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
) -> Tensor | None:
    """What the encoder's fast path leaves at padded positions, under the conditions under which it is taken."""
    given = dict(zip(("src", "mask", "src_key_padding_mask", "is_causal"), args, strict=False)) | dict(kwargs)
    source, padding = given["src"], given.get("src_key_padding_mask")
    if padding is None or given.get("mask") is not None or source.ndim != 3:
        return None
    first: nn.Module = encoder.layers[0]  # type: ignore[index, assignment]
    if first.training or not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
        return None
    tensors = [source, *first.parameters()]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    left_out = _added(padding, "src_key_padding_mask", source.dtype) != 0
    kept = ~left_out
    if getattr(encoder, "mask_check", True) and (
        torch.compiler.is_compiling() or not bool((kept[:, :-1] >= kept[:, 1:]).all())
    ):
        return None
    norm = encoder.norm
    empty = output.new_zeros(output.shape[-1])
    return torch.where(left_out[..., None], empty if norm is None else norm(empty), output)  # type: ignore[operator]
