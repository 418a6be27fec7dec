"""The experts of a mixture as codes: the module's own forward, with one expert's matrix decoded where it asks for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.errors import UsageError
from lowrank.layers.base import graph_is_made
from lowrank.layers.decoded import DecodedLayer
from lowrank.layers.expert_stack import ExpertStack
from lowrank.layers.packed import check_group, empty_parts, packed_roles, scale_dtype_from
from lowrank.layers.roles import Role, ScaleForm
from lowrank.layers.spec import LayerSpec
from lowrank.layers.weights import joined
from lowrank.numerics.packing import decode_rows, pack_rows
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.numerics.rounding_methods import Grid, Rounded, nearest, scale_dtype

__all__ = ["ExpertsLayer", "PackedExperts", "QuantizedExperts", "expert_scale_dtype", "experts_of", "is_turned"]

_Layer = TypeVar("_Layer", bound="PackedExperts")


def experts_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Give the parameters of a module itself that hold one matrix for each expert: three dimensions, as many experts in all.

    Example:
        >>> list(experts_of(nn.Conv1d(2, 4, 3)))
        ['weight']
    """
    found = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and not torch.nn.parameter.is_lazy(parameter) and parameter.ndim == 3
    }
    return found if len({parameter.shape[0] for parameter in found.values()}) == 1 else {}


