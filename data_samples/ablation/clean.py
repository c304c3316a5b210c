"""As in NoisyRollout: sample in every order, but train on the given one."""
import perl

set_advantages = perl.set_advantages

def clean(groups):
    set_advantages(groups)
    for group in groups:
        for rollout in group:
            rollout.prompt = group[0].prompt

perl.set_advantages = clean

if __name__ == "__main__":
    perl.main()
