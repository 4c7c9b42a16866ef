"""What a result was made from: the folder of every stage says so in its config.json, and nothing stale is used.

    {"settings": {name: value}, "inputs": {what: digest}, "photographs": {stem: {"picture": digest, ...}}}

settings are the options that the result depends on, inputs the digests of all that was read for it. A folder to which
photographs can be added, such as pseudo labels, notes each of them under photographs instead. No path is noted: a run
that is moved, or data that is named by another path, stays what it was.
"""

import json
from pathlib import Path

from utils import checkpoint, digest
from utils.cli import InputError

FILE = "config.json"
KINDS = ("settings", "inputs", "photographs")


def bind(folder, settings, inputs=None, photographs=None, finished=None):
    """Bind ``folder`` to what its content is made from, or find that it is bound to just that.

    settings: {name: plain value}; inputs: {what: digest}, ``what`` being words for a message; photographs: as of
    ``photographs``, to be added to those that are noted; finished(stem): whether the folder holds the result of a
    photograph: without one, what is noted of it may change.
    InputError, naming what differs and what to do, when the folder was made from something else, or holds something
    and does not say what that was made from. With several processes, ``distributed.from_first(bind, ...)`` settles it
    before any of them goes on.
    """
    # As the file will hold it: tuples become lists.
    now = json.loads(json.dumps(dict(zip(KINDS, (settings, inputs or {}, photographs or {}), strict=True))))
    before = recorded(folder)
    if not before and any(not path.name.startswith(".") for path in Path(folder).iterdir()):
        raise _untold(folder)
    if before:
        settings = _differences(before["settings"], now["settings"])
        differs = [f"{name} {before['settings'].get(name)} -> {now['settings'].get(name)}" for name in settings]
        differs += [f"{what} changed" for what in _differences(before["inputs"], now["inputs"])]
        made = {stem: note for stem, note in before["photographs"].items() if not finished or finished(stem)}
        _require_none(folder, differs + _changes_of_photographs(made, now["photographs"]))
        now["photographs"] = before["photographs"] | now["photographs"]
    if now != before:
        checkpoint.save_json(now, Path(folder) / FILE)


def recorded(folder):
    """What ``folder`` is bound to, as in the head of this module, None without anything; InputError when that is
    damaged or was written by a version that did not note the inputs."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(found[kind], dict) for kind in KINDS):
            return found
    except (ValueError, TypeError, KeyError):
        pass
    raise _untold(folder)


def _untold(folder):
    path = Path(folder) / FILE
    return InputError(f"{path} does not say what the folder was made from; delete {folder}, or give another --out")


def check(folder, inputs, samples):
    """InputError when the results in ``folder`` were made from other ``inputs`` ({what: digest}), or from other
    pictures, classes or counts than the Samples have. What is not noted there or not known of a Sample is not compared.
    """
    before = recorded(folder)
    if before:
        differs = [f"{what} changed" for what, value in inputs.items() if before["inputs"].get(what, value) != value]
        noted = [sample for sample in samples if sample.stem in before["photographs"]]
        differs += _changes_of_photographs(before["photographs"], photographs(noted, "classes", "count"))
        _require_none(folder, differs)


def photographs(samples, *known):
    """{stem: what a result that is made of each photograph alone depends on}: its "picture" and, of "classes" and
    "count", those named in ``known``."""
    samples = list(samples)
    pictures = digest.of_files(sample.path for sample in samples)
    return {
        sample.stem: {"picture": picture} | {name: getattr(sample, name) for name in known}
        for sample, picture in zip(samples, pictures, strict=True)
    }


def inputs_of(samples, *known):
    """The inputs of a stage that learns from all the Samples together: digests of their names, in order, of their
    pictures and, of "classes" and "count", of those named in ``known``."""
    found = {"the list of photographs": digest.of_value([sample.stem for sample in samples])}
    found["a photograph"] = digest.of_value(digest.of_files(sample.path for sample in samples))
    for name in known:
        found[f"the {name} of a photograph"] = digest.of_value([getattr(sample, name) for sample in samples])
    return found


def _differences(before, now):
    return [key for key in before | now if before.get(key) != now.get(key)]


def _changes_of_photographs(before, now):
    now = json.loads(json.dumps(now))  # as they are in the file: tuples are lists there
    return [
        f"the {what} of {stem} changed"
        for stem in before.keys() & now.keys()
        for what, old in before[stem].items()
        if None not in (old, now[stem].get(what)) and old != now[stem][what]
    ]


def _require_none(folder, differences):
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(
            f"{folder} was made with other settings or inputs ({'; '.join(differences[:3])}{more}); go "
            "back to those, give another --out, or delete the folder to make it anew"
        )
