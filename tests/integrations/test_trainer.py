"""Pruning inside transformers' Trainer: masks, logs, resuming, the best model, and two processes."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import sparseprune as sp

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("trained.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("trained", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def masks(trainer) -> dict[str, torch.Tensor]:
    return {name: trainer.model.get_submodule(name).weight != 0 for name in trainer.pruning.pruner.masks}


def check_equal(trainer, other) -> None:
    mine, others = trainer.model.state_dict(), other.model.state_dict()
    for name, value in mine.items():
        assert torch.equal(value, others[name]), name


def test_a_callback_prunes_in_a_plain_trainer(script, tmp_path):
    """Gradient accumulation: steps are those of the optimiser; the density is in the log and exact at the end."""
    from sparseprune.integrations.trainer import PruneCallback

    pruning = PruneCallback(script.settings(criterion="magnitude", end=5))
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    dense = script.model()
    trainer = transformers.Trainer(model=script.model(), args=args, train_dataset=script.Words(), callbacks=[pruning])
    trainer.train()
    assert trainer.state.global_step == pruning.pruner.steps == 6
    logged = [record["density"] for record in trainer.state.log_history if "loss" in record]
    assert logged == sorted(logged, reverse=True) and logged[0] == 1.0 and logged[-1] == 0.2 and len(logged) == 6
    report = pruning.pruner.report()
    assert report.kept == report.total - round(0.8 * report.total)
    for name in report.masks:
        weight = trainer.model.get_submodule(name).weight
        assert torch.equal(weight != 0, report.masks[name]), name
        assert not torch.equal(weight[report.masks[name]], dense.get_submodule(name).weight[report.masks[name]])
    assert list(trainer.model.state_dict()) == list(dense.state_dict())
    choice = sp.sparsify_(trainer.model, layout="csr")
    assert len(choice.converted) == len(report.masks)


@pytest.mark.parametrize("kind", ["movement", "magnitude", "learned", "teacher", "adversary"])
def test_a_resumed_run_ends_with_the_same_masks_and_weights(kind, script, tmp_path):
    from sparseprune.integrations.learned import LearnedScores

    def pruning():
        return script.settings(criterion=kind if kind in ("movement", "magnitude") else LearnedScores(), end=18)

    kappa = {"teacher": 0.0, "adversary": 0.2}.get(kind)
    whole = script.trainer(tmp_path / "whole", pruning(), kappa)
    whole.train()
    killed = script.trainer(tmp_path / "killed", pruning(), kappa)
    killed.add_callback(script.Kill(14))
    with pytest.raises(script.Killed):
        killed.train()
    resumed = script.trainer(tmp_path / "killed", pruning(), kappa)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 24
    check_equal(resumed, whole)
    assert (
        0.19 < sum(int(m.sum()) for m in masks(whole).values()) / sum(m.numel() for m in masks(whole).values()) < 0.21
    )
    if kappa is not None:
        named = {name for record in whole.state.log_history for name in record}
        assert {"kd", "hidden", "density"} <= named and ("discriminator_accuracy" in named) == (kappa > 0)
    # From a folder elsewhere.
    (tmp_path / "killed" / "checkpoint-12").rename(tmp_path / "moved")
    again = script.trainer(tmp_path / "third", pruning(), kappa)
    again.train(resume_from_checkpoint=str(tmp_path / "moved"))
    check_equal(again, whole)


def test_a_folder_elsewhere_may_be_a_path(script, tmp_path):
    """Another run's checkpoint of the same step lies where one would be looked for otherwise."""
    whole = script.trainer(tmp_path / "whole", script.settings(criterion="magnitude"), max_steps=12)
    whole.train()
    other = script.trainer(tmp_path / "other", script.settings(criterion="magnitude"), max_steps=12, seed=2)
    other.train()
    resumed = script.trainer(tmp_path / "other", script.settings(criterion="magnitude"), max_steps=12)
    began = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            began.append(state.global_step)

    resumed.add_callback(Watch())
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-8")
    assert began == [8]  # a run from the start would end alike
    check_equal(resumed, whole)


