"""The part of the build that pyproject.toml cannot say: where the packages lie."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["genrep_fast", "genrep_fast.*"]), "genrep_fast.kernels"],
    # The Triton sources are installed as genrep_fast.kernels: a top-level package named `kernels` would shadow Hugging Face's.
    package_dir={"genrep_fast": "genrep_fast", "genrep_fast.kernels": "kernels/triton"},
    package_data={"genrep_fast": ["evaluation/*.jinja"]},
)
