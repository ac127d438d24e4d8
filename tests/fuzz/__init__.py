"""Random valid questions, each from one seed, against single-example autograd."""
