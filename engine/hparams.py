"""TensorBoard's HParams tab: the settings of every run beside what it reaches."""

from utils import provenance
from utils.cli import InputError, make_folder


def settings_of(run):
    """{stage/name: value} of what the stages in a run's folder were told; InputError when it is no run."""
    found = {}
    for path in (*sorted(run.glob("*/config.json")), *run.glob("pts/r1/config.json")):
        stage = path.relative_to(run).parts[0]
        for name, value in provenance.read_record(path.parent)["settings"].items():
            found[f"{stage}/{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    if not found:
        raise InputError(f"{run} holds no settings of a training; name the --out of a run")
    return found


def write(run, name, summary):
    """Put the main figures of engine.metrics.summarize beside the run's settings, in run/val/``name``."""
    from torch.utils.tensorboard import SummaryWriter  # here, because few evaluations are put there

    figures = {
        f"{protocol} mAP@{threshold}": ap for protocol, by in summary["mAP"].items() for threshold, ap in by.items()
    }
    figures["exact count"] = summary["count"]["accuracy"]
    if summary["saliency"]:
        figures |= {"saliency MAE": summary["saliency"]["mae"], "saliency max F": summary["saliency"]["max_f"]}
    figures = {key: value for key, value in figures.items() if value is not None}
    with SummaryWriter(make_folder(run / "val" / name)) as writer:
        writer.add_hparams(settings_of(run), figures, run_name=".")
