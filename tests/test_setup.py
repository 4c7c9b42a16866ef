"""The build of the operators, and the messages where they cannot be built or used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from ops import compiled, sources
from setup import compiler, cuda_toolkit, takes


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def build(cwd, environment, *options):
    command = [sys.executable, ROOT / "setup.py", "build_ext", *options]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=240)


def test_what_can_be_built_is_built():
    """Without the compiled operators most of test_ops.py is skipped: where they can be built, that is a failure."""
    if not compiler():
        pytest.skip("no C++ compiler: the operators run in plain PyTorch")
    assert compiled.available, f"there is a C++ compiler, but of the operators {compiled.reason}: {compiled.BUILD}"
    if os.environ.get("FORCE_CUDA") != "0" and (toolkit := cuda_toolkit(torch.version.cuda)):
        assert compiled.has_kernels("cuda"), f"there is {toolkit}, but no CUDA kernels were built: {compiled.BUILD}"


def test_a_toolkit_is_found_behind_a_script_and_must_be_complete_and_fit(tmp_path, monkeypatch):
    real = tmp_path / "real toolkit ü"
    nvcc = script(
        real / "bin/nvcc",
        f'case $1 in --version) echo "release 13.0, V13.0.1";; *) echo "#\\$ TOP={real}/bin/.." >&2;; esac',
    )
    script(tmp_path / "bin/nvcc", f'exec "{nvcc}" "$@"')
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    parts = [real / "include/cuda_runtime.h", real / "lib64/libcudart.so"]
    for part in parts:
        assert cuda_toolkit("13.2") != str(real), "incomplete"
        part.parent.mkdir()
        part.touch()
    assert cuda_toolkit("13.2") == str(real), "of the same major version"
    assert cuda_toolkit("12.8") != str(real) and cuda_toolkit(None) is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # its bin/nvcc is the script
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda_toolkit("13.2") == str(real)


def test_without_a_compiler_there_is_one_sentence_from_any_folder(tmp_path):
    done = build(tmp_path, {"CXX": "no-such-compiler", "FORCE_CUDA": "0"}, "--inplace")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "there is no C++ compiler (no-such-compiler): install one" in done.stderr


def test_it_builds_from_any_folder_and_without_openmp(tmp_path):
    """With a stand-in for the compiler, which records its arguments and writes empty files."""
    fake = script(
        tmp_path / "bin/c++",
        f"""
for a in "$@"; do case $a in
    -fopenmp) echo "unsupported option '-fopenmp'" >&2; exit 1;;
    -dumpfullversion) echo 12.2.0; exit;;
esac; done
echo "$@" >> "{tmp_path}/asked"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done""",
    )
    assert not takes([str(fake)], "-fopenmp") and takes([str(fake)], "-O3")
    out = tmp_path / "gebaut für ü"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = build(
        elsewhere,
        {"CXX": str(fake), "FORCE_CUDA": "0"},
        "--build-lib",
        out,
        "--build-temp",
        out / "temp",
        "build_py",
        "--build-lib",
        out,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-fopenmp: the operators will run in one thread" in done.stderr
    assert not list(elsewhere.iterdir()) and {file.name for file in out.iterdir()} == {"temp", "wsid_ops"}
    installed = sorted(file.name.partition(".cpython")[0] for file in Path(out, "wsid_ops").iterdir())
    assert installed == ["_C", *sorted(file.name for file in Path(ROOT, "ops").glob("*.py"))]
    asked = (tmp_path / "asked").read_text()
    assert "walk.cpp" in asked and f"WSID_TORCH={torch.__version__}" in asked
    assert sources.digest() in Path(out, "temp/built_from.h").read_text()


def test_installed_as_wsid_ops_it_refuses_a_second_copy_of_itself(tmp_path):
    """PyTorch aborts when the operators are registered twice: either name can be imported, but not both."""
    shutil.copytree(ROOT / "ops", tmp_path / "wsid_ops", ignore=shutil.ignore_patterns("csrc", "__pycache__"))
    code = f"""import sys, torch, wsid_ops
print(wsid_ops.__file__, wsid_ops.compiled.available, *wsid_ops.boundary_affinity(torch.zeros(1, 2, 3), 2).shape)
sys.path.append({str(ROOT)!r})
try:
    import ops
except ImportError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    first, *refused = done.stdout.splitlines()
    assert first == f"{tmp_path / 'wsid_ops/__init__.py'} {compiled.available} 1 4 2 3"
    if compiled.available:
        (sentence,) = refused
        assert str(tmp_path / "wsid_ops/_C") in sentence and "import either ops, " in sentence
    else:
        assert not refused


@pytest.mark.parametrize(
    "found, why",
    [
        (ModuleNotFoundError("No module named 'ops._C'"), "they are not built"),
        (ImportError("_C.so: undefined symbol: _ZN2at"), "built for another PyTorch or Python than .*undefined symbol"),
        (SimpleNamespace(TORCH="1.13.0", SOURCES=sources.digest()), "they were built for PyTorch 1.13.0, and this is"),
        (SimpleNamespace(TORCH=torch.__version__, SOURCES="0123"), "they were built from other sources"),
        (SimpleNamespace(), "they were built from other sources"),
        (SimpleNamespace(TORCH=torch.__version__, SOURCES=sources.digest()), "^$"),
    ],
)
def test_operators_of_other_sources_or_for_another_torch_are_not_used(monkeypatch, found, why):
    def load(name, package):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(compiled.importlib, "import_module", load)
    reason = compiled._reason()
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(reason)


def test_the_digest_depends_on_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FOLDER", tmp_path / "csrc")
    assert sources.digest() is None, "installed without sources"
    sources.FOLDER.mkdir()
    seen = set()
    for name, text in (("a.h", "1"), ("a.h", "2"), ("b.h", "2"), ("cuda/c.cu", ""), ("cpu/c.cu", "")):
        (sources.FOLDER / name).parent.mkdir(exist_ok=True)
        (sources.FOLDER / name).write_text(text)
        seen.add(sources.digest())
    assert len(seen) == 5
