"""Set-up of the operators, the package `ops`.

`python setup.py build_ext --inplace` builds them beside their sources (`make setup` does it);
`pip install --no-build-isolation .` installs them for use elsewhere. The scripts run from the source tree.
Sources are ops/csrc/*.cpp, with ops/csrc/*.cu where a CUDA toolkit and a CUDA build of torch are found or
FORCE_CUDA=1; while there are none, the operators are plain PyTorch.
"""

import os
from pathlib import Path

from setuptools import setup


def operators():
    """Keyword arguments of setup() that compile ops/csrc to ops/_C; none while there are no sources."""
    sources = sorted(map(str, Path("ops/csrc").glob("*.cpp")))
    if not sources:
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    flags = {"cxx": ["-O3", "-fopenmp"]}
    cuda_sources = sorted(map(str, Path("ops/csrc").glob("*.cu")))
    cuda = bool(CUDA_HOME and torch.version.cuda) or os.environ.get("FORCE_CUDA") == "1"
    if cuda and cuda_sources:
        flags["nvcc"] = ["-O3"]
        extension = CUDAExtension("ops._C", sources + cuda_sources, extra_compile_args=flags)
    else:
        extension = CppExtension("ops._C", sources, extra_compile_args=flags, extra_link_args=["-fopenmp"])
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
