"""Records of training runs: traces and their steps."""
