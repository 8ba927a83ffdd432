"""SimNPO unlearning of language models on PyTorch Lightning."""
