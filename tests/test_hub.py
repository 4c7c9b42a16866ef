"""torch.hub.load beside packages of other projects that have the names of ours."""

import subprocess
import sys

import conftest
import numpy as np
import pytest
from conftest import ROOT

import infer
from datasets.images import read_image

SCRIPT = """
import sys
import numpy as np
import torch
before = {}
if sys.argv[2] == "others":
    import datasets, models, utils.helper
    assert hasattr(datasets, "load_dataset")
    before = {name: sys.modules[name] for name in ("datasets", "models", "utils", "utils.helper")}
image = np.load(sys.argv[1])
paths = list(sys.path)
predictors = [torch.hub.load(sys.argv[3], "wsid_net", source="local", weights=file, amp="off", verbose=False)
              for file in sys.argv[5:]]
found = [predictor.predict(image) for predictor in predictors]
for name in ("datasets", "models", "utils", "utils.helper"):
    assert sys.modules.get(name) is before.get(name), name
assert not [name for name in sys.modules if name.startswith(("models.", "engine.", "ops."))]
assert sys.path == paths
if before:
    import utils.later, datasets.load
    assert utils.later.value == 5 and datasets.load.load_dataset is datasets.load_dataset
    repeated = [predictor.predict(image) for predictor in predictors]
    assert all((one.masks == two.masks).all() for one, two in zip(found, repeated))
np.savez(sys.argv[4], *[array for prediction in found for array in (prediction.masks, prediction.scores)])
"""


@pytest.mark.parametrize("others", ["others", "alone"])
def test_both_networks_beside_packages_of_the_same_names(tmp_path, others):
    """Hugging Face's datasets, and modules of two other projects."""
    (tmp_path / "home/utils").mkdir(parents=True)
    for file, text in [("models", ""), ("utils/__init__", ""), ("utils/helper", ""), ("utils/later", "value = 5")]:
        (tmp_path / f"home/{file}.py").write_text(text)
    image = read_image(ROOT / "samples/cat.jpg")
    np.save(tmp_path / "image.npy", image)
    files = [ROOT / "weights" / name for name in ("student.pt", "wsid_net.pt")]
    arguments = [tmp_path / "image.npy", others, ROOT, tmp_path / "found.npz", *files]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path / "home",
        env=conftest.environment(),
    )
    assert done.returncode == 0, done.stderr
    found = list(np.load(tmp_path / "found.npz").values())
    for file, masks, scores in zip(files, found[::2], found[1::2]):
        expected = infer.Predictor(file, amp="off").predict(image)
        assert np.array_equal(masks, expected.masks) and np.allclose(scores, expected.scores, atol=1e-4)
