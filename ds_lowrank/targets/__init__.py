"""Which parameters are projected."""
