"""Mutation testing: one line of the method at a time is changed, and the tests that ought to fail are run.

    make mutants                                    # all mutations; exit code 1 when more than two in forty survive
    python tests/mutations.py --list
    python tests/mutations.py -k losses.py --jobs 1

Mutated files are copies in a temporary folder. Exit code 2: a snippet is not found exactly once in its file, or the
tests fail without a mutation.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("benchmarks", "datasets", "engine", "experiments", "models", "ops", "tests", "utils")
DATA = ("samples", "weights")  # read only, so a copy of the code gets symbolic links to them
ALLOWED = 2 / 40  # fraction of the mutations that may survive
TIMEOUT = 600  # seconds, for the tests of one mutation
# Imported once in the fork server: importing them takes most of the time of a quick test.
PROCESSES = multiprocessing.get_context("forkserver")
LIBRARIES = [
    "cv2",
    "numpy",
    "pycocotools.mask",
    "pydensecrf.densecrf",
    "pytest",
    "scipy.cluster.vq",
    "scipy.ndimage",
    "scipy.special",
    "timm",
    "torch",
    "torch.utils.tensorboard",
    "torchvision",
    "tqdm",
]

# {(file, test file, pytest -k expression): [(snippet of one line, its replacement)]}
MUTATIONS: dict[tuple[str, str, str], list[tuple[str, str]]] = {
    # ---- schedules
    ("engine/trainer.py", "test_defaults.py", "takes_the_steps"): [
        ("GAMMA = 1e-4, 0.9", "GAMMA = 1e-4, 0.1"),
        ("GAMMA = 1e-4, 0.9", "GAMMA = 0.0, 0.9"),
        ('rate * group["scale"]', "rate"),
        ("(1 - step / total) ** GAMMA", "1.0"),
        ("momentum=0.9", "momentum=0.0"),
        ('if name.startswith("backbone.") else 1.0', ""),
        ("weight_decay=WEIGHT_DECAY", "weight_decay=0"),
        ("optimizer.zero_grad(set_to_none=True)", "pass"),
    ],
    # ---- presets
    ("engine/presets.py", "test_defaults.py", "preset"): [
        ("_PAPER_SCHEDULE = Schedule(epochs=5", "_PAPER_SCHEDULE = Schedule(epochs=2"),
        ("epochs=5, batch_size=6, lr=0.01", "epochs=5, batch_size=6, lr=0.001"),
        ("radius=10, lsu_weight=1.0", "radius=5, lsu_weight=1.0"),
        ('lsu_weight=1.0, lsu_form="mse"', 'lsu_weight=0.02, lsu_form="mse"'),
        ("scales=(1.0, 0.5, 1.5, 2.0)", "scales=(1.0, 2.0)"),
        ("Schedule(epochs=8, batch_size=6, lr=1e-4", "Schedule(epochs=1, batch_size=6, lr=1e-4"),
        ("iterations=6", "iterations=2"),
        ("power=10", "power=5"),
        ('centroid_region="image"', 'centroid_region="salient"'),
    ],
    ("engine/config.py", "test_defaults.py", "option or removes or wrong_value"): [
        ("and not isinstance(value, FusionConfig)", ""),
        ('"size": multiple_of(32, 64, 4096', '"size": multiple_of(4, 64, 4096'),
        ("value if isinstance(value, tuple) else (value,)", "(value[0] if isinstance(value, tuple) else value,)"),
    ],
    # ---- what the stages learn
    ("engine/stages.py", "test_stages.py", "l_su"): [
        ('weights={"subitizing": config.lsu_weight', 'weights={"subitizing": 0'),
        ("(12.0 if progress < 0.5 else 6.0)", "12.0"),
        ("6.0) * size / 512", "6.0)"),
        ('batch["pseudo_saliency"] > 0.5,', 'batch["pseudo_saliency"] > 0.3,'),
    ],
    ("engine/stages.py", "test_stages.py", "centroid_targets or switch"): [
        ('"centroid_target": config.centroid_target_weight}', '"centroid_target": 1.0}'),
        ("        if config.lsu_weight:", "        if True:"),
        ("        if config.centroid_target_weight:", "        if config.lsu_weight:"),
    ],
    ("engine/stages.py", "test_stages.py", "mean_offset"): [
        ("if not config.centroid_target_weight:", "if not config.lsu_weight:"),
    ],
    ("engine/stages.py", "test_stages.py", "other_pixels"): [
        ("int(progress * 1e9)", "int(progress)"),
    ],
    ("engine/stages.py", "test_stages.py", "whole"): [
        ("TrainingImages(samples, network.size, jitter", "TrainingImages(samples, network.size, crop=0.7, jitter"),
    ],
    ("engine/stages.py", "test_stages.py", "soft_masks"): [
        ('batch["pseudo_saliency"][:, None]', 'batch["pseudo_saliency"][:, None].round()'),
    ],
    ("engine/cam_labels.py", "test_stages.py", "spread"): [
        ("SPREAD if config.spread else PLAIN", "PLAIN"),
        ("size, thresholds, config.crf)", "size, thresholds, False)"),
    ],
    ("engine/cam_labels.py", "test_stages.py", "bfloat16"): [("with run.autocast():", "if True:")],
    ("engine/cam_labels.py", "test_provenance.py", "two_precisions"): [
        ("settings |= run.machine.precision_of_labels", "pass"),
    ],
    ("models/classifier.py", "test_classifier.py", "third_power"): [("enabled=False", "enabled=True")],
    ("engine/student.py", "test_student.py", "no_other_network"): [
        ("result, is_student, teacher)", "result, lambda saved: True, teacher)"),
        ("result, is_student, teacher)", "result, is_student)"),
    ],
    ("engine/results.py", "test_infer.py", "while_it_is_computed or last_line or full_disk or two_settings"): [
        ("self.states.get(path) or", ""),
        ('own[entry["image_id"]] = entry', 'own.setdefault(entry["image_id"], entry)'),
        ("if file.write(line) != len(line):", "file.write(line)\n            if False:"),
        ("if not self.journal.exists():", "if False:"),
    ],
    ("utils/files.py", "test_infer.py", "computed_anew"): [
        ("mark in end if mark else end", "end"),
    ],
    ("engine/pts.py", "test_stages.py", "bfloat16"): [("with run.autocast():", "if True:")],
    ("engine/trainer.py", "test_defaults.py", "logs_its_rate"): [
        ("weights.get(key, 1.0) * term", "term"),
        ("{key: weights[key] * term for", "{key: term for"),
    ],
    # ---- losses
    ("models/losses.py", "test_stages.py", "l_su"): [
        ("(2 * bandwidth**2)", "bandwidth**2"),
        ("2 * F.smooth_l1_loss", "F.smooth_l1_loss"),
    ],
    ("models/losses.py", "test_method_values.py", ""): [
        ("errors = ops.displacement_pair_loss", "errors = 2 * ops.displacement_pair_loss"),
        ("subset: int = 256", "subset: int = 64"),
    ],
    ("models/losses.py", "test_losses.py", "mean_over_images"): [
        ("(counts >= 1)", "(counts >= 0)"),
    ],
    ("models/losses.py", "test_losses.py", "salient_region_only"): [
        ("valid = rank >= 0", "valid = rank >= -1"),
    ],
    ("models/losses.py", "test_losses.py", "distance_to_the_centres"): [
        ("[:, index] - places", "[:, index]"),
        ("% 256 > 0)", "% 256 >= 0)"),
    ],
    ("ops/reference.py", "test_ops.py", "path"): [
        ("< dy * dy + dx * dx]", "<= dy * dy + dx * dx]"),
    ],
    ("ops/reference.py", "test_ops.py", "reference and dense"): [
        ("step.mul_(2).sub_(before)", "step.mul_(2)"),
    ],
    # ---- the number of objects
    ("models/count_head.py", "test_models.py", "count_head"): [
        ("MAX_COUNT = 4", "MAX_COUNT = 5"),
        ("weight=1 / times", "weight=None"),
        ("decay: float = 0.2", "decay: float = 0.02"),
        ("self.linear.bias.add_(", "self.linear.bias.sub_("),
    ],
    ("models/grouping.py", "test_losses.py", "as_many_as_the_count"): [
        ("min_area: float = 0.005", "min_area: float = 0.0"),
    ],
    # ---- activations and pseudo labels
    ("models/classifier.py", "test_stages.py", "spread"): [
        ("CAM_SIZE = 512", "CAM_SIZE = 256"),
    ],
    ("models/classifier.py", "test_classifier.py", ""): [
        ("WALKS = ((2, 3), (3, 2))", "WALKS = ((2, 3), (3, 3))"),
        ("maps.square().flatten(2)", "maps.flatten(2)"),
        ("plain + flipped.flip(3)", "plain + flipped"),
        ("both.relu()", "both"),
    ],
    ("engine/cam_labels.py", "test_defaults.py", "unary"): [
        ("even=0.6, power=2", "even=0.5, power=2"),
        ("even=0.6, power=2", "even=0.6, power=1"),
    ],
    ("engine/cam_labels.py", "test_defaults.py", "confident_labels"): [
        ("foreground=0.7", "foreground=0.6"),
        ("background=0.5", "background=0.4"),
        ("foreground=0.30, background=0.05", "foreground=0.30, background=0.15"),
    ],
    ("engine/cam_labels.py", "test_fusion.py", "maximum_over_classes"): [
        ("cams.max(0)", "cams.mean(0)"),
    ],
    ("models/crf.py", "test_defaults.py", "the_crf_has"): [
        ("= 4.0, 49.0, 5.0", "= 4.0, 49.0, 50.0"),
        ("= 3.0, 3.0", "= 1.0, 3.0"),
        ("ITERATIONS = 10", "ITERATIONS = 1"),
        ("SIGMA_ALPHA * scale, SIGMA_BETA), (W2", "SIGMA_ALPHA, SIGMA_BETA), (W2"),
    ],
    ("datasets/training.py", "test_training.py", "move_with"): [
        ("window(read_label_map(", "(read_label_map("),
        ("labels[::4, ::4]", "labels[3::4, 3::4]"),
    ],
    ("datasets/training.py", "test_stages.py", "mirrored"): [
        ("array[:, ::-1] if flip else array", "array"),
        ("rng.random() < 0.5", "rng.random() < 0.05"),
    ],
    # ---- the student network
    ("models/detections.py", "test_student.py", "disjoint_set or best_set"): [
        ("MAX_COVERED = 0.5", "MAX_COVERED = 1.0"),
        ("INSTANCE_COST, COUNT_WEIGHT = 0.25, 0.1", "INSTANCE_COST, COUNT_WEIGHT = 0.25, 0.0"),
        ("(scores - INSTANCE_COST)", "scores"),
        ("min(count, numbers.max())", "count"),
    ],
    ("models/detections.py", "test_student.py", "pasted_as_torchvision"): [
        ("cv2.copyMakeBorder(found.masks[index], 1, 1, 1, 1, cv2.BORDER_CONSTANT)", "found.masks[index]"),
        ("[top - y0 : bottom - y0, left - x0 : right - x0]", "[: bottom - top, : right - left]"),
        ("min(x1 + 1, width)", "min(x1, width)"),
    ],
    ("models/detections.py", "test_student.py", "refined_masks or not_lost"): [
        ("WINDOW, MARGIN = 56, 0.1", "WINDOW, MARGIN = 56, 0.0"),
        ("part[y0:y1, x0:x1]", "part"),
        ("aligned if aligned.max() >= MASK_THRESH else probability", "aligned"),
        ("max(x0, 0), max(y0, 0)", "x0, y0"),
        ("masks=found.masks[kept]), side)", "masks=found.masks[kept], image=None), side)"),
    ],
    ("models/mask_rcnn.py", "test_student.py", "uncertain_masks"): [
        ("inside.sum((1, 2)).clamp(min=1)", "784"),
    ],
    ("models/mask_rcnn.py", "test_student.py", "detections_of_torchvision"): [
        ("torch.full_like(scores[:1], level)", "torch.zeros_like(scores[:1])"),
        ("one_class, heads.nms_thresh", "one_class, 0.9"),
        ("_top(scores, self.rpn.post_nms_top_n(), boxes)", "_top(scores, 20, boxes)"),
        (
            "image = boxes.flatten(0, 1)[found][order], masks[order], found[order]",
            "image = boxes.flatten(0, 1)[found], masks[order], found[order]",
        ),
    ],
    ("models/mask_rcnn.py", "test_student.py", "one_call"): [
        ("(groups.max() + 1) * torch.arange", "0 * torch.arange"),
        ("groups + (groups.max() + 1)", "0 * groups + (groups.max() + 1)"),
        (".view_as(scores) > 0) & (scores > -torch.inf)", ".view_as(scores) > 0)"),
    ],
    ("models/mask_rcnn.py", "test_student.py", "targets_are_boxes"): [
        ("present.shape[2] - last, 0)", "present.shape[2] - last - 1, 0)"),
        ("MIN_SIDE = 4", "MIN_SIDE = 1"),
        ("labels.masked_fill(labels == VOID, 0)", "labels"),
    ],
    ("datasets/copy_paste.py", "test_student.py", "cut_out or pasted"): [
        ("AREA = (0.02, 0.25)", "AREA = (0.1, 0.11)"),
        ("before[1:VOID] / 2", "before[1:VOID]"),
        ("at_border > 0.3 * np.sqrt(area) or ", ""),
    ],
    ("engine/trainer.py", "test_student.py", "moving_average"): [
        ("max(1 - decay, 9 / (10 + float(updates)))", "1 - decay"),
        ("* min(1, (step + 1) / (schedule.warmup + 1))", ""),
        ("                average.update_parameters(model)", "                pass"),
    ],
    # ---- the network
    ("models/backbones.py", "test_defaults.py", "statistics"): [
        ("((127 / 255,) * 3, (128 / 255,) * 3)", "IMAGENET"),
        ("0.229, 0.224, 0.225", "0.5, 0.5, 0.5"),
    ],
    ("datasets/transforms.py", "test_defaults.py", "canny"): [
        ("np.array([0.67, 1.33])", "np.array([0.33, 1.33])"),
        ("np.array([0.67, 1.33])", "np.array([0.67, 1.5])"),
    ],
    ("datasets/transforms.py", "test_models.py", "median"): [
        ("(up_to[-1] + 1) / 2", "up_to[-1] / 2"),
        ("np.ceil(middle)", "np.floor(middle)"),
    ],
    ("models/attention.py", "test_models.py", "orders"): [
        ("(feature) + self.spatial_attention", "(feature) * self.spatial_attention"),
    ],
    ("models/branches.py", "test_models.py", "saliency_net"): [
        ("RATES = (6, 12, 18, 24)", "RATES = (1, 12, 18, 24)"),
    ],
    ("models/branches.py", "test_models.py", "mean_offset"): [
        ("if self.training else offsets - self.mean_offset", ""),
    ],
    # ---- progressive training
    ("engine/pts.py", "test_stages.py", "algorithm_1"): [
        ("iteration <= 2", "iteration <= 3"),
        ("iteration / (iteration + 1)", "1 / (iteration + 1)"),
        ("current = refresh(previous, net.saliency.state_dict(), r)", "current = _clone(net.saliency.state_dict())"),
        ("seed=run.seed + r", "seed=run.seed"),
    ],
    ("engine/instance_labels.py", "test_defaults.py", "six_tenths"): [
        ("BG_THRESH = 0.6, 0.3", "BG_THRESH = 0.5, 0.3"),
        ("BG_THRESH = 0.6, 0.3", "BG_THRESH = 0.6, 0.5"),
    ],
    ("engine/instance_labels.py", "test_method_values.py", "the_crf_of_pts or contradict"): [
        ("(1 - saliency_weight) * foreground + saliency_weight * np.clip(soft, 0, 1)", "foreground"),
        ("(1 - init_mask_weight) * foreground + init_mask_weight * initial", "foreground"),
        ("decided = (classes > 0)", "decided = (classes >= 0)"),
    ],
    ("models/scoring.py", "test_method_values.py", "score"): [
        ("max(saliency.shape) / 25", "max(saliency.shape) / 20"),
    ],
    # ---- fusion
    ("models/fusion_config.py", "test_defaults.py", "settings_of_the_fusion"): [
        ("theta: float = 0.5", "theta: float = 0.2"),
        ("power: float = 5.0", "power: float = 10.0"),
        ("mask_thresh: float = 0.4", "mask_thresh: float = 0.25"),
    ],
    ("models/grouping.py", "test_fusion.py", ""): [
        ("inside > settings.theta * size", "inside > 0"),
    ],
    ("models/fusion.py", "test_fusion.py", ""): [
        ("start *= 1 - boundary[:, None]", "pass"),
        ("if count in precomputed:", "if False:"),
        ("of_one[:number], of_one[-1]", "of_one[:number], of_one[0]"),
        ("place[: len(masks)] = masks", "place[:1] = masks[:1]"),
        ("score >= settings.min_score", "score >= 0"),
    ],
    ("engine/predictor.py", "test_infer.py", "whole_batches"): [
        ("written(entry, next(fused))", "written(entry, list(fused)[0])"),
        ("saliencies, maps = zip(*usable, strict=True)", "saliencies, maps = zip(*usable[::-1], strict=True)"),
    ],
    ("models/scoring.py", "test_fusion.py", ""): [
        ("(within - beside)", "within"),
        ("expected += probability * ", "expected = "),
        ("if not settings.count_aware_scores:", "if False:"),
    ],
    # ---- metrics
    ("engine/metrics.py", "test_metrics.py", ""): [
        ("np.linspace(0.5, 0.95, 10)", "np.linspace(0.5, 1.0, 10)"),
        ("np.linspace(0.0, 1.0, 101)", "np.linspace(0.0, 1.0, 11)"),
        ("BETA_SQUARED = 0.3", "BETA_SQUARED = 1.0"),
        ("free[:, best] = -1", "pass"),
        ('side="left"', 'side="right"'),
        ("valid = gt != VOID", "valid = gt >= 0"),
        ("2 * values.mean()", "values.mean()"),
        ("result.scores >= threshold", "result.scores >= 0"),
    ],
    ("engine/bootstrap.py", "test_metrics.py", "draws or intervals or bootstrap"): [
        ("[2.5, 97.5]", "[5, 95]"),
        ("(weights * hits[row])", "((weights > 0) * hits[row])"),
        ("second[protocol][iou] - aps", "second[protocol][iou]"),
    ],
    ("engine/evaluation.py", "test_evaluate.py", "perturbed or compared"): [
        ("step = -1 if mirrored else 1", "step = 1"),
        ("> 2 * error", "> 0 * error"),
        ("base in (m.name, m.variant_of)", "base == m.variant_of"),
    ],
    # ---- experiments
    ("experiments/tables.py", "test_experiments.py", "changes_what_each_row or share_what"): [
        ('NO_CA = {"mixing": False, "attention": "none"}', 'NO_CA = {"mixing": False}'),
        ('NO_LSU = {"lsu_weight": 0.0}', 'NO_LSU = {"lsu_weight": 0.0, "count_head": False}'),
        ("epochs=schedule.epochs + pts.iterations * pts.schedule.epochs", "epochs=schedule.epochs"),
    ],
    ("experiments/oracle_study.py", "test_experiments.py", "true_maps"): [
        ("coarse[:, 1:] != coarse[:, :-1]", "coarse[:, 1:] != coarse[:, 1:]"),
        ("centre[:, None] - position[:, owned]", "position[:, owned] - centre[:, None]"),
    ],
    ("experiments/oracle_study.py", "test_experiments.py", "oracle_study_of_a_student"): [
        ("np.where(fits, best, 0)", "np.where(fits, best, 0.1)"),
        ("image=None), fits", "image=None), best * fits"),
        ('count * ("count" in names)', "0"),
        ("mask.shape[::-1]", "mask.shape"),
    ],
    ("experiments/prm.py", "test_experiments.py", "peaks_are_local"): [
        ("response >= PEAK_THRESH * response.max()", "response >= 0"),
        ("min(response.shape) // 6", "min(response.shape)"),
    ],
    # ---- clips
    (
        "engine/tracking.py",
        "test_video.py",
        "numbers or flow or appearance or hidden or carried or merge",
    ): [
        ("if iou >= self.config.min_iou and", "if iou >= 0 and"),
        ("affinity[i, j] = iou + self.config.appearance * similarity", "affinity[i, j] = iou"),
        ("if distance <= 1 and self._alike(similarity):", "if distance <= 1:"),
        ("(track.current or self._alike(similarity))", "track.current"),
        ("track.centre + (track.missing + 1) * track.velocity", "track.centre"),
        ("lacking = round(float(np.mean(self.counts))) - len(masks)", "lacking = 0"),
        ("masks[:] = [instance & ~mask for instance in masks]", "pass"),
        ("mask = _moved(track.mask, flow) & ~covered", "mask = track.mask & ~covered"),
        ("track.current or track.missing <= self.config.wait]", "True]"),
    ],
}


class Mutation(NamedTuple):
    """In ``file``, ``before`` becomes ``after``; a test of tests/``tests`` selected by ``-k words`` ought to fail."""

    file: str
    tests: str
    words: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}: {self.before}  ->  {self.after or 'nothing'}"


def all_mutations() -> list[Mutation]:
    return [Mutation(*where, *pair) for where, pairs in MUTATIONS.items() for pair in pairs]


def copy_code(folder: Path) -> None:
    """Copy into ``folder`` what the tests need; compiled operators and DATA are linked."""

    def place(source: str, target: str) -> None:
        os.symlink(source, target) if source.endswith(".so") else shutil.copy(source, target)

    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, copy_function=place, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    for name in DATA:
        os.symlink(ROOT / name, folder / name)


def run_tests(tests: str, words: str, mutation: Mutation | None = None) -> tuple[int | None, str]:
    """Run tests/``tests`` with ``-k words`` in a copy of the code with the mutation: (pytest's exit code, output)."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_code(folder)
        if mutation:
            path = folder / mutation.file
            path.write_text(path.read_text().replace(mutation.before, mutation.after))
        process = PROCESSES.Process(target=run_pytest, args=(folder, f"tests/{tests}", "-k", words))
        process.start()
        process.join(TIMEOUT)
        process.kill()  # after a timeout
        process.join()
        return process.exitcode, (folder / "output.txt").read_text()


def run_pytest(folder: Path, *arguments: str) -> None:
    """Run pytest in the tree ``folder``, in a process of its own, and write its output to output.txt there."""
    os.chdir(folder)
    sys.path[0] = str(folder)
    with open("output.txt", "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main([*arguments, "-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]))


