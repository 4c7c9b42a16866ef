"""The exported network against the network."""

import os
import subprocess
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, call

import export
from datasets.images import read_image
from engine.results import label_map
from examples import onnx_numpy
from export import difference, export_network
from infer import Predictor
from models.mask_rcnn import MaskRCNN, StudentConfig
from models.wsid_net import NetConfig, WSIDNet, save_weights


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=16)).eval()


def test_export_equals_the_network_for_any_batch(net):
    with torch.no_grad():
        program = export_network(net)
        assert difference(net, program.module()) < 1e-5
        image, edges = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
        for ours, theirs in zip(net(image, edges), program.module()(image, edges), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        other = WSIDNet(net.config).eval()
        assert difference(other, program.module()) > 1e-3, "a different network differs"


def test_exported_file_runs_alone(net, tmp_path, capsys):
    save_weights(net, tmp_path / "weights.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No complete tensor")
        assert call(export.main, "--weights", tmp_path / "weights.pt", "--out", tmp_path / "net.pt2") == 0
    assert "differs from the network by" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "net.pt2")
    inputs = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    saliency, boundary, offsets, count_probs = program.module()(*inputs)
    assert saliency.shape == boundary.shape == (2, 16, 16)
    assert offsets.shape == (2, 2, 16, 16) and count_probs.shape == (2, 4)


@pytest.mark.parametrize("out", ["absent/net.pt2", ".", "pipe"])
def test_an_output_that_cannot_be_written(tmp_path, capsys, out):
    os.mkfifo(tmp_path / "pipe")
    assert call(export.main, "--out", tmp_path / out) == 2
    assert capsys.readouterr().err.startswith("error: cannot write")


def test_an_export_that_differs_is_not_written(net, tmp_path, monkeypatch):
    save_weights(net, tmp_path / "weights.pt")
    (tmp_path / "net.pt2").write_text("from before")
    monkeypatch.setattr(export, "difference", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match="differs from the network"):
        export.main(["--weights", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "net.pt2")])
    assert (tmp_path / "net.pt2").read_text() == "from before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt2", "weights.pt"]


def test_the_example_finds_the_instances_of_no_refine_in_an_onnx_file(tmp_path, capsys):
    weights, out = ROOT / "weights/student.pt", tmp_path / "student.onnx"
    assert call(export.main, "--onnx", "--weights", weights, "--out", out) == 0
    assert "differs from the network by" in capsys.readouterr().out
    session, predictor = onnxruntime.InferenceSession(out), Predictor(weights, amp="off", refine=False)
    for name in ("cow_and_calf", "basketball"):
        image = read_image(ROOT / f"samples/{name}.jpg")
        labels, expected = onnx_numpy.instances(session, image), label_map(predictor.predict(image).masks)
        assert labels.max() == expected.max() == 2 and (labels == expected).mean() > 0.9999


@pytest.mark.parametrize(
    "arguments",
    [(), ("missing.onnx", "samples/cat.jpg"), ("README.md", "missing.jpg"), ("README.md", "samples/cat.jpg")],
)
def test_the_example_refuses_in_one_sentence(arguments):
    command = [sys.executable, "examples/onnx_numpy.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")


def test_a_wsid_net_as_onnx_takes_any_batch(net):
    with torch.no_grad():
        run = export.run_onnx(export.to_onnx(net))
        assert difference(net, run) < 1e-4
        image, edges = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
        for ours, theirs in zip(net(image, edges), run(image, edges), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_detections_of_another_number_differ():
    net = MaskRCNN(StudentConfig("mobilenetv2_100", 64, 32, 32, 32)).eval()
    with torch.no_grad():
        found = export.Outputs(net)(*export.Outputs(net).inputs(1))
        assert difference(net, lambda *_: found) == 0
        fewer = [value[1:] for value in found[:3]] + [found[3]]
        assert len(found[0]) and difference(net, lambda *_: fewer) == float("inf")


def test_onnx_without_its_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: name != "onnxscript")
    assert call(export.main, "--onnx", "--out", tmp_path / "a.onnx") == 2
    assert "error: --onnx needs onnxscript; python -m pip install" in capsys.readouterr().err


def test_the_example_without_hypotheses(tmp_path):
    """No hypothesis, or one without a pixel, is a label map of zeros."""

    class Session:
        def get_inputs(self):
            return [type("Input", (), {"shape": [1, 3, 64, 64]})]

        def run(self, *_):
            return self.found

    session, image = Session(), np.zeros((40, 50, 3), np.uint8)
    for n in (0, 1):
        boxes = np.tile(np.float32([0.2, 0.2, 0.6, 0.6]), (n, 1))
        session.found = boxes, np.ones(n, "f4"), np.zeros((n, 28, 28), "f4"), np.float32([0, 1, 0, 0, 0])
        assert not onnx_numpy.instances(session, image).any()
