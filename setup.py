"""The part of the build that pyproject.toml cannot say.

Where the packages lie, and the native code (csrc/build.py).
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent
PURE = os.environ.get("GENREP_FAST_PURE") == "1"
if PURE:
    # What an earlier editable installation built would be loaded still.
    for built in (*(ROOT / "genrep_fast").glob("_*.so"), ROOT / "genrep_fast/build.json"):
        built.unlink(missing_ok=True)

_spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc/build.py")
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


class BuildNative(build_ext):
    """Compiles everything with ninja.

    Into the wheel or, for an editable installation, beside the sources.
    """

    def run(self):
        try:
            native_build.build(self._folder, Path(self.build_temp))
        except native_build.BuildError as error:
            sys.exit(str(error))

    def get_outputs(self):
        return [str(self._folder / name) for name in (*native_build.libraries(), "build.json")]

    def get_output_mapping(self):
        return {}

    @property
    def _folder(self):
        if self.inplace or self.editable_mode:
            return ROOT / "genrep_fast"
        return Path(self.build_lib) / "genrep_fast"


class Metadata(dist_info):
    """Refuses to describe what cannot be built.

    pip would fetch torch, gigabytes, between this step and the build.
    """

    def run(self):
        if not PURE:
            try:
                native_build.torch_headers()
            except native_build.BuildError as error:
                sys.exit(str(error))
        super().run()


class BuildPython(build_py):
    """Leaves the tests that lie beside the benchmarks out of the wheel."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if not module[1].startswith("test_")]


class Wheel(bdist_wheel):
    """Tagged py3-none: the libraries know nothing of Python.

    No Python misses _introspection, which was built for one alone.
    """

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["genrep_fast", "genrep_fast.*"]),
        "genrep_fast.kernels",
        "genrep_fast.benchmarks",
    ],
    # The Triton sources are installed as genrep_fast.kernels: a top-level package named `kernels`
    # would shadow Hugging Face's.
    package_dir={
        "genrep_fast": "genrep_fast",
        "genrep_fast.kernels": "kernels/triton",
        "genrep_fast.benchmarks": "benchmarks",
    },
    # MANIFEST.in is the source distribution's.
    include_package_data=False,
    package_data={
        "genrep_fast": ["gpu_backends.json", "py.typed", "reporting/*.jinja"],
        "genrep_fast.benchmarks": ["*.jinja"],
    },
    ext_modules=[] if PURE else [Extension("genrep_fast._introspection", sources=[])],
    cmdclass={
        "build_ext": BuildNative,
        "build_py": BuildPython,
        "bdist_wheel": Wheel,
        "dist_info": Metadata,
    },
)
