"""app.py: the photographs and files behind the page, its options, and the page itself where there is a browser."""

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import conftest
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import app
import infer
from datasets.images import read_image
from datasets.masks import decode_rle
from engine import open_pages
from engine.open_pages import OpenPages
from engine.post_processing import Prediction
from engine.predictor import Predictor
from utils import cli
from utils.cli import InputError

call = partial(conftest.call, app.main)
SAMPLE = ROOT / "samples" / "cow_and_calf.jpg"  # two instances
SECONDS = 240  # to wait at most; a busy machine takes half a minute to import gradio


@pytest.fixture(scope="module")
def predictor():
    return Predictor()


@pytest.fixture
def pages(predictor, tmp_path):
    (tmp_path / "pages").mkdir()
    return OpenPages(predictor, tmp_path / "pages")


def uploaded(pages, source=SAMPLE, name=None):
    """A copy of ``source`` where gradio stores an uploaded file."""
    folder = pages.folder / "digest"
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(source, folder / (name or source.name)))


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def bytes_in(folder):
    total = 0
    for path in files_in(folder):
        with suppress(FileNotFoundError):  # deleted since it was listed
            total += path.stat().st_size
    return total


def count_calls(monkeypatch, predictor):
    calls = []
    network = predictor.network
    monkeypatch.setattr(predictor, "network", lambda inputs: calls.append(len(inputs)) or network(inputs))
    return calls


def test_the_files_are_those_of_infer(pages, tmp_path):
    out = tmp_path / "out"
    assert conftest.call(infer.main, "--img", SAMPLE, "--out", out, "--cutouts", "--gpu", -1) == 0
    shown = pages.open("a", uploaded(pages))
    assert shown.predictions.name == "predictions.json" and shown.cutouts.name == "cow_and_calf_cutouts.zip"
    assert shown.predictions.read_bytes() == (out / "predictions.json").read_bytes()
    with ZipFile(shown.cutouts) as archive:
        names = {"cow_and_calf_cutout1.png", "cow_and_calf_cutout2.png", "cutouts.json"}
        assert set(archive.namelist()) == names
        assert all(archive.read(name) == (out / name).read_bytes() for name in names)
    scores = [f"score {record['score']:.2f}" for record in json.loads(shown.predictions.read_text())]
    assert [caption for _, caption in shown.instances] == scores and len(scores) == 2
    assert shown.message == "2 instances in cow_and_calf.jpg, 294 x 219 pixels"
    assert read_image(shown.photograph).shape == read_image(shown.overlay).shape == (219, 294, 3)


def test_another_count_does_not_run_the_network(pages, predictor, monkeypatch):
    calls = count_calls(monkeypatch, predictor)
    first = pages.open("a", uploaded(pages))
    one = pages.recount("a", 1)
    assert one.message.startswith("1 instance in ") and len(one.instances) == 1
    assert len(json.loads(one.predictions.read_text())) == 1
    assert not first.predictions.exists(), "the files of the result before are deleted"
    many = pages.recount("a", 9)
    assert many.message.endswith("; 9 were asked for") and len(many.instances) < 9
    assert len(pages.recount("a", 0).instances) == len(first.instances) == 2
    assert calls == [1]


@pytest.mark.parametrize("name", ["notes.txt", "empty.jpg", "cut.jpg", "huge.png"])
def test_files_are_refused_as_by_infer_and_the_page_goes_on(pages, tmp_path, capsys, name):
    content = {
        "notes.txt": b"some text",
        "empty.jpg": b"",
        "cut.jpg": SAMPLE.read_bytes()[:9000],
        # The header of a PNG of 100,000 x 100,000 pixels.
        "huge.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0\xbbHH\xcf",
    }[name]
    (tmp_path / name).write_bytes(content)
    path = uploaded(pages, tmp_path / name)
    with pytest.raises(InputError) as refused:
        pages.open("a", path)
    assert conftest.call(infer.main, "--img", tmp_path / name, "--out", tmp_path / "out", "--gpu", -1) == 2
    sentence = capsys.readouterr().err.removeprefix("error: ").strip().replace(str(tmp_path / name), name)
    assert str(refused.value) == sentence and str(tmp_path) not in sentence
    assert not files_in(pages.folder)
    with pytest.raises(InputError, match="no photograph"):
        pages.recount("a", 1)
    assert pages.open("a", uploaded(pages)).instances


