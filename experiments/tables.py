"""Train and evaluate the rows of Tables 1 to 7 (Sec. 4.3, 4.4) and of our own tables; write each table as Markdown.

    python -m experiments.tables 2 6 --recipe small --data data/train --val data/val data/val2 --seeds 0 1 --gpu -1
    python -m experiments.tables 1 --recipe small ...               # the baselines that can be trained here
    python -m experiments.tables 6 --saliency-dir EGNet=maps/egnet ...    # saliency maps of another method

Every row changes the recipe in the settings that it names and in nothing else, and ends with PTS. What rows have in
common (classifier, pseudo labels, branches, saliency branch) is trained once. Without PTS, the saliency branch is
trained for as many epochs more as PTS has. A command that was stopped continues when it is given again;
--out/table<N>.md is written after every row.

Our tables: "parts" leaves out one setting of ours at a time, or adds it where the recipe has the paper's; "pts" is
Figures 17 and 18, the full model after every iteration of PTS, which --out/pts.svg draws.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from datasets.images import image_size
from datasets.labels import Mask
from datasets.sources import masks_by_stem, read_ground_truth
from engine import options
from engine.config import Preset, as_recorded, override
from engine.evaluation import maps_for, measure_files, measure_predictor, summarize_methods
from engine.predictions import check_size
from engine.predictor import Predictor, bfloat16_pays, digest_of_code
from engine.presets import BEST, PAPER
from engine.trainer import prepare_machine
from experiments import prm
from experiments.oracle_study import true_saliency
from experiments.recipes import (
    RECIPES,
    Setup,
    add_setup_options,
    batch_sizes,
    link,
    named_path,
    setup_of,
    train_labels,
    train_network,
    train_progressively,
)
from models.branches import SaliencyNet
from models.fusion_config import FusionConfig
from models.wsid_net import load_weights, save_weights
from utils import checkpoint, digest, distributed, files
from utils.cli import InputError, Parser, make_folder, select_device
from utils.script import run

Summary = dict[str, Any]  # of engine.evaluation.summarize_methods


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table.

    paper: its mAP@0.5 and mAP@0.7 in the paper. changes: settings for ``engine.config.override``; fusion: settings of
    FusionConfig, for measuring alone. pts: whether PTS is run. method: "wsid", "components" or "prm". iteration: of
    PTS, whose network is measured; None is the last. maps: a folder of saliency maps in place of S; true_saliency:
    whether those of the ground truth are taken.
    """

    name: str
    paper: tuple[float, float] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    fusion: Mapping[str, Any] = field(default_factory=dict)
    pts: bool = True
    method: str = "wsid"
    iteration: int | None = None
    maps: Path | None = None
    true_saliency: bool = False


