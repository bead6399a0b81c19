"""Who computes and owns what of every projected matrix; made once, from the layout alone."""
