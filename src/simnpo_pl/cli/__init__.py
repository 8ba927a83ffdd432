"""The command line: what runs a run and shows it in the terminal."""

RUNS = {
    "fit": "evaluate the start model, unlearn, export the model, evaluate it",
    "validate": "evaluate a model",
    "test": "evaluate a model",
    "predict": "write a model's answers, greedy or at --eval.temperature",
}
"""Subcommands of LightningCLI."""
