"""TensorBoard's HParams tab: the settings of every run beside its figures."""

from pathlib import Path
from typing import Any

from utils import provenance
from utils.cli import InputError, make_folder


def settings_of(run: Path) -> dict[str, bool | int | float | str]:
    """{"stage/name": value} of the settings recorded by the stages in a run's folder.

    Raises InputError when the folder holds none.
    """
    found: dict[str, bool | int | float | str] = {}
    for path in (
        *sorted(run.glob("*/config.json")),
        *run.glob("pts/r1/config.json"),
        *run.glob("r1/train/config.json"),
    ):
        stage = path.relative_to(run).parts[0]
        record = provenance.read_record(path.parent)
        for name, value in record["settings"].items() if record else ():
            found[f"{stage}/{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    if not found:
        raise InputError(f"{run} holds no settings of a training; name the --out of a run")
    return found


def write(run: Path, name: str, summary: dict[str, Any]) -> None:
    """Write the main figures of ``engine.metrics.summarize`` with the run's settings to run/val/``name``."""
    from torch.utils.tensorboard import SummaryWriter  # here, because few evaluations need it

    figures = {
        f"{protocol} mAP@{threshold}": ap for protocol, by in summary["mAP"].items() for threshold, ap in by.items()
    }
    figures["exact count"] = summary["count"]["accuracy"]
    if summary["saliency"]:
        figures |= {"saliency MAE": summary["saliency"]["mae"], "saliency max F": summary["saliency"]["max_f"]}
    figures = {key: value for key, value in figures.items() if value is not None}
    with SummaryWriter(make_folder(run / "val" / name)) as writer:
        writer.add_hparams(settings_of(run), figures, run_name=".")
