"""AD-TP's training: its loss from the parts, gradients, schedules, the teacher's signals, and that it learns."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TINY_WORDS
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tokprune_exp import losses
from tokprune_exp.attribution import Attribution
from tokprune_exp.data.attributions import teacher_signals
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.batches import BatchLoader, length_grouped_batches
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.encoder.backbone import Backbone, RandomShape
from tokprune_exp.encoder.pretrained import random_encoder
from tokprune_exp.errors import UserError
from tokprune_exp.head import Head
from tokprune_exp.losses import ADTPLoss
from tokprune_exp.measure.fidelity import saliency_fidelity
from tokprune_exp.methods.adtp import ADTP
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.module import PruningModule
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import AdaptiveRatio, MinP, Nucleus, RandomRatio, StaticRatio
from tokprune_exp.pruning.scorers import AttentionMass, RandomScores, TokenSaliency
from tokprune_exp.tracking import quieten_lightning

SIZES = {"layers": 2, "dim": 32, "heads": 4}
LOSS = ADTPLoss(alpha=0.7, beta=3.0, gamma=0.5, temperature=2.5, kappa_max=0.8, budget_weight=0.4, listwise_weight=0.3)
CPU = torch.device("cpu")

Build = Callable[..., Any]


@pytest.fixture
def data(tiny_task: Task, data_settings: Build) -> TaskData:
    return TaskData(tiny_task, data_settings())


@pytest.fixture
def adtp(random_classifier: Build, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build AD-TP without a Trainer, at a given training progress, without dropout; its teacher is another model."""

    def build(
        scorer: Build = TokenSaliency,
        retainer: Build = AdaptiveRatio,
        progress: float = 0.5,
        has_teacher: bool = True,
        loss: ADTPLoss = LOSS,
        **settings: Any,
    ) -> ADTP:
        model = random_classifier(scorer, retainer, outputs=2, **SIZES)
        teacher = Finetune(random_classifier(outputs=2, **SIZES), ["accuracy"], torch.optim.AdamW)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if has_teacher:
            settings = {"teacher": teacher, "teacher_is_trained": True, **settings}
        method = ADTP(
            model, ["accuracy"], torch.optim.AdamW, loss, settings.pop("attribution", Attribution()), **settings
        )
        monkeypatch.setattr(ADTP, "progress", progress)
        return method.eval()

    return build


def taught(method: ADTP, batch: Batch) -> Batch:
    """The batch with the teacher's logits and attributions."""
    teacher = method.dense.eval()
    batch.teacher_logits = teacher(batch).logits.detach()
    batch.teacher_attribution = teacher.attribute(batch, method.attribution, top_k=method.attribution.top_k).detach()
    return batch


def unit(values: list[float]) -> list[float]:
    norm = math.sqrt(sum(x**2 for x in values)) or 1.0
    return [x / norm for x in values]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


# The loss


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_total_is_the_weighted_sum_of_its_parts(progress: float, adtp: Build, ragged_batch: Build) -> None:
    method = adtp(progress=progress)
    method.eta = 0.6
    terms = method.terms(taught(method, ragged_batch(method.model, [9, 4, 2, 12], outputs=2)))
    parts = {name: value.item() for name, value in terms.parts.items()}
    assert parts.keys() == {"cross_entropy", "logit", "attribution", "saliency", "ratio", "retention"}
    theirs = (
        (1 - 0.7) * parts["cross_entropy"]
        + 0.7 * parts["logit"]
        + 3.0 * parts["attribution"]
        + 0.5 * (parts["ratio"] + parts["saliency"])
    )
    assert terms.total.item() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("progress", [0.1, 0.5, 1.0])
