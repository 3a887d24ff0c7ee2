"""The text that the rungs train on: `prepare.py` makes the token files and loads them."""
