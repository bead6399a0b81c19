"""How moments and bases are kept between two steps: full precision, bf16, or codes with a scale a block."""
