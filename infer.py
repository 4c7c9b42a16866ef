"""Find the salient instances of photographs and video clips.

    python infer.py --img x.jpg                     # one photograph; the bundled weights unless you trained your own
    python infer.py --img photos/*.jpg --visualize  # files, folders and patterns; also S, B and V as pictures
    python infer.py --img photos --weights runs/mine/weights_pts.pt --out results
    python infer.py --img clip.mp4                  # a clip: the same numbers through all frames (docs/video.md)
    python infer.py --img photos --cutouts --labelme --coco salient.json      # for other tools, see docs/outputs.md
    python infer.py --img - < x.jpg                 # a photograph from the standard input; its stem is stdin

For every photograph <stem>_instances.png (palette indices: 0 background, 1..N by descending score) and
<stem>_overlay.jpg are written at its own size, and predictions.json holds all instances as COCO result records.
Many photographs are shared by several processes. A run that was stopped continues with the same command; a clip is
then begun anew. For a clip <stem>_instances.mp4, the label maps <stem>/<frame>.png (values: track numbers) and
<stem>_tracks.json (as in YouTube-VIS) are written.

From Python: ``from infer import Predictor``.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path[:1]:  # the packages of this repository come before others of their names
    sys.path.insert(0, str(ROOT))
for name in ("datasets", "engine", "models", "ops", "utils"):
    if ROOT / name not in (Path(path).resolve() for path in getattr(sys.modules.get(name), "__path__", [ROOT / name])):
        raise ImportError(
            f"another package called {name!r} is imported already, and this repository has one of that name; "
            "import infer in a process that does not import the other, or run python infer.py"
        )

# Only what checking the arguments needs: importing torch takes longer than a photograph.
from models import AMP, MAX_INSTANCES, METHODS  # noqa: E402
from utils.cli import InputError, Parser, add_gpu_option, integer, make_folder, path_of  # noqa: E402
from utils.lazy import gc_disabled  # noqa: E402
from utils.script import raise_on_sigterm, run  # noqa: E402

if TYPE_CHECKING:
    from engine.predictor import (  # noqa: F401
        Maps,
        Prediction,
        Predictor,
        default_batch_size,
        default_weights,
        process,
    )

EXPORTED = ("Predictor", "Prediction", "Maps", "process", "default_batch_size", "default_weights")
STDIN, STDIN_STEM = "-", "stdin"  # the value of --img for the standard input, and the stem of its photograph


def __getattr__(name: str) -> Any:
    """``infer.Predictor`` and the rest of ``EXPORTED``, imported from engine.predictor on first use."""
    if name not in EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine import predictor

    return getattr(predictor, name)


def get_args_parser() -> Parser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--img",
        nargs="+",
        action="extend",
        required=True,
        type=lambda text: STDIN if text == STDIN else path_of(text),
        metavar="PATH",
        help="photographs, clips (.mp4 .avi .mov .mkv .webm), folders of them, or globs; or - alone, one photograph "
        "from the standard input",
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
        help="image ids of this COCO annotation file instead of the stems of the photographs",
    )

    output = parser.add_argument_group("what is written for photographs, not for clips; see docs/outputs.md")
    output.add_argument("--visualize", action="store_true", help="also S, B and V as pictures")
    output.add_argument(
        "--cutouts",
        action="store_true",
        help="also every instance as a transparent picture, and their places in cutouts.json",
    )
    output.add_argument(
        "--coco",
        type=path_of,
        metavar="FILE",
        help="also a COCO data set of all photographs, for pycocotools, CVAT and others",
    )
    output.add_argument(
        "--coco-polygons",
        action="store_true",
        help="simplified outlines in --coco in place of RLE, to be edited by hand; Label Studio needs them",
    )
    output.add_argument("--labelme", action="store_true", help="also <stem>.json for LabelMe, polygons")
    output.add_argument("--no-overlay", dest="overlay", action="store_false", help="no <stem>_overlay.jpg")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=METHODS,
        default="wsid",
        help="wsid: the fusion of S, B and V; components: the connected components of S, a baseline",
    )
    method.add_argument(
        "--count",
        type=integer(0, MAX_INSTANCES),
        default=0,
        metavar="N",
        help="the number of objects, where it is known: salient pixels are divided into N instances; 0: it is not",
    )
    method.add_argument(
        "--no-refine",
        dest="refine",
        action="store_false",
        help="masks of a student network as they are, not aligned with the photograph by a CRF",
    )
    method.add_argument(
        "--fusion",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="replace settings of the fusion (models.fusion_config.FusionConfig) stored in the weights, such as "
        "grouping=count or power=10",
    )

    machine = parser.add_argument_group("machine; several GPUs: torchrun --nproc_per_node=N infer.py ...")
    add_gpu_option(machine)
    machine.add_argument(
        "--batch-size", type=integer(1, 4096), help="photographs per pass; default: 16 on a GPU, 2 on the CPU"
    )
    machine.add_argument(
        "--workers",
        type=integer(1, 256),
        help="processes that share the photographs, each with the network; default: as many as pay for themselves: one "
        "for a few photographs, one per core for many, or 8 beside a GPU",
    )
    machine.add_argument(
        "--amp",
        choices=AMP,
        default="auto",
        help="precision of the network; auto: bfloat16 where the machine computes it faster; bf16; off: float32",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    if args.count and args.method != "wsid":
        raise InputError(f"--count has no meaning with --method {args.method}; leave one of the two out")
    check_coco(args)
    with raise_on_sigterm(), ExitStack() as stack:
        if STDIN in args.img:
            if len(args.img) > 1 or args.labelme:
                raise InputError("--img - takes no other paths and no --labelme; save the photograph to a file")
            args.img = [read_stdin(Path(stack.enter_context(TemporaryDirectory())))]
        paths, failed = list_photographs(args.img)
        with gc_disabled():
            from engine.inference import infer
        return infer(args, paths, failed)


def check_coco(args: argparse.Namespace) -> None:
    """InputError when --coco cannot be written, or would replace a file that is not such a data set."""
    if args.coco_polygons and not args.coco:
        raise InputError("--coco-polygons is a form of --coco; add --coco FILE")
    if not args.coco:
        return
    from engine.annotations import is_own_data_set

    if args.coco.suffix != ".json":
        raise InputError(f"--coco {args.coco} is no JSON file; end its name in .json")
    if args.coco.exists() and not is_own_data_set(args.coco):
        raise InputError(f"--coco {args.coco} exists and was not written with --coco; name another file")
    make_folder(args.coco.parent, "--coco")


def read_stdin(folder: Path) -> Path:
    """Save the photograph on the standard input as folder/stdin; InputError for a terminal, or for no photograph."""
    from datasets.images import read_image

    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("--img - needs a photograph on the standard input; add < x.jpg or name the file")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--img - works in one process; name the file for several")
    path = folder / STDIN_STEM
    path.write_bytes(sys.stdin.buffer.read())
    try:
        read_image(path)
    except InputError as error:
        raise InputError(re.sub(f"(the image )?{re.escape(str(path))}", "the standard input", str(error))) from error
    return path


def list_photographs(sources: Sequence[Path]) -> tuple[list[Path], list[InputError]]:
    """The photographs and clips that files, folders and globs name, each once, and errors of sources that name none.

    Files that are skipped in a folder are named on stderr. Raises the first error when there is nothing at all.
    """
    from datasets.listing import CLIP_SUFFIXES, SUFFIXES, list_images

    found: dict[str, Path] = {}
    failed = []
    for source in sources:
        try:
            listed = list_images(source, report=partial(print, file=sys.stderr), suffixes=SUFFIXES + CLIP_SUFFIXES)
        except InputError as error:
            failed.append(error)
        else:
            found |= {os.path.abspath(path): path for path in listed if os.path.abspath(path) not in found}
    if not found:
        raise failed[0]
    return list(found.values()), failed


if __name__ == "__main__":
    run(main)
