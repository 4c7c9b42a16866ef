"""Records of what results were made from: each stage writes config.json into its folder; stale results are refused.

    {"settings": {name: value}, "inputs": {what: digest}, "photographs": {stem: {"picture": digest, ...}}}

settings are the options that the result depends on, inputs the digests of all files that were read for it. A folder to
which photographs can be added, such as pseudo labels, records each of them under photographs. No path is recorded: a
run that is moved, or data that is named by another path, stays valid.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from utils import digest, files
from utils.cli import InputError

FILE = "config.json"
KINDS = ("settings", "inputs", "photographs")


class Record(TypedDict):
    """The content of config.json."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    photographs: dict[str, dict[str, Any]]


class LabelledPhotograph(Protocol):
    """What is used of datasets.labels.Sample."""

    @property
    def path(self) -> Path: ...
    @property
    def stem(self) -> str: ...


def bind(
    folder: str | Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    photographs: Mapping[str, dict[str, Any]] | None = None,
    finished: Callable[[str], bool] | None = None,
) -> None:
    """Record what the content of ``folder`` is made from, or check that it equals the existing record.

    settings: {name: JSON value}; inputs: {what: digest}, ``what`` in words for a message; photographs: as returned by
    ``describe_photographs``, added to the recorded ones; finished(stem): whether the folder holds the result of a
    photograph: the record of one without a result may change.

    Raises InputError, naming the difference and the remedy, when the folder was made from something else, or has
    content without a record. With several processes, call it as ``distributed.run_on_main(bind, ...)``, so that all of
    them stop or go on together.
    """
    now: Record = {
        "settings": json.loads(json.dumps(dict(settings))),  # as the file holds them: tuples become lists
        "inputs": dict(inputs or {}),
        "photographs": dict(photographs or {}),
    }
    before = read_record(folder)
    if not before and any(not path.name.startswith(".") for path in Path(folder).iterdir()):
        raise _no_record(folder)
    if before:
        names = _changed_keys(before["settings"], now["settings"])
        differences = [f"{name} {before['settings'].get(name)} -> {now['settings'].get(name)}" for name in names]
        differences += [f"{what} changed" for what in _changed_keys(before["inputs"], now["inputs"])]
        made = {stem: record for stem, record in before["photographs"].items() if not finished or finished(stem)}
        _refuse(folder, differences + _changed_photographs(made, now["photographs"]))
        now["photographs"] = before["photographs"] | now["photographs"]
    if now != before:
        files.save_json(now, Path(folder) / FILE)


def read_record(folder: str | Path) -> Record | None:
    """The record of ``folder``, None without one; InputError when it is damaged or has other parts than ``KINDS``."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(found[kind], dict) for kind in KINDS):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise _no_record(folder)


def check_unchanged(folder: str | Path, inputs: Mapping[str, str], samples: Iterable[LabelledPhotograph]) -> None:
    """InputError when the results in ``folder`` were made from other ``inputs`` ({what: digest}), or from other
    pictures, classes or counts than the Samples have. Values that the record or the Sample lacks are not compared.
    """
    before = read_record(folder)
    if before:
        differences = [
            f"{what} changed" for what, value in inputs.items() if before["inputs"].get(what, value) != value
        ]
        recorded = [sample for sample in samples if sample.stem in before["photographs"]]
        now = describe_photographs(recorded, "classes", "count")
        _refuse(folder, differences + _changed_photographs(before["photographs"], now))


def describe_photographs(samples: Iterable[LabelledPhotograph], *labels: str) -> dict[str, dict[str, Any]]:
    """{stem: what a result made from this photograph alone depends on}: the digest of its "picture" and those of its
    "classes" and "count" that ``labels`` name, as JSON values."""
    samples = list(samples)
    pictures = digest.of_files(sample.path for sample in samples)
    return {
        sample.stem: {"picture": picture} | {name: _json_value(getattr(sample, name)) for name in labels}
        for sample, picture in zip(samples, pictures, strict=True)
    }


def digest_inputs(samples: list[Any], *labels: str) -> dict[str, str]:
    """The inputs of a stage that is trained on all Samples together: digests of their names, in order, of their
    pictures and of those of "classes" and "count" that ``labels`` name."""
    found = {"the list of photographs": digest.of_value([sample.stem for sample in samples])}
    found["a photograph"] = digest.of_value(digest.of_files(sample.path for sample in samples))
    for name in labels:
        found[f"the {name} of a photograph"] = digest.of_value([getattr(sample, name) for sample in samples])
    return found


def _json_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _no_record(folder: str | Path) -> InputError:
    path = Path(folder) / FILE
    return InputError(f"{path} does not say what the folder was made from; delete {folder}, or give another --out")


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _changed_photographs(before: Mapping[str, dict[str, Any]], now: Mapping[str, dict[str, Any]]) -> list[str]:
    return [
        f"the {what} of {stem} changed"
        for stem in before.keys() & now.keys()
        for what, old in before[stem].items()
        if None not in (old, now[stem].get(what)) and old != now[stem][what]
    ]


def _refuse(folder: str | Path, differences: list[str]) -> None:
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(
            f"{folder} was made with other settings or inputs ({'; '.join(differences[:3])}{more}); go "
            "back to those, give another --out, or delete the folder to make it anew"
        )