def test_what_int8_kernels_round_is_rounded_while_the_rest_heals(script, tmp_path):
    """From the end of the schedule to the end of the run, resumed in between, and in the checkpoints under the names
    that the model has.
    """
    from sparseprune.nn.simulated import SimulatedLinear

    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, sum(isinstance(m, SimulatedLinear) for m in model.modules())))

    def start(folder, **more):
        more = {"value_dtype": "int8", "activations": "int8", **more}
        run = script.trainer(folder, script.settings(criterion="magnitude", end=6, **more), 0.0)
        run.add_callback(Watch())
        return run

    whole = start(tmp_path / "whole")
    whole.train()
    layers = len(whole.pruning.pruner.masks)
    assert [count for step, count in seen] == [0] * 6 + [layers] * 18
    assert not [m for m in whole.model.modules() if isinstance(m, SimulatedLinear)]
    again = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-24")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.model.parameters()))
    resumed = start(tmp_path / "other")
    seen.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert seen[0] == (12, layers) and not [m for m in resumed.model.modules() if isinstance(m, SimulatedLinear)]
    check_equal(resumed, whole)
    exact = start(tmp_path / "exact", value_dtype="float32", activations="float32")
    exact.train()
    assert not torch.equal(exact.model.classifier.weight, whole.model.classifier.weight)


def test_what_cannot_be_resumed_is_refused(script, tmp_path):
    run = script.trainer(tmp_path, script.settings(criterion="magnitude"), max_steps=8)
    run.train()
    for match, pruning, options in (
        ("another configuration", script.settings(criterion="magnitude", schedule=sp.CubicSchedule(0.5)), {}),
        ("without a teacher", script.settings(criterion="magnitude"), {"kappa": 0.0}),
        ("end expected up to 4", script.settings(criterion="magnitude"), {"max_steps": 4}),
    ):
        with pytest.raises(ValueError, match=match):
            script.trainer(tmp_path, pruning, **{"max_steps": 16, **options}).train(resume_from_checkpoint=True)
    state = tmp_path / "checkpoint-8" / "sparseprune.ckpt"
    whole = state.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"-8.*not a readable state of the run at step 8 .*resume from .*-4,"):
            script.trainer(tmp_path, script.settings(criterion="magnitude"), max_steps=16).train(True)
    state.unlink()
    with pytest.raises(ValueError, match=r"found no such file; this checkpoint is incomplete.*resume from .*-4,"):
        script.trainer(tmp_path, script.settings(criterion="magnitude"), max_steps=16).train(True)


def test_a_model_made_anew_has_no_teacher(script, tmp_path):
    from sparseprune.integrations.terms import Distillation
    from sparseprune.integrations.trainer import PruneTrainer

    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"expected model=\.\.\. beside a teacher, got model_init"):
        PruneTrainer(model_init=script.model, args=args, train_dataset=script.Words(), distillation=Distillation())


def test_the_best_model_is_one_of_the_final_density(script, tmp_path):
    """While the masks move the loss is lowest: a denser checkpoint must not come back."""
    run = script.trainer(
        tmp_path, script.settings(criterion="magnitude", schedule=sp.ConstantSchedule(0.05), begin=8, end=10),
        eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, learning_rate=5e-3, num_train_epochs=2,
    )  # fmt: skip
    run.train()
    losses = {record["step"]: record["eval_loss"] for record in run.state.log_history if "eval_loss" in record}
    assert run.state.best_global_step >= 12 and run.state.best_metric == min(l for s, l in losses.items() if s >= 12)
    found = masks(run)
    kept = sum(int(mask.sum()) for mask in found.values())
    total = sum(mask.numel() for mask in found.values())
    assert kept == total - round(0.95 * total)
    assert abs(run.evaluate()["eval_loss"] - run.state.best_metric) < 1e-6


def test_a_run_that_ends_early_says_so(script, tmp_path):
    run = script.trainer(tmp_path, script.settings(criterion="magnitude"))

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run.add_callback(Stop())
    with pytest.warns(UserWarning, match="ended at step 3, expected at least end=8"):
        run.train()
    assert run.pruning.density == 0.2


