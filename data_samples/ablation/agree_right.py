"""ConsistRoll (arXiv 2606.29812), after its abstract: rollouts that are right in every order
earn a joint reward. Its weight here is that of a right answer."""
import perl

set_advantages = perl.set_advantages

def agree_and_right(groups):
    for group in groups:
        by_order = {}
        for rollout in group:
            by_order.setdefault(rollout.order, []).append(rollout)
        # A column has the t-th rollout of every order; one order has nothing to agree with.
        for column in zip(*by_order.values()):
            if len(column) > 1 and all(rollout.accuracy for rollout in column):
                for rollout in column:
                    rollout.reward += perl.Config.accuracy_weight
    set_advantages(groups)

perl.set_advantages = agree_and_right

if __name__ == "__main__":
    perl.main()
