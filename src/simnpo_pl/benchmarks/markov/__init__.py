"""Mixtures of Markov chains: a forgetting problem whose right answer is known (SimNPO paper, section 5)."""
