"""Do the tests notice? One line of the method at a time is made wrong, and the tests that ought to fail are run.

    make mutants                                    # all of them; exit code 1 when more than two in forty survive
    python tests/mutations.py --list
    python tests/mutations.py -k losses.py --jobs 1

The wrong lines live in copies of the code in a temporary folder, never in this one. A snippet that is not found exactly
once, or tests that fail without a mutation, show nothing: exit code 2.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("benchmarks", "datasets", "engine", "experiments", "models", "ops", "tests", "utils")
DATA = ("samples", "weights")  # only read: a copy of the code has links to them
ALLOWED = 2 / 40  # share of the mutations that may survive
TIMEOUT = 600  # seconds for the tests of one mutation
# Every run is a process that begins with these imported, which is most of what a quick test takes.
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

# {(file, the tests that ought to notice, words of their names): [(a snippet of one line, what it becomes)]}
MUTATIONS = {
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
    # ---- defaults
    ("train_branches.py", "test_defaults.py", "left_alone"): [
        ('default=5, help="of each stage', 'default=2, help="of each stage'),
        ('default=6, help="photographs a step"', 'default=8, help="photographs"'),
        ("default=0.01,", "default=0.001,"),
        ("default=10,", "default=5,"),
        ('default=0.02, help="of L_su', 'default=0.0, help="of L_su'),
        ("[1.0, 0.5, 1.5, 2.0]", "[1.0, 2.0]"),
    ],
    ("train_pts.py", "test_defaults.py", "left_alone"): [
        ('default=6, help="iterations R', 'default=2, help="iterations R'),
        ('default=8, help="epochs E', 'default=1, help="epochs E'),
        ('default=1e-4, help="at the start', 'default=0.01, help="at the start'),
        ('default=6, help="photographs a step"', 'default=8, help="photographs"'),
    ],
    # ---- what the stages learn
    ("train_branches.py", "test_stages.py", "l_su"): [
        ("args.lsu_weight * ", "0 * "),
        ("(12.0 if progress < 0.5 else 6.0)", "12.0"),
        ("6.0) * size / 512", "6.0)"),
        ('batch["pseudo_saliency"] > 0.5', 'batch["pseudo_saliency"] > 0.3'),
    ],
    ("train_branches.py", "test_stages.py", "counted"): [
        ("args.counted_weight * ", ""),
    ],
    ("train_branches.py", "test_stages.py", "mean_offset"): [
        ("args.no_lsu or not args.counted_weight", "args.no_lsu"),
    ],
    ("train_branches.py", "test_stages.py", "other_pixels"): [
        ("int(progress * 1e9)", "int(progress)"),
    ],
    ("train_branches.py", "test_stages.py", "whole"): [
        ("TrainingImages(samples, args.size, jitter", "TrainingImages(samples, args.size, crop=0.7, jitter"),
    ],
    ("train_branches.py", "test_stages.py", "spread"): [
        ("PLAIN if args.plain_cam else pseudo_labels.SPREAD", "PLAIN"),
        ("not args.no_crf,", "False,"),
    ],
    ("train_branches.py", "test_stages.py", "soft_masks"): [
        ('batch["pseudo_saliency"][:, None]', 'batch["pseudo_saliency"][:, None].round()'),
    ],
    # ---- losses
    ("models/losses.py", "test_stages.py", "l_su"): [
        ("(2 * bandwidth**2)", "bandwidth**2"),
        ("2 * F.smooth_l1_loss", "F.smooth_l1_loss"),
    ],
    ("models/losses.py", "test_losses.py", "count_loss"): [
        ("label_smoothing=0.1", "label_smoothing=0.0"),
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
    ("models/wsid_net.py", "test_models.py", "count_net"): [
        ("(count_probs + own) / 2", "own"),
    ],
    ("models/grouping.py", "test_losses.py", "as_many_as_the_count"): [
        ("min_area: float = 0.005", "min_area: float = 0.0"),
    ],
    ("models/saliency_prior.py", "test_defaults.py", "left_alone"): [
        ("WEIGHTS = (0.65, 0.92, -0.75)", "WEIGHTS = (1.0, 0.0, 0.0)"),
    ],
    ("models/saliency_prior.py", "test_models.py", "prior_learns"): [
        ("decay: float = 0.1", "decay: float = 0.01"),
    ],
    ("models/saliency_prior.py", "test_fusion.py", "combined_logits"): [
        ("math.log(99)", "math.log(9999)"),
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
    ("engine/cam_labels.py", "test_defaults.py", "odds_of_spread"): [
        ("even=0.6, power=2", "even=0.5, power=2"),
        ("even=0.6, power=2", "even=0.6, power=1"),
    ],
    ("engine/cam_labels.py", "test_defaults.py", "confident_labels"): [
        ("foreground=0.7", "foreground=0.6"),
        ("mask_thresh=0.5", "mask_thresh=0.4"),
    ],
    ("engine/cam_labels.py", "test_fusion.py", "maximum_over_classes"): [
        ("cams.max(0)", "cams.mean(0)"),
    ],
    ("engine/crf.py", "test_defaults.py", "the_crf_has"): [
        ("= 4.0, 49.0, 5.0", "= 4.0, 49.0, 50.0"),
        ("= 3.0, 3.0", "= 1.0, 3.0"),
        ("ITERATIONS = 10", "ITERATIONS = 1"),
        ("SIGMA_ALPHA * scale", "SIGMA_ALPHA"),
    ],
    ("datasets/training.py", "test_training.py", "move_with"): [
        ("window(read_map(", "(read_map("),
        ("labels[::4, ::4]", "labels[3::4, 3::4]"),
    ],
    ("datasets/training.py", "test_stages.py", "mirrored"): [
        ("array[:, ::-1] if mirror else array", "array"),
        ("rng.random() < 0.5", "rng.random() < 0.05"),
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
    ],
    ("train_pts.py", "test_stages.py", "algorithm_1"): [
        ("current = refresh(previous, net.saliency.state_dict(), r)", "current = clone(net.saliency.state_dict())"),
        ("seed=args.seed + r", "seed=args.seed"),
    ],
    ("engine/pts.py", "test_defaults.py", "six_tenths"): [
        ("BG_THRESH = 0.6, 0.3", "BG_THRESH = 0.5, 0.3"),
        ("BG_THRESH = 0.6, 0.3", "BG_THRESH = 0.6, 0.5"),
    ],
    ("engine/pts.py", "test_method_values.py", "the_crf_of_pts or contradict"): [
        ("(masks.any(0) + np.clip(soft, 0, 1)) / 2", "masks.any(0).astype(np.float32)"),
        ("known = (classes > 0)", "known = (classes >= 0)"),
    ],
    ("models/scoring.py", "test_method_values.py", "score"): [
        ("max(saliency.shape) / 25", "max(saliency.shape) / 20"),
    ],
    ("engine/pts.py", "test_fusion.py", "union"): [
        ("(1 - keep) * foreground + keep * first", "foreground"),
    ],
    # ---- fusion
    ("train_pts.py", "test_defaults.py", "settings_of_the_fusion"): [
        ('"mask_thresh=0.5"', '"mask_thresh=0.25"'),
    ],
    ("models/fusion_config.py", "test_defaults.py", "settings_of_the_fusion"): [
        ("theta: float = 0.5", "theta: float = 0.2"),
        ("power: float = 5.0", "power: float = 10.0"),
        ("mask_thresh: float = 0.4", "mask_thresh: float = 0.25"),
    ],
    ("models/grouping.py", "test_fusion.py", ""): [
        ("inside > settings.theta * size", "inside > 0"),
    ],
    ("models/fusion.py", "test_fusion.py", ""): [
        ("(start * (1 - boundary))[None]", "start[None]"),
        ("if count in precomputed:", "if False:"),
        ("score >= settings.min_score", "score >= 0"),
    ],
    ("models/scoring.py", "test_fusion.py", ""): [
        ("(within - beside)", "within"),
        ("expected += probability * ", "expected = "),
        ("if not settings.count_aware_scores:", "if False:"),
    ],
    ("models/former_names.py", "test_models.py", "former_names"): [
        ('"sink": "sink_thresh"', '"sink": None'),
        ('settings["grouping"] = "count"', "pass"),
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
}


class Mutation(NamedTuple):
    """In ``file``, ``before`` becomes ``after``; tests in tests/``tests`` with ``words`` in their names then fail."""

    file: str
    tests: str
    words: str
    before: str
    after: str

    def __str__(self):
        return f"{self.file}: {self.before}  ->  {self.after or 'nothing'}"


def copy_code(folder):
    """Make ``folder`` a tree in which tests run and lines can change."""

    def place(source, target):
        return os.symlink(source, target) if source.endswith(".so") else shutil.copy(source, target)

    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, copy_function=place, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    for name in DATA:
        os.symlink(ROOT / name, folder / name)


def run_tests(tests, words, mutation=None):
    """Run the tests with ``words`` in their names in a copy of the code, with the mutation; (pytest's code, output)."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        folder = Path(folder)
        copy_code(folder)
        if mutation:
            path = folder / mutation.file
            path.write_text(path.read_text().replace(mutation.before, mutation.after))
        process = PROCESSES.Process(target=run_pytest, args=(folder, f"tests/{tests}", "-k", words))
        process.start()
        process.join(TIMEOUT)
        process.kill()  # where it has not come to an end
        process.join()
        return process.exitcode, (folder / "output.txt").read_text()


def run_pytest(folder, *arguments):
    """In a process of its own: pytest in the tree ``folder``, what it says in output.txt there."""
    os.chdir(folder)
    sys.path[0] = str(folder)
    with open("output.txt", "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main([*arguments, "-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]))


