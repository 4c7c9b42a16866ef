"""A page in the browser that finds the salient instances of photographs, see docs/app.md.

    python app.py                               # http://127.0.0.1:7860, the bundled weights unless you trained your own
    python app.py --weights runs/mine/weights_pts.pt --gpu -1 --port 8000

It needs gradio (requirements-app.txt); make app installs it and starts the page. Ctrl-C ends it.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import suppress

from utils.cli import InputError, Parser, add_gpu_option, integer, path_of, select_device
from utils.lazy import gc_disabled
from utils.script import Stopped, raise_on_sigterm, run


def get_args_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: the network can reach it")
    parser.add_argument("--port", type=integer(1, 65535), default=7860, metavar="N", help="port to listen on")
    parser.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    add_gpu_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise InputError(
            "app.py needs gradio, which is not installed: pip install -r requirements-app.txt, or make app"
        )
    with raise_on_sigterm(), suppress(KeyboardInterrupt, Stopped):
        with gc_disabled():
            from engine.predictor import Predictor
            from engine.web import check_address, serve
        check_address(args.host, args.port)
        serve(Predictor(args.weights, select_device(args.gpu)), args.host, args.port)
    return 0


if __name__ == "__main__":
    run(main)
