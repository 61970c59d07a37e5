"""AutoRound: rounding and ranges of a whole block trained together, on the block's output.

Cheng et al. 2023, https://arxiv.org/abs/2309.05516 (SignRound). `iters` steps of signed gradient descent, or Adam, on
||block_q(x_q) - target||^2 move every weight's rounding offset and both ends of every group's range (`tunable.py`).
x_q is what the quantized blocks before hand on; the target lies between what the float block makes of that and what the
float model has there. The best state by held-out samples is kept, the start among them.

Differences from the paper: the start is GPTQ's rounding, the optimizer Adam, the target not all of the way to the
float model's; each is a setting, and docs/algorithms.md has what each is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from woq.algorithms.base import Algorithm, LayerResult, float_weight
from woq.algorithms.gptq import Gptq
from woq.algorithms.kernels import fake_quantizer
from woq.algorithms.rtn import Rtn
from woq.algorithms.tunable import FakeQuantize, Tunable, fake_quantize, plain_fake_quantize
from woq.blocks import Linear, linears, weight_of, write_back
from woq.configs import AutoRoundConfig, GPTQConfig, RtnConfig
from woq.moe import UnfusedExperts
from woq.nested import mapped
from woq.phases import phase
from woq.recording import Gradients, recorded
from woq.replay import BlockCall, BlockInputs, forward_batch
from woq.weights import WeightSpec

_PATH = 0.5  # how far, in codes, an offset can travel in a whole run at the default learning rate
_CHECKS = 8  # times in a run that the held-out error is looked at
_HELD_OUT = 16  # one batch in so many is held out


class AutoRound(Algorithm[AutoRoundConfig]):
    """See the module's head."""

    needs_data: ClassVar[bool] = True

    def __init__(self, config: AutoRoundConfig) -> None:
        super().__init__(config)
        self.runner = torch.compile(_run_with) if config.compile else _run_with
        self.starter: Algorithm[Any] = Gptq(GPTQConfig()) if config.init == "gptq" else Rtn(RtnConfig())

    @property
    def needs_float_stream(self) -> bool:
        """Targets come from the float model."""
        return True

    @property
    def needs_following(self) -> bool:
        """Looks ahead where told to."""
        return self.config.lookahead > 0

    def quantize_block(
        self, block: nn.Module, specs: Mapping[str, WeightSpec], inputs: BlockInputs | None
    ) -> dict[str, LayerResult]:
        assert inputs is not None  # the quantize loop gives data to whoever needs it
        modules = linears(block)
        weights = {name: float_weight(name, weight_of(modules[name])).clone() for name in specs}
        with phase("targets"):
            targets = self._targets(block, inputs)
        training, held_out = _split(len(targets))
        begun = self.starter.quantize_block(block, specs, inputs.batches(training))
        tunables = [
            Tunable.start({n: weights[n] for n in names}, {n: begun[n].weight for n in names})
            for names in _alike(specs, modules)
        ]
        given = inputs if self.config.enable_quanted_input else inputs.in_float()
        tuning = Tuning(
            block,
            modules,
            tunables,
            self._quantizer(inputs.device, specs),
            self.runner,
            given,
            targets,
            training,
            held_out,
        )
        with phase("training"):
            before, after = self._train(tuning)
        note = f"block error {before:.3g} -> {after:.3g}"
        results = {}
        for tunable in tunables:
            for name, quantized in tunable.quantized().items():
                write_back(modules[name], quantized.dequantize())
                start = begun[name]
                results[name] = LayerResult(
                    quantized, after, start.tokens, start.damping, f"{start.note}; {note}".lstrip("; ")
                )
        return {name: results[name] for name in specs}

    def _quantizer(self, device: torch.device, specs: Mapping[str, WeightSpec]) -> FakeQuantize:
        """The kernels where there are some, else what torch.compile makes of it where that was asked for."""
        found = fake_quantizer(device, max(spec.group_size for spec in specs.values()))
        return torch.compile(plain_fake_quantize) if found is fake_quantize and self.config.compile else found

    def _targets(self, block: nn.Module, inputs: BlockInputs) -> list[Tensor]:
        """What the block's outputs are to be, [B, L, H] a batch, where the inputs are."""
        share = self.config.drift_correction if inputs.float_outputs is not None else 0.0
        targets = []
        for i, hidden in enumerate(inputs.hidden):
            if share == 1.0 and inputs.float_outputs is not None:
                targets.append(inputs.float_outputs[i])
                continue
            with torch.no_grad():
                target = forward_batch(block, inputs, i)
            if share and inputs.float_outputs is not None:
                target = torch.lerp(target, inputs.float_outputs[i].to(target.device), share)
            targets.append(target.to(hidden.device))
        return targets

    def _train(self, tuning: Tuning) -> tuple[float, float]:
        """Held-out error before and after, relative to the target; the tunables are left in their best state."""
        config = self.config
        steps = max(config.iters, 1)
        lr = config.lr or 2 * _PATH / steps
        groups = [{"params": tuning.offsets, "lr": lr}]
        if config.enable_minmax_tuning:
            groups.append({"params": tuning.ends, "lr": config.minmax_lr or lr})
        optimizer = _OPTIMIZERS[config.optimizer](groups)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        batches = tuning.training_batches(config.seed)
        gradients = tuning.recorded_gradients(config.gradient_accumulate_steps)
        before = best = tuning.held_out_error()
        kept = tuning.state()
        for step in range(config.iters):
            chosen = [tuning.example(next(batches)) for _ in range(config.gradient_accumulate_steps)]
            for parameter, gradient in zip(tuning.trained, gradients(chosen), strict=True):
                parameter.grad = gradient
            optimizer.step()
            falling.step()
            tuning.clamp()
            if (step + 1) % max(steps // _CHECKS, 1) == 0 or step + 1 == config.iters:
                error = tuning.held_out_error()
                if error < best:
                    best, kept = error, tuning.state()
        tuning.restore(kept)
        return before, best


@dataclass(frozen=True)
class Example:
    """One batch on the block's device: what the block is called with, and what it is to return there.

    hidden, target: [B, L, H]; mask: bool [B, L], or None where all tokens count; ahead: the next block's arguments and what
    it is to return, where the loss looks ahead.
    """

    hidden: Tensor
    call: BlockCall
    mask: Tensor | None
    target: Tensor
    ahead: tuple[BlockCall, Tensor] | None


@dataclass(eq=False)
class Tuning:
    """A block whose linears' weights are being trained: its loss, what is trained, and what is held out."""

    block: nn.Module
    modules: Mapping[str, Linear]
    tunables: Sequence[Tunable]
    quantizer: FakeQuantize
    runner: Callable[..., Any]
    inputs: BlockInputs
    targets: Sequence[Tensor]
    training: Sequence[int]
    held_out: Sequence[int]

    def __post_init__(self) -> None:
        self.power = self._power(self.targets)
        self.targets_ahead: list[Tensor] = []
        if self.inputs.following is not None:
            with torch.no_grad():
                self.targets_ahead = [
                    self._ahead(target, call, mask).to(target.device)
                    for target, call, mask in zip(
                        self.targets, self.inputs.following.calls, self.inputs.masks, strict=True
                    )
                ]
            self.power_ahead = self._power(self.targets_ahead)

    @property
    def trained(self) -> list[Tensor]:
        """Rounding offsets, then the factors of the ranges' ends."""
        return [*self.offsets, *self.ends]

    @property
    def offsets(self) -> list[Tensor]:
        """The rounding offsets."""
        return [tunable.offset for tunable in self.tunables]

    @property
    def ends(self) -> list[Tensor]:
        """The factors of the ranges' ends."""
        return [end for tunable in self.tunables for end in tunable.ends]

    def example(self, i: int) -> Example:
        """Batch `i`."""
        given, following = self.inputs, self.inputs.following
        ahead = None if following is None else (following.calls[i], self.targets_ahead[i])
        example = Example(given.hidden[i], given.calls[i], given.masks[i], self.targets[i], ahead)
        on_device: Example = mapped(example, lambda tensor: tensor.to(given.device))
        return on_device

    def training_batches(self, seed: int) -> Iterator[int]:
        """Indices of batches without end, each epoch in another order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for i in torch.randperm(len(self.training), generator=generator).tolist():
                yield self.training[i]

    def loss(self, example: Example) -> Tensor:
        """Mean squared error of the block's output, padding left out, relative to the mean target.

        Looking ahead, that of the next block's output on top.
        """
        given = BlockInputs(self.inputs.device, [example.hidden], [example.call], [example.mask])
        output = forward_batch(self.block, given, 0, self._call)
        error = _square(output - example.target, example.mask) / self.power
        if example.ahead is not None:
            call, target = example.ahead
            ahead = self._ahead(output, call, example.mask)
            error = error + _square(ahead - target, example.mask) / self.power_ahead
        return error

    def gradients(self, examples: Sequence[Example]) -> list[Tensor]:
        """Of the sum of the examples' losses, for all that is `trained`."""
        total: list[Tensor] = []
        for example in examples:
            # An expert that nothing reached has no gradient of its own.
            found = torch.autograd.grad(self.loss(example), self.trained, materialize_grads=True)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        return total

    def recorded_gradients(self, accumulated: int) -> Gradients:
        """`gradients`, as a CUDA graph where that pays. What reaches an expert decides over shapes, which a graph cannot."""
        following = self.inputs.following
        blocks = [self.block] if following is None else [self.block, following.block]
        if any(isinstance(module, UnfusedExperts) for block in blocks for module in block.modules()):
            return self.gradients
        hidden = self.inputs.hidden[0]
        weights = sum(offset.numel() for offset in self.offsets)
        return recorded(
            self.gradients, self.inputs.device, weights, accumulated * hidden.shape[0] * hidden.shape[1]
        )

    @torch.no_grad()
    def held_out_error(self) -> float:
        """The loss on what is not trained on."""
        with phase("held out"):
            return float(torch.stack([self.loss(self.example(i)) for i in self.held_out]).mean())

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep every weight within a code of where it began and every range within a half of what it was."""
        for offset in self.offsets:
            offset.clamp_(-_PATH, _PATH)
        for end in self.ends:
            end.clamp_(0.5, 1.5)

    def state(self) -> list[Tensor]:
        """A copy of all that is trained."""
        return [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Back to what `state()` gave."""
        for parameter, value in zip(self.trained, state, strict=True):
            parameter.copy_(value)

    def _power(self, targets: Sequence[Tensor]) -> float:
        masks = self.inputs.masks
        squares = [_square(target, mask) for target, mask in zip(targets, masks, strict=True)]
        return float(torch.stack(squares).mean()) or 1.0

    def _ahead(self, hidden: Tensor, call: BlockCall, mask: Tensor | None) -> Tensor:
        """What the next block makes of `hidden`, an output of this one."""
        assert self.inputs.following is not None
        given = BlockInputs(self.inputs.device, [hidden], [call], [mask])
        return forward_batch(self.inputs.following.block, given, 0)

    def _call(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
        """Run the block with the tunables' weights in place of its own."""
        weights = {}
        for tunable in self.tunables:
            dtype = self.modules[next(iter(tunable.rows))].weight.dtype
            for name, weight in tunable.weights(self.quantizer, dtype).items():
                module = self.modules[name]
                key = f"{name}.weight".lstrip(".")
                weights[key] = weight.t() if isinstance(module, Conv1D) else weight
        # Looked at without gradients, a block would have to be compiled once more.
        run = self.runner if torch.is_grad_enabled() else _run_with
        if call.hidden_by_keyword:
            return run(block, weights, (), {"hidden_states": hidden, **call.kwargs})
        return run(block, weights, (hidden, *call.args), call.kwargs)


def _square(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean square of x [B, L, H] over the tokens that count. Nothing here waits for the device."""
    if mask is None:
        return x.float().square().mean()
    mask = mask.to(x.device)
    counted = torch.where(mask.unsqueeze(-1), x.float(), 0.0)  # padding may hold NaN
    return counted.square().sum() / (mask.sum() * x.shape[-1])


def _run_with(
    block: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Compiled for one block it serves all blocks that are like it: weights are its arguments."""
    return functional_call(block, weights, args, kwargs)


class _SignSgd(torch.optim.Optimizer):
    """Steps of a fixed length against the gradient's sign."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def _adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    on_cuda = groups[0]["params"][0].is_cuda
    return torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True if on_cuda else None)


_OPTIMIZERS = {"signsgd": _SignSgd, "adam": _adam}


def _split(batches: int) -> tuple[list[int], list[int]]:
    """Which batches are trained on and which are held out, from the start too: it would look too good on what it saw."""
    held_out = list(range(0, batches, _HELD_OUT)) if batches > 1 else [0]
    return [i for i in range(batches) if i not in held_out] or [0], held_out


def _alike(specs: Mapping[str, WeightSpec], modules: Mapping[str, Linear]) -> list[list[str]]:
    """Linears whose groups can stand in one matrix."""
    parts: dict[tuple[object, ...], list[str]] = {}
    for name, spec in specs.items():
        dtype = modules[name].weight.dtype
        parts.setdefault((spec.group_size, spec.sym, spec.scale_dtype, dtype), []).append(name)
    return list(parts.values())