def verdict(mutation):
    """("noticed", the test that failed), ("SURVIVED", "") or ("BROKEN", why its tests tell nothing)."""
    code, output = run_tests(mutation.tests, mutation.words, mutation)
    failed = re.search(r"^FAILED tests/(\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return "noticed", failed[1]
    return ("SURVIVED", "") if code == 0 else ("BROKEN", last_line(output))


def last_line(output):
    return (output.strip().splitlines() or ["no word from pytest"])[-1]


def outdated(chosen):
    """One sentence for each mutation whose snippet is not in its file exactly once."""
    for mutation in chosen:
        times = (ROOT / mutation.file).read_text().count(mutation.before)
        if times != 1:
            yield f"the mutation no longer applies, its snippet is there {times} times: {mutation}"


def failing(chosen, pool):
    """One sentence for each file of tests that fail without a mutation."""
    words = {}
    for mutation in chosen:
        words.setdefault(mutation.tests, set()).add(mutation.words)
    choices = [" or ".join(sorted(each)) if all(each) else "" for each in words.values()]
    for tests, (code, output) in zip(words, pool.map(run_tests, words, choices)):
        if code != 0:
            yield f"tests/{tests} fails without a mutation: {last_line(output)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="TEXT", help="only the mutations with this text in --list")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutations that are tried at a time")
    args = parser.parse_args()
    chosen = [Mutation(*where, *pair) for where, pairs in MUTATIONS.items() for pair in pairs]
    chosen = [mutation for mutation in chosen if args.k in str(mutation)]
    if args.list or not chosen:
        print("\n".join(map(str, chosen)) or f"no mutation has {args.k!r} in it")
        return 0 if chosen else 2
    # No .pyc files: they are told apart by time and size, which a mutation may leave as they are.
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "WSID_TEST_THREADS": "1"}
    PROCESSES.set_forkserver_preload(LIBRARIES)
    found = Counter()
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
