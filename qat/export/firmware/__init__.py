"""What an exported C header is run by: `run.py` (NumPy alone) and `model.c`, copied beside it as they are."""
