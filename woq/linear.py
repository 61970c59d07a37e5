"""The one module that runs a quantized linear, whatever the backend.

It keeps the checkpoint's tensors as they are (memory-mapped where they came from a file, on the CPU) and the chosen
backend's own form of them, made when the first input shows which device and dtype it has to serve. So a model moves
between devices like any other, and saves what it loaded, to the bit. The gradient with respect to the input is always
that of the reference: adapters train on top of any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from woq.backends import choose
from woq.backends.base import Backend, ComputeDtype, Target
from woq.weights import PackedWeight, WeightSpec

if TYPE_CHECKING:
    from woq.shared_input import SharedInput

Method = TypeVar("Method", bound=Callable[..., None])


def not_traced(method: Method) -> Method:
    """torch.compile calls `method` once, as it traces, and leaves nothing of it in the graph.

    Says what `torch.compiler.assume_constant_result` says, which would import torch._dynamo and Triton here and now.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class QuantLinear(nn.Module):
    """`x @ dequantize(packed).T + bias`, in place of `nn.Linear` or transformers' `Conv1D`."""

    bias: nn.Parameter | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        backend: str = "auto",
        compute_dtype: ComputeDtype | None = None,
    ) -> None:
        """packed: on any device. bias: [out_features] or None. backend: "auto", or a name from `woq.backends`.
        compute_dtype: what activations may be rounded to; None: not at all (`Target`)."""
        super().__init__()
        self.packed = packed
        self.requested_backend = backend
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._backend: Backend[Any] | None = None
        self._state: Any = None
        self._target: Target | None = None
        self.shared: SharedInput | None = None
        """Set where other linears read the same input and all run as one (`woq.fuse_shared_inputs`)."""

    @property
    def spec(self) -> WeightSpec:
        """What the weight is."""
        return self.packed.spec

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self.spec.out_features

    @property
    def backend(self) -> str | None:
        """The name of the backend in use; None before the first input."""
        if self.shared is not None:
            return self.shared.backend
        return None if self._backend is None else self._backend.name

    @property
    def qweight(self) -> Tensor:
        """The packed codes, on the device that the layer runs on: PEFT and others look here for it."""
        target = self._target if self.shared is None else self.shared.target
        return self.packed.qweight if target is None else self.packed.qweight.to(target.device)

    def prepare(self, target: Target) -> None:
        """Choose a backend for `target` and give it the weight; the layer's own `compute_dtype` holds.

        Raises BackendError where there is none.
        """
        target = replace(target, compute_dtype=self.compute_dtype)
        self._backend = choose(self.spec, target, self.requested_backend)
        self._state = self._backend.prepare(self.packed, target)
        self._target = target

    @not_traced
    def prepare_for(self, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare unless that is done."""
        if self._target is None or self._target.device != device or self._target.dtype != dtype:
            self.prepare(Target(device, dtype))

    def share(self, group: SharedInput) -> None:
        """Compute with others from now on; what was prepared for this layer alone is given up."""
        self.shared = group
        self._backend = self._state = self._target = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        bias = self._parameters["bias"]  # nn.Module's own look-up takes longer than all else here
        trains = torch.is_grad_enabled() and x.requires_grad
        if self.shared is not None and not trains:
            y = self.shared.output(x, self)
            return y if bias is None else y + bias.to(y.dtype)
        self.prepare_for(x.device, x.dtype)
        assert self._backend is not None
        assert self._target is not None
        # Compiled code checks this first, and is traced again where another dtype was prepared for since.
        assert self._target.dtype == x.dtype
        y = _WithInputGradient.apply(x, self) if trains else self._backend.apply(x, self._state)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [out_features, in_features], on the device of the packed tensors."""
        return self.packed.unpack().dequantize(dtype)

    def extra_repr(self) -> str:
        spec = self.spec
        kind = ("sym" if spec.sym else "asym") if spec.data_type == "int" else spec.data_type
        return (
            f"{spec.in_features}, {spec.out_features}, bits={spec.bits}, group_size={spec.group_size}, {kind}, "
            f"backend={self.backend or self.requested_backend}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.packed.tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {
            name: state_dict.pop(prefix + name)
            for name in self.packed.tensors()
            if prefix + name in state_dict
        }
        if own:
            self.packed = PackedWeight.from_tensors(self.spec, own, prefix.removesuffix("."))
            self._target = None  # whatever was prepared is stale
            if self.shared is not None:
                self.shared.forget()
        elif strict:
            missing_keys.extend(prefix + name for name in self.packed.tensors())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _WithInputGradient(torch.autograd.Function):
    """Forward by the layer's backend; backward through the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        assert layer._backend is not None
        result: Tensor = layer._backend.apply(x, layer._state)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        packed = ctx.layer.packed.to(grad.device)
        return grad @ packed.unpack().dequantize(grad.dtype), None
