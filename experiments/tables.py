"""Train and evaluate the rows of Tables 1 to 7 (Sec. 4.3, 4.4) and write each table as Markdown.

    python -m experiments.tables 2 6 --recipe cpu --data data/train --val data/val --seeds 0 1 --gpu -1
    python -m experiments.tables 1 --recipe cpu ...               # the baselines that can be trained here
    python -m experiments.tables 6 --saliency-dir EGNet=maps/egnet ...    # maps of another method

What a row shares with others (classifier, pseudo labels, saliency branch) is trained once. The saliency branch gets
the same number of epochs in every row: those that PTS would give it are added where PTS is off. A run that was
stopped goes on with the same command; --out/table<N>.md is written as rows become complete.

The table "pts" is Figures 17 and 18: the full model after every iteration of PTS, and --out/pts.svg draws it. The table
"cycle" is what a second cycle with the --counted photographs gives.
"""

import argparse
import json
import os
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np

import evaluate
from datasets.images import image_size
from datasets.sources import read_ground_truth
from engine.evaluation import maps_for
from engine.predictions import check_size
from engine.predictor import bfloat16_pays
from engine.trainer import LARGEST_SEED
from experiments import prm
from experiments.oracle_study import true_saliency
from experiments.recipes import (
    RECIPES,
    add_data_arguments,
    link,
    train_again,
    train_both_branches,
    train_count_net,
    train_labels,
    train_progressively,
    train_saliency,
)
from models.fusion import FusionConfig
from models.wsid_net import load_weights, save_weights
from utils import checkpoint, digest, distributed
from utils.cli import InputError, Parser, integer, make_folder, path_of, run, select_device


@dataclass(frozen=True)
class Row:
    """One line of a table. switches: of the branches stage; labels: of the labels stage; paper: mAP@0.5, @0.7; number:
    whether a network of its own tells the number of objects; again: whether a second cycle comes before it; evaluate:
    options of evaluate.py; maps: a folder of saliency maps in place of S."""

    name: str
    paper: tuple[float, float] | None = None
    switches: str = ""
    labels: str = ""
    pts: bool = True
    number: bool = False
    again: bool = False
    evaluate: tuple[str, ...] = ()
    maps: Path | None = None


OURS = Row("ours", (68.3, 51.7))
NUMBER = Row("ours, and a network for the number", count_net=True)
COMPONENTS = Row("connected components of our saliency map", evaluate=("--method", "components"))
AGAIN = Row("ours, a second cycle and a network for the number", count_net=True, again=True)
PTS_ITERATIONS = 6  # of the table "pts", whatever the recipe has
IRN = "--no-ca --no-be --no-lsu"
PRM = Row("PRM, adapted", (49.6, 31.2), pts=False)
TABLES = {
    "1": (PRM, Row("IRN, adapted", (57.1, 37.4), IRN, pts=False), COMPONENTS, OURS),
    "2": (
        Row("w/o CA, BE, PTS, L_su", (57.1, 37.4), IRN, pts=False),
        Row("w/o CA", (64.3, 48.4), "--no-ca"),
        Row("w/o BE", (65.2, 48.9), "--no-be"),
        Row("w/o L_su", (62.1, 46.9), "--no-lsu"),
        Row("w/o PTS", (63.9, 47.2), pts=False),
        OURS,
        NUMBER,
        COMPONENTS,
    ),
    "3": (
        Row("w/o CFM, w/ parallel MA", (66.1, 49.5), "--no-cfm"),
        Row("w/ CFM, w/o MA", (66.8, 50.2), "--ma none"),
        Row("w/ CFM, w/ cascade (s→c) MA", (67.4, 51.4), "--ma s-c"),
        Row("w/ CFM, w/ cascade (c→s) MA", (67.2, 51.0), "--ma c-s"),
        OURS,
    ),
    "4": (
        Row("BE w/o Canny", (65.0, 49.3), "--canny none"),
        Row("Canny only", (63.7, 48.0), "--canny only"),
        OURS,
    ),
    "5": (
        Row("thresholds 30, 200", (67.4, 50.8), "--canny 30,200"),
        Row("thresholds 230, 260", (66.9, 50.2), "--canny 230,260"),
        OURS,
    ),
    "6": (OURS,),  # and a row for the ground truth and every --saliency-dir
    "7": (Row("w/o CRF", None, labels="--no-crf"), OURS),
    "cycle": (
        OURS,
        COMPONENTS,
        AGAIN,
        replace(AGAIN, name="connected components of its saliency map", evaluate=COMPONENTS.evaluate),
    ),
    "pts": (),  # a row for every iteration
}
COLUMNS = {
    "pooled @0.5": lambda numbers: 100 * numbers["mAP"]["pooled"]["0.5"],
    "@0.7": lambda numbers: 100 * numbers["mAP"]["pooled"]["0.7"],
    "per image @0.5": lambda numbers: 100 * numbers["mAP"]["per-image"]["0.5"],
    "@0.7 ": lambda numbers: 100 * numbers["mAP"]["per-image"]["0.7"],
    "exact count": lambda numbers: 100 * numbers["count"]["accuracy"],
    "saliency F": lambda numbers: 100 * numbers["saliency"]["max_f"] if numbers["saliency"] else None,
    "saliency MAE": lambda numbers: 100 * numbers["saliency"]["mae"] if numbers["saliency"] else None,
}


