"""Which image files a folder, a pattern or a file name stands for."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from glob import escape, glob, has_magic
from pathlib import Path

from utils.cli import InputError

SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .webp .tif .tiff .gif .avif .avifs .heic .heif .hif "
    ".jp2 .j2k .jpx .jpf .j2c .jpc .ppm .pgm .pbm .pnm .pfm .ico".split()
)
READABLE = (
    "JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF, HEIC, JPEG 2000, PPM or ICO"  # the formats of these suffixes, for messages
)

CLIP_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

# The pictures of infer.py, also of its earlier versions.
_RESULT = re.compile(r"(.+)_(?:(?:instances|overlay|saliency|boundary|offsets|cutout[1-9]\d*)\.png|overlay\.jpg)", re.S)
_SILENTLY_SKIPPED = ("predictions.json", "cutouts.json", "labels.csv", "thumbs.db", "desktop.ini")


def list_images(
    source: str | Path,
    report: Callable[[str], object] | None = None,
    results: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
) -> list[Path]:
    """The image files that ``source`` names, sorted.

    source: a file (of any suffix), a folder (the images in it, not those of its subfolders; those of ``suffixes`` in
    any case) or a glob pattern such as ``photos/*.jpg`` or ``photos/**``; brackets in the name of an existing file or
    folder are no pattern. A leading ~ is the home folder. Hidden files are skipped, and so are the pictures that
    infer.py wrote, unless ``results``.
    report: called with one sentence about the skipped files and subfolders, if any.
    Raises InputError when no image is found.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return [path]
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(
            f"{path} is a link to {os.readlink(path)}, which is missing; restore its target or remove the link"
        )
    if os.path.isdir(path):
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            raise InputError(f"cannot list the folder {path} ({error.strerror}); check its rights") from error
    else:
        # Unique by real folder and name: through a link to a parent folder, ``**`` finds the same files several times.
        entries = sorted({(os.path.realpath(match.parent), match.name): match for match in _matches(path)}.values())
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    files = [entry for entry in visible if os.path.isfile(entry)]
    written = set() if results else _results_of_infer(files)
    images = [file for file in files if file.suffix.lower() in suffixes and file not in written]
    skipped = _describe_skipped(path, set(visible) - set(images) - written)
    if written and not images:
        skipped = f"{len(written)} results of infer.py{'; ' * bool(skipped)}{skipped}"
    if images:
        if report and skipped:
            report(skipped)
        return images
    if not os.path.isdir(path) and not visible:
        raise InputError(f"no image file, folder or pattern matches {source}; check the path")
    reason = f" ({skipped})" if skipped else ""
    raise InputError(f"{path} holds no images{reason}; name {READABLE} files")


def stem_of_result(name: str) -> str | None:
    """The stem of the photograph whose result infer.py would call ``name``, or None for any other name."""
    match = _RESULT.fullmatch(name)
    return match[1] if match else None


def _matches(path: Path) -> list[Path]:
    """The paths that a pattern matches; brackets that match nothing as a pattern are taken literally."""
    parts = path.parts
    known = 0
    while known < len(parts) and os.path.exists(Path(*parts[: known + 1])):
        known += 1
    begin, rest = escape(str(Path(*parts[:known]))) if known else "", parts[known:]
    found: list[str] = []
    for pattern in (rest, [part.replace("[", "[[]") for part in rest]):
        found = glob(os.path.join(begin, *pattern), recursive=True)
        if found or not has_magic(str(path)):
            break
    return sorted(map(Path, found), reverse=True)


def _results_of_infer(files: list[Path]) -> set[Path]:
    """The ``files`` that infer.py wrote: results of <stem> beside predictions.json, or beside the photograph <stem> and
    its instances; of a clip <stem>_instances.mp4 and <stem>/*.png, with <stem>_tracks.json."""
    names, stems = set(files), {(file.parent, file.stem) for file in files if file.suffix.lower() in SUFFIXES}
    recorded = {folder for folder in {file.parent for file in files} if os.path.isfile(folder / "predictions.json")}
    written = set()
    for file in files:
        clip_stem, _, kind = file.stem.rpartition("_")
        clip = file.with_name(clip_stem) if file.suffix == ".mp4" and kind == "instances" else file.parent
        if file.suffix in (".mp4", ".png") and os.path.isfile(clip.with_name(f"{clip.name}_tracks.json")):
            written.add(file)
        stem = stem_of_result(file.name)
        if stem:
            beside = (file.parent, stem) in stems and file.with_name(f"{stem}_instances.png") in names
            if file.parent in recorded or beside:
                written.add(file)
    return written


def _describe_skipped(source: Path, entries: Iterable[Path]) -> str:
    """One sentence about the skipped files and subfolders; "" without any."""
    entries = sorted(entries)
    folders = sum(os.path.isdir(entry) and not os.path.isfile(f"{entry}_tracks.json") for entry in entries)
    files = [entry for entry in entries if not os.path.isdir(entry) and not _is_silently_skipped(entry.name.lower())]
    kinds = Counter(_kind_of_entry(file) for file in files)
    several = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
    words = []
    if files:
        more = ", ..." if len(kinds) > 5 else ""
        words.append(f"{len(files)} file{'s' * (len(files) > 1)} skipped: {several}{more}")
    if folders and "**" not in source.parts:
        inner = source if os.path.isdir(source) else source.parent
        words.append(f'{folders} subfolder{"s" * (folders > 1)} skipped, which "{inner / "**"}" takes too')
    return "; ".join(words)


def _is_silently_skipped(name: str) -> bool:
    if name.endswith("_tracks.json"):
        return True
    return name in _SILENTLY_SKIPPED or (name.startswith("finished-") and name.endswith(".jsonl"))  # infer.py's journal


def _kind_of_entry(path: Path) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return "broken link"
    if not os.path.isfile(path):
        return "no regular file"
    return path.suffix.lower() or "without suffix"
