"""The report of an evaluation: text tables, and one HTML page with the curves and the best and worst images.

The page needs no other file and no network: its pictures are data URIs, its curves SVG.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from datasets.images import read_image
from datasets.labels import Mask, Report, raise_or_warn
from datasets.masks import VOID
from engine.bootstrap import DRAWS
from engine.evaluation import Method
from engine.metrics import RECALLS, ImageResult, average_precision, pooled_precision
from engine.predictions import check_size
from utils.cli import InputError

SHOWN = 10  # images at either end of the ranking
SIDE, QUALITY = 320, 80  # the longer side of a picture in pixels, and its JPEG quality: some 15 kB each
GREY = 128  # of the picture that replaces a missing photograph
CURVES = (("0.5", 0, "none"), ("0.7", 4, "6 4"))  # name, row of IOU_THRESHOLDS, dashes
COLOURS = ("#3b82c4", "#e0662f", "#2f9e6e", "#b55fb0", "#c79a1b", "#7a7a7a")  # visible on white and on black

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { font-weight: 600; line-height: 1.2 } h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em }
h3 { font-size: 1em; margin: 1.5em 0 .4em; overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .93em }
th, td { padding: .25em .55em; text-align: right; border-bottom: 1px solid #8885 } th { font-weight: 600 }
th[colspan] { text-align: center } th[scope=row] { text-align: left }
svg.curves { width: 100%; max-width: 40em } svg text { font-size: 12px; fill: currentColor }
svg .grid { stroke: #8885 } svg .curve { fill: none; stroke-width: 2 }
ul { list-style: none; padding: 0 }
.row { display: flex; flex-wrap: wrap; gap: .6em } figure { margin: 0 }
img { display: block; max-width: 100%; height: auto }
figcaption { font-size: .85em; overflow-wrap: anywhere }
"""


# ---- the tables

Summary = dict[str, Any]  # of engine.evaluation.summarize_methods or engine.metrics.summarize


class Table(NamedTuple):
    """title: of the table, or ""; groups: [(title, [column, ...]), ...]; rows: {method: [cell, ...]}."""

    title: str
    groups: list[tuple[str, list[str]]]
    rows: dict[str, list[str]]


def format_table(summaries: Mapping[str, Summary]) -> str:
    """{method: summary} as aligned text: a row per method, then the intervals and differences that summaries have."""
    return "\n\n".join([_headline(summaries), *map(_format, _tables(summaries))])


def _tables(summaries: Mapping[str, Summary]) -> list[Table]:
    return [table for table in (_figures(summaries), _intervals(summaries), _differences(summaries)) if table.rows]


def _figures(summaries: Mapping[str, Summary]) -> Table:
    """The main table; '-' is what is undefined."""
    groups = [("", ["predictions"])]
    groups += [(f"{name} mAP (%)", ["0.5", "0.7", "0.5:0.95"]) for name in ("pooled", "per-image")]
    groups += [("count", ["exact (%)", "MAE"])]
    with_saliency = any(summary["saliency"] for summary in summaries.values())
    if with_saliency:
        groups.append(("saliency", ["max F (%)", "adaptive F (%)", "MAE"]))
    rows = {}
    for name, summary in summaries.items():
        ap, count, saliency = summary["mAP"], summary["count"], summary["saliency"] or {}
        cells = [f"{summary['predictions']:.0f}"]
        cells += map(_percent, [*ap["pooled"].values(), *ap["per-image"].values()])
        cells += _percent(count["accuracy"]), _number(count["mae"])
        if with_saliency:
            cells += _percent(saliency.get("max_f")), _percent(saliency.get("adaptive_f")), _number(saliency.get("mae"))
        rows[name] = cells
    return Table("", groups, rows)


def _intervals(summaries: Mapping[str, Summary]) -> Table:
    title = f"95 % intervals, from {DRAWS} bootstrap draws of the images"
    return _ap_table(title, summaries, "intervals", lambda interval: "..".join(map(_percent, interval)))


def _differences(summaries: Mapping[str, Summary]) -> Table:
    title = f"difference from {next(iter(summaries))} +/- standard error; *: more than two standard errors"
    return _ap_table(title, summaries, "differences", _difference)


def _ap_table(title: str, summaries: Mapping[str, Summary], key: str, show: Callable[[Any], str]) -> Table:
    """The table of what the summaries have under ``key``, {protocol: {IoU: value}}, with the cells show(value)."""
    values = {name: summary[key] for name, summary in summaries.items() if key in summary}
    columns: dict[str, Any] = next(iter(values.values()), {})
    groups = [(f"{protocol} mAP (%)", list(by_iou)) for protocol, by_iou in columns.items()]
    rows = {
        name: [show(value) for by_iou in protocols.values() for value in by_iou.values()]
        for name, protocols in values.items()
    }
    return Table(title, groups, rows)


