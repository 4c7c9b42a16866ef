"""app.py behind its options: the page, made with gradio, and the server."""

import html
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets.listing import list_images
from engine.open_pages import OpenPages, Shown
from engine.predictor import ROOT, Predictor
from models import MAX_INSTANCES
from utils.cli import InputError

MAX_UPLOAD = "256mb"
MAX_WAITING = 16  # photographs and counts that wait for their turn; further ones are refused
SECONDS_BETWEEN_SWEEPS = 60
HEIGHTS = 130, 380, 180, 115  # pixels: the drop zone, the two pictures, the instances, the samples

CSS = """
.gradio-container { max-width: 1200px !important; }
#message { font-size: 1.1em; min-height: 1.7em; }
#message .error { color: #d32f2f; }
#photograph img, #overlay img { width: 100%; height: 100%; object-fit: contain; }
#instances img { object-fit: contain; background: white; }
.grid-container { padding-top: 0 !important; }
#samples .grid-container { grid-template-columns: repeat(10, minmax(0, 1fr)) !important; }
"""
TITLE = "# Salient instances\nOne mask for each salient object of a photograph, found by WSID-Net."
PRIVACY = (
    "Photographs are sent to the computer that runs this page and to no other. They are deleted there when the page is "
    "left, or an hour after their last use."
)


def check_address(host: str, port: int) -> None:
    """InputError when nothing can listen on ``host`` and ``port``, such as where another program does already."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise _cannot_listen(host, port, error.strerror or str(error)) from error


def serve(predictor: Predictor, host: str, port: int) -> None:
    """Serve the page until the process is stopped (KeyboardInterrupt, Stopped); prints its address.

    Everything that is written lies in a temporary folder, which is removed at the end. Raises InputError when nothing
    can listen on ``host`` and ``port``.
    """
    with tempfile.TemporaryDirectory(prefix="wsid-net-", ignore_cleanup_errors=True) as folder:
        pages = OpenPages(predictor, Path(folder).resolve())
        page = make_page(pages)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=MAX_UPLOAD,
                css=CSS,
                theme=_theme(),
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
                # Nothing leaves this computer, and the browser keeps no list of results, whatever the environment says.
                share=False,
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
            )
            print(f"weights: {predictor.weights}")
            print(f"the page: {address} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(SECONDS_BETWEEN_SWEEPS)
                pages.sweep()
        except OSError as error:  # another program was faster
            raise _cannot_listen(host, port, str(error)) from error
        finally:
            page.close(verbose=False)


def make_page(pages: OpenPages) -> Any:
    """The page as gradio.Blocks, whose uploads and pictures lie in the folder of ``pages``."""
    os.environ["GRADIO_TEMP_DIR"] = str(pages.folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # its only request is one to itself, at the start
    import gradio as gr  # after the lines above, which it reads

    samples = list_images(ROOT / "samples")
    gr.set_static_paths(samples)  # served from their place

    def show(compute: Callable[..., Shown], *args: Any) -> list[Any]:
        """The values of ``outputs``: what compute(*args) returns, or the sentence of its InputError."""
        try:
            shown = compute(*args)
        except InputError as error:
            buttons = [gr.DownloadButton(value=None, interactive=False) for _ in range(2)]
            return [f'<span class="error">{html.escape(str(error))}</span>', None, None, None, *buttons]
        buttons = [gr.DownloadButton(value=str(path), interactive=True) for path in (shown.cutouts, shown.predictions)]
        instances = [(str(path), caption) for path, caption in shown.instances]
        return [html.escape(shown.message), str(shown.photograph), str(shown.overlay), instances, *buttons]

    def on_upload(path: str, request: gr.Request) -> list[Any]:
        return [None, 0, *show(pages.open, str(request.session_hash), Path(path))]

    def on_sample(event: gr.SelectData, request: gr.Request) -> list[Any]:
        return [0, *show(pages.open, str(request.session_hash), samples[event.index])]

    def on_count(count: int | None, request: gr.Request) -> list[Any]:
        return show(pages.recount, str(request.session_hash), count or 0)

    def on_leave(request: gr.Request) -> None:
        pages.close(str(request.session_hash))

    with gr.Blocks(title="WSID-Net", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        with gr.Row(equal_height=True):
            upload = gr.File(label="Drop a photograph", height=HEIGHTS[0], scale=3, elem_id="upload")
            count = gr.Number(
                0,
                label="Number of objects",
                info="0: not known",
                minimum=0,
                maximum=MAX_INSTANCES,
                precision=0,
                scale=1,
                elem_id="count",
            )
        message = gr.HTML(elem_id="message", padding=False)
        with gr.Row():
            photograph = gr.Image(
                label="Photograph", interactive=False, buttons=[], height=HEIGHTS[1], elem_id="photograph"
            )
            overlay = gr.Image(
                label="Instances with scores",
                interactive=False,
                buttons=["download", "fullscreen"],
                height=HEIGHTS[1],
                elem_id="overlay",
            )
        instances = gr.Gallery(
            label="Instances",
            show_label=False,
            columns=6,
            fit_columns=False,
            height=HEIGHTS[2],
            interactive=False,
            buttons=[],
            elem_id="instances",
        )
        with gr.Row():
            cutouts = gr.DownloadButton("Cut-outs (zip of PNGs)", interactive=False, elem_id="cutouts")
            predictions = gr.DownloadButton("predictions.json (COCO)", interactive=False, elem_id="predictions")
        gr.Markdown("Samples:")
        examples = gr.Gallery(
            [str(path) for path in samples],
            label="Samples",
            show_label=False,
            columns=10,
            height=HEIGHTS[3],
            interactive=False,
            allow_preview=False,
            buttons=[],
            elem_id="samples",
        )
        gr.Markdown(PRIVACY)

        outputs = [message, photograph, overlay, instances, cutouts, predictions]
        # One concurrency_id: one photograph or count at a time, of all pages together.
        turn: dict[str, Any] = {"concurrency_id": "turn", "concurrency_limit": 1, "api_visibility": "private"}
        upload.upload(on_upload, upload, [upload, count, *outputs], **turn)
        examples.select(on_sample, None, [count, *outputs], **turn)
        count.input(on_count, count, outputs, trigger_mode="always_last", **turn)
        page.unload(on_leave)
    return page.queue(max_size=MAX_WAITING, api_open=False)


def _theme() -> Any:
    """gradio's theme with the fonts of the system: its own are loaded from the network."""
    import gradio as gr

    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _cannot_listen(host: str, port: int, reason: str) -> InputError:
    return InputError(f"cannot listen on {host}:{port} ({reason}); choose another --port, or another --host")
