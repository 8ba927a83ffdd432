"""Evaluation: which rows are scored, what is kept of them, what it comes to."""
