"""PA-GRPO (arXiv 2603.21016): the answer that most orders agree on earns as much as a right
answer, whether it is right or wrong (the paper's lambda = 1)."""
import dataclasses
from collections import Counter

import perl

set_advantages = perl.set_advantages

def answer_as_given(rollout) -> str | None:
    """A rollout's answer in the given order of images: "1" -> "3" if the first image was the
    third there. None if there is no answer, or it names no image of the question."""
    answer, places = perl.extract_answer(rollout.text), range(len(rollout.order))
    asked = dataclasses.replace(rollout.prompt.sample, answer=answer or "")
    if answer is None or perl.named_positions(asked) is None:
        return None
    back = tuple(rollout.order.index(place) for place in places)
    return perl.permute(asked, back).answer

def reward_agreement(column) -> None:
    """column: the t-th rollout of every order."""
    answers = list(map(answer_as_given, column))
    # A tie has no favourite, and neither has a column in which most gave no answer.
    favourite, votes = Counter(answers).most_common(1)[0]
    for rollout, answer in zip(column, answers):
        if answer is not None and answer == favourite and votes > len(column) / 2:
            rollout.reward += perl.Config.accuracy_weight

def agree(groups):
    for group in groups:
        by_order = {}
        for rollout in group:
            by_order.setdefault(rollout.order, []).append(rollout)
        if len(by_order) > 1:  # one order has nothing to agree with
            for column in zip(*by_order.values()):
                reward_agreement(column)
    set_advantages(groups)

perl.set_advantages = agree

if __name__ == "__main__":
    perl.main()