def test_every_part_equals_its_equation(progress: float, adtp: Build, ragged_batch: Build) -> None:
    """Written out in plain Python from logits, attributions, saliencies and ratio scores; κ = 0.8·u."""
    method = adtp(progress=progress)
    method.eta, lengths = 0.6, [9, 4, 2, 12]
    batch = taught(method, ragged_batch(method.model, lengths, extra=2, outputs=2))
    parts = {name: value.item() for name, value in method.terms(batch).parts.items()}

    model = method.model
    pruned = model(batch)
    own = model.attribute(batch, method.attribution).tolist()
    saliency, ratio_logits = pruned.trace.layers[0].importance.tolist(), pruned.trace.decisions[0].ratio_logits.tolist()
    teacher = batch.teacher_attribution.tolist()
    sums = dict.fromkeys(("cross_entropy", "logit", "attribution", "saliency", "ratio"), 0.0)
    expected_ratio, kappa = 0.0, 0.8 * progress
    for row, length in enumerate(lengths):
        z = pruned.logits[row].tolist()
        sums["cross_entropy"] -= math.log(softmax(z)[int(batch.labels[row])])
        p, q = softmax([x / 2.5 for x in batch.teacher_logits[row].tolist()]), softmax([x / 2.5 for x in z])
        sums["logit"] -= sum(one * math.log(other) for one, other in zip(p, q, strict=True))
        sums["attribution"] += sum((own[row][i] - teacher[row][i]) ** 2 for i in range(length)) / length
        target = unit([(1 - kappa) * teacher[row][i] + kappa * own[row][i] for i in range(1, length)])
        given = unit(saliency[row][1:length])
        sums["saliency"] += sum((s - a) ** 2 for s, a in zip(given, target, strict=True)) / (length - 1)
        root = math.sqrt(length - 1)
        wanted, offered = softmax([a * root for a in target]), softmax([s * root for s in given])
        sums["saliency"] += 0.3 * sum(a * math.log(a / s) for a, s in zip(wanted, offered, strict=True))
        falling = sorted(target, reverse=True)
        held = [sum(falling[: -(-c * len(falling) // 10)]) / sum(falling) for c in range(1, 11)]
        label = next(c for c, share in enumerate(held) if share >= 0.6)
        scores = softmax(ratio_logits[row])
        sums["ratio"] -= math.log(scores[label])
        expected_ratio += sum(score * (c + 1) / 10 for c, score in enumerate(scores)) / len(lengths)
    theirs = {name: value / len(lengths) for name, value in sums.items()}
    theirs["ratio"] += 0.4 * (expected_ratio - 0.3) ** 2
    theirs["retention"] = (pruned.trace.counts("outputs")[:, -1] / torch.tensor(lengths)).mean().item()
    assert parts == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("kappa_max", "progress", "teachers_share"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (0.5, 1.0, 0.5)]
)
def test_kappa_moves_the_target_from_the_teacher_to_the_student(
    kappa_max: float,
    progress: float,
    teachers_share: float,
    adtp: Build,
    ragged_batch: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = adtp(progress=progress, loss=ADTPLoss(kappa_max=kappa_max))
    batch = taught(method, ragged_batch(method.model, [9, 4, 12], outputs=2))
    targets = []
    saliency_loss = losses.saliency_loss

    def recorded(importance: Tensor, target: Tensor, *rest: Any) -> Tensor:
        targets.append(target)
        return saliency_loss(importance, target, *rest)

    monkeypatch.setattr(losses, "saliency_loss", recorded)
    method.terms(batch)
    own = method.model.attribute(batch, method.attribution).detach()
    mixed = teachers_share * batch.teacher_attribution + (1 - teachers_share) * own
    mixed[:, 0] = 0
    torch.testing.assert_close(targets[0], F.normalize(mixed, dim=1), atol=1e-6, rtol=0)
    assert not targets[0].requires_grad


def gradients_of(method: ADTP, batch: Batch) -> dict[str, bool]:
    """Which parts of the model get a gradient, all of them finite."""
    method.zero_grad()
    method.terms(batch).total.backward()
    found = {}
    for part in ("encoder", "head", "pruning.scorer", "pruning.retainer"):
        gradients = [p.grad for p in method.model.get_submodule(part).parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        found[part] = any((gradient != 0).any() for gradient in gradients)
    return found


@pytest.mark.parametrize("ratio_target", ["mass", "oracle", "gumbel"])
@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_reach_encoder_head_scorer_and_retainer(
    layer: int, ratio_target: str, adtp: Build, ragged_batch: Build
) -> None:
    method = adtp(retainer=partial(AdaptiveRatio, layer=layer), ratio_target=ratio_target).train()
    method.eta = 0.6
    batch = taught(method, ragged_batch(method.model, [9, 4, 1, 12], outputs=2))
    method.train()
    assert all(gradients_of(method, batch).values())


@pytest.mark.parametrize("ratio_target", ["mass", "oracle", "gumbel"])
@pytest.mark.parametrize("scorer", [TokenSaliency, AttentionMass])
def test_the_loss_is_computed_and_differentiated_under_bf16_autocast_too(
    scorer: Build, ratio_target: str, adtp: Build, ragged_batch: Build
) -> None:
    method = adtp(scorer, partial(AdaptiveRatio, layer=1), ratio_target=ratio_target)
    batch = taught(method, ragged_batch(method.model, [9, 4, 1, 12], outputs=2))
    method.train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.terms(batch)
    terms.total.backward()
    assert terms.total.isfinite() and terms.total.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_the_gumbel_target_teaches_the_ratio_by_the_task_loss_alone(adtp: Build, ragged_batch: Build) -> None:
    torch.manual_seed(0)
    loss = ADTPLoss(alpha=0.0, beta=0.0, gamma=0.0, budget_weight=0.0)
    for ratio_target, reaches in (("gumbel", True), ("mass", False)):
        method = adtp(loss=loss, ratio_target=ratio_target)
        batch = taught(method, ragged_batch(method.model, [9, 4, 12], outputs=2))
        method.train()
        assert gradients_of(method, batch)["pruning.retainer"] == reaches


@pytest.mark.parametrize("retainer", [StaticRatio, RandomRatio, AdaptiveRatio, Nucleus, MinP])
@pytest.mark.parametrize("scorer", [TokenSaliency, AttentionMass, RandomScores])
def test_every_scorer_and_retainer_can_be_trained(
    scorer: Build, retainer: Build, adtp: Build, ragged_batch: Build
) -> None:
    method = adtp(scorer, partial(retainer, layer=1))
    terms = method.terms(taught(method, ragged_batch(method.model, [9, 4, 1, 12], outputs=2)))
    terms.total.backward()
    assert ("saliency" in terms.parts) == (scorer is TokenSaliency)
    assert ("ratio" in terms.parts) == (retainer is AdaptiveRatio)


def test_without_beta_no_second_derivative_is_computed(
    adtp: Build, ragged_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    attribute = PrunedClassifier.attribute

    def recorded(self: PrunedClassifier, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(kwargs.get("create_graph", False))
        return attribute(self, *args, **kwargs)

    for beta, kappa_max, expected in ((1.0, 1.0, [True]), (0.0, 1.0, [False]), (0.0, 0.0, [])):
        method = adtp(loss=ADTPLoss(beta=beta, kappa_max=kappa_max))
        batch = taught(method, ragged_batch(method.model, [9, 4], outputs=2))
        with monkeypatch.context() as patch:
            patch.setattr(PrunedClassifier, "attribute", recorded)
            method.terms(batch).total.backward()
        assert asked == expected
        asked.clear()


def test_with_a_share_attributed_its_terms_are_those_of_the_drawn_texts_and_the_others_those_of_all(
    adtp: Build, ragged_batch: Build
) -> None:
    method, part_method = adtp(), adtp(attributed_share=0.5)
    method.eta = part_method.eta = 0.6
    batch = taught(method, ragged_batch(method.model, [9, 4, 7, 12, 3], outputs=2))
    torch.manual_seed(4)
    drawn = part_method.attributed_rows(batch, 0.4)
    assert len(drawn) == 2 == len(set(drawn.tolist()))
    torch.manual_seed(4)
    ours = part_method.terms(batch).parts
    of_all, of_drawn = method.terms(batch).parts, method.terms(batch.rows(drawn)).parts
    for name in ("cross_entropy", "logit", "retention"):
        torch.testing.assert_close(ours[name], of_all[name])
    for name in ("attribution", "saliency"):
        torch.testing.assert_close(ours[name], of_drawn[name])
        assert ours[name] != of_all[name]
    # the labels are those of the drawn texts, the mean ratio that of all
    logits = part_method.pruned_pass(batch).trace.decisions[0].ratio_logits
    ratios, asked = method.retainer.ratios, method.retainer.ratio
    means = [LOSS.budget_weight * losses.budget_loss(rows, ratios, asked) for rows in (logits, logits[drawn])]
    torch.testing.assert_close(ours["ratio"], of_drawn["ratio"] - means[1] + means[0])
    assert means[0] != means[1]


def test_before_the_dense_fraction_is_over_every_token_is_kept_while_the_pruning_learns(
    adtp: Build, ragged_batch: Build
) -> None:
    for progress, keeps_all in ((0.0, True), (0.19, True), (0.2, False), (0.9, False)):
        method = adtp(retainer=partial(AdaptiveRatio, layer=1), progress=progress, dense_fraction=0.2)
        batch = taught(method, ragged_batch(method.model, [9, 4, 20], outputs=2))
        output = method.pruned_pass(batch)
        dense = method.model(batch, prune=False).logits
        assert torch.allclose(output.logits, dense, atol=1e-5) == keeps_all
        assert (method.terms(batch).parts["retention"].item() == 1) == keeps_all
        assert output.trace.decisions[0].ratio_logits is not None and output.trace.layers[1].importance is not None
        found = gradients_of(method, batch)
        assert found["pruning.scorer"] and found["pruning.retainer"]


def test_without_a_teacher_the_student_teaches_its_own_pruning(
    adtp: Build, ragged_batch: Build, data: TaskData
) -> None:
    method = adtp(has_teacher=False, progress=0.2, loss=ADTPLoss(alpha=0.0, gamma=0.5))
    assert method.dense is None and [stage.name for stage in method.stages()] == ["student"]
    method.prepare(data, CPU)
    assert data.train.teacher_logits is None and data.train.teacher_attribution is None
    batch = ragged_batch(method.model, [9, 4, 2], outputs=2)
    terms = method.terms(batch)
    assert terms.parts.keys() == {"cross_entropy", "saliency", "ratio", "retention"}
    own = F.normalize(method.model.attribute(batch, method.attribution).detach() * (torch.arange(9) > 0), dim=1)
    saliency = method.model(batch).trace.layers[0].importance * (torch.arange(9) > 0) * batch.valid
    theirs = ((F.normalize(saliency, dim=1) - own).square().sum(1) / torch.tensor([8, 3, 1])).mean()
    assert terms.parts["saliency"].item() == pytest.approx(theirs.item(), rel=1e-4)
    expected = terms.parts["cross_entropy"] + 0.5 * (terms.parts["saliency"] + terms.parts["ratio"])
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("layer", "tolerance"), [(0, 0.05), (1, 0.02)])
def test_the_oracle_ratio_equals_a_search_from_below_on_each_example(
    layer: int, tolerance: float, mode: str, adtp: Build, ragged_batch: Build
) -> None:
    """Each example alone, gathered by hand; in training as in evaluation, because dropout is off."""
    method = adtp(
        retainer=partial(AdaptiveRatio, layer=layer, candidates=5), ratio_target="oracle", oracle_tolerance=tolerance
    )
    model, lengths = method.model, [9, 4, 1, 20, 2, 15, 11]
    batch = ragged_batch(model, lengths, outputs=2)
    target = torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(0)) * batch.valid

    theirs = []
    with torch.no_grad():
        for row, length in enumerate(lengths):
            one = ragged_batch(model, [length], seeds=[row], outputs=2)
            full = F.cross_entropy(model(one, "gathered", prune=False).logits, one.labels)
            order = sorted(range(1, length), key=lambda i, row=row: -float(target[row, i]))
            for c in range(1, 6):
                places = torch.tensor(sorted([0, *order[: -(-c * len(order) // 5)]]))
                hidden = model.start(one, "gathered")[0]
                for number, block in enumerate(model.encoder.layers):
                    if number == layer:
                        hidden = hidden[places]
                    query, key, value = (
                        linear(hidden).view(-1, 4, 8).transpose(0, 1)
                        for linear in (block.query, block.key, block.value)
                    )
                    weights = (query @ key.transpose(1, 2) / math.sqrt(8)).softmax(-1)
                    hidden = block.finish(hidden, (weights @ value).transpose(0, 1).flatten(1))
                if F.cross_entropy(model.head(hidden[:1]), one.labels) <= full + tolerance or c == 5:
                    theirs.append(c - 1)
                    break
    method.train(mode == "train")
    ours = method.oracle_ratio(target, batch)
    assert ours.tolist() == theirs
    assert len(set(theirs)) > 1
    assert method.model.training == (mode == "train")


def test_the_loss_of_fine_tuning_is_the_cross_entropy_of_the_unpruned_model(
    random_classifier: Build, ragged_batch: Build
) -> None:
    method = Finetune(random_classifier(outputs=2, **SIZES), ["accuracy"], torch.optim.AdamW)
    batch = ragged_batch(method.model, [9, 4], outputs=2)
    terms = method.terms(batch)
    assert terms.total.item() == pytest.approx(F.cross_entropy(method.model(batch).logits, batch.labels).item())
    assert [stage.name for stage in method.stages()] == ["finetune"] and method.dense is None


# The teacher


def test_the_teacher_is_neither_stored_nor_trained_with_the_student(adtp: Build, ragged_batch: Build) -> None:
    method = adtp()
    teacher = method.dense
    ours, students = (
        {tensor.data_ptr() for tensor in module.state_dict().values()} for module in (method, method.model)
    )
    assert ours == students
    assert not {id(p) for p in method.parameters()} & {id(p) for p in teacher.parameters()}
    before = [parameter.clone() for parameter in teacher.parameters()]
    batch = taught(method, ragged_batch(method.model, [9, 4], outputs=2))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    method.terms(batch).total.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))


def test_a_resumed_student_goes_on_with_the_eta_it_had_reached(
    tiny_tokenizer: PreTrainedTokenizerFast, data: TaskData, tmp_path: Path
) -> None:
    """Without a teacher η is a moving average over the batches."""

    def student() -> ADTP:
        model, build = small_model(tiny_tokenizer, 2, prunes=True), partial(torch.optim.AdamW, lr=1e-3)
        return ADTP(model, ["accuracy"], build, ADTPLoss(alpha=0.0, beta=0.0), Attribution(), epochs=2)

    quieten_lightning()
    first = student()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "reached.ckpt")
    assert first.eta is not None and 0 < first.eta < 1
    again = student()
    again.on_load_checkpoint(torch.load(tmp_path / "reached.ckpt", weights_only=True))
    assert again.eta == first.eta
    again.on_load_checkpoint({})  # of a version that did not keep it
    assert again.eta == first.eta


def test_a_teacher_is_trained_first_unless_it_is_trained_already(adtp: Build) -> None:
    assert [stage.name for stage in adtp(teacher_is_trained=False).stages()] == ["teacher", "student"]
    assert [stage.name for stage in adtp(teacher_is_trained=True).stages()] == ["student"]


@pytest.mark.parametrize("initialises_student", [True, False])
def test_preparing_starts_the_student_from_the_teacher_only_on_request(
    initialises_student: bool, adtp: Build, data: TaskData
) -> None:
    method = adtp(initialises_student=initialises_student)
    before = {name: tensor.clone() for name, tensor in method.model.state_dict().items()}
    method.prepare(data, CPU)
    expected = method.dense.state_dict() if initialises_student else before
    for name, tensor in method.model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("pruning.") else expected[name])


def test_preparing_refuses_to_start_the_student_from_a_teacher_of_another_width(
    adtp: Build, random_classifier: Build, data: TaskData
) -> None:
    wide = Finetune(random_classifier(outputs=2, layers=2, dim=64), ["accuracy"], torch.optim.AdamW)
    with pytest.raises(UserError, match=r"teacher\.initialises_student=true"):
        adtp(teacher=wide, initialises_student=True).prepare(data, CPU)


def test_preparing_sets_eta_so_that_the_labels_have_the_asked_mean_ratio(adtp: Build, data: TaskData) -> None:
    for ratio in (0.3, 0.6):
        method = adtp(retainer=partial(AdaptiveRatio, ratio=ratio))
        method.prepare(data, CPU)
        labels = []
        for one in range(len(data.train)):
            batch = data.train.collate([one])
            falling = sorted(batch.teacher_attribution[0, 1:].tolist(), reverse=True)
            held = [sum(falling[: -(-c * len(falling) // 10)]) / sum(falling) for c in range(1, 11)]
            labels.append(next((c for c, share in enumerate(held, start=1) if share >= method.eta), 10) / 10)
        assert sum(labels) / len(labels) == pytest.approx(ratio, abs=0.02)


def test_the_teachers_signals_belong_to_their_example_and_their_token(adtp: Build, data: TaskData) -> None:
    """Against each example alone, unbatched and uncached."""
    method = adtp(attribution=Attribution(steps=3, top_k=7))
    method.prepare(data, CPU)
    teacher = method.dense
    for one in (0, 1, 57, 130, 219):
        batch = data.train.collate([one])
        assert len(batch.input_ids[0]) == int(data.train.lengths[one])
        logits = teacher(batch).logits
        attribution = teacher.attribute(batch, method.attribution, top_k=7)
        torch.testing.assert_close(batch.teacher_logits, logits.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.teacher_attribution, attribution.detach(), atol=1e-5, rtol=0)
    together = data.train.collate([219, 0, 57])
    for row, one in enumerate((219, 0, 57)):
        alone = data.train.collate([one]).teacher_attribution[0]
        assert torch.equal(together.teacher_attribution[row, : len(alone)], alone)
        assert (together.teacher_attribution[row, len(alone) :] == 0).all()


def test_the_teachers_signals_are_computed_once_and_again_only_when_something_they_depend_on_changes(
    adtp: Build, data: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    attribute = PrunedClassifier.attribute_and_answer

    def counted(self: PrunedClassifier, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return attribute(self, *args, **kwargs)

    monkeypatch.setattr(PrunedClassifier, "attribute_and_answer", counted)
    teacher, settings = adtp().dense, Attribution()

    def computes(split: Any = data.train, **changes: Any) -> bool:
        calls.clear()
        teacher_signals(teacher, split, Attribution(**{**vars(settings), **changes}), data.cache)
        return bool(calls)

    first = teacher_signals(teacher, data.train, settings, data.cache)
    assert len(calls) == 7  # 220 examples in batches of 32
    assert not computes()
    again = teacher_signals(teacher, data.train, settings, data.cache)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert computes(steps=2) and computes(top_k=3) and computes(baseline="zero")
    assert computes(split=data.selection)
    with torch.no_grad():
        teacher.head.classifier.bias += 0.1
    assert computes() and not computes()


# What every method shares


def with_trainer(method: PruningModule, step: int = 0, steps: int = 100, **attributes: Any) -> PruningModule:
    method._trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=steps, **attributes)
    return method


def test_progress_goes_from_zero_to_one(random_classifier: Build) -> None:
    method = Finetune(random_classifier(outputs=2, **SIZES), ["accuracy"], torch.optim.AdamW)
    assert [with_trainer(method, step).progress for step in (0, 25, 100)] == [0, 0.25, 1]


def test_the_pruning_has_its_own_rate_and_only_matrices_decay(random_classifier: Build) -> None:
    model = random_classifier(TokenSaliency, AdaptiveRatio, outputs=2, **SIZES)
    build = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.01)
    method = with_trainer(ADTP(model, ["accuracy"], build, ADTPLoss(), Attribution(), pruner_lr=1e-3))
    rates = {}
    for group in method.configure_optimizers()["optimizer"].param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)] = (group["initial_lr"], group["weight_decay"])
    for name, parameter in model.named_parameters():
        lr = 1e-3 if name.startswith("pruning.") else 1e-5
        assert rates[id(parameter)] == (lr, 0.01 if parameter.dim() > 1 else 0.0), name


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero(random_classifier: Build) -> None:
    model = random_classifier(outputs=2, **SIZES)
    method = with_trainer(
        Finetune(model, ["accuracy"], partial(torch.optim.SGD, lr=2.0), warmup_fraction=0.2), steps=10
    )
    configured = method.configure_optimizers()
    rates = []
    for _ in range(11):
        rates.append(configured["optimizer"].param_groups[0]["lr"] / 2.0)
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert configured["lr_scheduler"]["interval"] == "step"


def test_a_loss_that_is_not_a_number_stops_training_and_names_its_term(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(outputs=2, **SIZES)
    method = with_trainer(Finetune(model, ["accuracy"], torch.optim.AdamW), step=7)
    with torch.no_grad():
        model.head.classifier.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="cross_entropy is nan at step 7 of stage train"):
        method.training_step(ragged_batch(model, [4, 2], outputs=2), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dense_fraction": 1.5}, r"method\.dense_fraction=1\.5 must lie between 0 and 1"),
        ({"attributed_share": 0.0}, r"method\.attributed_share=0\.0 must be above 0 and at most 1"),
        ({"epochs": 0}, r"method\.epochs=0 must be at least 1"),
        ({"warmup_fraction": 1.0}, r"method\.warmup_fraction=1\.0 must be at least 0 and below 1"),
        ({"oracle_tolerance": -0.1}, r"method\.oracle_tolerance=-0\.1 must not be negative"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_its_key(wrong: dict[str, Any], message: str, adtp: Build) -> None:
    with pytest.raises(ValueError, match=message):
        adtp(**wrong)


# Learning


def small_model(tokenizer: PreTrainedTokenizerFast, outputs: int, prunes: bool = False) -> PrunedClassifier:
    shape = RandomShape(dim=32, heads=4, layers=2, ff_dim=64)
    encoder = random_encoder(Backbone(name="tiny", random=shape), tokenizer)
    pruning = Pruning(TokenSaliency(32), AdaptiveRatio(32, 4, ratio=0.4)) if prunes else None
    return PrunedClassifier(encoder, Head(32, outputs), pruning, tokenizer.sep_token_id)


def train(method: PruningModule, data: TaskData, epochs: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A plain loop in place of the Trainer; returns the loss of every step."""
    pruners = [p for name, p in method.model.named_parameters() if name.startswith("pruning.")]
    others = [p for name, p in method.model.named_parameters() if not name.startswith("pruning.")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": pruners, "lr": 5e-3}], lr=2e-3)
    history: list[float] = []
    batches = [
        batch
        for epoch in range(epochs)
        for batch in BatchLoader(data.train, length_grouped_batches(data.train.lengths, 16, seed=0, epoch=epoch))
    ]
    method.train()
    for step, batch in enumerate(batches):
        monkeypatch.setattr(type(method), "progress", step / len(batches))
        optimizer.zero_grad()
        loss = method.terms(batch).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
    method.eval()
    return history


def predictions(model: PrunedClassifier, data: TaskData, execution: str = "gathered") -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        pairs = [(model(batch, execution).logits, batch.labels) for batch in data.evaluation_batches()]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def test_on_a_tiny_task_a_student_from_scratch_learns_to_answer_from_a_part_of_the_tokens(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    teacher = Finetune(small_model(tiny_tokenizer, 2), ["accuracy"], torch.optim.AdamW)
    history = train(teacher, data, 4, monkeypatch)
    assert sum(history[-5:]) < 0.3 * sum(history[:5])
    logits, labels = predictions(teacher.model, data)
    assert (logits.argmax(-1) == labels).all()

    model = small_model(tiny_tokenizer, 2, prunes=True)
    student = ADTP(
        model,
        ["accuracy"],
        torch.optim.AdamW,
        ADTPLoss(alpha=0.5),
        Attribution(),
        teacher=teacher,
        teacher_is_trained=True,
    )
    student.prepare(data, CPU)
    at_first = F.cross_entropy(*predictions(model.eval(), data))
    train(student, data, 6, monkeypatch)
    for execution in ("masked", "gathered"):
        logits, labels = predictions(model, data, execution)
        assert (logits.argmax(-1) == labels).float().mean() >= 0.95
        assert F.cross_entropy(logits, labels) < 0.3 * at_first
    kept = torch.cat([model(batch).trace.retention[:, -1] for batch in data.evaluation_batches()])
    assert kept.mean() < 0.8


@pytest.fixture
def sums(data_settings: Build, tmp_path: Path) -> TaskData:
    """A regression in which each word has its weight: every token matters, some more than others."""
    (tmp_path / "sums").mkdir()
    for split, rows in (("train", 240), ("validation", 40)):
        generator = torch.Generator().manual_seed(rows)
        lengths = torch.randint(4, 13, (rows,), generator=generator).tolist()
        words = [torch.randint(0, 16, (length,), generator=generator).tolist() for length in lengths]
        table = {
            "sentence": [" ".join(TINY_WORDS[word] for word in one) for one in words],
            "label": [sum((word - 7.5) / 16 for word in one) for one in words],
        }
        pd.DataFrame(table).to_parquet(tmp_path / "sums" / f"{split}.parquet")
    task = Task(name="sums", labels=[], metrics=["pearson"], directory="sums")
    return TaskData(task, data_settings(root=str(tmp_path)))


def test_training_lowers_the_loss_and_the_saliency_comes_to_rank_as_the_attributions_do(
    sums: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    teacher = Finetune(small_model(tiny_tokenizer, 1), ["pearson"], torch.optim.AdamW)
    history = train(teacher, sums, 12, monkeypatch)
    assert sum(history[-5:]) < 0.3 * sum(history[:5])

    model = small_model(tiny_tokenizer, 1, prunes=True)
    student = ADTP(
        model,
        ["pearson"],
        torch.optim.AdamW,
        ADTPLoss(alpha=0.5),
        Attribution(),
        teacher=teacher,
        teacher_is_trained=True,
        initialises_student=True,
    )
    student.prepare(sums, CPU)
    before = saliency_fidelity(model, sums.evaluation_batches(), Attribution())
    history = train(student, sums, 8, monkeypatch)
    after = saliency_fidelity(model, sums.evaluation_batches(), Attribution())
    assert sum(history[-5:]) < 0.7 * sum(history[:5])
    assert after["spearman"] > max(0.6, before["spearman"] + 0.3)
    assert after["mse"] < 0.5 * before["mse"]


def test_without_a_teacher_eta_follows_the_students_attributions_and_holds_the_ratio(
    adtp: Build, ragged_batch: Build
) -> None:
    method = adtp(loss=ADTPLoss(alpha=0.0, beta=0.0), has_teacher=False)
    batch = ragged_batch(method.model, [9, 14, 21, 30, 12, 17, 25, 28], outputs=2)
    method.terms(batch)
    own = method.model.attribute(batch, method.attribution).detach()
    mass = losses.mass_by_ratio(own, method.model.sequences(batch).prunable, method.retainer.ratios)
    labels = method.retainer.ratios[losses.smallest_sufficient_ratio(mass, method.eta)]
    assert method.eta > 0
    assert abs(float(labels.mean()) - method.retainer.ratio) < 0.1
