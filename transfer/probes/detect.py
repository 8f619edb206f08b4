"""Detection by torchvision's FCOS on frozen maps: a feature pyramid and the head are trained, the network is not.

Maps of several resolutions are extracted once (`transfer.probes.pyramid`), so that there is no augmentation; their channels are
standardised by the fitted images. Pyramid (Lin et al. 2017, with P6 and P7), head, matching, losses and suppression
of doubles are torchvision's (`torchvision.models.detection.FCOS`; Tian et al. 2019). AdamW, the rate falling linearly to 0.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from pipeline.data.format.boxes import Boxes
from pipeline.errors import UserError
from transfer.box_precision import MAX_DETECTIONS
from transfer.probes.segment import drawn
from transfer.protocol.method_settings import DetectSettings

FINEST_PX = 8
"""Side of a position of the finest maps in the frame that boxes are learnt in, FCOS's P3: pixels of the image where that stride
is 8."""
STD_FLOOR = 1e-5
CHUNK = 64  # images


class _Pyramid(nn.Module):
    """Standardised maps -> levels of one width, two coarser ones besides."""

    def __init__(self, channels: Sequence[int], width: int, stats: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__()
        self.out_channels, self.num_levels = width, len(channels) + 2
        self.fpn = FeaturePyramidNetwork(list(channels), width, extra_blocks=LastLevelP6P7(width, width))
        for i, (mean, std) in enumerate(stats):
            self.register_buffer(f"mean{i}", torch.from_numpy(mean)[:, None, None])
            self.register_buffer(f"std{i}", torch.from_numpy(std)[:, None, None])

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        scaled = [(x - self.get_buffer(f"mean{i}")) / self.get_buffer(f"std{i}") for i, x in enumerate(maps)]
        return list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(scaled))).values())


class Detector(FCOS):
    """torchvision's, with maps in the place of images: all have the frame `frame_px`, so that nothing is resized or padded."""

    def __init__(self, pyramid: _Pyramid, num_classes: int, frame_px: int, settings: DetectSettings) -> None:
        sizes = tuple((FINEST_PX * 2**i,) for i in range(pyramid.num_levels))
        super().__init__(
            pyramid,
            num_classes,
            anchor_generator=AnchorGenerator(sizes, ((1.0,),) * len(sizes)),
            score_thresh=settings.min_score,
            nms_thresh=settings.nms_iou,
            detections_per_img=MAX_DETECTIONS,
        )
        self.frame_px = frame_px

    def forward(
        self, maps: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Maps (N, C, h, w), finest first -> detections of each image, or with targets one entry of its losses."""
        num, side = len(maps[0]), self.frame_px
        levels = self.backbone(maps)
        said = self.head(levels)
        frame = ImageList(maps[0].new_empty(num, 0, side, side), [(side, side)] * num)
        anchors = self.anchor_generator(frame, levels)
        sizes = [level.shape[2] * level.shape[3] for level in levels]
        if targets is not None:
            return [self.compute_loss(targets, said, anchors, sizes)]
        by_level = {name: list(values.split(sizes, dim=1)) for name, values in said.items()}
        return self.postprocess_detections(by_level, [list(a.split(sizes)) for a in anchors], frame.image_sizes)


@dataclass(frozen=True)
class DetectHead:
    detector: Detector
    device: str

    @torch.inference_mode()
    def detections(self, maps: np.ndarray) -> np.ndarray:
        """(N,) maps -> (N,) of objects, each (D, 6) float64: edges in shares of the image, score, label; surest first."""
        found = np.empty(len(maps), object)
        for begin in range(0, len(maps), CHUNK):
            for i, one in enumerate(self.detector(_tensors(maps[begin : begin + CHUNK], self.device)), begin):
                columns = (one["boxes"] / self.detector.frame_px, one["scores"][:, None], one["labels"][:, None])
                found[i] = torch.cat([column.double() for column in columns], 1).cpu().numpy()
        return found


def fit_detect(
    maps: np.ndarray,
    truth: Sequence[Boxes],
    num_classes: int,
    *,
    settings: DetectSettings,
    rates: Sequence[float],
    seed: int,
    device: str = "cpu",
) -> list[DetectHead]:
    """A head for each rate, in order.

    Args:
        maps: (N,) of fields (C, h, w), as `pyramid_of`.
        seed: decides the first weights and the order of images; equal for all rates.
    Raises:
        UserError: features are not finite, or no image has a box.
    """
    if all(boxes.crowd.all() for boxes in truth):
        raise UserError("no training image has a box to learn; prepare the dataset with some")
    stats = [_moments(maps[name]) for name in maps.dtype.names or ()]
    return [_fit(maps, truth, num_classes, settings, rate, seed, device, stats) for rate in rates]


def _moments(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) of each channel, (C,) float32, over images and positions."""
    total, squares = np.zeros(maps.shape[1]), np.zeros(maps.shape[1])
    for begin in range(0, len(maps), CHUNK):
        part = maps[begin : begin + CHUNK].astype(np.float64)
        total, squares = total + part.sum((0, 2, 3)), squares + (part**2).sum((0, 2, 3))
    if not np.isfinite(total).all():
        raise UserError("the features are not finite; the checkpoint has diverged, take an earlier one")
    num = maps.size / maps.shape[1]
    mean = total / num
    std = np.sqrt(np.maximum(squares / num - mean**2, 0))
    return mean.astype(np.float32), std.astype(np.float32) + np.float32(STD_FLOOR)


def _tensors(maps: np.ndarray, device: str) -> list[torch.Tensor]:
    return [torch.from_numpy(maps[name].astype(np.float32)).to(device) for name in maps.dtype.names or ()]


def _fit(
    maps: np.ndarray,
    truth: Sequence[Boxes],
    num_classes: int,
    settings: DetectSettings,
    rate: float,
    seed: int,
    device: str,
    stats: Sequence[tuple[np.ndarray, np.ndarray]],
) -> DetectHead:
    frame_px = FINEST_PX * maps["0"].shape[-1]
    targets = [_target(boxes, frame_px, device) for boxes in truth]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pyramid = _Pyramid([len(mean) for mean, _ in stats], settings.width, stats)
        detector = Detector(pyramid, num_classes, frame_px, settings).to(device)
    optimiser = torch.optim.AdamW(detector.parameters(), lr=rate, weight_decay=settings.weight_decay)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / settings.num_steps)
    generator = torch.Generator().manual_seed(seed)
    for chosen in drawn(len(maps), settings.batch, settings.num_steps, generator):
        (losses,) = detector(_tensors(maps[chosen], device), [targets[i] for i in chosen])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        falling.step()
    return DetectHead(detector.eval(), device)


def _target(boxes: Boxes, frame_px: int, device: str) -> dict[str, torch.Tensor]:
    kept = ~boxes.crowd
    edges = boxes.edges[kept] / boxes.scale * frame_px
    return {
        "boxes": torch.from_numpy(edges.astype(np.float32)).to(device),
        "labels": torch.from_numpy(boxes.labels[kept]).to(device),
    }