def get_args_parser():
    parser = Parser(prog="python -m experiments.tables", description=__doc__)
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=f"any of {', '.join(TABLES)}")
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help="schedule of all stages")
    add_data_arguments(parser, "runs/tables")
    parser.add_argument("--val", default="data/val", metavar="PATH[@SPLIT]", help="photographs with instance masks")
    parser.add_argument(
        "--seeds", type=integer(0, LARGEST_SEED), nargs="+", default=[0], help="the table shows the mean over them"
    )
    parser.add_argument("--no-pts", action="store_true", help="all rows without PTS, in half the time")
    parser.add_argument("--fusion", nargs="+", default=[], metavar="NAME=VALUE", help="as for infer.py")
    parser.add_argument(
        "--saliency-dir",
        nargs="*",
        type=named_folder,
        default=[],
        metavar="NAME=DIR",
        help="saliency maps of other methods, a row each in Tables 1 and 6",
    )
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    check_arguments(args)
    recipe = RECIPES[args.recipe]
    make_folder(args.out)
    for table in args.tables:
        maps = args.saliency_dir if table in ("1", "6") else []
        if table == "6":
            maps = [("the ground truth", write_truth(args)), *maps]
        maps = [Row(f"saliency of {name}", maps=folder) for name, folder in maps]
        measured = {}
        for seed in args.seeds:
            rows = (*TABLES[table], *maps)
            if args.no_pts:
                rows = [replace(row, pts=False) if row.pts else row for row in rows if row.name != "w/o PTS"]
            todo = ((row, train_row(row, recipe, args, seed)) for row in rows)  # each is written before the next trains
            for row, weights in pts_rows(recipe, args, seed) if table == "pts" else todo:
                measured.setdefault(row, []).append(measure(row, weights, args))
                text = format_table(table, measured, args)
                name = f"table{table}_no_pts.md" if args.no_pts else f"table{table}.md"
                (args.out / name).write_text(text, encoding="utf-8")
        if table == "pts":
            draw_iterations(measured, args.out / "pts.svg")
        print(text)


def check_arguments(args):
    """InputError for what would only be found after the training, because it is what the rows are measured on."""
    if distributed.is_launched():
        raise InputError("the rows are trained and measured in one process; start experiments.tables without torchrun")
    if args.no_pts and ("pts" in args.tables or "cycle" in args.tables):
        raise InputError("--no-pts leaves nothing of the tables pts and cycle; give one of them")
    if "cycle" in args.tables and not args.counted:
        raise InputError("the table cycle needs more photographs with a count; name them with --counted")
    names = [name for name, _ in args.saliency_dir]
    for option, values in (("--seeds", args.seeds), ("--saliency-dir", names)):
        if len(set(values)) < len(values):
            raise InputError(f"{option} names {max(values, key=values.count)} twice; give each another")
    FusionConfig.of(args.fusion)
    try:
        stems, _ = digest_of_truth(args.val)
    except InputError as error:
        raise InputError(f"--val {args.val}: {error}") from error
    for _, folder in args.saliency_dir:
        digest_of_maps(folder, stems)


