import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import files
from utils.script import run

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("WSID_TEST_THREADS", "2")))


@pytest.fixture
def photographs(tmp_path):
    """A data folder of six small photographs of one or two coloured discs on noise, with labels."""
    return make_data(tmp_path / "data")


def make_data(folder, count=6, size=(72, 96)):
    """Write images/ and labels.csv into ``folder`` and return it: ``count`` photographs of size (H, W)."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = ["image,classes,count"]
    yy, xx = np.mgrid[: size[0], : size[1]]
    for i in range(count):
        image = rng.integers(60, 120, (*size, 3)).astype(np.uint8)
        for k in range(i % 2 + 1):
            image[(yy - 36) ** 2 + (xx - 25 - 45 * k) ** 2 < 300] = (200, 40 + 100 * (i % 3), 30)
        files.save_png(image, folder / "images" / f"photo{i}.png")
        rows.append(f"photo{i}.png,{('cat', 'dog', 'person cat')[i % 3]},{i % 2 + 1}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def call(main, *args):
    """Run a script's ``main`` in this process, which is faster than starting it; returns the exit code."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: main(list(map(str, args))))
    return stop.value.code


def python(*args, before=(), timeout=240, **kwargs):
    """Run one of the scripts in a process of its own; returns the finished process with its output as text.

    before: arguments between the interpreter and the script, such as those of a launcher.
    """
    return subprocess.run(
        [sys.executable, *before, ROOT / args[0], *map(str, args[1:])],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def environment():
    """The environment of scripts started by tests: the same number of threads, so that equal runs are bitwise equal."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
