"""Influence functions of projected gradients: LoGra, GraSS, FactGraSS."""
