"""The benchmark settings of the field, and some that need no download, as things to be run.

python -m benchmarks.settings list
python -m benchmarks.settings run digits-mlp --methods GradDot TracInCP --subsets 10 --out folder
"""

from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.data import Data, Sizes
from benchmarks.settings.setting import Published, Setting, Trained

__all__ = ["SETTINGS", "Data", "Published", "Setting", "Sizes", "Trained"]