FULL = Row("full model", (68.3, 51.7))
COMPONENTS = Row("connected components of S", method="components")
PRM = Row("PRM, adapted", (49.6, 31.2), pts=False, method="prm")
NO_CA = {"mixing": False, "attention": "none"}
NO_BE = {"enhancement": False}
NO_LSU = {"lsu_weight": 0.0}
NO_PTS = Row("w/o PTS", (63.9, 47.2), pts=False)
PTS_ITERATIONS = 6  # of the table "pts", as in the paper
TABLES = {
    "1": (PRM, Row("IRN, adapted", (57.1, 37.4), NO_CA | NO_BE | NO_LSU, pts=False), COMPONENTS, FULL),
    "2": (
        Row("w/o CA, BE, PTS, L_su", (57.1, 37.4), NO_CA | NO_BE | NO_LSU, pts=False),
        Row("w/o CA", (64.3, 48.4), NO_CA),
        Row("w/o BE", (65.2, 48.9), NO_BE),
        Row("w/o L_su", (62.1, 46.9), NO_LSU),
        NO_PTS,
        FULL,
        COMPONENTS,
    ),
    "3": (
        Row("w/o CFM, w/ parallel MA", (66.1, 49.5), {"mixing": False}),
        Row("w/ CFM, w/o MA", (66.8, 50.2), {"attention": "none"}),
        Row("w/ CFM, w/ cascade (s→c) MA", (67.4, 51.4), {"attention": "s-c"}),
        Row("w/ CFM, w/ cascade (c→s) MA", (67.2, 51.0), {"attention": "c-s"}),
        FULL,
    ),
    "4": (
        Row("BE w/o Canny", (65.0, 49.3), {"canny": "none"}),
        Row("Canny only", (63.7, 48.0), {"canny": "only"}),
        FULL,
    ),
    "5": (
        Row("thresholds 30, 200", (67.4, 50.8), {"canny": "30,200"}),
        Row("thresholds 230, 260", (66.9, 50.2), {"canny": "230,260"}),
        FULL,
    ),
    "6": (FULL, Row("saliency of the ground truth", (72.1, 58.3), true_saliency=True)),  # and every --saliency-dir
    "7": (Row("w/o CRF", None, {"crf": False}), FULL),
    "parts": (FULL,),  # and ``rows_of_parts``
    "pts": tuple(Row(f"r = {r}" if r else "r = 0, before PTS", iteration=r) for r in range(PTS_ITERATIONS + 1)),
}
# Settings of ours: {name: (the part of a Preset, its settings)}.
PARTS = {
    "CAM propagated by feature affinity": ("labels", ("spread",)),
    "count head": ("network", ("count_head",)),
    "centroid targets": ("branches", ("centroid_target_weight",)),
    "L_su linear beyond an error of 1, with a small weight": ("branches", ("lsu_form", "lsu_weight")),
    "S in the pseudo masks of PTS": ("pts", ("saliency_weight",)),
    "initial mask in the pseudo masks of PTS": ("pts", ("init_mask_weight",)),
    "masks relative to other instances and the background": ("fusion", ("mask_rule", "mask_thresh")),
    "scores times the expected IoU": ("fusion", ("count_aware_scores",)),
}
COLUMNS: dict[str, Callable[[Summary], float | None]] = {
    "pooled @0.5": lambda summary: 100 * summary["mAP"]["pooled"]["0.5"],
    "@0.7": lambda summary: 100 * summary["mAP"]["pooled"]["0.7"],
    "per image @0.5": lambda summary: 100 * summary["mAP"]["per-image"]["0.5"],
    "@0.7 ": lambda summary: 100 * summary["mAP"]["per-image"]["0.7"],
    "exact count": lambda summary: 100 * summary["count"]["accuracy"],
    "saliency F": lambda summary: 100 * summary["saliency"]["max_f"] if summary["saliency"] else None,
    "saliency MAE": lambda summary: 100 * summary["saliency"]["mae"] if summary["saliency"] else None,
}


def rows_of_parts(preset: Preset) -> list[Row]:
    """A row for each of ``PARTS``: without it, or with it where the preset has the paper's settings."""
    rows = []
    for name, (part, settings) in PARTS.items():
        own, paper, ours = ({key: getattr(getattr(p, part), key) for key in settings} for p in (preset, PAPER, BEST))
        changed, word = (ours, "with") if own == paper else (paper, "w/o")
        changes, fusion = ({}, changed) if part == "fusion" else (changed, {})
        rows.append(Row(f"{word} {name}", changes=changes, fusion=fusion))
    return rows


