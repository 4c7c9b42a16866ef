"""The notebook of examples/: its cells run, and its stored outputs are theirs."""

import io
import json
from contextlib import redirect_stdout

import matplotlib
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples" / "salient_instances.ipynb"


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_prints_what_it_shows(monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names, pictures = {}, 0
    for cell in cells:
        with redirect_stdout(io.StringIO()) as output:
            exec("".join(cell["source"]), names)
        assert output.getvalue().split() == printed(cell).split(), "run make notebook"
        pictures += any("image/png" in output.get("data", ()) for output in cell["outputs"])
    assert pictures == 3 and len(names["found"].masks)