def test_bfloat16_and_accumulation_with_a_teacher(script, tmp_path):
    run = script.trainer(
        tmp_path, script.settings(end=6), 0.2, bf16=True, gradient_accumulation_steps=2, num_train_epochs=1
    )
    run.train()
    assert all(parameter.dtype is torch.float32 for parameter in run.model.parameters())
    assert run.pruning.density == 0.2
    last = [record for record in run.state.log_history if "loss" in record][-1]
    assert last["kd"] > 0 and last["hidden"] > 0


def test_accumulated_batches_give_the_loss_of_one_large_batch(script, tmp_path):
    """The teacher's terms are means over the batch, however it is cut."""
    found = []
    for rows, batches in ((8, 1), (4, 2)):
        run = script.trainer(
            tmp_path, script.settings(criterion="magnitude"), 0.0, per_device_train_batch_size=rows,
            gradient_accumulation_steps=batches, max_steps=8, save_strategy="no", optim="sgd", logging_steps=1,
        )  # fmt: skip
        # BERT's own loss is a mean whatever Trainer divides by, so that it counts twice here; not ours to mend.
        run.terms.config = dataclasses.replace(run.terms.config, ce=0.0)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(1.2)  # unlike the teacher from the first step on
        run.train()
        found.append(run)
    for first, second in zip(*([r for r in run.state.log_history if "loss" in r] for run in found)):
        assert first["loss"] == pytest.approx(second["loss"], abs=2e-3) and first["kd"] == pytest.approx(
            second["kd"], rel=1e-2
        )
    for name, value in found[0].model.state_dict().items():
        torch.testing.assert_close(value, found[1].model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_sparse_model_trains_in_a_trainer_and_resumes(script, tmp_path):
    """Checkpoints of a sparsified model are sparse folders, which a Trainer reads again."""

    def start(folder: Path):
        model = script.model()
        sp.prune_(model, 0.8)
        sp.sparsify_(model, layout="csr", engine="layers")
        args = transformers.TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, save_steps=4, report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(model=model, args=args, train_dataset=script.Words())

    whole = start(tmp_path / "whole")
    whole.train()
    config = json.loads((tmp_path / "whole" / "checkpoint-4" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparseprune"
    resumed = start(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    check_equal(resumed, whole)
    before = copy.deepcopy(whole.model)
    again = type(before).from_pretrained(tmp_path / "whole" / "checkpoint-8")
    for name, module in before.named_modules():
        if isinstance(module, sp.SparseLinear):
            assert torch.equal(again.get_submodule(name).weight, module.weight), name


def test_learned_scores_follow_adam(script):
    from sparseprune.integrations.learned import LearnedScores

    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4)
    criterion = LearnedScores(lr=0.1)
    scores = torch.nn.Parameter(torch.empty(4, 5))
    with torch.no_grad():
        order = linear.weight.abs().flatten().argsort()
        scores.view(-1)[order] = torch.arange(20.0) / 19
    adam = torch.optim.Adam([scores], lr=0.1)
    for _ in range(3):
        gradient = torch.randn(4, 5)
        criterion.observe({"a": linear.weight}, {"a": gradient})
        scores.grad = gradient * linear.weight.detach()
        adam.step()
    torch.testing.assert_close(criterion.state["a"]["score"], scores.detach(), rtol=1e-5, atol=1e-6)
    other = LearnedScores(lr=0.1)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.state["a"]["score"], criterion.state["a"]["score"]) and other.steps == 3


@pytest.mark.slow
def test_two_processes_end_with_the_same_masks(torchrun, tmp_path):
    torchrun(SCRIPT, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["whole"]["world"] == 2 and first["whole"]["steps"] == 12
    runs = [found[name] for found in (first, second) for name in ("whole", "resumed")]
    assert len({run["hash"] for run in runs}) == 1
    assert runs[0]["kept"] == runs[0]["total"] - round(0.8 * runs[0]["total"])
    for run in runs:
        for name, value in run["state"].items():
            assert torch.equal(value, runs[0]["state"][name]), name
