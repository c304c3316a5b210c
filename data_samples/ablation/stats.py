"""Intervals and tests for the few paired values of an ablation."""
import math
from statistics import fmean, stdev

import torch

# 97.5 % quantiles of Student's t with 1, 2, .. degrees of freedom; beyond them, the last.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)

def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval; infinite for one value."""
    if len(values) < 2:
        return fmean(values), math.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))

def p_value(values: list[float]) -> float:
    """Two-sided, of Student's t-test that the mean is 0. At least two values."""
    spread, freedom, center = stdev(values), len(values) - 1, abs(fmean(values))
    if spread < 1e-9:
        return float(center < 1e-9)
    # With t = sqrt(freedom) * tan(angle), the density is cos(angle) ** (freedom - 1).
    angle = math.atan(center / spread * math.sqrt(len(values) / freedom))
    areas = []
    for begin in (angle, 0.0):
        angles = torch.linspace(begin, math.pi / 2, 2001, dtype=torch.float64)
        areas.append(float(torch.trapezoid(angles.cos() ** (freedom - 1), angles)))
    return areas[0] / areas[1]

def holm(differences: dict) -> list:
    """The keys of the differences that Holm's correction for their number leaves, at 5 %."""
    p_values = {key: p_value(values) for key, values in differences.items()}
    survivors = []
    for key in sorted(p_values, key=p_values.get):
        if p_values[key] * (len(p_values) - len(survivors)) > 0.05:
            break
        survivors.append(key)
    return survivors
