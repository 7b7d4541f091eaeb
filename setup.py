"""Build memattn: pure Python, the Triton kernels, and the C++ extension where it can be compiled.

The extension uses LibTorch's stable ABI and Python's limited API, so one wheel serves torch >= 2.11
and Python >= 3.10. Build without isolation (``pip install --no-build-isolation``), so that the
installed torch supplies the headers. Without torch or a C++ compiler the package still installs
and runs on the reference backend; ``memattn doctor`` says what is missing. MEMATTN_CXXFLAGS adds
flags for the compiler, after those here.
"""

import os
import sys
from glob import glob

from setuptools import find_packages, setup

# torch 2.11, as TORCH_TARGET_VERSION wants it: 0xMMmmpp0000000000
TORCH_ABI = "0x020b000000000000"


def cpp_extension() -> dict:
    """Arguments of setup() that add memattn._C, or none where torch cannot be imported."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("memattn: torch is not installed, the C++ backend is left out", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """Build the extension, and go on without it where there is no working compiler."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # any compiler fault leaves a package that works
                if os.environ.get("CI"):
                    raise
                reason = str(error).strip().splitlines()
                print(
                    f"memattn: the C++ backend was not built ({reason[0] if reason else error!r}); "
                    "run `memattn doctor` after the installation",
                    file=sys.stderr,
                )
                for extension in self.extensions:
                    extension.optional = True

    extension = CppExtension(
        "memattn._C",
        sorted(glob("csrc/*.cpp")),
        include_dirs=["csrc"],
        depends=sorted(glob("csrc/*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI)],
        extra_compile_args=[
            *("-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-g0"),
            *os.environ.get("MEMATTN_CXXFLAGS", "").split(),
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=find_packages(include=["memattn", "memattn.*"]) + find_packages("kernels"),
    package_dir={"memattn_kernels": "kernels/memattn_kernels"},
    **cpp_extension(),
)
