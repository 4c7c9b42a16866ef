"""What TensorBoard shows of a training beside its losses: intermediate maps of a few photographs, after every epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from datasets.instances import read_with_labels
from datasets.labels import Sample
from datasets.masks import VOID, centroids_of
from datasets.training import read_label_map
from datasets.transforms import load_square, network_input, resize, to_tensor
from engine.post_processing import PostProcessor, to_arrays
from engine.visualize import colour_wheel, grey, heat, instance_colours, mark, overlay
from models import STUDENT
from models.branches import BoundaryCentroidNet, SaliencyNet
from models.classifier import CAM_SIZE, Classifier, activations
from models.fusion_config import FusionConfig
from models.grouping import find_clusters

if TYPE_CHECKING:
    from models.mask_rcnn import MaskRCNN


def _add_rows(writer: SummaryWriter, tag: str, rows: list[list[np.ndarray]], step: int) -> None:
    """Rows of equally sized pictures as one TensorBoard image."""
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    writer.add_image(tag, sheet, step, dataformats="HWC")


def _shrink(picture: np.ndarray, side: int = 192) -> np.ndarray:
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)


def show_cams(
    model: Classifier,
    writer: SummaryWriter,
    step: int,
    *,
    samples: list[Sample],
    scales: Sequence[float],
    size: int,
    spread: bool,
    device: torch.device,
) -> None:
    """TensorBoard: photographs beside the maximum of their classes' activation maps; scales, size, spread: as for
    ``models.classifier.activations``."""
    rows = []
    for sample in samples:
        image = load_square(sample.path, CAM_SIZE)
        batch = to_tensor(image)[None].to(device)
        cams = activations(model, batch, sample.classes or (), scales, size, spread)[0].cpu().numpy()
        image = _shrink(image)
        rows.append([image, heat(_shrink(cams.max(0, initial=0)), image)])
    _add_rows(writer, "cam", rows, step)


def show_branches(
    model: BoundaryCentroidNet,
    writer: SummaryWriter,
    step: int,
    *,
    samples: list[Sample],
    size: int,
    canny: str,
    device: torch.device,
    labels: Path,
) -> None:
    """TensorBoard: photograph, pseudo labels, B, and V as a colour wheel with the centroids pixels converge to.

    size: of the input square, pixels; labels: the folder of classes/.
    """
    rows = []
    for sample in samples:
        image = load_square(sample.path, size)
        output = model(*network_input(image, canny, device))
        boundary, offsets = output.boundary[0, 0].cpu().numpy(), output.offsets[0]
        wheel, points = _shrink(colour_wheel(offsets.cpu().numpy())), find_clusters(offsets)[1]
        classes = read_label_map(labels / "classes" / f"{sample.stem}.png")
        tints = instance_colours(256)
        tints[0], tints[255] = 0, 255
        wheel = mark(wheel, points * wheel.shape[0] / offsets.shape[1])
        rows.append([_shrink(image), _shrink(tints[classes].astype(np.uint8)), grey(_shrink(boundary)), wheel])
    _add_rows(writer, "boundary and centroids", rows, step)


def show_saliency(
    model: SaliencyNet,
    writer: SummaryWriter,
    step: int,
    *,
    samples: list[Sample],
    size: int,
    device: torch.device,
    labels: Path,
) -> None:
    """TensorBoard: photograph, the pseudo mask it is trained on, S.

    size: of the input square, pixels; labels: the folder of saliency/.
    """
    rows = []
    for sample in samples:
        image = load_square(sample.path, size)
        saliency = model(to_tensor(image)[None].to(device))[0, 0].cpu().numpy()
        mask = read_label_map(labels / "saliency" / f"{sample.stem}.png") / 255
        rows.append([_shrink(image), grey(_shrink(mask)), grey(_shrink(saliency))])
    _add_rows(writer, "saliency", rows, step)


def show_student(
    model: "MaskRCNN", writer: SummaryWriter, step: int, *, samples: list[Sample], labels: Path, device: torch.device
) -> None:
    """TensorBoard: the instance labels of photographs beside the disjoint instances that the student network finds.

    labels: the folder of the label maps.
    """
    rows, size = [], model.config.size
    post_process = PostProcessor(STUDENT, FusionConfig(), size)
    for sample in samples:
        image, found = read_with_labels(sample, labels)
        (output,) = model(to_tensor(resize(image, size))[None].to(device))
        truth = found == np.setdiff1d(found, (0, VOID))[:, None, None]
        taught = overlay(image, truth, np.ones(len(truth)), centroids_of(truth))
        prediction = post_process(to_arrays(output), image.shape[:2])
        learned = overlay(image, prediction.masks, prediction.scores, prediction.centroids)
        rows.append([_shrink(taught), _shrink(learned)])
    _add_rows(writer, "instances", rows, step)