def named_folder(argument):
    """NAME=DIR -> (NAME, DIR)."""
    name, _, folder = argument.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"{argument} is no NAME=DIR")
    return name, path_of(folder)


def digest_of_truth(source):
    """(stems, digest) of the photographs with masks in a source, in its order: of their files and the masks' labels.

    InputError for one that cannot be read or is not of the size of its mask.
    """
    samples, parts = read_ground_truth(source), []
    for sample, photograph in zip(samples, digest.of_files([sample.path for sample in samples]), strict=True):
        labels = sample.mask.read()
        check_size(sample.path, image_size(sample.path), labels.shape)
        parts.append([sample.stem, photograph, digest.of_bytes(str(labels.shape).encode(), labels.tobytes())])
    return [sample.stem for sample in samples], digest.of_value(parts)


def digest_of_maps(folder, stems):
    """The digest of the saliency maps <stem>.png in ``folder``; InputError where one is missing."""
    maps = maps_for(stems, folder, png=True)
    return digest.of_value(digest.of_files([maps[stem] for stem in stems]))


def write_truth(args):
    """The saliency maps that the instance masks of --val make, as PNGs. Returns their folder."""
    folder = make_folder(args.out / "truth")
    for sample in read_ground_truth(args.val):
        checkpoint.save_png(np.uint8(255 * true_saliency(sample.mask.read())), folder / f"{sample.stem}.png")
    return folder


def folder_name(*parts):
    """A folder's name from option strings: one that tells them, with a digest that parts those it makes alike."""
    told = re.sub(r"\W+", "_", " ".join(("run", *parts))).strip("_")
    return f"{told}_{digest.of_value(parts)[:8]}" if any(parts) else told


def share(base, run, stage, *depends_on):
    """Let the run's stage live where every run of the same settings finds it."""
    link(run / stage, make_folder(base / "shared" / folder_name(stage, *depends_on)))


def labels_of(row, recipe, args, seed):
    """The folder of the pseudo labels that the row is trained on; they are made when no row before it has."""
    if args.labels and not row.labels:
        return args.labels
    base = args.out / f"seed{seed}"
    labels_run = make_folder(base / folder_name("labels", row.labels))
    share(base, labels_run, "cam")
    return train_labels(recipe, args, labels_run, seed, row.labels)


def train_row(row, recipe, args, seed):
    """Train what the row needs and no row before it has trained. Returns the file of its weights."""
    base = args.out / f"seed{seed}"
    labels = labels_of(row, recipe, args, seed)
    if row is PRM:
        return labels.parent / "cam" / "weights.pt"
    rounds, per_round = recipe.rounds
    epochs = recipe.epochs + (0 if row.pts else rounds * per_round)
    out = make_folder(base / folder_name(row.labels, row.switches, "" if row.pts else "no PTS"))
    share(base, out, "saliency", row.labels, str(epochs))
    share(base, out, "branches", row.labels, row.switches)
    train_saliency(recipe, args, out, seed, labels, epochs, row.switches)
    weights = train_both_branches(recipe, args, out, seed, labels, row.switches)
    if row.pts:
        weights = train_progressively(recipe, args, out, seed, labels)
    if row.again:
        weights = train_again(recipe, args, out, seed, labels)
    if row.count_net:
        more = args.counted if row.again else ()
        weights = train_count_net(recipe, args, weights.parent / "number", seed, weights, more)
    return weights


def pts_rows(recipe, args, seed):
    """[(Row, weights)] of the full model before PTS and after each of its iterations, as many as in the paper."""
    ours = train_row(OURS, recipe, args, seed).parent
    out = make_folder(ours.with_name(f"run_{PTS_ITERATIONS}_iterations"))
    for part in ("weights.pt", "pts"):  # the first iterations are those of ours
        link(out / part, ours / part)
    longer = replace(recipe, rounds=(PTS_ITERATIONS, recipe.rounds[1]))
    train_progressively(longer, args, out, seed, labels_of(OURS, recipe, args, seed))
    net = load_weights(out / "weights.pt")
    found = [(Row("r = 0, before PTS"), out / "weights.pt")]
    for r in range(1, PTS_ITERATIONS + 1):
        folder = out / "pts" / f"r{r}"
        net.saliency.load_state_dict(checkpoint.load(folder / "weights.pt")["model"])
        save_weights(net, folder / "network.pt", note=f"PTS, iteration {r}")
        found.append((Row(f"r = {r}"), folder / "network.pt"))
    return found


