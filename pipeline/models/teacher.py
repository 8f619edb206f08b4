"""A trained network as a teacher: its softmax takes the place of the labels.

The student's loss is then the mean over samples of the cross-entropy of its softmax with the teacher's, which is the
distributional loss of Liu et al. 2020 (ReActNet, arXiv 2003.03488) and, but for the teacher's entropy, a Kullback-Leibler
divergence: no labels, no temperature. The source's teacher is of full precision; nothing here asks for that.
"""

from collections.abc import Sequence

import torch

from nfnet.optim.losses import MixedLabels, TaughtLabels
from pipeline.errors import UserError
from pipeline.models.backbone import load_backbone


class Teacher:
    """Of a checkpoint (`pipeline.models.backbone`): in evaluation mode, in fp32, without gradients.

    Args:
        classes: of the student, in the order of its outputs.
    Raises:
        UserError: the checkpoint has other classes, or another order of them.
    """

    def __init__(self, url: str, classes: Sequence[str], device: torch.device) -> None:
        found = load_backbone(url)
        if found.classes != list(classes):
            pairs = zip(found.classes, classes, strict=False)
            number = next((i for i, (its, ours) in enumerate(pairs) if its != ours), None)
            differs = (
                f"has {len(found.classes)} classes, and the student {len(classes)}"
                if number is None
                else f"has {found.classes[number]!r} for class {number}, and the student {classes[number]!r}"
            )
            raise UserError(f"the teacher {url} {differs}; give one that was trained on the same classes")
        self._network = found.model.to(device).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor | MixedLabels) -> TaughtLabels:
        """Args: images: (N, 3, H, W), as the student gets them; labels: (N,) classes, or two of each mixed image."""
        targets = self._network(images).float().softmax(1)
        return TaughtLabels(targets, labels if isinstance(labels, torch.Tensor) else labels.larger)
