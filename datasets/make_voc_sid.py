"""Make a data folder of the benchmark VOC-SID (docs/voc_sid.md) from VOC 2012, SegmentationClassAug and PASCAL-S.

    python -m datasets.make_voc_sid --voc VOCdevkit/VOC2012 --class-masks SegmentationClassAug --pascal-s PASCAL-S \\
        --split val2 --out data/val2

Writes OUT/images/ and OUT/labels.csv and, for val, val2 and test, OUT/instance_masks/ (0 background, 1..N salient
instances, 255 void). The training splits need --voc alone. datasets/splits/ lists the photographs.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.io
from scipy import ndimage

from datasets.images import image_size
from datasets.labels import MIN_AREA, VOC_CLASSES
from datasets.masks import VOID, read_instance_mask, read_saliency_mask
from datasets.voc import Box, parse_annotation, read_box
from utils import files
from utils.cli import InputError, Parser, make_folder, path_of
from utils.progress import tqdm
from utils.script import run

LISTS = Path(__file__).parent / "splits"
SPLITS = ("train", "voc2012_animals", "voc2012_animals2", "val", "val2", "test")

BOX_MARGIN, COMPONENT_MARGIN = 3, 5  # pixels by which boxes are grown
MAX_SHARED, MAX_OUTSIDE = 0.08, 0.05  # fractions of the pixels of a class inside several boxes, and inside none
MIN_IOU, MAX_SIDE_ERROR = 0.8, 6  # agreement of a region and its box: IoU, or the pixels between each pair of sides
SALIENT, NOT_SALIENT = 0.5, 0.25  # mean human saliency of an instance; void in between

Extent = tuple[float, float, float, float]  # first column and row, last column and row, in pixels


def split_by_boxes(classes: np.ndarray, boxes: Sequence[Box], saliency: np.ndarray | None = None) -> np.ndarray:
    """The instance mask of val2: the pixels of a class inside exactly one box of that class are its instance.

    classes: uint8 [H,W], 0 background, 1..20 VOC's classes, 255 void. boxes: all annotated objects, difficult ones too,
    in VOC's coordinates, which are taken as indices of pixels. saliency: float [H,W] in 0..1, the mean human saliency,
    where it is known. Returns uint8 [H,W]: 0 background, 1..N salient instances, ordered by class and then as the
    boxes, 255 void.

    Pixels inside several boxes or inside none are void, and so is an instance whose box covers less than MIN_AREA of
    the image. Raises ValueError, with the reason, when class mask and boxes do not determine the instances.
    """
    boxed = [1 + VOC_CLASSES.index(box.name) for box in boxes]
    labels = np.where((classes > 0) & ~np.isin(classes, boxed), VOID, 0).astype(np.uint8)
    regions = []
    for pixels, own in _by_class(classes, boxes):
        windows = [_window(box, classes.shape, BOX_MARGIN) for box in own]
        covered = np.sum(windows, axis=0)
        labels[pixels & (covered != 1)] = VOID
        for ambiguous, limit, place in (
            (covered > 1, MAX_SHARED, "several boxes"),
            (covered == 0, MAX_OUTSIDE, "no box"),
        ):
            if (fraction := ambiguous[pixels].mean()) > limit:
                raise ValueError(f"{fraction:.0%} of the pixels of {own[0].name} are inside {place}")
        regions += [(pixels & window & (covered == 1), box) for window, box in zip(windows, own)]
    small = [(box.right - box.left) * (box.bottom - box.top) < MIN_AREA * classes.size for _, box in regions]
    for (region, box), is_small in zip(regions, small):
        if not is_small and not _agrees(region, box):
            raise ValueError(f"the region of a {box.name} does not fit its box")
    return _number_instances(labels, [region for region, _ in regions], saliency, small)


def split_by_components(classes: np.ndarray, boxes: Sequence[Box], saliency: np.ndarray | None = None) -> np.ndarray:
    """The instance mask of val and test: each connected component of a class belongs to one box of that class.

    Arguments and result as for ``split_by_boxes``. Going from large to small, a 4-connected component is added to the
    box, of those that contain more than half of it, whose IoU with the extent of its region grows most; a component
    outside all boxes is background. Boxes of any size count.
    """
    labels = np.where(classes == VOID, VOID, 0).astype(np.uint8)
    regions = []
    for pixels, own in _by_class(classes, boxes):
        windows = [_window(box, classes.shape, COMPONENT_MARGIN) for box in own]
        assigned = [np.zeros_like(pixels) for _ in own]
        extents: list[Extent | None] = [None] * len(own)
        numbers, _ = ndimage.label(pixels)
        components = [(place, numbers[place] == k) for k, place in enumerate(ndimage.find_objects(numbers), 1)]
        for place, component in sorted(components, key=lambda item: -item[1].sum()):
            candidates = [k for k, window in enumerate(windows) if window[place][component].mean() > 0.5]
            if candidates:
                grown = [_union(extents[k], place) for k in candidates]
                gains = [_iou(new, own[k]) - _iou(extents[k], own[k]) for new, k in zip(grown, candidates)]
                best = int(np.argmax(gains))
                extents[candidates[best]] = grown[best]
                assigned[candidates[best]][place] |= component
        regions += assigned
    return _number_instances(labels, regions, saliency, [False] * len(regions))


RULES: dict[str, Callable[..., np.ndarray]] = {
    "val": split_by_components,
    "val2": split_by_boxes,
    "test": split_by_components,
}


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.make_voc_sid", description=__doc__)
    parser.add_argument("--voc", type=path_of, required=True, help="VOC2012, with JPEGImages/ and Annotations/")
    parser.add_argument("--class-masks", type=path_of, help="SegmentationClassAug, PNG files of class indices")
    parser.add_argument("--pascal-s", type=path_of, help="PASCAL-S, with imgList.mat and masks/1.png, masks/2.png, ...")
    parser.add_argument("--split", choices=SPLITS, required=True, help="list of photographs in datasets/splits/")
    parser.add_argument("--out", type=path_of, required=True, help="data folder to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    with open(LISTS / f"{args.split}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rule = RULES.get(args.split)
    if rule and not (args.class_masks and args.pascal_s):
        raise InputError(f"the instance masks of {args.split} need --class-masks and --pascal-s; name both folders")
    human_saliency = find_human_saliency(args.pascal_s) if rule else {}
    images = make_folder(args.out / "images")
    masks = make_folder(args.out / "instance_masks") if rule else None
    for row in tqdm(rows, args.split):
        photograph = args.voc / "JPEGImages" / row["image"]
        copy(photograph, images / row["image"])
        if rule and masks:
            labels = make_mask(rule, photograph, args.voc, args.class_masks, human_saliency)
            count = len(np.setdiff1d(labels, (0, VOID)))
            if int(row.setdefault("count", str(count))) != count:
                raise InputError(
                    f"{photograph} has {count} instances where the list has {row['count']}; take the annotations of "
                    "VOC 2012 and the masks of SegmentationClassAug and PASCAL-S unchanged"
                )
            files.save_label_png(labels, masks / f"{photograph.stem}.png")
    header = [column for column in ("image", "classes", "count") if column in rows[0]]
    lines = [",".join(header), *(",".join(row[column] for column in header) for row in rows)]
    files.write_atomically(args.out / "labels.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    print(f"{len(rows)} photographs in {args.out}")


def find_human_saliency(folder: Path) -> dict[str, Path]:
    """{VOC name without suffix: map of mean human saliency} of a PASCAL-S folder, whose imgList.mat names the maps in
    their order.

    Raises InputError when the list or the maps are missing.
    """
    lists = sorted(folder.rglob("imgList.mat"))
    places = [folder / name for name in ("masks/pascal", "datasets/masks/pascal", "masks", "mask")]
    place = next((place for place in places if (place / "1.png").is_file()), None)
    if not lists or place is None:
        raise InputError(f"{folder} lacks imgList.mat or masks/1.png; name the folder of PASCAL-S")
    try:
        names = [str(np.squeeze(name)) for name in scipy.io.loadmat(lists[0], squeeze_me=True)["imgList"]]
    except Exception as error:  # of any type, for a damaged file
        raise InputError(f"{lists[0]} is not the list of PASCAL-S ({error}); copy it again") from error
    return {Path(name).stem: place / f"{number}.png" for number, name in enumerate(names, 1)}


def make_mask(
    rule: Callable[..., np.ndarray], photograph: Path, voc: Path, class_masks: Path, human_saliency: dict[str, Path]
) -> np.ndarray:
    """The instance mask uint8 [H,W] of a photograph; InputError when a file is missing or does not fit the others."""
    annotation = voc / "Annotations" / f"{photograph.stem}.xml"
    boxes = [read_box(thing, annotation) for thing in parse_annotation(annotation).iterfind("object")]
    class_mask = class_masks / f"{photograph.stem}.png"
    classes = read_instance_mask(class_mask)
    if ((classes > len(VOC_CLASSES)) & (classes < VOID)).any():
        raise InputError(f"{class_mask} is no class mask; take SegmentationClassAug, with indices 0 to 20 and 255")
    if unknown := {box.name for box in boxes} - set(VOC_CLASSES):
        raise InputError(f"{annotation} has the unknown class {min(unknown)!r}; take the annotations of VOC 2012")
    path = human_saliency.get(photograph.stem)
    saliency = read_saliency_mask(path) if path else None
    for name, size in ((class_mask, classes.shape), (path, classes.shape if saliency is None else saliency.shape)):
        if size != image_size(photograph):
            raise InputError(f"{name} has another size than {photograph}; take it from the published data set")
    try:
        return rule(classes, boxes, saliency)
    except ValueError as error:
        raise InputError(f"no mask can be made of {photograph}: {error}; check --voc and --class-masks") from error


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically; InputError when it cannot be read or written."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {source} ({error.strerror}); --voc names the folder VOC2012") from error
    files.write_atomically(target, lambda file: file.write(content))


def _by_class(classes: np.ndarray, boxes: Sequence[Box]) -> Iterator[tuple[np.ndarray, list[Box]]]:
    """(pixels of the class as bool [H,W], its boxes) for each class that has both."""
    for index, name in enumerate(VOC_CLASSES, 1):
        own = [box for box in boxes if box.name == name]
        if own and (classes == index).any():
            yield classes == index, own


def _window(box: Box, shape: tuple[int, ...], margin: int) -> np.ndarray:
    """The pixels of a box grown by ``margin``, bool [H,W]."""
    window = np.zeros(shape, bool)
    left, top, right, bottom = (int(side) for side in box[1:])
    window[max(0, top - margin) : bottom + margin + 1, max(0, left - margin) : right + margin + 1] = True
    return window


def _agrees(region: np.ndarray, box: Box) -> bool:
    """Whether the bounding box of ``region`` has an IoU of MIN_IOU with ``box``, or sides within MAX_SIDE_ERROR."""
    if not region.any():
        return False
    extent = _union(None, ndimage.find_objects(region.astype(np.uint8))[0])
    near = all(abs(side - other) <= MAX_SIDE_ERROR for side, other in zip(extent, box[1:]))
    return near or _iou(extent, box) >= MIN_IOU


def _union(extent: Extent | None, place: tuple[slice, slice]) -> Extent:
    """The extent of a region that grows by the component at ``place``."""
    rows, columns = place
    left, top, right, bottom = columns.start, rows.start, columns.stop - 1, rows.stop - 1
    if extent is None:
        return left, top, right, bottom
    return min(left, extent[0]), min(top, extent[1]), max(right, extent[2]), max(bottom, extent[3])


def _iou(extent: Extent | None, box: Box) -> float:
    """Intersection over union of two boxes that include their last row and column; 0 for an empty extent."""
    if extent is None:
        return 0.0
    width = min(extent[2], box.right) - max(extent[0], box.left) + 1
    height = min(extent[3], box.bottom) - max(extent[1], box.top) + 1
    common = max(width, 0) * max(height, 0)
    areas = [(right - left + 1) * (bottom - top + 1) for left, top, right, bottom in (extent, box[1:])]
    return common / (sum(areas) - common)


def _number_instances(
    labels: np.ndarray, regions: list[np.ndarray], saliency: np.ndarray | None, small: list[bool]
) -> np.ndarray:
    """``labels`` with the salient regions numbered from 1, in place; unclear and small ones are void.

    regions: bool [H,W] each; saliency: float [H,W] in 0..1, None: all regions are salient.
    """
    number = 0
    for region, is_small in zip(regions, small):
        salience = 1.0 if saliency is None else saliency[region].mean() if region.any() else 0.0
        if salience < NOT_SALIENT or not region.any():
            continue
        number += not (salience < SALIENT or is_small)
        labels[region] = VOID if salience < SALIENT or is_small else number
    return labels


if __name__ == "__main__":
    run(main)
