"""Random projections of gradients, layer by layer or joint."""
