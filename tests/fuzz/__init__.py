"""Random networks, random schemes, and what must hold for every pair of them."""
