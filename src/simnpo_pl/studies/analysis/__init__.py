"""The paper's analyses over finished runs: numbers, figures and the runs they need."""
