"""The documentation names files, options and settings that exist, in plain words, and README stays short."""

import argparse
import hashlib
import re
import shlex
import sys
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import mutations
import pytest

from models.fusion import FusionConfig

ROOT = Path(__file__).resolve().parent.parent
# Pages that quote commands and options of earlier versions are checked for everything else.
HISTORY = ["CHANGELOG.md", "docs/development_log.md", "weights/PROVENANCE.md"]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "MODEL_CARD.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
CURRENT = [page for page in PAGES if page not in HISTORY]
ALL = sorted({*PAGES, *HISTORY})

SCRIPT = re.compile(r"(?:benchmarks/)?(?!setup\.py)\w+\.py")
MODULE = re.compile(r"(?:datasets|experiments)\.\w+")
FOREIGN_OPTIONS = {
    "--inplace",
    "--force",
    "--no-build-isolation",
    "--no-deps",
    "--shm-size",
    "--ipc",
    "--nproc_per_node",
}
# Private vocabulary, and places that only the authors' machines have.
WORDS = (
    r"told|tells|knows|has a say|looks|doubts?|rivals?|opinions?|again|cycles?|speaks|odds|likes|likeness|"
    r"/work/|\.\./shared"
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The fenced blocks of a page, each with its continued lines joined."""
    return [block.replace("\\\n", " ") for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)]


def inline(text: str) -> list[str]:
    """The passages in backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def prose(text: str) -> str:
    """A page without code: fenced and indented blocks, backticks and the targets of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"`[^`]*`|^ {4}.*$|\]\([^)]*\)", "", text, flags=re.M)
    return text


def anchors(page: str) -> set[str]:
    """The anchors that a page's headings get on a code host."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script or module, its arguments) of every command for a script of ours in the fenced blocks."""
    found = []
    for line in "\n".join(blocks(text)).splitlines():
        for command in re.split(r"[;&]|\s#\s|\s#$", line):
            try:
                words = shlex.split(command)
            except ValueError:  # prose in a block
                continue
            for i, word in enumerate(words):
                if SCRIPT.fullmatch(word) or (MODULE.fullmatch(word) and words[i - 1] == "-m"):
                    found.append((word, words[i + 1 :]))
                    break
    return found


def options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}


class _Parsed(Exception):
    pass


@cache
def options_of(script: str) -> set[str]:
    """The options of a script's parser, which is caught where it would read the command line.

    script: a file, or a module for ``python -m``.
    """

    def stop(parser, *args, **kwargs):
        raise _Parsed(parser)

    path = Path(script)
    name, folder = (path.stem, ROOT / path.parent) if path.suffix == ".py" else (script, ROOT)
    with (
        patch.object(sys, "path", [str(folder), *sys.path]),
        patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        pytest.raises(_Parsed) as caught,
    ):
        import_module(name).main()
    return set(caught.value.args[0]._option_string_actions)


def test_the_model_card_is_that_of_the_bundled_files():
    for file in (ROOT / "weights").glob("*.pt"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in read("MODEL_CARD.md"), file.name


def test_readme_is_short():
    assert len(read("README.md").split()) <= 1200


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page} links to {target}"


@pytest.mark.parametrize("page", CURRENT)
def test_files_and_modules_exist(page):
    top = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "runs", "output", "data"}
    for code in inline(read(page)):
        for name in re.findall(r"[\w./-]+", code):
            if name.split("/")[0] in top and "/" in name:
                assert (ROOT / name).exists(), f"{page} names {name}"
        for name in re.findall(r"\b((?:models|engine|datasets|utils|experiments)(?:\.\w+)+)", code):
            parts = name.split(".")
            if parts[-1] != "py":
                assert (ROOT / parts[0] / f"{parts[1]}.py").exists(), f"{page} names {name}"


def test_commands_have_options_that_exist():
    checked = 0
    for page in CURRENT:
        for script, words in commands(read(page)):
            unknown = options(words) - options_of(script)
            assert not unknown, f"{page}: {script} has no option {', '.join(unknown)}"
            checked += 1
    assert checked > 20


def test_options_in_the_text_exist():
    scripts = {script for page in CURRENT for script, _ in commands(read(page))}
    known = set().union(FOREIGN_OPTIONS, *map(options_of, scripts))
    for page in CURRENT:
        pieces = [*inline(read(page)), *re.findall(r'^\w+="(.*)"', "\n".join(blocks(read(page))), re.M)]
        unknown = options(" ".join(pieces).split()) - known
        assert not unknown, f"{page} names {', '.join(unknown)}"


def test_settings_of_the_fusion_exist():
    names = {field.name for field in fields(FusionConfig)}
    for page in CURRENT:
        text = " ".join([*inline(read(page)), *blocks(read(page))])
        for settings in re.findall(r"--fusion((?:\s+[a-z_]+=[\w.]+)+)", text):
            assert set(re.findall(r"([a-z_]+)=", settings)) <= names, f"{page}: --fusion{settings}"


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    for page in CURRENT:
        for line in [*"\n".join(blocks(read(page))).splitlines(), *inline(read(page))]:
            match = re.match(r"make (?:\w+=\S+ )*([a-z]+)\b", line)
            assert not match or match[1] in targets, f"{page} names {line}"


@pytest.mark.parametrize("page", ALL)
def test_plain_words(page):
    found = re.findall(rf"(?<![\w-])(?:{WORDS})(?![\w-])", prose(read(page)), re.I)
    assert not found, f"{page}: {', '.join(sorted(set(found)))}"


def test_the_lines_that_make_mutants_changes_are_there():
    chosen = mutations.all_mutations()
    assert len(chosen) > 100 and not list(mutations.outdated(chosen))
