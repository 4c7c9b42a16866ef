"""Export the network part, S, B, V and the probable number of objects of a batch of photographs, with torch.export.

    python export.py --out wsid.pt2                          # the weights infer.py would take
    python export.py --weights runs/mine/weights_pts.pt --out wsid.pt2

The file runs without this repository: torch.export.load("wsid.pt2").module()(image, edges), with image RGB
[N,3,size,size] in 0..1 and edges its Canny map [N,1,size,size] in 0 or 1 (models.enhancement.canny_edges), any N. What
it returns is compared with the network's own answer before the file is named.
"""

import io
from pathlib import Path

import torch

from infer import Predictor
from utils import files
from utils.cli import InputError, Parser, path_of, run

BOUND = 1e-4  # on the difference between what was exported and the network


def export_network(net):
    """A WSIDNet in evaluation mode as a torch.export.ExportedProgram, for any batch size from 1."""
    size = net.config.size
    image, edges = torch.rand(2, 3, size, size), torch.zeros(2, 1, size, size)
    batch = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(net, (image, edges), dynamic_shapes=(batch, batch))


def difference(net, program):
    """The largest difference between the network and what was exported of it, on a batch of three."""
    size = net.config.size
    generator = torch.Generator().manual_seed(0)
    image, edges = (torch.rand(3, channels, size, size, generator=generator) for channels in (3, 1))
    edges = (edges > 0.9).float()
    pairs = zip(net(image, edges), program.module()(image, edges), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def get_args_parser():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    parser.add_argument("--out", type=path_of, default=Path("wsid.pt2"), help="file to write")
    return parser


@torch.no_grad()
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.out.exists() and not args.out.is_file() or not args.out.parent.is_dir():
        raise InputError(f"cannot write {args.out}, which is no file or in no folder; name a file in one that exists")
    # Plain layout: torch.export takes weights that are stored channels last for parts of larger ones, and warns.
    net = Predictor(args.weights).net.to(memory_format=torch.contiguous_format)
    program = export_network(net)
    whole = io.BytesIO()  # on a disk that is full, torch ends the process
    torch.export.save(program, whole)
    whole.seek(0)
    error = difference(net, torch.export.load(whole))
    if not error < BOUND:
        raise RuntimeError(f"what was exported differs from the network by {error:.1e}; {args.out} is not written")
    files.write_atomically(args.out, lambda file: file.write(whole.getbuffer()))
    print(f"{args.out} (differs from the network by {error:.1e} at most)")


if __name__ == "__main__":
    run(main)
