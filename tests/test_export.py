"""The exported network against the network."""

import os
import warnings

import pytest
import torch
from conftest import call

import export
from export import difference, export_network
from models.wsid_net import NetConfig, WSIDNet, save_weights


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return WSIDNet(NetConfig(backbone="mobilenetv2_100", size=64, channels=16)).eval()


def test_export_equals_the_network_for_any_batch(net):
    with torch.no_grad():
        program = export_network(net)
        assert difference(net, program) < 1e-5
        image, edges = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
        for ours, theirs in zip(net(image, edges), program.module()(image, edges), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        other = WSIDNet(net.config).eval()
        assert difference(other, program) > 1e-3, "a different network differs"


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
