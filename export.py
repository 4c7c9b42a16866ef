"""Export a network for use without this repository: to ONNX, or a WSID-Net with torch.export.

    python export.py --onnx                                     # runs/default, else the bundled student: student.onnx
    python export.py --onnx --weights runs/mine/weights_pts.pt --out mine.onnx
    python export.py                                            # runs/default, else the bundled WSID-Net: wsid_net.pt2

WSID-Net: inputs image, RGB [N,3,size,size] in 0..1, and edges, its Canny map [N,1,size,size] of 0 and 1
(datasets.transforms.canny_edges); outputs saliency, boundary, offsets and count_probs of models.wsid_net.NetOutput. Any
N; torch.export.load("wsid_net.pt2").module()(image, edges) runs it in torch.

Student network: input image, RGB [1,3,size,size] in 0..1; outputs of n hypotheses boxes [n,4] as fractions (x0, y0, x1,
y1) of the photograph's width and height, scores [n], masks [n,28,28] inside the boxes, and count_probs [5], as in
models.mask_rcnn.Detections. examples/onnx_numpy.py makes instances of them. The exported network is compared with the
network before the file is written.
"""

import argparse
import io
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from engine.predictor import BUNDLED_WSID_NET, default_weights
from models.mask_rcnn import Detections, MaskRCNN
from models.wsid_net import NetOutput, WSIDNet, load_network
from utils import files
from utils.cli import InputError, Parser, path_of
from utils.script import run

# On the difference between the exported network and the network; onnxruntime has other kernels than torch.
BOUND, ONNX_BOUND = 1e-4, 1e-3

Network = WSIDNet | MaskRCNN


class Outputs(nn.Module):
    """A network that returns a plain tuple: a file with a named one could only be loaded beside its class."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.net, WSIDNet):
            return tuple(self.net(*inputs))
        (found,) = self.net(*inputs)
        return found.boxes / self.net.config.size, found.scores, found.masks, found.count_probs

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs for a comparison: pictures of smooth noise, and for a WSID-Net edges; always the same."""
        size, generator = self.net.config.size, np.random.default_rng(0)
        small = generator.random((batch, 8, 8, 3), np.float32)
        images = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in small])
        image = torch.from_numpy(images).permute(0, 3, 1, 2).clamp(0, 1).contiguous()
        edges = torch.from_numpy(generator.random((batch, 1, size, size), np.float32) > 0.9).float()
        return (image, edges) if isinstance(self.net, WSIDNet) else (image,)


def export_network(net: WSIDNet) -> ExportedProgram:
    """A WSIDNet in evaluation mode as an exported program, for any batch size from 1."""
    batch = {0: torch.export.Dim("batch", min=1)}
    outputs = Outputs(net)
    return torch.export.export(outputs, outputs.inputs(2), dynamic_shapes=((batch, batch),))


def to_onnx(net: Network) -> bytes:
    """A network in evaluation mode as an ONNX file. Raises InputError when the packages for it are missing."""
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if not find_spec(package)]
    if missing:
        raise InputError(f"--onnx needs {' and '.join(missing)}; python -m pip install onnx onnxscript onnxruntime")
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        names: dict[str, Any]
        if isinstance(net, WSIDNet):
            names = {"input_names": ["image", "edges"], "output_names": list(NetOutput._fields)}
            program = torch.onnx.export(export_network(net), dynamo=True, verbose=False, **names)
            program.save(path)  # type: ignore[union-attr]
        else:  # by tracing: torch.export refuses the code of torchvision's detectors, whose flow depends on values
            names = {"input_names": ["image"], "output_names": list(Detections._fields[:4])}
            any_number = {name: {0: "n"} for name in ("boxes", "scores", "masks")}
            outputs = Outputs(net)
            torch.onnx.export(outputs, outputs.inputs(1), path, dynamo=False, dynamic_axes=any_number, **names)
        return path.read_bytes()


def run_onnx(data: bytes) -> Callable[..., Sequence[Tensor]]:
    """The network in an ONNX file, from tensors to tensors, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Else its threads keep the cores busy for a while after each call, which would slow down what is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, values)]

    return call


def contiguous(net: Any) -> Any:
    """Contiguous weights: torch.export takes channels-last ones for views of larger tensors, and warns."""
    return net.to(memory_format=torch.contiguous_format)


def difference(net: Network, exported: Callable[..., Sequence[Tensor]]) -> float:
    """The largest absolute difference between the outputs of a network and of the exported one, on a batch of three or,
    for a student network, on one image; infinite where they differ in shape."""
    outputs = Outputs(net)
    inputs = outputs.inputs(3 if isinstance(net, WSIDNet) else 1)
    pairs = list(zip(outputs(*inputs), exported(*inputs), strict=True))
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return float("inf")
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs if ours.numel())


def get_args_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = Parser(description=__doc__)
    parser.add_argument("--onnx", action="store_true", help="an ONNX file, of either network")
    parser.add_argument("--weights", type=path_of, help="default: those of runs/default, else the bundled ones")
    parser.add_argument("--out", type=path_of, help="file to write; default: the name of the weights, here")
    return parser


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Export, compare, write; InputError for weights or a path that cannot be used."""
    args = get_args_parser().parse_args(argv)
    weights = args.weights or (default_weights() if args.onnx else default_weights(BUNDLED_WSID_NET))
    out = args.out or Path(weights.stem + (".onnx" if args.onnx else ".pt2"))
    if out.exists() and not out.is_file() or not out.parent.is_dir():
        raise InputError(f"cannot write {out}: it must be a file in a folder that exists")
    network: Network = contiguous(load_network(weights))
    if args.onnx:
        data = to_onnx(network)
        error = difference(network, run_onnx(data))
    elif isinstance(network, WSIDNet):
        program, whole = export_network(network), io.BytesIO()  # torch aborts the process where the disk is full
        torch.export.save(program, whole)
        whole.seek(0)
        error, data = difference(network, torch.export.load(whole).module()), whole.getvalue()
    else:
        raise InputError(f"{weights} is a student network, which torch.export does not take; add --onnx")
    if not error < (ONNX_BOUND if args.onnx else BOUND):
        raise RuntimeError(f"the exported network differs from the network by {error:.1e}; {out} is not written")
    files.write_atomically(out, lambda file: file.write(data))
    print(f"{out} (differs from the network by {error:.1e} at most)")


if __name__ == "__main__":
    run(main)
