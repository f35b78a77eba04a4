"""The probability of a gray level, by SciPy in float64."""

import numpy as np
import scipy.special
import scipy.stats


def scipy_log_prob(x_0, mean, sd, levels):
    """Independent, in float64: differences of SciPy's log CDF on the side where the CDF is small."""
    k = np.round((x_0 + 1) * (levels - 1) / 2)
    lower = np.where(k == 0, -np.inf, ((2 * k - 1) / (levels - 1) - 1 - mean) / sd)
    upper = np.where(k == levels - 1, np.inf, ((2 * k + 1) / (levels - 1) - 1 - mean) / sd)
    a, b = np.where(lower + upper > 0, -upper, lower), np.where(lower + upper > 0, -lower, upper)
    log_a, log_b = scipy.special.log_ndtr(a), scipy.special.log_ndtr(b)
    return log_b + np.log(-np.expm1(log_a - log_b))
