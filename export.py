"""Export the network, from images to S, B, V and count probabilities, with torch.export.

    python export.py --out wsid.pt2                          # runs/default, else the bundled WSID-Net
    python export.py --weights runs/mine/weights_pts.pt --out wsid.pt2

The file runs without this repository: torch.export.load("wsid.pt2").module()(image, edges), with image RGB
[N,3,size,size] in 0..1 and edges its Canny map [N,1,size,size] of 0 and 1 (datasets.transforms.canny_edges), any N. It
returns the tuple (saliency, boundary, offsets, count_probs) of models.wsid_net.NetOutput. The exported program is
compared with the network before the file is written.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from engine.predictor import BUNDLED_WSID_NET, default_weights
from models.wsid_net import WSIDNet, load_weights
from utils import files
from utils.cli import InputError, Parser, path_of, run

BOUND = 1e-4  # on the difference between the exported program and the network


class _PlainTuple(nn.Module):
    """A WSIDNet that returns a plain tuple: a file with a named one could only be loaded beside its class."""

    def __init__(self, net: WSIDNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, edges: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(image, edges))


def export_network(net: WSIDNet) -> ExportedProgram:
    """A WSIDNet in evaluation mode as an exported program, for any batch size from 1."""
    size = net.config.size
    image, edges = torch.rand(2, 3, size, size), torch.zeros(2, 1, size, size)
    batch = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(_PlainTuple(net), (image, edges), dynamic_shapes=(batch, batch))


def difference(net: WSIDNet, program: ExportedProgram) -> float:
    """The largest absolute difference between the outputs of the network and of the program, on a batch of three."""
    size = net.config.size
    generator = torch.Generator().manual_seed(0)
    image, edges = (torch.rand(3, channels, size, size, generator=generator) for channels in (3, 1))
    edges = (edges > 0.9).float()
    pairs = zip(net(image, edges), program.module()(image, edges), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def get_args_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--weights", type=path_of, help="of a WSID-Net; default: those of runs/default, else the bundled ones"
    )
    parser.add_argument("--out", type=path_of, default=Path("wsid.pt2"), help="file to write")
    return parser


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Export, compare, write; InputError for weights or a path that cannot be used."""
    args = get_args_parser().parse_args(argv)
    if args.out.exists() and not args.out.is_file() or not args.out.parent.is_dir():
        raise InputError(f"cannot write {args.out}: it must be a file in a folder that exists")
    net = load_weights(args.weights or default_weights(BUNDLED_WSID_NET))
    # Contiguous weights: torch.export takes channels-last ones for views of larger tensors, and warns.
    net = net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    program = export_network(net)
    whole = io.BytesIO()  # torch aborts the process where the disk is full
    torch.export.save(program, whole)
    whole.seek(0)
    error = difference(net, torch.export.load(whole))
    if not error < BOUND:
        raise RuntimeError(f"the exported program differs from the network by {error:.1e}; {args.out} is not written")
    files.write_atomically(args.out, lambda file: file.write(whole.getbuffer()))
    print(f"{args.out} (differs from the network by {error:.1e} at most)")


if __name__ == "__main__":
    run(main)
