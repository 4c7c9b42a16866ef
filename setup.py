"""Set-up of the operators, the package `ops`.

`python setup.py build_ext --inplace` builds them beside their sources (`make setup` does it);
`pip install --no-build-isolation .` installs them for use elsewhere. The scripts run from the source tree.
Sources are ops/csrc/*.cpp, with ops/csrc/*.cu where a CUDA toolkit that fits a CUDA build of torch is found or
FORCE_CUDA=1; FORCE_CUDA=0 leaves them out. Not built, the operators are plain PyTorch.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup


def cuda_toolkit(version):
    """The folder of a CUDA toolkit of the same major version as the CUDA that torch was built with, or None."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1],
               "/usr/local/cuda"]
    for folder in map(Path, filter(None, folders)):
        if version and (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            text = subprocess.run([folder / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
            if f"release {version.split('.')[0]}." in text:
                return str(folder)
    return None


def operators():
    """Keyword arguments of setup() that compile ops/csrc to ops/_C; none while there are no sources."""
    sources = sorted(map(str, Path("ops/csrc").glob("*.cpp")))
    if not sources:
        return {}
    import torch

    force = os.environ.get("FORCE_CUDA")
    toolkit = cuda_toolkit(torch.version.cuda) if force != "0" else None
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit  # read when cpp_extension is imported
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # As PyTorch itself is built; without no-trapping, GCC makes no vectors of loops that choose between numbers.
    flags = {"cxx": ["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-trapping-math", "-Wno-psabi"]}
    if toolkit or force == "1":
        # Without a GPU to ask, build for the A100, and in a form that the driver translates for later ones.
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
        # Products and sums are fused only where the code says so: the centroids then agree with the CPU's bit by bit.
        flags["nvcc"] = ["-O3", "-fmad=false"]
        sources += sorted(map(str, Path("ops/csrc").glob("*.cu")))
        extension = CUDAExtension("ops._C", sources, extra_compile_args=flags, extra_link_args=["-fopenmp"])
    else:
        extension = CppExtension("ops._C", sources, extra_compile_args=flags["cxx"], extra_link_args=["-fopenmp"])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="wsid-net",
    version="0.1.0",
    description="Weakly supervised salient instance detection from class labels and object counts",
    license="MIT",
    python_requires=">=3.10",
    install_requires=["torch>=2.9", "numpy>=1.26"],
    packages=["ops"],
    **operators(),
)
