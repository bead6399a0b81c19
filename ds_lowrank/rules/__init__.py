"""Update rules inside the subspace: projected gradient and moments -> direction. Pure torch, one file a rule."""
