"""Advantages within each order, in place of the whole group."""
import perl

pooled = perl.set_advantages

def per_order(groups):
    for group in groups:
        for order in {rollout.order for rollout in group}:
            pooled([[rollout for rollout in group if rollout.order == order]])

perl.set_advantages = per_order

if __name__ == "__main__":
    perl.main()
