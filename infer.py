"""Find the salient instances of photographs.

    python infer.py --img x.jpg                     # one photograph; the bundled weights unless you trained your own
    python infer.py --img photos/*.jpg --visualize  # files, folders and patterns; also S, B and V as pictures
    python infer.py --img photos --weights runs/mine/weights_pts.pt --out results

For every photograph <stem>_instances.png (palette indices: 0 background, 1..N in order of score) and <stem>_overlay.png
are written at its own size, and predictions.json holds all instances as COCO result records. While the network runs on
one batch, the next photographs load and the instances of the previous ones are fused and written. A run that was
stopped continues when the same command is given again.

From Python: ``from infer import Predictor``.
"""

import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path[:1]:  # the packages of this repository come before others of their names
    sys.path.insert(0, str(ROOT))
for name in ("datasets", "models", "ops", "utils"):
    if ROOT / name not in (Path(path).resolve() for path in getattr(sys.modules.get(name), "__path__", [ROOT / name])):
        raise ImportError(
            f"another package called {name!r} is imported already, and this repository has one of that name; "
            "import infer in a process that does not import the other, or run python infer.py"
        )

# What a script needs that only says what is wrong with its arguments: torch and all that needs it comes later.
from models import AMP, MAX_INSTANCES, METHODS  # noqa: E402
from utils.cli import InputError, Parser, integer, make_folder, path_of, run, stop_at_once  # noqa: E402
from utils.lazy import without_collection  # noqa: E402

OFFERS = ("Predictor", "Prediction", "Maps", "process", "default_batch_size", "default_weights")
FEW = 10  # photographs whose results are named one by one


def __getattr__(name):
    """``infer.Predictor`` and the rest of engine.predictor, imported when asked for."""
    if name not in OFFERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine import predictor

    return getattr(inference, name)


def get_args_parser():
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--img",
        nargs="+",
        action="extend",
        required=True,
        type=path_of,
        metavar="PATH",
        help="photographs, folders of them, or globs",
    )
    files.add_argument("--out", type=path_of, default=Path("output"), help="folder for the results")
    files.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    files.add_argument(
        "--saliency-dir", type=path_of, help="<stem>.png maps that replace the saliency branch (Table 6)"
    )
    files.add_argument(
        "--coco-ids",
        type=path_of,
        metavar="FILE",
        help="image_id is that of this COCO annotation file, not the photograph's stem",
    )
    files.add_argument("--visualize", action="store_true", help="also write S, B and V as pictures")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=METHODS,
        default="wsid",
        help="how instances are told apart; components of S are the baseline",
    )
    method.add_argument(
        "--count",
        type=integer(0, MAX_INSTANCES),
        default=0,
        metavar="N",
        help="the number of objects, where you know it; 0: the network tells it",
    )
    method.add_argument(
        "--fusion",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="in place of the settings in the weights: those of models.fusion.FusionConfig, such as power=10 "
        "mask_thresh=0.25",
    )

    machine = parser.add_argument_group("machine; several GPUs: torchrun --nproc_per_node=N infer.py ...")
    machine.add_argument("--gpu", type=integer(-1), default=-1, help="CUDA device; -1 is the CPU")
    machine.add_argument(
        "--batch-size", type=integer(1, 4096), help="photographs per pass; default: 16 on a GPU, 2 on the CPU"
    )
    machine.add_argument(
        "--workers",
        type=integer(1, 256),
        help="threads that load photographs, and as many that fuse and write; default: as many as "
        "torch uses, at most 4",
    )
    machine.add_argument(
        "--amp",
        choices=AMP,
        default="auto",
        help="the network in bfloat16: where the machine is fast at it, always, never",
    )
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.count and args.method != "wsid":
        raise InputError(f"--count has no meaning with --method {args.method}; leave one of the two out")
    paths, failed = list_photographs(args.img)
    with stop_at_once():
        return infer(args, paths, failed)


def infer(args, paths, failed):
    """Find the instances of ``paths``; failed: a list of InputErrors of what was asked for beside them."""
    asked = len(paths) + len(failed)
    with without_collection():
        from tqdm import tqdm

        from engine.predictor import Predictor, default_batch_size, default_workers, process
        from engine.predictions import coco_ids
        from engine.results import Results
        from utils import digest, distributed

        device = distributed.start(args.gpu)
        predictor = Predictor(
            args.weights, device, method=args.method, settings=args.fusion, count=args.count, amp=args.amp
        )
    ids = partial(coco_ids, args.coco_ids) if args.coco_ids else None
    identity = [predictor.identity(), args.coco_ids and digest.of_file(args.coco_ids)]
    results = Results(make_folder(args.out), identity, args.visualize, args.saliency_dir, ids)
    paths, clashes = results.without_clashes(paths)
    failed += clashes
    if ids:
        ids([path.stem for path in paths])  # what is wrong is told before the work
    own = distributed.shard(paths)
    todo = results.unfinished(own)
    if distributed.is_first():
        print(f"weights: {predictor.weights}")
    if len(todo) < len(own):
        print(
            f"{len(own) - len(todo)} of {len(own)} photographs are finished and skipped; delete {results.journal} to "
            "do them again"
        )
    batch_size = args.batch_size or default_batch_size(device)
    found = process(todo, predictor, results.add, batch_size, args.workers or default_workers(), args.saliency_dir)
    written, wrong = [], []
    silent = len(paths) < 2 or not distributed.is_first()
    try:
        with closing(found):
            # None: a bar only where someone watches it.
            for result in tqdm(found, total=len(todo), disable=silent or None, mininterval=1):
                (wrong if isinstance(result, InputError) else written).append(result)
    except BaseException:
        results.save(paths)
        raise
    written, wrong = distributed.gather(written), distributed.gather(wrong)
    if not distributed.is_first():
        return 0
    failed += wrong
    nothing, saved = len(failed) == asked, None
    try:
        saved = results.save(paths)
    except InputError as error:
        failed.append(error)
    if len(written) > FEW:
        print(f"{args.out}: pictures of {len(written)} photographs")
    else:
        for picture in sum(written, []):
            print(picture)
    if saved:
        print(saved)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if nothing:
        return 2
    return 1 if failed else 0


def list_photographs(sources):
    """(the files that ``sources`` name, each once, and the InputErrors of the sources that name none).

    What is passed over in them is told on stderr. The InputError itself where there is no photograph at all.
    """
    from datasets.images import list_images

    found, failed = {}, []
    for source in sources:
        try:
            listed = list_images(source, report=partial(print, file=sys.stderr))
        except InputError as error:
            failed.append(error)
        else:
            found |= {os.path.abspath(path): path for path in listed if os.path.abspath(path) not in found}
    if not found:
        raise failed[0]
    return list(found.values()), failed


if __name__ == "__main__":
    run(main)