def verdict(mutation: Mutation) -> tuple[str, str]:
    """("noticed", the test that failed), ("SURVIVED", "") or ("BROKEN", pytest's last line, as after a timeout)."""
    code, output = run_tests(mutation.tests, mutation.words, mutation)
    failed = re.search(r"^FAILED tests/(\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return "noticed", failed[1]
    return ("SURVIVED", "") if code == 0 else ("BROKEN", last_line(output))


def last_line(output: str) -> str:
    """The last line of pytest's output."""
    return (output.strip().splitlines() or ["no output of pytest"])[-1]


def outdated(chosen: list[Mutation]) -> Iterator[str]:
    """One sentence for each mutation whose snippet is not in its file exactly once."""
    for mutation in chosen:
        path = ROOT / mutation.file
        times = path.read_text().count(mutation.before) if path.is_file() else 0
        if times != 1:
            yield f"the mutation no longer applies, its snippet is in the file {times} times: {mutation}"


def failing(chosen: list[Mutation], pool: ThreadPoolExecutor) -> Iterator[str]:
    """One sentence for each test file that fails without a mutation."""
    words: dict[str, set[str]] = {}
    for mutation in chosen:
        words.setdefault(mutation.tests, set()).add(mutation.words)
    choices = [" or ".join(sorted(each)) if all(each) else "" for each in words.values()]
    for tests, (code, output) in zip(words, pool.map(run_tests, words, choices)):
        if code != 0:
            yield f"tests/{tests} fails without a mutation: {last_line(output)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="TEXT", help="only mutations whose line in --list contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutations tested at the same time")
    args = parser.parse_args()
    chosen = [mutation for mutation in all_mutations() if args.k in str(mutation)]
    if args.list or not chosen:
        print("\n".join(map(str, chosen)) or f"no mutation contains {args.k!r}")
        return 0 if chosen else 2
    # No .pyc files: Python compares their time and size with the source, and a mutation may change neither.
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "WSID_TEST_THREADS": "1"}
    PROCESSES.set_forkserver_preload(LIBRARIES)
    found: Counter[str] = Counter()
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        problems = list(outdated(chosen)) or list(failing(chosen, pool))
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 2
        for mutation, (word, why) in zip(chosen, pool.map(verdict, chosen)):
            found[word] += 1
            print(f"{word:8}  {mutation}" + (f"  ({why})" if why else ""), flush=True)
    print(f"{found['noticed']} of {len(chosen)} were noticed; {ALLOWED:.0%} may survive")
    return int(found["BROKEN"] > 0 or found["SURVIVED"] > ALLOWED * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
