"""Metrics of samples and likelihoods of trained models; each module is imported by its name."""