def test_too_little_memory_is_one_sentence(pages, predictor, monkeypatch):
    def too_much(*args, **options):
        raise MemoryError

    for name in ("network", "instances"):
        with monkeypatch.context() as patch:
            patch.setattr(predictor, name, too_much)
            with pytest.raises(InputError, match="cow_and_calf.jpg needs more memory than there is"):
                pages.open("a", uploaded(pages))
        assert not files_in(pages.folder) and not pages.held


def test_a_page_that_is_left_leaves_nothing(pages):
    path = uploaded(pages)
    pages.open("a", path)
    second = pages.open("b", path)  # equal files are stored once
    pages.close("a")
    assert path.exists() and second.cutouts.exists()
    pages.close("b")
    pages.close("b")
    assert not files_in(pages.folder)
    pages.open("a", SAMPLE)  # a sample of the repository is kept
    pages.close("a")
    assert SAMPLE.exists()


def test_a_photograph_takes_the_place_of_the_one_before(pages):
    first = uploaded(pages, name="first.jpg")
    pages.open("a", first)
    shown = pages.open("a", uploaded(pages, name="second.jpg"))
    assert not first.exists() and "second.jpg" in shown.message
    assert len({path.parent for path in files_in(pages.folder) if path.suffix == ".json"}) == 1


def test_what_was_not_used_is_deleted(pages):
    used, idle = pages.open("used", uploaded(pages, name="used.jpg")), pages.open("idle", uploaded(pages))
    stray = pages.folder / "upload that was given up" / "part"
    stray.parent.mkdir()
    stray.touch()
    past = time.time() - 2 * open_pages.KEPT
    pages.held["idle"].used = past
    for path in (stray, pages.held["idle"].upload):
        os.utime(path, (past, past))
    pages.sweep()
    assert set(pages.held) == {"used"} and used.cutouts.exists()
    assert not idle.cutouts.exists() and not stray.exists()
    with pytest.raises(InputError, match="not used for 60 minutes"):
        pages.recount("idle", 1)
    pages.sweep(age=-1)
    assert not list(pages.folder.iterdir())


def test_few_photographs_are_held_and_those_used_last(pages, monkeypatch):
    monkeypatch.setattr(open_pages, "MAX_PAGES", 2)
    for page in "ab":
        pages.open(page, uploaded(pages, name=f"{page}.jpg"))
    pages.recount("a", 1)
    pages.open("c", uploaded(pages, name="c.jpg"))
    assert list(pages.held) == ["a", "c"]
    monkeypatch.setattr(open_pages, "MAX_PIXELS", 219 * 294)
    assert pages.open("d", uploaded(pages)).instances, "the one that was just opened is held in any case"
    assert list(pages.held) == ["d"]


