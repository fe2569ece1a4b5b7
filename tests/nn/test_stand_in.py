"""Stand-ins: all that a Linear has beside its forward is there, before and after."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from sparseprune.nn.replace import replace_
from sparseprune.nn.simulated import simulated
from sparseprune.nn.stand_in import StandIn, put_back_


class Doubled(StandIn):
    def forward(self, input):
        return 2 * F.linear(input, self.weight, self.bias)


def linear():
    layer = nn.Linear(4, 3)
    layer.gain = 0.5
    layer.register_buffer("seen", torch.zeros(2))
    layer.extra = nn.Parameter(torch.ones(1))
    return layer


def test_what_a_linear_has_beside_its_weight_is_there_while_another_stands_in_for_it():
    model = nn.Sequential(linear())
    names, layer = list(model.state_dict()), model[0]
    replace_(model, {id(layer): Doubled(layer)})
    assert list(model.state_dict()) == names and model[0].gain == 0.5 and model[0].extra is layer.extra
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "0.extra"]
    model[0].gain, model[0].bias = 2.0, nn.Parameter(torch.ones(3))
    model[0].seen.add_(1)
    model[0].register_buffer("late", torch.zeros(1))
    model.train(False)
    twin = copy.deepcopy(model)
    for own in (twin, model):
        put_back_(own)
        assert type(own[0]) is nn.Linear and not own[0].training and own[0].gain == 2.0 and bool(own[0].seen.all())
        assert list(own.state_dict()) == [*names, "0.late"] and float(own[0].bias.detach().sum()) == 3
    assert model[0] is layer and twin[0].weight is not layer.weight


def test_a_stand_in_runs_its_own_forward_where_the_linear_s_was_compiled():
    layer = nn.Linear(4, 3)
    expected = 2 * layer(torch.ones(4))
    layer.compile(backend="eager")
    torch.testing.assert_close(Doubled(layer)(torch.ones(4)), expected)


def test_a_buffer_of_a_linear_is_saved_and_loaded_across_stand_ins():
    model = nn.Sequential(linear())
    with simulated(model, ["0"]):
        state = model.state_dict()
    model.load_state_dict(state)
