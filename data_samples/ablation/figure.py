"""The figure of the ablation, for data_samples/ablation.png."""
from pathlib import Path

import torch
from ablation.hashes import hash_of
from ablation.stats import interval
from PIL import Image

COLORS = {"perl": "#1a66c9", "grpo": "#d1610a"}

def draw_line(axes, kind: str, x: list[float], columns: list) -> None:
    """Means over seeds, a column for each x, in their 95 % band; named at the end."""
    means, halves = torch.tensor([interval(values) for values in columns]).T
    halves = halves.nan_to_num(posinf=0.0)  # one seed has no band
    color, is_perl = COLORS[kind], kind == "perl"
    axes.fill_between(x, means - halves, means + halves, color=color, alpha=0.22)
    axes.plot(x, means, color=color, linewidth=2.4, marker="o" if is_perl else "s",
              markersize=4, linestyle="-" if is_perl else "--")
    axes.annotate(f"{'PeRL' if is_perl else 'GRPO'} {means[-1]:.0f} %", (x[-1], means[-1]),
                  xytext=(7, 0), va="bottom" if is_perl else "top", color=color,
                  textcoords="offset points", weight="bold")

def draw_curves(axes, kind: str, lines) -> None:
    """The worst order over the steps of each seed, thin, and their mean."""
    columns = {}
    for line in lines:
        steps, _, worst, _ = torch.tensor(line["curve"]).T
        axes.plot(steps, 100 * worst, color=COLORS[kind], alpha=0.25, linewidth=0.8)
        for step, value in zip(steps.tolist(), (100 * worst).tolist()):
            columns.setdefault(step, []).append(value)
    if columns:
        draw_line(axes, kind, list(columns), list(columns.values()))

def draw(runs: dict, shares: dict[str, float], path: Path) -> None:
    """Worst order over 40 and over 120 steps; and at the end, by skew of the training set.
    runs: arm -> seed -> line of ablation.jsonl. Nothing is drawn if the picture is of these
    runs and this code already: another version of matplotlib would write other bytes."""
    # The picture notes what it was made from.
    code = Path(__file__).read_text(encoding="utf-8")
    source = hash_of(code, runs)
    if path.exists():
        with Image.open(path) as picture:
            if picture.info.get("Description") == source:
                return
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (short, long, skew) = pyplot.subplots(
        1, 3, figsize=(12, 4.4), sharey=True, layout="constrained")
    for kind in COLORS:
        for axes, name in ((short, kind), (long, f"{kind}-120")):
            draw_curves(axes, kind, runs.get(name, {}).values())
        # The arms of the samples themselves have no share in their names.
        ends = {}
        for share, percent in shares.items():
            lines = runs.get(f"{kind}-{share}".removesuffix("-0.95"), {}).values()
            if lines:
                ends[percent] = [100 * line["all"][1] for line in lines]
        if ends:
            draw_line(skew, kind, list(ends), list(ends.values()))
    for axes, first, last in ((short, 0, 40), (long, 0, 120), (skew, 29, 100)):
        # Room for the names at the lines' ends.
        axes.set_xlim(first - 0.03 * (last - first), last + 0.34 * (last - first))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        for line in runs.get("start", {}).values():
            axes.axhline(100 * line["all"][1], color="gray", linestyle=":")
    short.set(ylim=(0, 100), xlabel="training step (dotted: the start model)",
              ylabel="right in every order, %", title="40 steps")
    long.set(xlabel="training step", title="120 steps")
    skew.set(xlabel="right image first, % (29: balanced)", title="40 steps, by training set")
    short.set_xticks(range(0, 41, 10))
    long.set_xticks(range(0, 121, 20))
    skew.set_xticks(list(shares.values()), ["29", "50", "80", "95 ", "  100"])
    figure.suptitle("Held-out questions answered right in every order of their images",
                    weight="bold")
    figure.savefig(path, dpi=150, pil_kwargs={"optimize": True},
                   metadata={"Description": source})
