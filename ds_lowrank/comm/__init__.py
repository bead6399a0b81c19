"""Collectives, with counted bytes and named errors."""
