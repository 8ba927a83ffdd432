"""Time and memory against a plain implementation of the public recipe: `python -m bench --help`."""
