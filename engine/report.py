"""What an evaluation shows: the table, and one HTML page with the curves and the best and worst images.

The page needs no other file and no network: its pictures are data URIs, its curves SVG. Methods are given as any
objects with a name, ``found`` ({stem: load} of engine.predictions) and ``results`` ({stem: ImageResult}).
"""

import base64
from html import escape

import cv2
import numpy as np

from datasets.images import read_image
from datasets.labels import raise_or_warn
from datasets.masks import VOID
from engine.metrics import RECALLS, average_precision, pooled_precision
from engine.predictions import check_size
from utils.cli import InputError

SHOWN = 10  # images at either end of the ranking
SIDE, QUALITY = 320, 80  # the longer side of a picture in pixels, and its JPEG quality: some 15 kB each
GREY = 128  # stands for a photograph that is not there
CURVES = (("0.5", 0, "none"), ("0.7", 4, "6 4"))  # name, index into IOU_THRESHOLDS, dashes
COLOURS = ("#3b82c4", "#e0662f", "#2f9e6e", "#b55fb0", "#c79a1b", "#7a7a7a")  # seen on white and on black

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


# ---- the table


def format_table(summaries):
    """{method: summary of engine.metrics.summarize} as aligned text, a row per method."""
    groups, rows = _table(summaries)
    widths = [[max(len(column), 5) + 1 + (column == columns[0]) for column in columns] for _, columns in groups]
    first = max(map(len, ["method", *rows])) + 1
    flat = [width for group in widths for width in group]
    lines = [
        " " * first + "".join(f"{title:>{sum(group)}}" for (title, _), group in zip(groups, widths)),
        _aligned("method", [column for _, columns in groups for column in columns], first, flat),
    ]
    lines += [_aligned(name, cells, first, flat) for name, cells in rows.items()]
    return "\n".join([_headline(summaries), "", *lines])


def _table(summaries):
    """Groups of columns, [(title, [column, ...]), ...], and rows, {method: [cell, ...]}; '-' is what is undefined."""
    groups = [("", ["predictions"])]
    groups += [(f"{name} mAP (%)", ["0.5", "0.7", "0.5:0.95"]) for name in ("pooled", "per-image")]
    groups += [("count", ["exact (%)", "MAE"])]
    with_saliency = any(summary["saliency"] for summary in summaries.values())
    if with_saliency:
        groups.append(("saliency", ["max F (%)", "adaptive F (%)", "MAE"]))
    rows = {}
    for name, summary in summaries.items():
        ap, count, saliency = summary["mAP"], summary["count"], summary["saliency"] or {}
        cells = [str(summary["predictions"]), *map(_percent, [*ap["pooled"].values(), *ap["per-image"].values()])]
        cells += _percent(count["accuracy"]), _number(count["mae"])
        if with_saliency:
            cells += _percent(saliency.get("max_f")), _percent(saliency.get("adaptive_f")), _number(saliency.get("mae"))
        rows[name] = cells
    return groups, rows


def _headline(summaries):
    summary = next(iter(summaries.values()))  # the ground truth is the same in all
    with_instances = summary["images_with_instances"]
    return f"{summary['images']} images ({with_instances} with instances), {summary['instances']} instances"


def _aligned(name, cells, first, widths):
    return f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))


def _percent(share):
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value):
    return "-" if value is None else f"{value:.3f}"


# ---- the page


def format_page(methods, summaries, gt_masks, photographs, threshold=0.0, report=raise_or_warn):
    """The whole evaluation as one HTML page, a str.

    methods: the rows of the table, the first of which ranks the images; summaries: {name: summary}; gt_masks: {stem:
    ground-truth mask}; photographs: {stem: photograph}, may lack any; threshold: predictions that score less are
    not drawn. A photograph that cannot be read or is not of the size of its mask is grey, and ``report`` gets an
    InputError.
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
<div class="wide">{_html_table(summaries)}</div>
<h2>Precision and recall, pooled</h2>
{_curves(methods)}
<p>Below are the best and the worst images of {escape(methods[0].name)} by AP at 0.5:0.95. Images without instances have
no AP and are not shown. Drawn are the predictions that score at least {threshold:g}; pale ground truth is void.</p>
{"".join(sections)}
</body>
</html>
"""


