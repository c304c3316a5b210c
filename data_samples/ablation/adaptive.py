"""Permute each question with the probability of its own gap in accuracy between two orders,
which stage 0 measures. For one process that runs stage 0 and then stage 1, as ablate.py does."""
from statistics import mean

import perl

sample_orders, draw_orders, gaps = perl.sample_orders, perl.draw_orders, {}

def in_two_orders(model, processor, samples, cfg, accelerator, **named):
    if cfg.stage > 0:
        return sample_orders(model, processor, samples, cfg, accelerator, **named)
    named |= {"n_orders": 2, "n": named["n"] // 2}
    groups = sample_orders(model, processor, samples, cfg, accelerator, **named)
    for group in groups:
        by_order = {}
        for rollout in group:
            by_order.setdefault(rollout.order, []).append(rollout.accuracy)
        means = list(map(mean, by_order.values()))
        gaps[group[0].prompt.sample.id] = max(means) - min(means)
    return groups

def by_gap(sample, n_permutations, alpha, rng):
    return draw_orders(sample, n_permutations, gaps.get(sample.id, alpha), rng)

perl.sample_orders, perl.draw_orders = in_two_orders, by_gap

if __name__ == "__main__":
    perl.main()