def test_large_and_empty_photographs(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(open_pages, "SIDE", 100)
    shown = pages.open("a", uploaded(pages))
    assert read_image(shown.overlay).shape == read_image(shown.photograph).shape == (74, 100, 3)
    assert json.loads(shown.predictions.read_text())[0]["segmentation"]["size"] == [219, 294]
    Image.fromarray(np.zeros((1, 300, 3), np.uint8)).save(tmp_path / "line.png")
    shown = pages.open("a", uploaded(pages, tmp_path / "line.png"))
    assert shown.message.endswith(" in line.png, 300 x 1 pixels") and read_image(shown.overlay).shape == (1, 100, 3)
    nothing = Prediction(np.zeros((0, 5, 7), bool), np.zeros(0, np.float32), np.zeros((0, 2)), np.zeros((5, 7)))
    shown = open_pages.write(tmp_path, Path("wall.jpg"), np.zeros((5, 7, 3), np.uint8), nothing, 1)
    assert shown.message == "no instances in wall.jpg, 7 x 5 pixels; 1 was asked for"
    assert json.loads(shown.predictions.read_text()) == [] and shown.instances == []
    assert ZipFile(shown.cutouts).namelist() == ["cutouts.json"]


def test_without_gradio_there_is_one_sentence(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert call() == 2
    assert "needs gradio, which is not installed: pip install -r requirements-app.txt" in capsys.readouterr().err


@pytest.mark.parametrize("host, port", [("127.0.0.1", None), ("192.0.2.1", 7860), ("no.such.host.invalid", 7860)])
def test_an_address_that_cannot_be_used_is_one_sentence(monkeypatch, capsys, host, port):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = port or other.getsockname()[1]
        assert call("--host", host, "--port", port) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on {host}:{port} (" in error and "choose another --port, or another --host" in error


@pytest.mark.parametrize("gpu, device", [(None, "cuda:1"), (-1, "cpu")])
def test_the_options_reach_the_page(monkeypatch, gpu, device):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(app, "select_device", lambda gpu: "cuda:1" if gpu is None else cli.select_device(gpu))
    made, served = [], []
    monkeypatch.setattr("engine.predictor.Predictor", lambda *given: made.append(given))
    monkeypatch.setattr("engine.web.check_address", lambda *given: None)
    monkeypatch.setattr("engine.web.serve", lambda predictor, *given: served.append(given))
    options = () if gpu is None else ("--gpu", gpu)
    assert call("--host", "192.0.2.1", "--port", 8000, "--weights", "mine.pt", *options) == 0
    assert [(str(path), str(device)) for path, device in made] == [("mine.pt", device)]
    assert served == [("192.0.2.1", 8000)]


# ---- in a browser


def chromium():
    """The path of a Chromium that playwright can drive; skips the test, with the reason, where a part is missing."""
    for name in ("gradio", "playwright"):
        pytest.importorskip(name, reason=f"{name} is not installed: make test-app")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
    if not os.path.exists(found):
        pytest.skip("there is no Chromium: install it, or run playwright install chromium")
    return found


@pytest.fixture
def browser():
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def server(browser, tmp_path):
    """(address, temporary folder) of a running app.py, which SIGTERM must end, with the folder cleared."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, ROOT / "app.py", "--port", str(port), "--gpu", "-1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=conftest.environment() | {"TMPDIR": str(folder), "HTTP_PROXY": "http://127.0.0.1:9"},
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("the page: "):
                break
        assert process.poll() is None and lines, "".join(lines)
        address = lines[-1].split()[2]
        assert address == f"http://127.0.0.1:{port}/"
        yield address, folder
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in rest, rest
        assert not files_in(folder) and not list(folder.glob("wsid-net-*"))
    finally:
        process.kill()
        process.wait()


def test_the_page_in_a_browser(server, browser, predictor, tmp_path):
    """With WSID_SCREENSHOT=FILE.jpg the page with a sample is saved as a picture, as in docs/app.md."""
    address, folder = server
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(SECONDS * 1000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    upload, message = page.locator("#upload input[type=file]"), page.locator("#message")

    def wait(text, instances=0):
        message.get_by_text(text).wait_for()
        page.wait_for_function(
            "n => document.querySelectorAll('#instances .thumbnail-item').length == n", arg=instances
        )

    def wait_for_instances(photograph):
        number = len(predictor.predict(read_image(photograph)).masks)
        assert number > 1, "so that a count of 1 changes something"
        wait(f"{number} instances in {photograph.name}", number)

    def download(button):
        with page.expect_download() as waiting:
            page.locator(button).click()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()

    upload.set_input_files(SAMPLE)
    wait_for_instances(SAMPLE)
    message.get_by_text("in cow_and_calf.jpg, 294 x 219 pixels").wait_for()
    assert page.locator("#overlay img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 294

    page.locator("#count input").fill("1")
    wait("1 instance in cow_and_calf.jpg", 1)
    name, content = download("#predictions")
    (record,) = json.loads(content)
    assert name == "predictions.json" and record["image_id"] == "cow_and_calf"
    assert decode_rle(record["segmentation"]).shape == (219, 294)
    name, content = download("#cutouts")
    with ZipFile(io.BytesIO(content)) as archive:
        (place,) = json.loads(archive.read("cutouts.json"))
        cutout = Image.open(io.BytesIO(archive.read(place["file_name"])))
    assert name == "cow_and_calf_cutouts.zip" and place["score"] == record["score"]
    assert cutout.mode == "RGBA" and list(cutout.size) == place["bbox"][2:]

    (tmp_path / "notes.txt").write_text("some text")
    upload.set_input_files(tmp_path / "notes.txt")
    wait("notes.txt is not an image that can be read; save it as JPEG or PNG")
    page.locator("#samples button").first.click()
    wait_for_instances(ROOT / "samples" / "astronaut.jpg")
    assert page.locator("#count input").input_value() == "0"
    if os.environ.get("WSID_SCREENSHOT"):
        page.mouse.move(0, 0)
        page.wait_for_timeout(2000)
        page.screenshot(path=os.environ["WSID_SCREENSHOT"], type="jpeg", quality=75, full_page=True)

    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
    assert bytes_in(folder) > 0
    page.close()
    end = time.monotonic() + SECONDS
    while bytes_in(folder) and time.monotonic() < end:
        time.sleep(0.2)
    assert not bytes_in(folder), "all contents are deleted when the page is left"
