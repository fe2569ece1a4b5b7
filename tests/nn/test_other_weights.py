"""Weights that no Linear holds are listed, so that the density of the Linears is not taken for the model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn.other_weights import count_parameters, describe_weights, other_weights


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.experts, self.norm = nn.Linear(8, 8), Experts(), nn.LayerNorm(8)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.tiny = nn.Parameter(torch.zeros(1, 2))
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight


def test_experts_are_listed_once_for_all_layers_with_their_share():
    model = Mixed()
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == total
    found = other_weights(model)
    assert found == {
        "layers.*.experts.gate_up_proj": f"2 x [4, 8, 16] of Experts, {1024 / total:.3f} of all parameters"
    }  # the embedding is the head's weight, the norm a vector, and tiny is tiny


def test_every_report_says_what_it_passed_over():
    model = Mixed()
    pruned = sp.prune_(model, 0.5)
    share = pruned.total / count_parameters(model)
    assert pruned.density == 0.5 and share < 0.1 and pruned.parameters == count_parameters(model)
    assert list(pruned.other_weights) == ["layers.*.experts.gate_up_proj"] and "lm_head" in pruned.skipped
    text = str(pruned)
    assert f"density 0.5000, {share:.3f} of all parameters" in text
    assert "no Linear, left dense: layers.*.experts.gate_up_proj: 2 x [4, 8, 16] of Experts, 0.7" in text
    assert pruned.to_dict()["other_weights"] == pruned.other_weights
    sparse = sp.sparsify_(model, layout="csr")
    assert sparse.other_weights == pruned.other_weights == sparse.to_dict()["other_weights"]
    assert "no Linear, left dense: layers.*.experts.gate_up_proj" in str(sparse)
    report = sp.sparsity_report(model)
    assert report.other_weights == pruned.other_weights == report.to_dict()["other_weights"]
    assert "not among the layers: layers.*.experts.gate_up_proj" in str(report)
    assert count_parameters(model) == pruned.parameters  # a SparseLinear counts dense


def test_what_expose_linears_can_reach_is_marked():
    found = other_weights(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "body": nn.Linear(8, 8)}))
    assert "of MultiheadAttention (expose_linears_ gives it Linears)" in found["attention.in_proj_weight"]


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 3), (4, 3), (5, 3)]])
def test_unlike_shapes_share_a_line(shapes):
    lines = describe_weights([(f"{i}.w", shape, "W") for i, shape in enumerate(shapes)], 42)
    assert lines == {"*.w": "4 x [2, 3], [3, 3], [4, 3], ... of W, 1.000 of all parameters"}
    assert describe_weights([("a", (1, 1), "")], 1000) == {}


def test_lazy_and_meta_parameters_are_no_obstacle():
    unfinished = {"lazy": nn.LazyLinear(4), "meta": nn.Embedding(9, 9, device="meta")}
    model = nn.ModuleDict({**unfinished, "body": nn.Linear(4, 4)})
    assert list(other_weights(model)) == ["meta.weight"]
