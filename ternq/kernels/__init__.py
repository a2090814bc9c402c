"""Products with packed ternary matrices."""
