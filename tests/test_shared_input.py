"""Linears that share an input as one product: which are found, that nothing else changes, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

import woq
from tests.tiny_models import MORE_ARCHITECTURES, TINY_ARCHITECTURES
from woq.linear import QuantLinear
from woq.shared_input import find_shared_inputs, fuse_shared_inputs

ARCHITECTURES = {**TINY_ARCHITECTURES, **MORE_ARCHITECTURES}
IDS = torch.arange(12).reshape(2, 6)
# Distinct ends of names in a group, for those whose projections come apart; the others fuse them in their checkpoints.
GROUPS: dict[str, set[str]] = {
    "llama": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "gpt2": set(),
    "opt": {"q_proj k_proj v_proj"},
    "gemma3": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "phi3": set(),
    "gpt_neox": set(),
}


def quantized(build: Callable[[], nn.Module], **settings: Any) -> Any:
    model = build()
    woq.quantize(model, woq.RtnConfig(bits=4, group_size=16, **settings))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_logits_and_same_checkpoint(name: str) -> None:
    model = quantized(ARCHITECTURES[name])
    before, stored = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    groups = fuse_shared_inputs(model)
    if name in GROUPS:
        assert {" ".join(n.rpartition(".")[2] for n in names) for names in groups} == GROUPS[name]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[k], v) for k, v in stored.items())
    assert not find_shared_inputs(model)


def test_products_are_one_and_end_with_the_parent() -> None:
    model = quantized(TINY_ARCHITECTURES["llama"])
    fuse_shared_inputs(model)
    attention = model.get_submodule("model.layers.0.self_attn")
    group = attention.q_proj.shared
    assert isinstance(attention.q_proj, QuantLinear)
    assert group is not None
    assert group is attention.k_proj.shared
    x = torch.randn(1, 3, attention.q_proj.in_features)
    with torch.no_grad():
        q, k = attention.q_proj(x), attention.k_proj(x)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    logits(model)
    assert group._x is None
    assert attention.q_proj.backend == group.backend


def test_another_tensor_is_another_product() -> None:
    model = quantized(TINY_ARCHITECTURES["llama"])
    mlp = model.get_submodule("model.layers.0.mlp")
    a, b = torch.randn(2, 1, mlp.gate_proj.in_features)
    with torch.no_grad():
        expected = [mlp.gate_proj(a), mlp.up_proj(b), mlp.up_proj(a)]
        fuse_shared_inputs(model)
        got = [mlp.gate_proj(a), mlp.up_proj(b), mlp.up_proj(a)]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_new_weights_are_taken() -> None:
    model, other = (quantized(TINY_ARCHITECTURES["llama"]) for _ in range(2))
    fuse_shared_inputs(model)
    logits(model)
    shifted = {k: v + 0.25 if k.endswith("scales") else v for k, v in other.state_dict().items()}
    model.load_state_dict(shifted)
    other.load_state_dict(shifted)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


def test_gradients_pass_by() -> None:
    model = quantized(TINY_ARCHITECTURES["llama"])
    mlp = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(3, mlp.gate_proj.in_features, requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x).sum(), x)
    fuse_shared_inputs(model)
    (got,) = torch.autograd.grad(mlp(x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_what_differs_stays_apart() -> None:
    model = quantized(TINY_ARCHITECTURES["llama"], overrides={r".*up_proj": {"bits": 8}})
    ends = {" ".join(n.rpartition(".")[2] for n in names) for names in find_shared_inputs(model)}
    assert ends == {"q_proj k_proj v_proj"}


@pytest.mark.parametrize("prepared", [True, False])
def test_compiles_whole(prepared: bool) -> None:
    model = quantized(TINY_ARCHITECTURES["llama"])
    before = logits(model)
    fuse_shared_inputs(model)
    if prepared:
        logits(model)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def keeping(graphs: list[torch.fx.GraphModule]) -> Callable[..., Callable[..., Any]]:
    """A backend of torch.compile that runs graphs as they are and keeps them in `graphs`."""

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return keep


def test_layers_are_compiled_once() -> None:
    """As those of the float model are: weights are inputs of the graph, and nothing in it is one layer's own."""
    model = quantized(TINY_ARCHITECTURES["llama"])
    fuse_shared_inputs(model)
    before = logits(model)
    graphs: list[torch.fx.GraphModule] = []
    layers, backend = model.get_submodule("model.layers"), keeping(graphs)
    assert len(layers) > 1
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(3):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    (graph,) = graphs
    assert not [*graph.parameters(), *graph.buffers()]
    products = [node for node in graph.graph.nodes if "linear" in str(node.target)]
    assert len(products) == 4  # query, key and value; output; gate and up; down


@torch.no_grad()
def test_a_decoding_step_is_compiled_once() -> None:
    """With a static cache, as `generate` does it: no step after the first compiles anything."""
    model = quantized(TINY_ARCHITECTURES["llama"])
    fuse_shared_inputs(model)

    def decode(forward: Callable[..., Any]) -> list[torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(IDS, past_key_values=cache)
        return [forward(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(4)]

    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(model, backend=keeping(graphs), fullgraph=True, dynamic=False)
    torch.testing.assert_close(decode(compiled), decode(model), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_what_activations_may_be_rounded_to_holds_for_all() -> None:
    model = quantized(TINY_ARCHITECTURES["llama"])
    attention = model.get_submodule("model.layers.0.self_attn")
    for layer in (attention.q_proj, attention.k_proj):
        layer.compute_dtype = "int8"
    fuse_shared_inputs(model)
    logits(model)
    assert attention.v_proj.shared is None
    assert attention.q_proj.shared.target.compute_dtype == "int8"
    assert len(attention.q_proj.shared.layers) == 2