def rank_images(results):
    """Stems of the images with instances, best AP (mean over IoU 0.5:0.95) first. results: {stem: ImageResult}.

    Among equals the most confident success comes first and, at AP 0, the most confident mistake last.
    """

    def key(stem):
        ap, confidence = image_ap(results[stem]), results[stem].scores.max(initial=-np.inf)
        return -ap, confidence if ap == 0 else -confidence

    return sorted((stem for stem, result in results.items() if result.instances), key=key)


def image_ap(result):
    """AP of one image (an ImageResult), averaged over IoU 0.5:0.95, in 0..1; NaN without instances."""
    return float(average_precision(result.scores, result.hits, result.instances).mean())


def tint(image, masks):
    """uint8 RGB [H, W, 3] with masks, a list of bool [H, W] whose first lies on top, tinted and outlined."""
    from engine.visualize import instance_colours

    picture = image.copy()
    for mask, colour in reversed(list(zip(masks, instance_colours(len(masks))))):
        picture[mask] = 0.5 * image[mask] + 0.5 * colour
        contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(picture, contours, -1, colour.tolist(), 2, cv2.LINE_AA)
    return picture


def _html_table(summaries):
    groups, rows = _table(summaries)
    titles = "".join(f'<th colspan="{len(columns)}">{title}</th>' for title, columns in groups)
    columns = "".join(f"<th>{column}</th>" for _, columns in groups for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, cells in rows.items()
    )
    head = f'<tr><th></th>{titles}</tr>\n<tr><th scope="row">method</th>{columns}</tr>'
    return f"<table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table>"


def _curves(methods):
    """The precision-recall curves as SVG with a legend: a colour per method, a dash per IoU."""
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
            look = f'class="curve" stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{dashes}"'
            points = zip(left + width * RECALLS, top + height * (1 - precision[row]))
            marks.append(f'<polyline {look} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
            key = f'<svg width="32" height="8"><line {look} x2="32" y1="4" y2="4"/></svg>'
            legend.append(f"<li>{key} {escape(method.name)}, IoU {iou}</li>")
    below, beside = f'x="{left + width / 2:g}" y="{top + height + 36}"', f'x="{-top - height / 2:g}" y="14"'
    marks.append(f'<text {below} text-anchor="middle">recall</text>')
    marks.append(f'<text {beside} text-anchor="middle" transform="rotate(-90)">precision</text>')
    box = f'viewBox="0 0 {left + width + 20} {top + height + 42}"'
    return f'<svg class="curves" {box}>\n' + "\n".join(marks) + f"\n</svg>\n<ul>{''.join(legend)}</ul>"


def _photograph(path, shape, size, report):
    """uint8 RGB of ``size`` (W, H): the photograph of a mask of ``shape`` (H, W), or grey without one."""
    try:
        if path is not None:
            image = read_image(path)
            check_size(path, image.shape, shape)
            return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    except InputError as error:
        report(error)
    return np.full((size[1], size[0], 3), GREY, np.uint8)


def _image_row(stem, methods, gt_mask, photograph, threshold, report):
    gt = gt_mask.read()
    height, width = gt.shape
    scale = min(1, SIDE / max(gt.shape))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = _photograph(photograph, gt.shape, size, report)

    def shrink(mask):
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


def _figure(stem, name, note, picture):
    jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    data = base64.b64encode(jpeg).decode("ascii")
    height, width = picture.shape[:2]
    size = f'width="{width}" height="{height}"'
    image = f'<img {size} alt="{escape(f"{stem}: {name}")}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(name)}<br>{note}</figcaption></figure>"
