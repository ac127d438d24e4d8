"""``make quality``: how good every method is, as figures and as pages made of them."""
