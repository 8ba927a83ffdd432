"""What an unlearned model still holds: relearning, quantisation, sampling; each over a finished run."""
