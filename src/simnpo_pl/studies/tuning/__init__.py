"""Tuning of methods with Optuna: the same number of trials for each, chosen by a rule that is written down."""