def draw_iterations(measured, path):
    """Figures 17 and 18: what the rows of the table "pts" measure over r; a line each, the mean over seeds."""
    import matplotlib.pyplot as plt  # here, because one table alone is drawn

    figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for panel, columns in zip(panels, (("saliency MAE",), ("saliency F",), ("pooled @0.5", "@0.7")), strict=True):
        for column in columns:
            lines = np.array([[COLUMNS[column](summary) for summary in summaries] for summaries in measured.values()])
            panel.plot(lines, ".", color="0.7")
            panel.plot(lines.mean(1), "o-", label=column)
        panel.set(xlabel="iteration of PTS", ylabel="mAP" if len(columns) > 1 else columns[0])
        panel.grid(alpha=0.3)
    panels[-1].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def measure(row, weights, args):
    """The numbers of engine.metrics.summarize for ``weights`` on --val.

    They are kept beside the weights, under the digest of all that they depend on. InputError where a photograph cannot
    be measured.
    """
    stems, truth = digest_of_truth(args.val)
    device = select_device(args.gpu)
    named = {argument.partition("=")[0] for argument in args.fusion}  # the others are those in the weights
    made_from = {
        "weights": digest.of_file(weights),
        "truth": truth,
        "fusion": {name: value for name, value in asdict(FusionConfig.of(args.fusion)).items() if name in named},
        "options": row.evaluate,
        "maps": digest_of_maps(row.maps, stems) if row.maps else None,
        "classifier": RECIPES[args.recipe].cam if row is PRM else None,
        "device": [device.type, bfloat16_pays(device)],
    }
    kept = weights.with_name(f"{weights.stem}_{digest.of_value(made_from)}.json")
    if not kept.exists():
        given = ["--weights", str(weights), "--data", args.val, "--gpu", str(args.gpu), *row.evaluate]
        given += ["--fusion", *args.fusion] if args.fusion else []
        given += ["--saliency-dir", str(row.maps)] if row.maps else []
        unfinished = kept.with_suffix(".unfinished")
        failed = 0
        if row is PRM:
            found = weights.with_name("predictions.json")
            failed = prm.main(
                [
                    "--classifier",
                    str(weights),
                    "--data",
                    args.val,
                    "--gpu",
                    str(args.gpu),
                    "--out",
                    str(found),
                    *RECIPES[args.recipe].cam.split(),
                ]
            )
            given = ["--pred", str(found), "--gt", args.val]
        # What cannot be measured they have named; the figures of the rest are not those of --val.
        if failed or evaluate.main([*given, "--json", str(unfinished)]):
            raise InputError(f"not all of {args.val} can be measured; mend or remove what is named above")
        os.replace(unfinished, kept)
    return json.loads(kept.read_text())


def format_table(table, measured, args):
    """measured: {Row: [summary of each seed]}. Returns Markdown: the mean over seeds, and ± half their range."""
    maps = [f"{name}={folder}" for name, folder in args.saliency_dir]
    options = {
        "recipe": [args.recipe],
        "data": args.data,
        "cam-data": args.cam_data,
        "counted": args.counted,
        "unlabelled": args.unlabelled,
        "labels": [args.labels] if args.labels else [],
        "val": [args.val],
        "seeds": args.seeds,
        "fusion": args.fusion,
        "saliency-dir": maps,
    }
    words = [word for name, values in options.items() if values for word in (f"--{name}", *values)]
    command = shlex.join(["python", "-m", "experiments.tables", table, *map(str, words)])
    command += " --no-pts" if args.no_pts else ""
    head = [f"Table {table}", "paper", *COLUMNS]
    lines = [f"`{command}`", "", f"| {' | '.join(head)} |", "|---|---|" + "---:|" * len(COLUMNS)]
    for row, summaries in measured.items():
        paper = "{} / {}".format(*row.paper) if row.paper else ""
        cells = [_mean_and_spread([number(summary) for summary in summaries]) for number in COLUMNS.values()]
        lines.append(f"| {row.name} | {paper} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values):
    if None in values:
        return "-"
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


if __name__ == "__main__":
    run(main)
