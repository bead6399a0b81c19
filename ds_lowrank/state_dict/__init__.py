"""What the optimizer's own state holds, and how a loaded one is taken over."""
