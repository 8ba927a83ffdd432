"""Reading, tokenizing and pairing rows; knows no model and no metric."""