def rows_of(table: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a table as the options ask for them."""
    preset = RECIPES[args.recipe]
    rows = list(TABLES[table])
    if table == "parts":
        rows += rows_of_parts(preset)
    if table in ("1", "6"):
        rows += [Row(f"saliency of {name}", maps=folder) for name, folder in args.saliency_dir]
    if args.no_pts:
        rows = [replace(row, pts=False) for row in rows if row is not NO_PTS]
    return rows


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m experiments.tables", description=__doc__)
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=f"any of {', '.join(TABLES)}")
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help="see experiments.recipes")
    add_setup_options(parser, "runs/tables")
    parser.add_argument(
        "--val", nargs="+", default=["data/val"], metavar="PATH[@SPLIT]", help="photographs with instance masks"
    )
    parser.add_argument("--no-pts", action="store_true", help="all rows without PTS, in half the time")
    parser.add_argument("--fusion", nargs="+", default=[], metavar="NAME=VALUE", help="as for infer.py")
    parser.add_argument(
        "--saliency-dir",
        nargs="*",
        type=named_path,
        default=[],
        metavar="NAME=DIR",
        help="saliency maps of other methods, a row each in Tables 1 and 6",
    )
    options.add_machine_options(parser, several_seeds=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    args = get_args_parser().parse_args(argv)
    check_arguments(args)
    preset = RECIPES[args.recipe]
    device = prepare_machine(options.machine_of(args), args.seeds[0], batch_sizes(preset))
    make_folder(args.out)
    for table in args.tables:
        rows = rows_of(table, args)
        measured: dict[str, dict[Row, list[Summary]]] = {val: {} for val in args.val}
        for seed in args.seeds:
            setup = setup_of(args, device, seed)
            for row in rows:
                weights = train_row(row, preset, setup, args.out / f"seed{seed}")
                for val, summaries in measured.items():
                    summaries.setdefault(row, []).append(measure(row, weights, val, args))
                text = format_table(table, measured, shlex.join(["python", "-m", "experiments.tables", *given]))
                name = f"table{table}_no_pts.md" if args.no_pts else f"table{table}.md"
                (args.out / name).write_text(text, encoding="utf-8")
        if table == "pts":
            draw_iterations(measured, args.out / "pts.svg")
        print(text)


def check_arguments(args: argparse.Namespace) -> None:
    """InputError, before anything is trained, for options and photographs that the rows cannot be measured with."""
    if distributed.is_launched():
        raise InputError("the rows are trained and measured in one process; start experiments.tables without torchrun")
    if args.no_pts and "pts" in args.tables:
        raise InputError("--no-pts leaves nothing of the table pts; leave out one or the other")
    names = [name for name, _ in args.saliency_dir]
    for option, values in (("--seeds", args.seeds), ("--saliency-dir", names), ("--val", args.val)):
        if len(set(values)) < len(values):
            raise InputError(f"{option} names {max(values, key=values.count)} twice; give each once")
    FusionConfig.of(args.fusion)
    for table in args.tables:
        rows_of(table, args)
    select_device(args.gpu)
    for val in args.val:
        try:
            stems, _ = digest_of_truth(val)
        except InputError as error:
            raise InputError(f"--val {val}: {error}") from error
        for _, folder in args.saliency_dir:
            digest_of_maps(folder, stems)


def ground_truth(source: str) -> tuple[dict[str, Mask], dict[str, Path]]:
    """({stem: mask}, {stem: photograph}) of a source, in its order; InputError for what cannot be read."""
    samples = read_ground_truth(source)
    return masks_by_stem(samples), {sample.stem: sample.path for sample in samples}


def digest_of_truth(source: str) -> tuple[list[str], str]:
    """(stems, digest) of ``ground_truth``: a digest of the files of the photographs and the values of the masks.

    InputError for a photograph or mask that cannot be read, or whose sizes differ.
    """
    masks, photographs = ground_truth(source)
    files_digests = dict(zip(photographs, digest.of_files(photographs.values()), strict=True))
    parts = []
    for stem, mask in masks.items():
        labels = mask.read()
        check_size(photographs[stem], image_size(photographs[stem]), labels.shape)
        parts.append([stem, files_digests[stem], digest.of_bytes(str(labels.shape).encode(), labels.tobytes())])
    return list(masks), digest.of_value(parts)


def digest_of_maps(folder: Path, stems: Iterable[str]) -> str:
    """The digest of the saliency maps <stem>.png in ``folder``; InputError where one is missing."""
    maps = maps_for(stems, folder, png=True)
    return digest.of_value(digest.of_files([maps[stem] for stem in stems]))


def write_truth(val: str, out: Path) -> Path:
    """Write the saliency maps of the instance masks of ``val``, 0 or 255, as out/<name>/<stem>.png. Returns their
    folder."""
    _, made_from = digest_of_truth(val)
    folder = make_folder(out / f"truth_{made_from[:8]}")
    for stem, mask in ground_truth(val)[0].items():
        files.save_png(np.uint8(255 * true_saliency(mask.read())), folder / f"{stem}.png")
    return folder


def folder_name(words: str, *settings: Any) -> str:
    """A name of letters, digits and underscores: the ``words``, and a digest of plain values and dataclasses."""
    values = [value if isinstance(value, str | int | dict) else as_recorded(value) for value in settings]
    return re.sub(r"\W+", "_", words).strip("_") + "_" + digest.of_value(values)[:8]


def share(base: Path, run_folder: Path, stage: str, *settings: Any) -> None:
    """Let the stage of a run live in a folder of ``base`` that all runs with these settings of the stage share."""
    link(run_folder / stage, make_folder(base / folder_name(stage, *settings)))


def labels_of(preset: Preset, setup: Setup, base: Path) -> Path:
    """The folder of the pseudo labels of a row's preset; trains what is missing."""
    if setup.data.pseudo_labels and preset.labels == RECIPES[preset.name].labels:
        return setup.data.pseudo_labels
    labels_run = make_folder(base / folder_name("labels", preset.cam, preset.labels))
    share(base, labels_run, "cam", preset.cam)
    return train_labels(setup, preset, labels_run)


def train_row(row: Row, preset: Preset, setup: Setup, base: Path) -> Path:
    """Train what the row needs and no row before it has trained, in folders of ``base``. Returns its weights file."""
    if row.iteration is not None:
        return network_of_iteration(row.iteration, preset, setup, base)
    preset = override(preset, row.changes)
    labels = labels_of(preset, setup, base)
    if row.method == "prm":
        return labels.parent / "cam" / "weights.pt"
    out = train_first(preset, setup, base, labels, row)
    if not row.pts:
        return out / "weights.pt"
    return train_progressively(setup, preset, out, labels)


def train_first(preset: Preset, setup: Setup, base: Path, labels: Path, row: Row) -> Path:
    """The network of a row before PTS. Returns its folder, which holds weights.pt."""
    schedule, pts = preset.saliency.schedule, preset.pts
    if not row.pts:
        longer = replace(schedule, epochs=schedule.epochs + pts.iterations * pts.schedule.epochs)
        preset = replace(preset, saliency=replace(preset.saliency, schedule=longer))
    place, home = labels.resolve(), base.resolve()
    if place.is_relative_to(home):
        place = place.relative_to(home)  # the folder can be moved
    made_of = (str(place), preset.network)
    words = " ".join(f"{name} {value}" for name, value in row.changes.items()) or "full"
    name = folder_name(words + ("" if row.pts else " no pts"), *made_of, preset.branches, preset.saliency, pts)
    out = make_folder(base / name)
    shared_by_saliency = {name: getattr(preset.network, name) for name in SaliencyNet.SETTINGS}
    share(base, out, "saliency", made_of[0], shared_by_saliency, preset.saliency)
    share(base, out, "branches", *made_of, preset.branches)
    train_network(setup, preset, out, labels)
    return out


def network_of_iteration(r: int, preset: Preset, setup: Setup, base: Path) -> Path:
    """The file of the full model after iteration r of PTS, before it for r = 0; runs ``PTS_ITERATIONS``."""
    labels = labels_of(preset, setup, base)
    full = train_first(preset, setup, base, labels, FULL)
    if r == 0:
        return full / "weights.pt"
    train_progressively(setup, preset, full, labels)
    more = make_folder(full / f"{PTS_ITERATIONS}_iterations")
    link(more / "weights.pt", full / "weights.pt")
    link(more / "pts", full / "pts")  # the first iterations are those of the full model
    train_progressively(setup, override(preset, {"iterations": PTS_ITERATIONS}), more, labels)
    folder = more / "pts" / f"r{r}"
    net = load_weights(full / "weights.pt")
    net.saliency.load_state_dict(checkpoint.load(folder / "weights.pt")["model"])
    save_weights(net, folder / "network.pt", note=f"PTS, iteration {r}")
    return folder / "network.pt"


def measure(row: Row, weights: Path, val: str, args: argparse.Namespace) -> Summary:
    """The summary of engine.evaluation.summarize_methods of a row's ``weights`` on the photographs ``val``.

    It is kept beside the weights, under the digest of all that it depends on. InputError where a photograph cannot be
    measured.
    """
    stems, truth = digest_of_truth(val)
    device, cam = select_device(args.gpu), RECIPES[args.recipe].cam
    maps = write_truth(val, args.out) if row.true_saliency else row.maps
    named = {argument.partition("=")[0] for argument in args.fusion}
    changed = {f.name: getattr(FusionConfig.of(args.fusion), f.name) for f in fields(FusionConfig) if f.name in named}
    changed |= row.fusion
    made_from = {
        "weights": digest.of_file(weights),
        "truth": truth,
        "fusion": changed,
        "method": row.method,
        "maps": digest_of_maps(maps, stems) if maps else None,
        "classifier": as_recorded(cam) if row.method == "prm" else None,
        "device": [device.type, bfloat16_pays(device)],
        "code": [digest_of_code(), digest.of_file(Path(prm.__file__))],
    }
    kept = weights.with_name(f"{weights.stem}_{digest.of_value(made_from)}.json")
    if kept.exists():
        return json.loads(kept.read_text())
    problems: list[InputError] = []
    masks, photographs = ground_truth(val)
    if row.method == "prm":
        classifier = prm.load_classifier(weights, cam.backbone, cam.output_stride).to(device)
        records, problems = prm.predict_source(classifier, val, cam.size, device)
        found = weights.with_name("predictions.json")
        files.save_json(records, found)
        methods = measure_files({row.name: found}, masks, problems.append)
    else:
        settings = [f"{name}={value}" for name, value in changed.items()]
        predictor = Predictor(weights, device, method=row.method, settings=settings)
        methods = measure_predictor(predictor, masks, photographs, problems.append, maps)
    if problems:
        raise InputError(f"{len(problems)} of {len(masks)} photographs cannot be measured; the first: {problems[0]}")
    (summary,) = summarize_methods(methods).values()
    files.save_json(summary, kept)
    return summary


def draw_iterations(measured: Mapping[str, Mapping[Row, list[Summary]]], path: Path) -> None:
    """Figures 17 and 18 as an SVG: the figures of the table "pts" over r. A row of panels for each source, points for
    seeds, a line for their mean."""
    import matplotlib.pyplot as plt  # only this table is drawn

    figure, panels = plt.subplots(
        len(measured), 3, figsize=(10, 2.8 * len(measured)), layout="constrained", squeeze=False
    )
    for line, (val, summaries) in zip(panels, measured.items(), strict=True):
        for panel, columns in zip(line, (("saliency MAE",), ("saliency F",), ("pooled @0.5", "@0.7")), strict=True):
            for column in columns:
                values = np.array([[COLUMNS[column](summary) for summary in each] for each in summaries.values()])
                panel.plot(values, ".", color="0.7")
                panel.plot(values.mean(1), "o-", label=column)
            panel.set(xlabel="iteration of PTS", ylabel="mAP" if len(columns) > 1 else columns[0])
            panel.grid(alpha=0.3)
        line[0].set_title(val)
        line[-1].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def format_table(table: str, measured: Mapping[str, Mapping[Row, list[Summary]]], command: str) -> str:
    """Markdown: the command, and for each source the mean over seeds, ± half of their range.

    measured: {source: {row: its summary of each seed}}.
    """
    blocks = [f"`{command}`"]
    for val, summaries in measured.items():
        head = [f"Table {table}, {val}", "paper", *COLUMNS]
        lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * len(COLUMNS)]
        for row, of_seeds in summaries.items():
            paper = "{} / {}".format(*row.paper) if row.paper else ""
            cells = [_mean_and_spread([number(summary) for summary in of_seeds]) for number in COLUMNS.values()]
            lines.append(f"| {row.name} | {paper} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _mean_and_spread(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "-"
    spread = f" ± {(max(numbers) - min(numbers)) / 2:.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{spread}"


if __name__ == "__main__":
    run(main)
