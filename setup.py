"""Installs influence_kit; everything about the package is written in pyproject.toml."""

from setuptools import setup

setup()
