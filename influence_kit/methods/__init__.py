"""One method a file: its formula, its terms, and what is special about it."""
