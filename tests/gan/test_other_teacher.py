"""A teacher of another architecture: read at the same depth, compared where it can be, refused where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseprune.gan import GANConfig, GANPruner
from sparseprune.gan.game import Game
from sparseprune.runner.text_encoder import TextEncoder
from sparseprune.training import DistillConfig, DistillPruner


def encoder(hidden, layers, seed=0):
    torch.manual_seed(seed)
    return TextEncoder(40, 3, hidden=hidden, ffn=2 * hidden, layers=layers, heads=2, dropout=0.0)


@pytest.fixture
def batches():
    ids = torch.randint(4, 40, (6, 8, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": own, "attention_mask": torch.ones_like(own), "labels": own[:, 0] % 3} for own in ids]


def test_it_is_read_at_the_same_depth():
    pruner = DistillPruner(encoder(16, 2), DistillConfig(hidden=0.0), encoder(24, 3, 1))
    assert pruner.reader.taps == ["layers.0", "layers.1"]
    seen = []
    for model in (pruner.model, pruner.teacher):
        handles = [m.register_forward_hook(lambda m, a, o, n=n: seen.append(n)) for n, m in model.named_modules()
                   if n.startswith("layers.") and n.count(".") == 1]  # fmt: skip
        from sparseprune.pruning.batches import LabelledBatch

        batch = LabelledBatch({"input_ids": torch.tensor([[5, 6]])}, torch.tensor([0]))
        _, features, entry = pruner.reader(model, batch)
        assert [f.shape[-1] for f in features] == [16, 16] if model is pruner.model else [24, 24]
        assert entry.shape[-1] == features[0].shape[-1]
        for handle in handles:
            handle.remove()
    assert pruner.reader._others == ("layers.0", ["layers.1", "layers.2"])  # 1 of 2 is nearest to 2 of 3


def test_a_student_is_pruned_by_its_outputs_and_by_distributions(batches, tmp_path):
    config = GANConfig(hidden=0.0, steps=12)
    pruner = GANPruner(encoder(16, 2), config, encoder(24, 3, 1))
    history = pruner.fit(batches, checkpoint=tmp_path / "c.pt")
    assert history.steps[-1]["kd"] > 0 and pruner.game.width == 16
    assert pruner.game.feature_sizes == [24, 24] and pruner.game.student_sizes == [16, 16]
    again = GANPruner(encoder(16, 2), config, encoder(24, 3, 1))
    again.fit(batches, checkpoint=tmp_path / "c.pt")  # over already: read, not trained
    for a, b in zip(pruner.finalize().parameters(), again.finalize().parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("teacher", [None, (24, 3)])
def test_the_game_on_logits_pulls_on_the_student(batches, teacher):
    """With logits distilled and no hidden state: the adversary has its share of that pull, and changes something."""
    given = None if teacher is None else encoder(*teacher, 1)
    found = []
    for kind, config in (
        (GANPruner, GANConfig(hidden=0.0, steps=24, features="logits")),
        (DistillPruner, DistillConfig(hidden=0.0, steps=24, features="logits")),
    ):
        pruner = kind(encoder(16, 2), config, given)
        history = pruner.fit(batches)
        found.append(torch.cat([p.flatten() for p in pruner.model.parameters()]))
        if kind is GANPruner:
            assert history.steps[-1]["weight"] > 0 and not any("no weight" in str(e) for e in history.events)
    assert not torch.equal(*found)


def test_an_adversary_without_weight_says_so(batches):
    """Nothing is distilled, so there is no pull that its own could be measured by."""
    pruner = GANPruner(encoder(16, 2), GANConfig(kd=0.0, hidden=0.0, ce=1.0, steps=24), None)
    history = pruner.fit(batches)
    told = [e for e in history.events if "the adversarial term has no weight" in str(e)]
    assert history.steps[-1]["weight"] == 0 and len(told) == 1


def test_neither_side_is_given_away_by_the_length_of_its_rows():
    game = Game(GANConfig().discriminator, 0.2, [24], 0, 0, torch.device("cpu"), student_sizes=[16])
    rows = game.rows([torch.randn(50, 24)], [torch.randn(50, 16)], None, None)
    for side in (rows.real, rows.fake):
        assert side.shape == (50, 16)
        torch.testing.assert_close(side.norm(dim=1), torch.full((50,), 4.0), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_compared_is_refused(batches):
    with pytest.raises(ValueError, match="expected the teacher's width, 24, got 16; set hidden=0"):
        DistillPruner(encoder(16, 2), DistillConfig(steps=2), encoder(24, 3, 1)).fit(batches)
    with pytest.raises(ValueError, match="compensation fits each layer"):
        DistillPruner(encoder(16, 2), DistillConfig(compensation="bias"), encoder(24, 3, 1))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="expected blocks"):
        DistillPruner(plain, DistillConfig(), nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)))


def test_a_deeper_teacher_of_the_same_width_can_be_copied(batches):
    history = DistillPruner(encoder(16, 2), DistillConfig(steps=3), encoder(16, 4, 1)).fit(batches)
    assert history.steps[0]["hidden"] > 0