def is_turned(module: nn.Module) -> bool:
    """Tell whether a module keeps its experts' matrices as (in, out), as transformers' gpt-oss and Llama 4 do.

    By what the module says of itself (``is_transposed``); else by the width of its tokens (``hidden_size``, ``hidden_dim``), where
    the sizes of its parameters leave no choice.

    Example:
        >>> is_turned(nn.Conv1d(2, 4, 3))
        False
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    width = next((size for name in _WIDTHS if isinstance(size := getattr(module, name, None), int)), None)
    for name, parameter in experts_of(module).items():
        _, rows, columns = parameter.shape
        if width is None or rows == columns or width not in (rows, columns):
            continue
        # What leads back to the tokens' width has it on its outputs.
        return (rows if name.startswith(_LEADING_BACK) else columns) != width
    return False


_WIDTHS = ("hidden_size", "hidden_dim", "input_size")
_LEADING_BACK = ("down", "w2", "output")


def expert_scale_dtype(stack: Tensor, grid: Grid) -> torch.dtype:
    """Tell in which dtype the scales of all experts are stored: float16 if that does for each of them.

    Args:
        stack: (experts, out, in).
    """
    return next((torch.float32 for each in stack if scale_dtype(each, grid) is torch.float32), torch.float16)


class ExpertsLayer(DecodedLayer):
    """Base of a mixture's experts as codes; see :class:`DecodedLayer` for what is kept of the module.

    The module's own forward runs with an :class:`ExpertStack` in the place of each parameter, so that an expert that no token was
    routed to is not decoded, and no more than one at a time is.

    Args:
        turned: the parameters are (experts, in, out); codes are rows of (out, in) all the same.

    Attributes:
        turned: as above.
    """

    n_bits: int

    def __init__(
        self,
        weights: Mapping[str, Sequence[int]],
        rows: Mapping[str, int],
        others: Mapping[str, Sequence[int]] | None = None,
        stored: Mapping[str, tuple[str, Sequence[int]]] | None = None,
        *,
        n_bits: int = 8,
        turned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, shape in weights.items():
            if len(shape) != 3:
                raise UsageError(f"weights: {name} must be (experts, …, …), got {tuple(shape)}")
        self.__dict__["turned"] = bool(turned)
        super().__init__(weights, rows, others, stored, n_bits=n_bits, device=device, dtype=dtype)

    @classmethod
    def _held_as_codes(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        return experts_of(module)

    @classmethod
    def _empty_for(cls, module: nn.Module, **own: Any) -> Any:
        return super()._empty_for(module, turned=is_turned(module), **own)

    @classmethod
    def _rows_for(cls, module: nn.Module, weight: Tensor) -> int:
        return weight.shape[0] * weight.shape[2 if is_turned(module) else 1]

    def stack_shape(self, name: str) -> tuple[int, int, int]:
        """Give (experts, out, in) of a parameter, whichever way it lies."""
        experts, first, second = self.weight_shapes[name]
        return (experts, second, first) if self.turned else (experts, first, second)

    def _rounded_expert(self, name: str, part: slice) -> Tensor:
        """Some rows of (experts · out, in), float32."""
        raise NotImplementedError

    def expert(self, name: str, index: int) -> Tensor:
        """Decode the matrix of one expert, as the module keeps it, in the dtype of the model."""
        _, outputs, _ = self.stack_shape(name)
        matrix = self._rounded_expert(name, slice(index * outputs, (index + 1) * outputs)).to(self.dtype)
        return matrix.T if self.turned else matrix

    def _stack(self, name: str) -> Tensor:
        """(experts, out, in) float32."""
        return self._rounded_expert(name, slice(None)).view(self.stack_shape(name))

    def dense_weights(self) -> dict[str, Tensor]:
        """Decode each parameter whole, as the module keeps it, float32."""
        stacks = {name: self._stack(name) for name in self.weight_shapes}
        return {name: stack.transpose(1, 2) if self.turned else stack for name, stack in stacks.items()}

    def dense_weight(self) -> Tensor:
        """Join all weights, flattened, each as (experts, out, in): (1, elements) float32."""
        return joined(self._stack(name) for name in self.weight_shapes)

    def dequantize(self) -> nn.Module:
        """See :meth:`DecodedLayer.dequantize`."""
        module = super().dequantize()
        for name in self.weight_shapes:
            parameter = module._parameters[name]
            assert parameter is not None
            parameter.data = parameter.data.contiguous()
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, decoding the experts that it asks for."""
        if graph_is_made():
            return super().forward(*args, **kwargs)
        tensors: dict[str, Tensor] = {name: ExpertStack.of(self, name) for name in self.weight_shapes}
        return functional_call(self._adopted(), tensors | self._kept(), args, kwargs)

    def _round(self, name: str, weight: Tensor) -> None:
        stack = weight.detach()
        if tuple(stack.shape) == self.weight_shapes[name] and self.turned:
            stack = stack.transpose(1, 2)
        self._round_rows(name, stack.reshape(self._rows(name), -1))

    def _round_rows(self, name: str, rows: Tensor) -> None:
        """Hold (experts · out, in) as codes."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"turned": self.turned}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"turned": bool(config["turned"])}


class QuantizedExperts(ExpertsLayer):
    """A mixture's experts with int8 codes and a float32 scale a row of each expert; weight-only.

    Example:
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = nn.Parameter(torch.ones(3, 4, 32))
        ...     def forward(self, x):
        ...         return x @ self.up[1].T
        >>> layer = QuantizedExperts.from_module(Experts())
        >>> layer(torch.ones(2, 32)).shape, layer.up_codes.shape, layer.stored_bytes
        (torch.Size([2, 4]), torch.Size([3, 4, 32]), 432)
    """

    def _make_room(self, name: str, device: torch.device | str | None) -> None:
        prefix = self.prefixes[name]
        codes = torch.zeros(self.stack_shape(name), dtype=torch.int8, device=device)
        self.register_buffer(f"{prefix}codes", codes)
        self.register_buffer(f"{prefix}scale", torch.ones(self.weight_rows[name], device=device))

    def _rounded_expert(self, name: str, part: slice) -> Tensor:
        codes, scale = self._matrix(name)
        return dequantize_rows(codes[part], scale[part])

    def _round_rows(self, name: str, rows: Tensor) -> None:
        codes, scale = quantize_rows(rows, self.n_bits, name=name)
        setattr(self, f"{self._prefix(name)}codes", codes.view(self.stack_shape(name)))
        setattr(self, f"{self._prefix(name)}scale", scale)


class PackedExperts(ExpertsLayer):
    """A mixture's experts with packed codes of 2 to 8 bits in groups of inputs; weight-only.

    Args:
        group, zero_point: see :class:`lowrank.layers.packed.PackedCodes`.
        scale_dtypes: "float16" or "float32" by the parameters' names.

    Attributes:
        <name>_codes: (experts · out, bytes of a row) uint8 buffer.
        <name>_scale: (experts · out, groups) float16 or float32 buffer.
        <name>_zero_point: (experts · out, bytes) uint8 buffer, where groups have zeros of their own.

    Example:
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = nn.Parameter(torch.ones(3, 4, 32))
        ...     def forward(self, x):
        ...         return x @ self.up[1].T
        >>> layer = PackedExperts.from_rounded(Experts(), {}, Grid(4))
        >>> layer(torch.ones(2, 32)).shape, layer.up_codes.shape, layer.stored_bytes
        (torch.Size([2, 4]), torch.Size([12, 16]), 216)
    """

    def __init__(
        self,
        weights: Mapping[str, Sequence[int]],
        rows: Mapping[str, int],
        others: Mapping[str, Sequence[int]] | None = None,
        stored: Mapping[str, tuple[str, Sequence[int]]] | None = None,
        *,
        n_bits: int = 4,
        group: int | None = None,
        zero_point: bool = False,
        scale_dtypes: Mapping[str, str] | None = None,
        turned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_group(group)
        self.__dict__["grid"] = Grid(n_bits, group, zero_point)
        self.__dict__["scale_dtypes"] = {
            name: scale_dtype_from((scale_dtypes or {}).get(name, "float16"), "scale_dtypes") for name in weights
        }
        super().__init__(weights, rows, others, stored, n_bits=n_bits, turned=turned, device=device, dtype=dtype)

    @classmethod
    def from_rounded(
        cls: type[_Layer], module: nn.Module, rounded: Mapping[str, Sequence[Rounded]], grid: Grid
    ) -> _Layer:
        """Make the layer of codes that were chosen expert by expert; parameters left out are rounded to the nearest.

        Args:
            module: the mixture's experts.
            rounded: (out, in) of each expert, by the parameter's name.

        Raises:
            UsageError: no experts in the module, or children with tensors of their own.
            NumericsError: NaN or Inf in a parameter.
        """
        held = cls._held_as_codes(module)
        turned = is_turned(module)
        stacks = {name: each.detach().transpose(1, 2) if turned else each.detach() for name, each in held.items()}
        dtypes = {name: str(expert_scale_dtype(stack, grid)).removeprefix("torch.") for name, stack in stacks.items()}
        layer: _Layer = cls._empty_for(
            module, n_bits=grid.bits, group=grid.group, zero_point=grid.zero_point, scale_dtypes=dtypes
        )
        for name, stack in stacks.items():
            layer._hold(name, rounded[name] if name in rounded else [nearest(each, grid) for each in stack])
        return layer._completed(module)

    def _hold(self, name: str, experts: Sequence[Rounded]) -> None:
        """Take the codes of every expert."""
        prefix = self.prefixes[name]
        setattr(self, f"{prefix}codes", pack_rows(torch.cat([each.codes for each in experts]), self.n_bits))
        scale = torch.cat([each.scale.float() for each in experts]).to(self.scale_dtypes[name])
        setattr(self, f"{prefix}scale", scale)
        if self.grid.zero_point:
            zeros = [each.zero for each in experts if each.zero is not None]
            setattr(self, f"{prefix}zero_point", pack_rows(torch.cat(zeros), self.n_bits))

    def _make_room(self, name: str, device: torch.device | str | None) -> None:
        columns = self.stack_shape(name)[2]
        parts = empty_parts(self.weight_rows[name], columns, self.grid, self.scale_dtypes[name], device)
        for part in packed_roles(self.grid):
            self.register_buffer(f"{self.prefixes[name]}{part}", parts[part])

    @property
    def spec(self) -> LayerSpec:
        """Format, bits, group and zero point; how the codes were chosen they do not tell."""
        zero_point = True if self.grid.zero_point else None
        return LayerSpec(self.format, None, self.bits, self.activations, group=self.grid.group, zero_point=zero_point)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return tuple(self._own_roles())

    def scales(self) -> dict[str, ScaleForm]:
        """See :meth:`CompressedLayer.scales`."""
        return {
            f"{self._prefix(name)}scale": ScaleForm(
                (self.weight_rows[name], self.grid.groups(self.stack_shape(name)[2])),
                self.scale_dtypes[name],
                signed=True,
            )
            for name in self.weight_shapes
        }

    def _own_roles(self) -> dict[str, Role]:
        parts = packed_roles(self.grid)
        return {f"{self._prefix(name)}{part}": role for name in self.weight_shapes for part, role in parts.items()}

    def _part(self, name: str, part: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        prefix, columns = self.prefixes[name], self.stack_shape(name)[2]
        codes, scale = self.get_buffer(f"{prefix}codes")[part], self.get_buffer(f"{prefix}scale")[part]
        zero = self.get_buffer(f"{prefix}zero_point")[part] if self.grid.zero_point else None
        return decode_rows(codes, scale, zero, self.grid, columns, dtype)

    def _rounded_expert(self, name: str, part: slice) -> Tensor:
        return self._part(name, part)

    def exact_weight(self) -> Tensor:
        """See :meth:`CompressedLayer.exact_weight`."""
        return joined(self._part(name, slice(None), torch.float64) for name in self.weight_shapes)

    def _round_rows(self, name: str, rows: Tensor) -> None:
        stack = rows.view(self.stack_shape(name))
        self.scale_dtypes[name] = expert_scale_dtype(stack, self.grid)
        self._hold(name, [nearest(each, self.grid) for each in stack])

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {
            "group": self.grid.group,
            "zero_point": True if self.grid.zero_point else None,
            "scale_dtypes": {name: str(each).removeprefix("torch.") for name, each in self.scale_dtypes.items()},
        }

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        own = {"group": config["group"], "zero_point": bool(config["zero_point"])}
        return super()._arguments(config) | own | {"scale_dtypes": config["scale_dtypes"]}
