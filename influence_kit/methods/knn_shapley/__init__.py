"""KNN-Shapley."""
