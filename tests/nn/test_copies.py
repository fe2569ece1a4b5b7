"""Models that torch does not copy are refused by name, where a copy is needed, before any work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparseprune.integrations.terms import Distillation, TeacherTerms
from sparseprune.nn.copies import copy_of
from sparseprune.training import DistillConfig, DistillPruner

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def normed():
    made = model()
    nn.utils.weight_norm(made[2])
    return made


def spectral():
    made = model()
    nn.utils.spectral_norm(made[2])
    made(torch.ones(2, 6))
    return made


def pruned():
    made = model()
    prune.l1_unstructured(made[2], "weight", 0.5)
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (normed, r"2 \(Linear\): weight, of torch.nn.utils.weight_norm: call torch.nn.utils.remove_weight_norm"),
        (spectral, r"2 \(Linear\): weight, of torch.nn.utils.spectral_norm: call torch.nn.utils.remove_spectral_norm"),
        (pruned, r"2 \(Linear\): weight, of torch.nn.utils.prune: call torch.nn.utils.prune.remove\(module, 'weight'"),
    ],
)
def test_weights_that_hooks_compute(make, message):
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(make())
    said = f"here: expected a model that can be copied, got computed tensors in {message}"
    with pytest.raises(ValueError, match=said):
        copy_of(make(), "here")
    with pytest.raises(ValueError, match=f"DistillPruner: .*{message}"):
        DistillPruner(make(), DistillConfig(steps=2))
    with pytest.raises(ValueError, match=f"Distillation: .*{message}"):
        TeacherTerms(make(), None, Distillation())


def test_a_tensor_that_a_forward_pass_left():
    made = model()
    made[0].seen = made(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"0 \(Linear\): seen, which has a history of gradients: detach\(\) it"):
        copy_of(made, "here")


def test_what_the_remedies_leave_is_copied():
    after = [normed(), spectral(), pruned(), model()]
    nn.utils.remove_weight_norm(after[0][2])
    nn.utils.remove_spectral_norm(after[1][2])
    prune.remove(after[2][2], "weight")
    parametrizations.weight_norm(after[3][2])
    x = torch.randn(2, 6)
    for made in after:
        assert torch.equal(copy_of(made, "here")(x), made(x))


def test_a_model_that_copies_itself_is_copied():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            return Own(self.in_features, self.out_features)

    model = Own(4, 3)
    model.last = model(torch.randn(2, 4))
    assert isinstance(copy_of(model, "here"), Own)
