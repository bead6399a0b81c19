"""The parameters that are not projected."""
