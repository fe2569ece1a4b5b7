"""Runs on a GPU, as far as they can be seen without one: nothing stays behind on the CPU, and a run changes over."""

from __future__ import annotations

import pytest
import torch
from fake_card import CARD, OnCard, a_card
from torch import nn

from sparseprune.runner import RunConfig, run
from sparseprune.runner.devices import describe_device, find_device
from sparseprune.training import DistillConfig, DistillPruner

TINY = {
    "hidden": 32, "ffn": 64, "layers": 1, "heads": 2, "dense_epochs": 2, "train_limit": 320, "other_limit": 60,
    "latency_batch": 8, "batch_size": 32, "layout": "dense", "robustness": 20,
}  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    with a_card(monkeypatch) as waits:
        yield waits


def tiny(**pruning):
    return RunConfig(pruning=DistillConfig(epochs=2.0, **pruning), **TINY)


def test_the_card_refuses_what_a_real_one_refuses(card):
    linear = nn.Linear(3, 4).to("cuda")
    assert linear.weight.device == CARD and isinstance(linear.weight, OnCard | nn.Parameter)
    with pytest.raises(RuntimeError, match="same device"):
        linear(torch.ones(2, 3))
    out = linear(torch.ones(2, 3).to(CARD))
    assert out.device == CARD and out.cpu().device.type == "cpu"
    out.sum().backward()
    assert linear.weight.grad.device == CARD
    with pytest.raises(TypeError, match="numpy"):
        out.detach().numpy()
    assert torch.zeros(2, device="cuda").device == CARD == torch.zeros_like(out).device
    assert torch.zeros(2).device.type == "cpu" and float(out.mean()) == float(out.cpu().mean())


def test_a_whole_run_on_it(card, tmp_path):
    record = run(tiny(), out=tmp_path, name="card", quiet=True, device="auto")
    assert record.record["device"] == "cuda:0 (Fake card)" and len(card) > 30
    assert "computed on cuda:0 (Fake card)" in record.table
    assert {p.device for p in record.model.parameters()} == {CARD}


