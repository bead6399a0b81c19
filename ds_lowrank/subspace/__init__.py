"""Gram matrix -> basis, and the three products of a step. Pure torch: no process group."""