def _difference(cell: Mapping[str, Any]) -> str:
    if cell["difference"] is None:
        return "-"
    mark = "*" if cell["exceeds_two"] else " "
    return f"{100 * cell['difference']:+.1f} +/- {100 * cell['standard_error']:.1f}{mark}"


def _headline(summaries: Mapping[str, Summary]) -> str:
    summary = next(iter(summaries.values()))  # the ground truth is the same in all
    with_instances = summary["images_with_instances"]
    return f"{summary['images']} images ({with_instances} with instances), {summary['instances']} instances"


def _format(table: Table) -> str:
    cells = [column for _, columns in table.groups for column in columns]
    widths = [max(map(len, [*column, " " * 5])) + 1 for column in zip(cells, *table.rows.values(), strict=True)]
    sizes = [len(columns) for _, columns in table.groups]
    starts = np.cumsum([0, *sizes[:-1]])
    for start in starts:  # a wider gap before each group
        widths[start] += 1
    name_width = max(map(len, ["method", *table.rows])) + 1
    grouped = [sum(widths[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    lines = [table.title] if table.title else []
    lines.append(_aligned("", [title for title, _ in table.groups], name_width, grouped))
    lines.append(_aligned("method", cells, name_width, widths))
    lines += [_aligned(name, row, name_width, widths) for name, row in table.rows.items()]
    return "\n".join(lines)


def _aligned(name: str, cells: Iterable[str], name_width: int, widths: Iterable[int]) -> str:
    return f"{name:<{name_width}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---- the page


def format_page(
    methods: Sequence[Method],
    summaries: Mapping[str, Summary],
    gt_masks: Mapping[str, Mask],
    photographs: Mapping[str, Path],
    threshold: float = 0.0,
    report: Report = raise_or_warn,
) -> str:
    """The whole evaluation as one HTML page.

    methods: the rows of the table, of which the first ranks the images; summaries: {name: summary}; gt_masks: {stem:
    ground-truth mask}; photographs: {stem: path}, of any of the images; threshold: the lowest score that is drawn.
    A photograph that is missing, unreadable or of another size than its mask is grey; for the latter two ``report``
    gets an InputError.
    """
    ranked = rank_images(methods[0].results)
    best = ranked[: min(SHOWN, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][-SHOWN:][::-1]
    sections = []
    for title, stems in (("Best images", best), ("Worst images", worst)):
        rows = [_image_row(stem, methods, gt_masks[stem], photographs.get(stem), threshold, report) for stem in stems]
        sections.append(f"<h2>{title}</h2>\n" + "".join(rows))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Salient instances: evaluation</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Salient instances: evaluation</h1>
<p>{_headline(summaries)}. Average precision (AP) is of class-agnostic masks, at the IoU named or averaged over
0.5:0.95. Pooled: all predictions of the set ranked together. Per-image: AP of each image, averaged.</p>
{"".join(map(_html_table, _tables(summaries)))}
<h2>Precision and recall, pooled</h2>
{_curves(methods)}
<p>Below are the best and the worst images of {escape(methods[0].name)} by AP at 0.5:0.95. Images without instances have
no AP and are not shown. Predictions of a score below {threshold:g} are not drawn; pale ground truth is void.</p>
{"".join(sections)}
</body>
</html>
"""


def rank_images(results: Mapping[str, ImageResult]) -> list[str]:
    """Stems of the images with instances, by descending AP (mean over IoU 0.5:0.95). results: {stem: ImageResult}.

    Of equal AP the one with the highest score comes first; of AP 0 it comes last, as the most confident mistake.
    """

    def key(stem: str) -> tuple[float, float]:
        ap, confidence = image_ap(results[stem]), results[stem].scores.max(initial=-np.inf)
        return -ap, confidence if ap == 0 else -confidence

    return sorted((stem for stem, result in results.items() if result.instances), key=key)


def image_ap(result: ImageResult) -> float:
    """AP of one image, averaged over IoU 0.5:0.95, in 0..1; NaN without instances."""
    return float(average_precision(result.scores, result.hits, result.instances).mean())


def tint(image: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """``image``, uint8 RGB [H, W, 3], with ``masks``, bool [H, W], tinted and outlined; the first mask is on top."""
    from engine.visualize import instance_colours

    picture = image.copy()
    for mask, colour in reversed(list(zip(masks, instance_colours(len(masks))))):
        picture[mask] = 0.5 * image[mask] + 0.5 * colour
        contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(picture, contours, -1, colour.tolist(), 2, cv2.LINE_AA)
    return picture


def _html_table(table: Table) -> str:
    titles = "".join(f'<th colspan="{len(columns)}">{title}</th>' for title, columns in table.groups)
    columns = "".join(f"<th>{column}</th>" for _, columns in table.groups for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, cells in table.rows.items()
    )
    head = f'<tr><th></th>{titles}</tr>\n<tr><th scope="row">method</th>{columns}</tr>'
    title = f"<p>{escape(table.title)}</p>\n" if table.title else ""
    return f'{title}<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table></div>\n'


def _curves(methods: Sequence[Method]) -> str:
    """The pooled precision-recall curves as SVG with a legend: a colour per method, a dash per IoU."""
    if not any(result.instances for result in methods[0].results.values()):
        return "<p>The ground truth holds no instance: there is no curve.</p>"
    left, top, width, height = 56, 10, 500, 300
    marks, legend = [], []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + width * tick, top + height * (1 - tick)
        marks.append(f'<path class="grid" d="M{x:g} {top}v{height}M{left} {y:g}h{width}"/>')
        marks.append(f'<text x="{x:g}" y="{top + height + 16}" text-anchor="middle">{tick:g}</text>')
        marks.append(f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{tick:g}</text>')
    for number, method in enumerate(methods):
        precision = pooled_precision(list(method.results.values()))
        for iou, row, dashes in CURVES:
            stroke = f'class="curve" stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{dashes}"'
            points = zip(left + width * RECALLS, top + height * (1 - precision[row]))
            marks.append(f'<polyline {stroke} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
            key = f'<svg width="32" height="8"><line {stroke} x2="32" y1="4" y2="4"/></svg>'
            legend.append(f"<li>{key} {escape(method.name)}, IoU {iou}</li>")
    below, beside = f'x="{left + width / 2:g}" y="{top + height + 36}"', f'x="{-top - height / 2:g}" y="14"'
    marks.append(f'<text {below} text-anchor="middle">recall</text>')
    marks.append(f'<text {beside} text-anchor="middle" transform="rotate(-90)">precision</text>')
    box = f'viewBox="0 0 {left + width + 20} {top + height + 42}"'
    return f'<svg class="curves" {box}>\n' + "\n".join(marks) + f"\n</svg>\n<ul>{''.join(legend)}</ul>"


def _photograph(path: Path | None, shape: tuple[int, ...], size: tuple[int, int], report: Report) -> np.ndarray:
    """uint8 RGB of ``size`` (W, H): the photograph at ``path``, if it is of ``shape`` (H, W), else grey."""
    try:
        if path is not None:
            image = read_image(path)
            check_size(path, image.shape, shape)
            return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    except InputError as error:
        report(error)
    return np.full((size[1], size[0], 3), GREY, np.uint8)


def _image_row(
    stem: str,
    methods: Sequence[Method],
    gt_mask: Mask,
    photograph: Path | None,
    threshold: float,
    report: Report,
) -> str:
    gt = gt_mask.read()
    height, width = gt.shape
    scale = min(1, SIDE / max(gt.shape))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = _photograph(photograph, gt.shape, size, report)

    def shrink(mask: np.ndarray) -> np.ndarray:
        return cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 127

    truth = image.copy()
    void = shrink(gt == VOID)
    truth[void] = 0.5 * image[void] + 127
    truths = [shrink(gt == label) for label in np.unique(gt) if 0 < label < VOID]
    figures = [_figure(stem, "ground truth", f"instances: {len(truths)}", tint(truth, truths))]
    for method in methods:
        masks, scores = method.found[stem](gt.shape) if stem in method.found else ((), ())
        drawn = [(score, shrink(mask)) for mask, score in zip(masks, scores) if score >= threshold]
        drawn.sort(key=lambda pair: -pair[0])
        note = f"AP {_percent(image_ap(method.results[stem]))} %, predictions: {len(drawn)}"
        figures.append(_figure(stem, method.name, note, tint(image, [mask for _, mask in drawn])))
    return f'<h3>{escape(stem)}</h3>\n<div class="row">\n' + "\n".join(figures) + "\n</div>\n"


def _figure(stem: str, name: str, note: str, picture: np.ndarray) -> str:
    jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    data = base64.b64encode(jpeg.tobytes()).decode("ascii")
    height, width = picture.shape[:2]
    size = f'width="{width}" height="{height}"'
    image = f'<img {size} alt="{escape(f"{stem}: {name}")}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(name)}<br>{note}</figcaption></figure>"
