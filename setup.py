"""Packaging of influence_kit; the tools are set up in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "influence_kit/__init__.py").read_text())[1]

EXTRAS = {
    "demo": ["scikit-learn>=1.3"],
    "hf": ["transformers>=4.40"],
    "ann": ["faiss-cpu>=1.8"],
    "parallel": ["joblib>=1.4"],
    "tutorials": ["scikit-learn>=1.3", "ipykernel>=6", "nbclient>=0.10", "nbformat>=5.9"],
    "docs": ["sphinx>=7.3", "furo>=2024.1", "myst-nb>=1.1", "sphinx-copybutton>=0.5"],
    "test": ["pytest>=8", "pytest-xdist>=3.5", "scikit-learn>=1.3", "scipy>=1.11"],
    "lint": ["ruff>=0.6", "mypy>=1.10"],
}
EXTRAS["test"] += EXTRAS["hf"] + EXTRAS["ann"] + EXTRAS["parallel"]

setup(
    name="influence_kit",
    version=VERSION,
    description="Training-data attribution for PyTorch, in Captum's style",
    long_description=(HERE / "README.rst").read_text(),
    long_description_content_type="text/x-rst",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["influence_kit", "influence_kit.*"]),
    package_data={"influence_kit": ["py.typed"], "influence_kit.viz": ["templates/*"]},
    install_requires=[
        "torch>=2.3",
        "captum>=0.9",
        "tqdm>=4.60",
        "numpy>=1.24",
        "safetensors>=0.4",
        "jinja2>=3.0",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "License :: OSI Approved :: BSD License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