@pytest.mark.parametrize("change", [
    {"method": "gan"}, pytest.param({"layout": "csr", "compensation": "low_rank"}, marks=pytest.mark.slow),
    pytest.param({"granularity": "16x1", "layout": "bsr"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_else_a_run_does_stays_on_it(card, tmp_path, change):
    from sparseprune.runner.config import method_config

    method, layout = change.pop("method", "scores"), change.pop("layout", "dense")
    config = RunConfig(pruning=method_config(method, epochs=1.0, **change), **{**TINY, "layout": layout})
    model = run(config, out=tmp_path, name="card", quiet=True, device="cuda").model
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors and {t.device for t in tensors} == {CARD}


class Killed(Exception):
    pass


def killed_at(patch, step):
    fit = DistillPruner.fit

    def until(self, *args, **more):
        def stop(record):
            if record["step"] == step:
                raise Killed

        return fit(self, *args, **{**more, "callback": stop, "checkpoint_every": 5})

    patch.setattr(DistillPruner, "fit", until)


# Steps: before a checkpoint of the pruning, while masks move, while it heals.
@pytest.mark.slow
@pytest.mark.parametrize(("first", "step"), [("cuda", 2), ("cuda", 7), ("cpu", 7), ("cpu", 17)])
def test_a_killed_run_goes_on_on_another_device(monkeypatch, tmp_path, capsys, first, step):
    """As if it had stayed: the card computes what the CPU does."""
    from sparseprune.runner.config import method_config

    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "reference")
    config = RunConfig(pruning=method_config("gan" if step == 7 else "scores", epochs=2.0), **TINY)
    whole = run(config, out=tmp_path, name="whole", quiet=True, device="cpu").record
    for device, cut in ((first, step), ("cuda" if first == "cpu" else "cpu", None)):
        with monkeypatch.context() as patch:
            if cut is not None:
                killed_at(patch, cut)
            scope = a_card(patch) if device == "cuda" else torch.enable_grad()
            with scope:
                if cut is not None:
                    with pytest.raises(Killed):
                        run(config, out=tmp_path, name="cut", quiet=True, device=device)
                else:
                    record = run(config, out=tmp_path, name="cut", device=device).record
    said = capsys.readouterr().out
    assert "resuming: 2 of 2 dense epochs are done" in said and "replaced" not in said
    assert ("pruning steps are done" in said) == (step > 5)
    assert record["mask_hash"] == whole["mask_hash"]
    assert record["device"].startswith("cpu" if first == "cuda" else "cuda")
    assert record["pruned"]["test"]["loss"] == pytest.approx(whole["pruned"]["test"]["loss"], rel=1e-3)


def test_training_in_bfloat16_on_the_cpu(tmp_path, monkeypatch):
    seen = set()
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.add((out := forward(self, x)).dtype), out)[1])
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    record = run(tiny(autocast="bfloat16"), out=tmp_path, name="half", quiet=True, device="cpu").record
    assert torch.bfloat16 in seen and record["config"]["pruning"]["autocast"] == "bfloat16"
    assert record["device"] == "cpu"
    seen.clear()
    whole = run(tiny(), out=tmp_path, name="whole", quiet=True, device="cpu").record
    assert seen == {torch.float32}
    for which in ("dense", "pruned"):
        assert record[which]["test"]["loss"] == pytest.approx(whole[which]["test"]["loss"], rel=0.05)
        assert record[which]["test"]["loss"] != whole[which]["test"]["loss"]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_one_shot_pruning_of_a_model_that_is_on_it(card, criterion):
    transformers = pytest.importorskip("transformers")
    import sparseprune as sp
    from sparseprune.language import perplexity, tokens_per_second

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                      intermediate_size=24)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to("cuda")
    ids = torch.randint(0, 20, (8, 16))
    # In memory: what is saved comes back as an ordinary tensor, where a real card's comes back to the card.
    report = sp.prune_(model, 0.5, criterion=criterion, data=ids, criterion_options={"spill": False})
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and {p.device for p in model.parameters()} == {CARD}
    assert perplexity(model, ids).tokens == 120
    del card[:]
    tokens_per_second({"a": model}, ids[0, :4], new_tokens=2, repeats=2)
    assert len(card) >= 9  # before and after the prompt, and after the last token, of each of three rounds


def test_names_of_devices(monkeypatch):
    cpu = torch.device("cpu")
    assert find_device("auto") == find_device("cpu") == cpu and describe_device(cpu) == "cpu"
    for name in ("meta", "tpu", "cuda:", "cuda:x", "CPU", "", "cuda:-1"):
        with pytest.raises(ValueError, match="device expected auto, cpu, cuda or cuda:N, got"):
            find_device(name)
    with pytest.raises(ValueError, match=r"expected a GPU for 'cuda', got none .*; use cpu or auto"):
        find_device("cuda")
    with a_card(monkeypatch):
        assert find_device("auto") == find_device("cuda") == find_device("cuda:0") == CARD
        assert find_device("cpu") == torch.device("cpu")
        with pytest.raises(ValueError, match=r"one of the 1 GPUs here, cuda:0 to cuda:0, got 'cuda:1'"):
            find_device("cuda:1")


@pytest.mark.parametrize("command", ["demo", "prune --model encoder --train a --valid b --test c", "article",
                                     "eval --model m --text t", "prune --model m --text t",
                                     "sensitivity --model m --text t", "export a b"])  # fmt: skip
def test_every_command_that_runs_a_model_takes_a_device(command, capsys, tmp_path):
    from sparseprune.cli import main

    assert main([*command.split(), "--device", "cuda:0"]) == 2
    error = capsys.readouterr().err.strip()
    if not torch.cuda.is_available():
        assert "expected a GPU for 'cuda:0', got none" in error and len(error.splitlines()) == 1
