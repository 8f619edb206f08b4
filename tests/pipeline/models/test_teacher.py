"""A teacher's softmax in the place of the labels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nfnet.optim.losses import MixedLabels, TaughtLabels
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import Objective
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig, load_backbone
from pipeline.models.teacher import Teacher
from pipeline.records import Step
from pipeline.training.run import Run
from pipeline.training.train import train

OBJECTIVE = Objective(torch.nn.Identity(), OptimConfig(learning_rate=0.1), "fp32")


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher (6, 5), labels (6,)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, 5, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(5, (6,), generator=generator)


def test_the_loss_is_the_cross_entropy_of_both_softmaxes_and_its_gradient_their_difference() -> None:
    student, teacher, labels = drawn()
    p, q = teacher.softmax(1), student.detach().softmax(1)
    loss, correct = OBJECTIVE.losses(student, TaughtLabels(p, labels))
    by_hand = -sum(float(p[n, c] * q[n, c].log()) for n in range(6) for c in range(5)) / 6
    entropy = torch.special.entr(p).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-6)
    torch.testing.assert_close(loss.detach(), F.kl_div(q.log(), p, reduction="batchmean") + entropy)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, (q - p) / 6)
    assert int(correct) == int((student.argmax(1) == labels).sum())  # of the labels, not of the teacher


def test_a_teacher_that_is_sure_of_the_labels_is_plain_cross_entropy() -> None:
    student, _, labels = drawn()
    taught = TaughtLabels(F.one_hot(labels, 5).float(), labels)
    torch.testing.assert_close(OBJECTIVE.losses(student, taught), OBJECTIVE.losses(student, labels))


@pytest.fixture(scope="module")
def taught(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run, and the folder of the network with batch normalisation that it made."""
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    run = Run(
        name="teacher",
        model=ModelConfig(name="trunk:resnet_v2_tiny", options={"method": "batch_norm", "widths": (8, 8, 8)}),
        data=DataConfig(url=digits, eval_split=None),
        augment=AugmentConfig(image_px=16),
        optim=OptimConfig(learning_rate=0.1),
        global_batch=16,
        duration=Duration(4, "steps"),
        log_every_steps=1,
    )
    assert list(train(run, out))
    return run, out


def test_a_teacher_is_in_evaluation_mode_and_has_no_gradients(taught: tuple[Run, str]) -> None:
    _, url = taught
    found, images = load_backbone(url), torch.randn(4, 3, 16, 16, requires_grad=True)
    teacher = Teacher(url, found.classes, torch.device("cpu"))
    mixed = MixedLabels(torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([0.7, 0.3, 0.7, 0.3]))
    said = teacher(images, mixed)
    torch.testing.assert_close(said.targets, found.model(images).softmax(1).detach())
    torch.testing.assert_close(
        teacher(images[:1], mixed.first[:1]).targets, said.targets[:1]
    )  # whatever its neighbours
    assert not said.targets.requires_grad and said.larger.tolist() == [0, 5, 2, 7]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda classes: classes[:-1],
            "has 10 classes, and the student 9; give one that was trained on the same classes",
        ),
        (lambda classes: [classes[1], classes[0], *classes[2:]], "for class 0, and the student"),
    ],
)
def test_a_teacher_with_other_classes_is_refused(taught: tuple[Run, str], change: object, sentence: str) -> None:
    _, url = taught
    with pytest.raises(UserError, match=sentence):
        Teacher(url, change(load_backbone(url).classes), torch.device("cpu"))  # type: ignore[operator]


def test_a_run_is_trained_to_what_its_teacher_says_of_its_own_images(taught: tuple[Run, str], tmp_path: Path) -> None:
    """A student that is its teacher has nothing to learn from it, of mixed and cropped images either."""
    run, _ = taught
    model = replace(run.model, options={**run.model.options, "method": "layer_norm"})
    url, mixed = str(tmp_path / "run"), replace(run.augment, mixup_alpha=0.2)
    run = replace(run, model=model, augment=mixed)
    assert list(train(run, url))
    student = replace(run, model=replace(model, init_from=url), duration=Duration(1, "steps"))
    first, other = (
        next(r for r in train(student, str(tmp_path / name), teacher=teacher) if isinstance(r, Step))
        for name, teacher in (("taught", url), ("labels", ""))
    )
    assert first.gradient_norm < 1e-5 < other.gradient_norm and first.loss != other.loss
    assert first.accuracy == other.accuracy  # of the labels, in both


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_a_run_that_goes_on_hears_the_same_teacher(taught: tuple[Run, str], tmp_path: Path, sam_rho: float) -> None:
    run, url = taught
    student = replace(run, seed=1, optim=replace(run.optim, sam_rho=sam_rho))
    losses = [
        [r.loss for r in train(student, str(tmp_path / out), teacher=url, leave_at=until) if isinstance(r, Step)]
        for out, until in (("whole", 0), ("parts", 2), ("parts", 0))
    ]
    assert losses[0] == losses[1] + losses[2] and len(losses[1]) == 2
