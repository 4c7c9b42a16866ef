"""Set-up of the operators: the package `ops` in the source tree, `wsid_ops` where it is installed.

`python setup.py build_ext --inplace` builds them beside their sources, from any folder (`make setup` runs it);
`pip install --no-build-isolation .` installs them for use elsewhere, as `import wsid_ops`. The scripts run from the
source tree. The sources are the .cpp files in ops/csrc, and those in ops/csrc/cuda where a CUDA toolkit of the major
version of PyTorch's CUDA is found; FORCE_CUDA=1 makes it an error to find none, FORCE_CUDA=0 builds without CUDA. Where
they are not built, the operators run in plain PyTorch.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def compiler() -> list[str] | None:
    """The command of the C++ compiler: that of CXX, else the first of c++, g++, clang++ that exists; None without."""
    names = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in names if shutil.which(command[0])), None)


def cuda_toolkit(version: str | None) -> str | None:
    """The folder of a complete CUDA toolkit of the major version of ``version``, PyTorch's CUDA; None without one.

    It is searched in CUDA_HOME, CUDA_PATH, by the nvcc of the PATH and in /usr/local/cuda. nvcc itself is asked for its
    folder, as the one on the PATH may be a script that calls it.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    in_home, in_path, usual = [home and str(Path(home, "bin/nvcc")) for home in homes]
    for nvcc in (in_home, in_path, shutil.which("nvcc"), usual):
        if not version or not nvcc or not Path(nvcc).exists():
            continue
        release, dry_run = (
            subprocess.run([nvcc, *options], capture_output=True, text=True)
            for options in (["--version"], ["--dryrun", "-c", "-x", "cu", os.devnull])
        )
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        folder = Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve()
        complete = (folder / "include/cuda_runtime.h").exists() and any(folder.glob("lib*/libcudart.so"))
        if complete and f"release {version.split('.')[0]}." in release.stdout:
            return str(folder)
    return None


def takes(command: list[str], flag: str) -> bool:
    """Whether a compiler builds a program with this flag."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        built = subprocess.run([*command, flag, source, "-o", source.with_suffix("")], capture_output=True)
        return built.returncode == 0


def operators() -> dict[str, Any]:
    """Keyword arguments of setup() that compile ops/csrc to wsid_ops._C, which is placed in ops/ when built in place.

    Exits with one sentence where FORCE_CUDA=1 and there is no toolkit, or at the build without a C++ compiler.
    """
    import torch

    force = os.environ.get("FORCE_CUDA")
    toolkit = cuda_toolkit(torch.version.cuda) if force != "0" else None
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # read when cpp_extension is imported
    elif force == "1":
        if not torch.version.cuda:
            sys.exit("FORCE_CUDA=1 was given, but this PyTorch is built without CUDA; install one with it")
        sys.exit(
            f"FORCE_CUDA=1 was given, but there is no toolkit for a PyTorch of CUDA {torch.version.cuda}; set "
            "CUDA_HOME to a folder of that major version that holds bin/nvcc, include/ and lib64/libcudart.so"
        )
    if found := compiler():
        os.environ.setdefault("CXX", found[0])  # for compiling and for linking
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            if not found:
                names = os.environ.get("CXX") or "c++, g++ or clang++"
                sys.exit(
                    f"there is no C++ compiler ({names}): install one, as with apt install g++, and build "
                    "again; without it the operators run in plain PyTorch, slower"
                )
            (extension,) = self.extensions
            if not takes(found, "-fopenmp"):
                print(f"{found[0]} builds nothing with -fopenmp: the operators will run in one thread", file=sys.stderr)
                extension.extra_compile_args["cxx"].remove("-fopenmp")
                extension.extra_link_args.remove("-fopenmp")
            # The extension holds the digest of its sources; everything is compiled anew where this header changes.
            options = f"// For PyTorch {torch.__version__}: {extension.sources} {extension.extra_compile_args}\n"
            text = options + f'#define WSID_SOURCES "{sources_digest()}"\n'
            header = Path(self.build_temp, "built_from.h").resolve()
            header.parent.mkdir(parents=True, exist_ok=True)
            if not header.exists() or header.read_text() != text:
                header.write_text(text)
            extension.include_dirs.append(str(header.parent))
            extension.depends.append(str(header))
            super().build_extensions()

    sources_digest = runpy.run_path(str(ROOT / "ops/sources.py"))["digest"]
    files = {end: sorted(map(str, Path("ops/csrc").rglob(f"*.{end}"))) for end in ("cpp", "cu", "cuh", "h", "inl")}
    sources, kind = files["cpp"], CppExtension
    # -fno-trapping-math lets GCC vectorise loops with conditional values; PyTorch itself is built with it, too.
    flags = {"cxx": ["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-trapping-math", "-Wno-psabi"]}
    if toolkit:
        # Without a GPU to query, build for the A100, and PTX, which the driver compiles for later ones.
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
        # No implicit fused multiply-add: centroids are then equal to the CPU's bit by bit.
        flags["nvcc"] = ["-O3", "-fmad=false"]
        sources, kind = sources + files["cu"], CUDAExtension
    headers = [*files["h"], *files["cuh"], *files["inl"]]
    extension = kind(
        "wsid_ops._C",
        sources,
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        depends=headers,
        define_macros=[("WSID_TORCH", torch.__version__)],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    os.chdir(ROOT)  # setuptools reads and writes relative to the current folder
    setup(
        name="wsid-net",
        version="0.1.0",
        description="Weakly supervised salient instance detection from class labels and object counts",
        license="MIT",
        python_requires=">=3.10",
        install_requires=["torch>=2.9", "numpy>=1.26"],
        packages=["wsid_ops"],
        package_dir={"wsid_ops": "ops"},
        **operators(),
    )
