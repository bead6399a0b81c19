"""Moves rows, bases and updates between the pure functions; knows no mathematics of its own."""
