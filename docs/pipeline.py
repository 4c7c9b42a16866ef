"""Draws docs/pipeline.jpg: how WSID-Net is trained, and the maps that it computes for one photograph.

python infer.py --img samples/astronaut.jpg --weights weights/wsid_net.pt --amp off --out output --visualize
python docs/pipeline.py samples/astronaut.jpg output docs/pipeline.jpg
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

WIDTH, HEIGHT = 14.0, 6.2  # inches, and the units of all coordinates below
TRAIN, INFER = "#e8eef7", "#eef5e9"  # background colours of the two bands
LABELS = "classes: person\ncount: 2\n(PASCAL VOC, ILSO, COCO,\nor your own labels.csv)"
PSEUDO_LABELS = (
    "class activation maps (CAM)\nof a 20-class classifier,\nrefined by a dense CRF:\nclass and saliency masks"
)
BRANCHES = "$L_B + L_V + L_{su}$, with CA and BE;\nthe count supervises $L_{su}$"
SALIENCY = "cross entropy on the saliency\nmasks; a backbone of its own"
PTS = """R times: the whole network
and a CRF label the images,
S trains on these labels and is
averaged over iterations (Eq. 8)"""
FUSION = r"""1. clusters around
    centroids (Eq. 1, 2)
2. filter by their
    salient fraction $\theta$
3. random walk that
    stops at B (Eq. 9, 10)"""


def band(axes: Axes, y: float, height: float, colour: str, title: str) -> None:
    """A coloured stripe over the whole width with its title in the upper left corner."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((0.1, y), WIDTH - 0.2, height, style, facecolor=colour, edgecolor="none"))
    axes.text(0.3, y + height - 0.13, title, fontsize=12.5, weight="bold", va="top")


def box(axes: Axes, x: float, y: float, width: float, height: float, title: str, text: str) -> None:
    """A white box with a bold first line; x, y: its lower left corner."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor="white", edgecolor="#555555"))
    axes.text(x + 0.12, y + height - 0.12, title, fontsize=11, weight="bold", va="top")
    axes.text(x + 0.12, y + height - 0.42, text, fontsize=10, va="top", linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow from start to end, bent by a fraction of its length."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color="#333", connectionstyle=style)
    )


def picture(axes: Axes, path: Path, x: float, y: float, height: float, caption: str) -> float:
    """A picture of the given height with a caption below; returns the x of its right edge."""
    image = Image.open(path).convert("RGB")
    width = height * image.width / image.height
    axes.imshow(image, extent=(x, x + width, y, y + height), interpolation="lanczos", zorder=2)
    axes.text(x + width / 2, y - 0.07, caption, fontsize=10, ha="center", va="top", linespacing=1.3)
    return x + width


def draw(photograph: Path, results: Path, out: Path) -> None:
    """photograph: a file; results: the folder that infer.py --visualize wrote; out: the figure, .jpg or .png."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=115)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()

    band(axes, 3.35, 2.75, TRAIN, "Training: class labels and a count per photograph, no masks")
    box(axes, 0.3, 3.92, 2.6, 1.4, "Labels", LABELS)
    box(axes, 3.5, 3.92, 2.8, 1.4, "Pseudo labels", PSEUDO_LABELS)
    box(axes, 6.9, 4.7, 3.1, 0.98, "Boundaries B and offsets V", BRANCHES)
    box(axes, 6.9, 3.52, 3.1, 0.98, "Saliency S", SALIENCY)
    box(axes, 10.6, 3.92, 3.1, 1.4, "Progressive training (PTS)", PTS)
    arrow(axes, (2.9, 4.62), (3.5, 4.62))
    arrow(axes, (6.3, 4.77), (6.9, 5.19))
    arrow(axes, (6.3, 4.47), (6.9, 4.05))
    arrow(axes, (10.0, 5.19), (10.6, 4.77))
    arrow(axes, (10.0, 4.15), (10.6, 4.47))
    arrow(axes, (10.6, 4.0), (10.0, 3.75), bend=-0.15)

    band(axes, 0.1, 3.1, INFER, "Inference")
    stem, y, size = photograph.stem, 0.62, 2.0
    right = picture(axes, photograph, 0.3, y, size, "photograph")
    left = right + 0.4
    arrow(axes, (right + 0.05, y + size / 2), (left - 0.05, y + size / 2))
    for name, caption in (
        ("saliency", "S: saliency"),
        ("boundary", "B: boundaries"),
        ("offsets", "V: offsets (hue: direction)\nand centroids (dots)"),
    ):
        right = picture(axes, results / f"{stem}_{name}.png", left, y, size, caption)
        left = right + 0.1
    width = WIDTH - 0.3 - size - 0.4 - (right + 0.4)
    box(axes, right + 0.4, y, width, size, "Fusion", FUSION)
    arrow(axes, (right + 0.05, y + size / 2), (right + 0.38, y + size / 2))
    left = right + 0.4 + width
    arrow(axes, (left + 0.05, y + size / 2), (left + 0.37, y + size / 2))
    picture(axes, results / f"{stem}_overlay.jpg", left + 0.4, y, size, "salient instances, with scores")

    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.set_aspect("equal")
    figure.savefig(out, pil_kwargs={"quality": 88} if out.suffix == ".jpg" else {})


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
