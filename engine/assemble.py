"""OUT/weights.pt: the whole network, put together from the stages that were trained."""

from pathlib import Path

from engine.run import Run
from models.branches import SaliencyNet
from models.wsid_net import NetConfig, WSIDNet, save_weights
from utils import checkpoint, provenance
from utils.cli import InputError

NOTE = "train_branches.py"  # in OUT/weights.pt, which names the program that made it


def require_place(run: Run, stage: str) -> None:
    """InputError when the stage would overwrite an OUT/weights.pt that it has not made: the network of ``run.start``,
    a copy, or the network of other stages."""
    if stage not in ("cam", "labels"):
        checkpoint.require_own(run.out / "weights.pt", lambda saved: saved.get("note") == NOTE, run.start_path)


def assemble(run: Run) -> None:
    """Write OUT/weights.pt once both networks are trained; until then print what is missing.

    Its configuration is that of the branches; InputError when the saliency branch does not fit. Where OUT has no
    saliency branch and the pseudo labels come from PTS, the saliency branch of that iteration is taken.
    """
    parts = {"branches": run.out / "branches" / "weights.pt", "saliency": run.out / "saliency" / "weights.pt"}
    if not parts["saliency"].exists():
        parts["saliency"] = _saliency_of_labels(run) or parts["saliency"]
    missing = [str(path) for path in parts.values() if not path.exists()]
    if missing:
        path = run.out / "weights.pt"
        print(f"the network will be in {path} when {missing[0]} exists too")
        if path.exists():
            print(f"until then {path} is the network of an earlier training")
        return
    saved = {name: checkpoint.load(path) for name, path in parts.items()}
    try:
        configs = {name: part["config"] for name, part in saved.items()}
        differs = [
            f"{key} {configs['branches'][key]} and {configs['saliency'][key]}"
            for key in SaliencyNet.SETTINGS
            if configs["branches"][key] != configs["saliency"][key]
        ]
        if differs:
            raise InputError(
                f"{parts['branches']} and {parts['saliency']} do not go together ({'; '.join(differs)}); "
                "train one of them anew with the settings of the other"
            )
        net = WSIDNet(NetConfig(**configs["branches"]), run.preset.fusion)
        for name, part in saved.items():
            getattr(net, name).load_state_dict(part["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{run.out} holds parts of an earlier version of this program; train it anew") from error
    net.training_record = _record(run, saved)
    save_weights(net, run.out / "weights.pt", note=NOTE)
    print(f"the network is in {run.out / 'weights.pt'}; try it: python infer.py --img samples")


def _saliency_of_labels(run: Run) -> Path | None:
    """The file of the saliency branch that PTS trained on the pseudo labels of this run; None for other labels."""
    made = provenance.read_record(run.labels)
    name = made["settings"].get("saliency_branch") if made else None
    return run.labels / name if name else None


def _record(run: Run, saved: dict[str, dict]) -> dict[str, object]:
    """What the network was trained with: the name of the preset, and the settings of every stage."""
    record: dict[str, object] = {"preset": saved["branches"].get("preset", "")}
    for stage, folder in (("cam", run.labels.parent / "cam"), ("labels", run.labels)):
        if made := provenance.read_record(folder):
            record[stage] = made["settings"]
    return record | {stage: part.get("settings", {}) for stage, part in saved.items()}
