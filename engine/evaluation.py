"""Measuring methods on one ground truth: predictions from files, or a Predictor of this repository."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from datasets.labels import Mask, Report
from datasets.masks import list_masks, prediction_records, read_saliency_mask
from engine import bootstrap
from engine.metrics import ImageResult, SaliencyMetrics, match_instances, summarize, without_nan
from engine.perturbations import Perturbation
from engine.predictions import Load, Scored, check_size, group_records, open_predictions
from utils.cli import InputError

if TYPE_CHECKING:
    from engine.post_processing import Prediction
    from engine.predictor import Predictor

GroundTruth = Mapping[str, Mask]  # {stem: mask}


@dataclass
class Method:
    """A row of the table.

    name: of the row. found: {stem: load} of engine.predictions, the predictions. results: {stem: ImageResult} of every
    image that was measured. variant_of: the name of the row of the same weights on unchanged photographs, where the
    photographs of this one were perturbed. records: COCO result records, where a Predictor was measured.
    """

    name: str
    found: Mapping[str, Load] = field(default_factory=dict)
    results: dict[str, ImageResult] = field(default_factory=dict)
    saliency: SaliencyMetrics = field(default_factory=SaliencyMetrics)
    variant_of: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)


def measure_files(
    paths: Mapping[str, Path], gt_masks: GroundTruth, report: Report, saliency_dir: Path | None = None
) -> list[Method]:
    """Measure the predictions at ``paths``, {name of the row: a path that ``open_predictions`` takes}.

    saliency_dir: the folder of the first method's saliency maps, one for each mask, or None. An image that cannot be
    measured for one method is left out of all, so that rows stay comparable; ``report`` gets its error.
    """
    maps = maps_for(gt_masks, saliency_dir) if saliency_dir else {}
    methods = [Method(name, open_predictions(path, gt_masks)) for name, path in paths.items()]
    for stem, mask in tqdm(gt_masks.items(), "evaluate", unit="img", disable=None):
        try:
            gt = mask.read()
            if maps:
                saliency = read_saliency_mask(maps[stem])
                check_size(maps[stem], saliency.shape, gt.shape)
            predictions = [method.found[stem](gt.shape) if stem in method.found else ((), ()) for method in methods]
            results = [match_instances(*prediction, gt) for prediction in predictions]
        except InputError as error:
            report(error)
            continue
        for method, result in zip(methods, results, strict=True):
            method.results[stem] = result
        if maps:
            methods[0].saliency.add(saliency, gt)
    return methods


def measure_predictor(
    predictor: "Predictor",
    gt_masks: GroundTruth,
    photographs: Mapping[str, Path],
    report: Report,
    saliency_dir: Path | None = None,
    perturbations: Iterable[Perturbation] = (),
) -> list[Method]:
    """Run a Predictor on the photograph of every mask, and then on each perturbation of those that could be measured.

    photographs: {stem: path} of every mask; saliency_dir: the folder of maps that replace S, or None. Returns one row
    for each of ``hypotheses_of`` the unchanged photographs, then as many for each perturbation. Raises InputError when
    a photograph that was measured before can no longer be.
    """
    name = f"{predictor.weights.stem} ({predictor.method})"
    if saliency_dir:
        maps_for(gt_masks, saliency_dir, png=True)  # raises its InputError before the work begins
    methods = _run(predictor, name, gt_masks, photographs, report, saliency_dir, None)
    measured = {stem: gt_masks[stem] for method in methods[:1] for stem in method.results}
    for perturbation in perturbations:
        methods += _run(predictor, name, measured, photographs, _raise, None, perturbation)
    return methods


def hypotheses_of(prediction: "Prediction") -> dict[str, Scored]:
    """What is measured of a Prediction, {ending of the row's name: (masks, scores)}: its disjoint instances, and before
    them the overlapping hypotheses of a student network, as COCO's protocol measures detectors."""
    disjoint = prediction.masks, prediction.scores
    return {"": disjoint} if prediction.ranked is None else {", ranked": prediction.ranked, ", disjoint": disjoint}


def _run(
    predictor: "Predictor",
    name: str,
    gt_masks: GroundTruth,
    photographs: Mapping[str, Path],
    report: Report,
    saliency_dir: Path | None,
    perturbation: Perturbation | None,
) -> list[Method]:
    from engine.predictor import default_batch_size, default_threads, process  # here, because files need no network

    def finish(path: Path, image: np.ndarray, prediction: "Prediction") -> tuple[str, np.ndarray, Any]:
        gt = gt_masks[path.stem].read()
        check_size(path, image.shape, gt.shape)
        mirrored = perturbation is not None and perturbation.mirrored
        step = -1 if mirrored else 1
        measured = {}
        for ending, (masks, scores) in hypotheses_of(prediction).items():
            masks = np.asarray(masks)[..., ::step]
            records = prediction_records(path.stem, masks, np.asarray(scores))
            measured[ending] = match_instances(masks, scores, gt), records
        return path.stem, gt, (measured, prediction.saliency[:, ::step])

    methods: dict[str, Method] = {}
    paths = [photographs[stem] for stem in gt_masks]
    transform = perturbation.change if perturbation else None
    device = predictor.device
    outcomes = process(paths, predictor, finish, default_batch_size(device), default_threads(), saliency_dir, transform)
    description = perturbation.name if perturbation else "evaluate"
    for outcome in tqdm(outcomes, description, len(paths), unit="img", disable=None):
        if isinstance(outcome, InputError):
            report(outcome)
            continue
        stem, gt, (measured, saliency) = outcome
        for ending, (result, records) in measured.items():
            method = methods.setdefault(ending, _row(name + ending, perturbation))
            method.results[stem] = result
            method.records += records
            method.saliency.add(saliency, gt)
    for method in methods.values():
        method.found = group_records(method.records, method.name, {}, gt_masks)
    return list(methods.values())


def _row(name: str, perturbation: Perturbation | None) -> Method:
    if perturbation is None:
        return Method(name)
    return Method(f"{name}, {perturbation.name}", variant_of=name)


def _raise(error: InputError) -> None:
    raise error


def maps_for(stems: Iterable[str], folder: Path, png: bool = False) -> dict[str, Path]:
    """{stem: path} of the saliency maps of a folder, which must have one for each of ``stems``.

    png: accept <stem>.png only. Raises InputError for a map that is missing.
    """
    maps = list_masks(folder)
    for stem in stems:
        if stem not in maps or (png and maps[stem].suffix != ".png"):
            raise InputError(f"{folder} has no saliency map of {stem}; each photograph needs {stem}.png")
    return maps


def summarize_methods(methods: Sequence[Method], count_threshold: float = 0.0) -> dict[str, dict[str, Any]]:
    """{name: summary of engine.metrics.summarize} of all rows, which must have measured the same images.

    Each summary also has "intervals": {protocol: {IoU: [lower, upper]}}, the 95 % bootstrap intervals; and all but the
    first have "differences": {protocol: {IoU: {"difference", "standard_error", "exceeds_two"}}} from the first row, as
    fractions; exceeds_two is whether the difference is larger than two standard errors. Where photographs were
    perturbed, the row "NAME, mean" has the mean of the figures over the unchanged and the perturbed photographs.
    """
    stems = list(methods[0].results)
    summaries, samples = {}, []
    draws = bootstrap.draw_images(len(stems))
    for method in methods:
        results = [method.results[stem] for stem in stems]
        saliency = method.saliency if method.saliency.summary()["images"] else None
        summaries[method.name] = summarize(results, saliency, count_threshold)
        samples.append(bootstrap.ap_of_draws(results, draws))
    means = {
        f"{base}, mean": _mean([summaries[m.name] for m in methods if base in (m.name, m.variant_of)])
        for base in dict.fromkeys(method.variant_of for method in methods if method.variant_of)
    }
    first = summaries[methods[0].name]["mAP"]
    for place, (summary, sample) in enumerate(zip(summaries.values(), samples, strict=True)):
        summary["intervals"] = without_nan(bootstrap.intervals(sample))
        if place:
            errors, second = bootstrap.standard_errors(samples[0], sample), summary["mAP"]
            summary["differences"] = {
                protocol: {iou: _difference(first[protocol][iou], second[protocol][iou], by_iou[iou]) for iou in by_iou}
                for protocol, by_iou in errors.items()
            }
    return summaries | means


def _difference(first: float | None, second: float | None, error: float) -> dict[str, Any]:
    if first is None or second is None or np.isnan(error):
        return {"difference": None, "standard_error": None, "exceeds_two": None}
    difference = second - first
    return {"difference": difference, "standard_error": error, "exceeds_two": abs(difference) > 2 * error}


def _mean(values: Sequence[Any]) -> Any:
    """The mean of nested dicts of numbers; None where any of them is None."""
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    if None in values:
        return None
    return values[0] if len(set(values)) == 1 else float(np.mean(values))
