"""Instances in the files of annotation tools: a COCO data set, and LabelMe's JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask

from datasets.masks import bounding_box, decode_rle, encode_polygons
from utils.cli import InputError

CATEGORY = {"id": 1, "name": "salient object", "supercategory": "object"}
INFO = {"description": "Salient instances found by WSID-Net"}
TOLERANCE = 1.0  # of simplified outlines, pixels: they have few enough points to be edited by hand
# The version of LabelMe whose format is written. LabelMe saves its own, so a file that was edited has another one.
LABELME_VERSION = "5.0.0 (WSID-Net)"


def coco_dataset(
    entries: Sequence[Mapping[str, Any]], names: Mapping[str, str], ids: Mapping[str, Any], polygons: bool
) -> dict[str, Any]:
    """A COCO data set, ready for JSON, of photographs and their instances.

    entries: one per photograph: image_id, its stem; size, [H, W] in pixels; records, its COCO result records. names,
    ids: {stem: file name} and {stem: image id}. polygons: whether segmentations are outlines simplified by
    ``TOLERANCE``, which Label Studio needs, instead of the exact RLE. bbox and area are those of the mask.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for entry in entries:
        image_id, (height, width) = ids[entry["image_id"]], entry["size"]
        images.append({"id": image_id, "file_name": names[entry["image_id"]], "height": height, "width": width})
        for record in entry["records"]:
            rle = record["segmentation"]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": CATEGORY["id"],
                "segmentation": encode_polygons(decode_rle(rle), TOLERANCE) if polygons else rle,
                "area": int(pycocotools.mask.area(rle)),
                "bbox": bounding_box(rle),
                "iscrowd": 0,
                "score": record["score"],
            }
            annotations.append(annotation)
    return {
        "info": INFO,
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [CATEGORY],
    }


def labelme(masks: np.ndarray, scores: np.ndarray, photograph: Path, folder: Path) -> dict[str, Any]:
    """LabelMe's JSON, to be saved in ``folder``, of the instances of a photograph.

    masks: bool [n,H,W]; scores: n values in (0, 1], in the descriptions. An instance is one polygon for each of its
    connected parts, simplified by ``TOLERANCE``, with the instance's number (1..n) as group_id.
    """
    shapes = [
        {
            "label": CATEGORY["name"],
            "points": np.reshape(polygon, (-1, 2)).tolist(),
            "group_id": number,
            "description": f"score {score:.3f}",
            "shape_type": "polygon",
            "flags": {},
        }
        for number, (mask, score) in enumerate(zip(masks, scores, strict=True), 1)
        for polygon in encode_polygons(mask, TOLERANCE)
    ]
    place = os.path.join(os.path.realpath(photograph.parent), photograph.name)
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": Path(os.path.relpath(place, os.path.realpath(folder))).as_posix(),
        "imageData": None,
        "imageHeight": masks.shape[1],
        "imageWidth": masks.shape[2],
    }


def is_unedited_labelme(data: Any) -> bool:
    """Whether the content of a JSON file is what ``labelme`` returns, not saved by LabelMe since."""
    return isinstance(data, dict) and data.get("version") == LABELME_VERSION


def is_own_data_set(path: Path) -> bool:
    """Whether ``path`` is a file of ``coco_dataset``, from its first bytes; InputError when it cannot be read."""
    begin = json.dumps({"info": INFO})[:-1].encode()
    try:
        with open(path, "rb") as file:
            return file.read(len(begin)) == begin
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); name another file") from error


def file_names(paths: Sequence[Path]) -> dict[str, str]:
    """{stem: path relative to the folder that all photographs ``paths`` have in common, with forward slashes}."""
    places = {path.stem: Path(os.path.abspath(path)) for path in paths}
    try:
        common = os.path.commonpath([place.parent for place in places.values()])
    except ValueError:  # on several drives, or without photographs
        return {stem: place.name for stem, place in places.items()}
    return {stem: place.relative_to(common).as_posix() for stem, place in places.items()}
