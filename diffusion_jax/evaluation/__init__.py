"""Sample metrics and likelihoods of trained models; import each module by name."""
