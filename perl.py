#!/usr/bin/env python3
"""PeRL in one file: reinforcement learning on multi-image questions whose images are permuted.

Paper: Zhang, Ding, Zhang et al., "PeRL: Permutation-Enhanced Reinforcement Learning for Interleaved
Vision-Language Reasoning", NeurIPS 2025, arXiv 2506.14907. Equation numbers are that paper's.

A vision-language model that is asked "which image shows ...?" often prefers a position to a
picture: reorder the images, keep the meaning, and its answer changes. PeRL trains that away.
One step of it:

  1. Draw questions. Each comes in n_s + 1 orders of its images: as given, and permuted      (Eq. 1)
     n_s times, the right answer moving along ("image 3" becomes "image 1").
  2. The policy answers each order n times: (n_s + 1) * n rollouts of a question.
  3. Rules grade each rollout: 0.9 * right answer + 0.1 * right format.
  4. All rollouts of a question, whatever their order, form ONE group: the advantage is   (Eq. 4-5)
     the reward less the group's mean, over the group's standard deviation.
  5. Groups that teach nothing are left out: equal rewards, or (stage 2) too easy or too hard.
  6. AdamW maximizes the clipped policy objective, each rollout conditioned on the order    (Eq. 6)
     it was sampled from, less beta times the KL divergence from the start model.

Stages: 0 scores the training questions with the start model and resamples them by difficulty,
1 explores (the permutation probability alpha falls from 1 to 0), 2 exploits (goes on from stage 1
with the online filter of point 5). 1 and 2 are presets over plain flags, see PRESETS; beyond them,
1 picks up stage 0's choice of questions, and 2 starts from stage 1's checkpoint.

Where this departs from the paper or from its released code:
  - Standard deviation: the paper's population one; the code's is unbiased, plus 1e-6.
  - How an answer moves is a field of the data (`order_rule`), not code for each data set.
    Statements about "left" and "right" are not negated when images move: they are never permuted.
  - The permutations of a question are distinct, as long as it has any left, and one generator draws
    them for the whole run.
  - A group without variance leaves the loss whole; in the code it dilutes the token mean.
  - The number of updates per rollout batch does not depend on n_s. No dual clip, no KL clamp.

    python perl.py                                       # tiny model, real digits, CPU, minutes
    python perl.py --model Qwen2.5-VL-3B --stage 1       # one GPU
    accelerate launch perl.py --model Qwen2.5-VL-3B      # several GPUs, one copy of the model each
    python perl.py --help                                # every setting

Shapes: Q questions, R = (n_s + 1) * n rollouts of a question; B rows of a batch, P prompt tokens,
T response tokens, D hidden width, V vocabulary.
"""
import argparse
import dataclasses
import functools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.modeling_outputs import BaseModelOutputWithPooling

SAMPLES = Path(__file__).resolve().parent / "data_samples"

# ---- Config: every setting with one line of prose. Defaults are the paper's, where it gives them.


def setting(default, prose: str):
    return field(default=default, metadata={"help": prose})


@dataclass
class Config:
    # what runs
    model: str = setting("tiny", "Hub id, folder, or tiny, Qwen2.5-VL-3B, -7B, -32B, -72B")
    data: str = setting(str(SAMPLES / "train.jsonl"), "training questions (format: README)")
    eval_data: str = setting(str(SAMPLES / "test.jsonl"), "held-out questions; '': no evaluation")
    stage: int = setting(1, "0: score the questions; 1: explore; 2: exploit")
    out: str = setting("", "run folder, shared by the stages; '': runs/MODEL-seedSEED")
    resume: str = setting("", "run folder to go on with; its settings hold and may not change")
    seed: int = setting(0, "seeds data order, permutations and sampling")
    dry_run: bool = setting(False, "check data and settings, show a question in its orders, stop")
    # permutation (Eq. 1)
    n_permutations: int = setting(1, "n_s: permuted orders beside the given one; 0: plain GRPO")
    rollouts_per_order: int = setting(6, "n; follows --n-permutations so that (n_s + 1) * n stays")
    alpha_start: float = setting(1.0, "probability of permuting a question at the first step")
    alpha_end: float = setting(0.0, "the same at the last step; linear in between")
    # reward
    accuracy_weight: float = setting(0.9, "reward for a right answer")
    format_weight: float = setting(0.1, "reward for <think>...</think>...\\boxed{...}")
    # filter
    filter: str = setting("offline", "none; offline: train on stage 0's choice; online: see bounds")
    filter_low: float = setting(0.1, "online: groups of lower mean accuracy are dropped")
    filter_high: float = setting(0.9, "online: groups of higher mean accuracy are dropped")
    max_rounds: int = setting(4, "online: at most so many rounds of sampling to fill a batch")
    score_rollouts: int = setting(10, "stage 0: answers sampled for each question (K)")
    score_target: str = setting("12 11 11 12 15 17 6 5 4 3 3", "stage 0: % of score 0, .1 .. 1")
    score_keep: float = setting(0.5, "stage 0: questions to keep, as a share of those scored")
    # advantage and loss (Eq. 4-6)
    baseline: str = setting("pooled", "group: pooled over all orders of a question, or per-order")
    std_normalization: bool = setting(True, "divide advantages by the group's standard deviation")
    condition: str = setting("permuted", "loss on the order sampled (permuted) or given (clean)")
    clip_low: float = setting(0.2, "the ratio pi / pi_old is clipped below 1 - this")
    clip_high: float = setting(0.2, "the ratio pi / pi_old is clipped above 1 + this")
    beta: float = setting(0.01, "weight of the KL divergence; 0: no reference model is loaded")
    # optimization
    steps: int = setting(0, "rollout batches to train on; 0: what --epochs needs")
    epochs: float = setting(2.0, "passes over the training questions, if steps is 0")
    questions_per_step: int = setting(128, "questions of a rollout batch, over all processes")
    updates_per_step: int = setting(4, "optimizer updates on each rollout batch")
    lr: float = setting(1e-6, "AdamW learning rate, constant")
    weight_decay: float = setting(0.01, "AdamW weight decay")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    freeze_vision: bool = setting(False, "do not train the vision tower")
    # prompts and sampling
    instruction: str = setting(
        "First think about the question as an internal monologue inside <think> </think>, "
        "then give the final answer inside \\boxed{}.", "text after every question")
    max_pixels: int = setting(262144, "images are scaled down to at most this many pixels")
    max_prompt_tokens: int = setting(8192, "longer prompts are dropped and counted, never cut")
    max_new_tokens: int = setting(2048, "longest response, in tokens")
    temperature: float = setting(1.0, "of sampling, and of the log-probabilities in the loss")
    # memory and speed: the method stays the same, random draws and rounding aside
    rollout_batch: int = setting(96, "sequences in one call of generate")
    micro_batch: int = setting(8, "sequences in one forward and backward pass")
    logit_chunk: int = setting(4096, "response tokens whose logits exist at one time")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    cpu_threads: int = setting(0, "torch's threads on a CPU; 0: as many as torch chooses")
    bf16: bool = setting(True, "bfloat16 autocast on a GPU; weights and AdamW stay float32")
    # evaluation, logging, checkpoints; in steps
    eval_every: int = setting(50, "evaluate so often, and at start and end; 0: never")
    eval_orders: int = setting(24, "evaluate each question in all its orders, up to this many")
    eval_questions: int = setting(0, "evaluate on the first so many questions; 0: on all")
    log_every: int = setting(10, "print a rollout and write a whole group so often")
    save_every: int = setting(50, "write a checkpoint so often, and at the end")


PRESETS = {  # over the defaults: the model's, over it the stage's, over both the flags as typed
    "tiny": dict(questions_per_step=16, updates_per_step=1, lr=2e-5, beta=0.0, steps=40,
                 max_new_tokens=64, rollout_batch=512, micro_batch=192,
                 gradient_checkpointing=False, cpu_threads=1, eval_every=10),
    0: dict(),
    1: dict(alpha_start=1.0, alpha_end=0.0, filter="offline"),
    2: dict(alpha_start=0.0, alpha_end=0.0, filter="online"),
}
CHOICES = {"stage": (0, 1, 2), "filter": ("none", "offline", "online"),
           "baseline": ("pooled", "per-order"), "condition": ("permuted", "clean")}
MAY_BE_ZERO = {"seed", "n_permutations", "alpha_start", "alpha_end", "accuracy_weight",
               "format_weight", "filter_low", "clip_low", "clip_high", "beta", "steps", "lr",
               "weight_decay", "eval_every", "eval_questions", "stage", "cpu_threads"}
SHORT_NAMES = {"tiny": str(SAMPLES / "tiny")} | {
    f"Qwen2.5-VL-{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")}


def parse_config(argv: list[str] | None = None) -> Config:
    """Command line -> Config. A setting that makes no sense ends the program and says why."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s [--setting value ...]; --help lists them all")
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(
            "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, choices=CHOICES.get(f.name),
            help=f"{f.metadata['help']} [{f.default!r}]".replace("%", "%%"), **kind)
    typed = vars(parser.parse_args(argv))  # flags on the command line, nothing else
    if typed.get("resume"):
        return resume_config(parser, typed)
    presets = PRESETS.get(typed.get("model", Config.model), {})
    presets = presets | PRESETS[typed.get("stage", Config.stage)]
    cfg = Config(**(presets | typed))
    for name, value in vars(cfg).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in MAY_BE_ZERO):
            parser.error(f"--{name.replace('_', '-')} {value} is too small")
    if "n_permutations" in typed and "rollouts_per_order" not in typed:
        budget = (Config.n_permutations + 1) * Config.rollouts_per_order
        cfg.rollouts_per_order, rest = divmod(budget, cfg.n_permutations + 1)
        if rest:
            parser.error(f"--n-permutations {cfg.n_permutations}: {budget} rollouts do not divide "
                         f"into {cfg.n_permutations + 1} orders; give --rollouts-per-order too")
    shares = [re.fullmatch(r"\d+(\.\d+)?", share) for share in cfg.score_target.split()]
    if len(shares) < 2 or not all(shares) or not any(float(share[0]) for share in shares):
        parser.error(f"--score-target {cfg.score_target!r} is no list of shares such as '40 40 20'")
    for name in ("alpha_start", "alpha_end", "filter_low", "filter_high", "score_keep"):
        if getattr(cfg, name) > 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(cfg, name)} is above 1")
    if cfg.filter_low > cfg.filter_high:
        parser.error(f"--filter-low {cfg.filter_low} is above --filter-high {cfg.filter_high}")
    cfg.out = cfg.out or f"runs/{Path(cfg.model).name}-seed{cfg.seed}"
    return cfg


def resume_config(parser: argparse.ArgumentParser, typed: dict) -> Config:
    """The settings of the run in --resume. A changed one is refused: it would be another run."""
    path = Path(typed["resume"]) / "config.json"
    if not path.exists():
        parser.error(f"--resume: no {path}; name the run folder (--out) of the run to go on with")
    if (path.parent.parent / "config.json").exists():
        parser.error(f"--resume: {path.parent} was set aside by a later run in the folder above it")
    saved = json.loads(path.read_text()) | {"resume": typed["resume"], "out": typed["resume"]}
    for name, value in typed.items():
        if saved[name] != value:
            parser.error(f"--resume: {name} was {saved[name]!r} in {path} and is {value!r} now; "
                         "a changed setting needs a new run")
    return Config(**saved)


# ---- Samples and permutation (Eq. 1) -------------------------------------------------------------

ORDER_RULES = {  # what an answer must look like, and what becomes of it when images change places
    "keep": ("", ""),  # it stays as it is (the paper's S = 1)
    "index": (r"[1-9]\d*", "an image number"),  # is renumbered
    "letter": (r"[A-Z]", "the letter of a movable image"),  # k-th letter: k-th of them; is renamed
    "sequence": (r"[1-9]\d*(\s*,\s*[1-9]\d*)*", "different image numbers, as in '2,1,3'"),
    "never": ("", "")}  # it depends on the order: the images may not change places
MENTION = re.compile(r"<image_(\d+)>")  # mentions image k; a bare <image> is where one stands
CONTROL = re.compile(r"<\|\w+\|>")      # tokens of the chat format have no place in a question


@dataclass(frozen=True)
class Sample:
    """One question. `movable`: 0-based positions whose images may change places (None: all)."""
    id: str
    images: tuple[str, ...]
    question: str
    answer: str
    order_rule: str
    movable: tuple[int, ...] | None = None
    source: str = ""

    def __post_init__(self):
        movable = range(len(self.images)) if self.movable is None else self.movable
        object.__setattr__(self, "images", tuple(self.images))
        object.__setattr__(self, "movable", tuple(sorted(movable)))


def load_samples(path: str | Path) -> list[Sample]:
    """Read a JSONL file of samples. ValueError names file, line and field of what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a JSONL file of samples")
    samples, lines, checked = [], {}, set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        sample = parse_sample(line, path.parent, where)
        if sample.id in lines:
            raise ValueError(f"{where}, field id: {sample.id!r} stands in line {lines[sample.id]} "
                             "already; ids must be unique")
        for image in set(sample.images) - checked:
            check_image(image, path.parent, where)
        checked.update(sample.images)
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: the file holds no samples")
    return samples


def parse_sample(line: bytes, folder: Path, where: str) -> Sample:
    """One JSONL line -> Sample, image paths joined to `folder`. ValueError for anything unfit."""
    def require(holds, name, problem):
        if not holds:
            raise ValueError(f"{where}, field {name}: {problem if name in row else 'is missing'}")

    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a sample is a JSON object, not {type(row).__name__}")
    for name in row:
        require(name in Sample.__dataclass_fields__, name, "is not a field of a sample")
    for name in ("id", "question", "answer", "order_rule"):
        require(isinstance(row.get(name), str) and row[name].strip(), name,
                f"must be a non-empty text, not {row.get(name)!r}")
    row = {"source": "", "movable": None} | row
    require(isinstance(row["source"], str), "source", f"must be a text, not {row['source']!r}")
    images, movable, question = row.get("images"), row["movable"], row["question"]
    require(isinstance(images, list) and images and all(isinstance(i, str) and i for i in images),
            "images", f"must be a list of one or more paths, not {images!r}")
    require(movable is None or isinstance(movable, list)
            and all(type(k) is int and 0 <= k < len(images) for k in movable)
            and len(set(movable)) == len(movable),
            "movable", f"must list distinct 0-based positions below {len(images)}, not {movable!r}")
    require(row["order_rule"] in ORDER_RULES, "order_rule",
            f"{row['order_rule']!r} is none of {', '.join(ORDER_RULES)}")
    require((found := question.count("<image>")) == len(images), "question",
            f"has {found} <image> placeholders for {len(images)} images")
    for k in map(int, MENTION.findall(question)):
        require(1 <= k <= len(images), "question", f"mentions <image_{k}> of {len(images)} images")
    require(not CONTROL.search(question), "question", "holds a control token, <|...|>")
    paths = tuple(os.path.normpath(folder / image) for image in images)
    sample = Sample(**(row | {"images": paths, "answer": row["answer"].strip()}))
    pattern, wanted = ORDER_RULES[sample.order_rule]
    n = len(sample.movable) if sample.order_rule == "letter" else len(images)
    named = [ord(name) - 64 if name.isalpha() else int(name)
             for name in re.findall(r"\d+|[A-Z]", sample.answer)]
    require(not pattern or re.fullmatch(pattern, sample.answer) and max(named) <= n
            and len(set(named)) == len(named),
            "answer", f"{sample.answer!r} is not {wanted}, of {n} (order_rule {sample.order_rule})")
    return sample


def check_image(image: str, folder: Path, where: str) -> None:
    """ValueError unless `image` is a readable picture inside `folder`, links followed."""
    if not Path(image).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}, field images: {image} lies outside the JSONL's folder {folder}")
    try:
        with Image.open(image) as picture:
            picture.load()  # verify() would not notice a truncated file
    except FileNotFoundError:
        raise ValueError(f"{where}, field images: {image} does not exist") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where}, field images: {image} is no readable image ({error})") from None


def permute(sample: Sample, order: tuple[int, ...]) -> Sample:
    """Reorder the images: new_images[j] = images[order[j]]. Answer and mentions follow.     (Eq. 1)

    Example: order (2, 0, 1), order_rule index, answer "3". The third image now stands first, so the
    answer is "1"; a mention <image_1> is now <image_2>. ValueError if `order` is no permutation or
    moves an image that must stay.
    """
    if sorted(order) != list(range(len(sample.images))):
        raise ValueError(f"{sample.id}: {order} is no permutation of {len(sample.images)} images")
    moved = {j for j, k in enumerate(order) if j != k}
    if moved and (sample.order_rule == "never" or not moved <= set(sample.movable)):
        raise ValueError(f"{sample.id}: {order} moves images that must stay (order_rule "
                         f"{sample.order_rule}, movable {sample.movable})")

    def follow(number: str) -> str:  # 1-based image number, before -> after
        return str(order.index(int(number) - 1) + 1)

    answer = sample.answer                                              # y' = Lambda(y, sigma)
    if sample.order_rule == "index":
        answer = follow(answer)
    elif sample.order_rule == "sequence":
        answer = re.sub(r"\d+", lambda match: follow(match[0]), answer)
    elif sample.order_rule == "letter":
        position = order.index(sample.movable[ord(answer) - 65])
        answer = chr(65 + sample.movable.index(position))
    question = MENTION.sub(lambda match: f"<image_{follow(match[1])}>", sample.question)
    images = tuple(sample.images[k] for k in order)
    return dataclasses.replace(sample, images=images, question=question, answer=answer)


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that undoes `order`: permute(permute(s, order), inverse(order)) == s."""
    return tuple(order.index(j) for j in range(len(order)))


def count_orders(sample: Sample) -> int:
    """How many orders of its images the sample allows."""
    return 1 if sample.order_rule == "never" else math.factorial(len(sample.movable))


def draw_orders(sample: Sample, n_permutations: int, alpha: float,
                rng: random.Random) -> list[tuple[int, ...]]:
    """The identity, then n_permutations permuted orders; with probability 1 - alpha, itself again.

    One Bernoulli draw a sample (Algorithm 1). Permuted orders differ from the identity and from
    each other as long as the sample has any left; then all its orders may come again.
    """
    identity = tuple(range(len(sample.images)))
    if rng.random() >= alpha or count_orders(sample) == 1:
        return [identity] * (n_permutations + 1)
    orders, seen = [identity], {identity}
    while len(orders) <= n_permutations:
        order = list(identity)
        for j, k in zip(sample.movable, rng.sample(sample.movable, len(sample.movable))):
            order[j] = k
        if tuple(order) not in seen:
            orders.append(tuple(order))
            seen.add(tuple(order))
        if len(seen) == count_orders(sample):
            seen.clear()
    return orders


def all_orders(sample: Sample, cap: int) -> list[tuple[int, ...]]:
    """Every order the sample allows, identity first; beyond `cap`, a fixed random choice."""
    n_permutations = min(cap, count_orders(sample)) - 1
    return draw_orders(sample, n_permutations, 1.0, random.Random(sample.id))


# ---- Reward: rules that read a response. Training and evaluation share them. ---------------------

DECLARATION = re.compile(
    r"\b(?:answer|(?:correct|right|best|final) (?:option|choice))\b(?:(?!\bif\b)[^.\n:=]){0,80}?"
    r"(?:\b(?:is|be)\b|:|=)[\s:]*(?=((?:[^.\n]|\.(?=\S)){1,300}))", re.IGNORECASE)
IMAGES = re.compile(r"(?:\d|[\s\[\]()#,;>→]|->|and|the|images?)+")  # "image 3", "[3, 1, 2]"
UNIT = re.compile(r"(?<=\d) +(?:[kcm]?m|miles?|ft|k?g|m?l)(?:\^\{?[23]\}?|[²³]|/\w+)+$")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+(?!But\b|However\b)|\n+")  # not behind "B."
# What names an option: a label in front, "(B)", "or C. dogs", "option b"; less surely a bare "B",
# unless it is the word "a".
LABEL = r"\(?([A-Za-z])(?=[).:]|$|,? (?:because|since)\b)"
MARKED = re.compile(rf"^{LABEL}|\(([A-Z])\)|(?<=\s)([A-Z])(?=[).:]\s)|"
                    r"\b(?i:option|choice|answer)\s*:?\s*\(?([A-Za-z])(?![\w'’])")
BARE = re.compile(
    r"(?<![\w'’$\\^(])(?!A\s+(?!(?:is|was|has|and|or|but|as|in|on|because|since|fits|looks|seems|"
    r"appears|shows|matches|would)\b)[a-z])([A-HJ-Z])(?![\w'’(^*+-]|/\d)")
# What takes it back: "not A", "closer than A"; "A is not", "A can be ruled out".
NOT_BEFORE = re.compile(r"(?:\b(?:not|than|neither|nor|unlike|except|instead of|compared to)|n't)"
                        r"(?:\s+(?:the|in|of|option|choice|point|image|box))*\s+\(?$", re.I)
NOT_AFTER = re.compile(r"\)?(?:\s+(?!because|since|as|while|and)\w+){0,4}?\s+(?:(?:is|are|was|does|"
                       r"do|did|can)\s?n[o']t|cannot|incorrect|wrong|ruled out)\b", re.I)
NUMBERS = "zero one two three four five six seven eight nine ten".split()
ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth".split()


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance (escaped ones aside), or None."""
    open_braces, boxes = [], []
    for brace in re.finditer(r"\\boxed\s*\{|(?<!\\)[{}]", text):
        if brace[0] != "}":
            open_braces.append(brace)
        elif open_braces and (start := open_braces.pop())[0] != "{":
            boxes.append((start.end(), brace.start()))
    return text[slice(*max(boxes))].strip() if boxes else None


def extract_answer(response: str) -> str | None:
    r"""What a response states behind </think>: the last \boxed{}; else the last <answer>, closed or
    not; else what follows the last "the answer is". None for nothing, or if <think> stays open."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    if (boxed := last_boxed(text)) is not None:
        return boxed or None
    if tagged := re.findall(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", text, re.DOTALL):
        return tagged[-1].strip() or None
    declared = DECLARATION.findall(text) or [""]
    return re.sub(r"^\((\w+)\)$", r"\1", declared[-1].strip("*_ $")) or None


def extract_choice(response: str, options: list[str] | tuple[str, ...] = ("",) * 26) -> str | None:
    """The letter of the option that a response settles on; None if it names none, or two.

    Behind </think>, in this order: what it states as its answer; a first sentence that is labeled
    ("B. Both images"); the one letter marked as in "(B)"; the last sentence that speaks for one.
    """
    text = re.sub(r"[*`\"]+|\\[()]", "", response.rpartition("</think>")[2]).strip()
    if not text or "<think>" in text:
        return None
    texts = {chr(65 + k): re.sub(rf"^\s*\(?{chr(65 + k)}[).:]\s*", "", option)
             for k, option in enumerate(options[:26])}
    sentences = [extract_answer(text) or ""]
    if not spoken_for(sentences[0], texts) and not re.search(r"\\boxed|<answer>", text):
        listed = dict(reversed(re.findall(r"(?m)^[^\w\n]*([A-Z])([).:].*)$", text)))
        if len(listed) > 1:  # several options, one a line, perhaps with comments: no choice
            for letter, line in listed.items():
                text = text.replace(letter + line, "", 1)
        sentences = SENTENCE_END.split(text.strip())
        if re.match(LABEL, sentences[0]):
            sentences = sentences[:1]
    named = set().union(*(spoken_for(s, texts) for s in sentences if re.search(r"\([A-Z]\)", s)))
    if len(named) != 1:
        named = next(filter(None, (spoken_for(s, texts) for s in reversed(sentences))), set())
    if not named and len(sentences) == 1:
        named = {letter for letter in texts if same_answer(sentences[0], texts[letter])}
    return named.pop() if len(named) == 1 else None


def spoken_for(sentence: str, options: dict[str, str]) -> set[str]:
    """Letters of the options that a sentence speaks for: by marked letters, else by option texts,
    else by bare letters. Negated ones do not count; what follows a "but" counts more."""
    bare = {k: canonical(option) for k, option in sorted(options.items(), key=lambda o: -len(o[1]))}
    worded = re.compile("|".join(rf"(?P<{k}>(?<![\w./{{]){re.escape(option)}(?![\w/]|\.\d))"
                                 for k, option in bare.items() if option) or r"\b\B")
    for clause in reversed(re.split(r"(?i)\b(?:but|however)\b", plain(sentence))):
        for pattern, text in ((MARKED, clause), (worded, canonical(clause)), (BARE, clause)):
            named = {(m.lastgroup or m[m.lastindex]).upper() for m in pattern.finditer(text)
                     if not NOT_BEFORE.search(text[max(0, m.start() - 60):m.start()])
                     and not NOT_AFTER.match(text[m.end():m.end() + 100])}
            if named & options.keys():
                return named & options.keys()
    return set()


@functools.lru_cache(maxsize=65536)
def canonical(text: str) -> str:
    """Text to look for option texts in: "the 2nd picture" -> "second image", "three" -> "3"."""
    text = plain(text).casefold()
    for k, (number, ordinal) in enumerate(zip(NUMBERS, ORDINALS)):
        text = re.sub(rf"\b{number}\b", str(k), text)
        text = re.sub(rf"\b(?:image #?{k}|(?:{ordinal}|{k}(?:st|nd|rd|th)) (?:1|image|picture|"
                      r"photo|option))\b", f"{ordinal} image", text)
    return re.sub(r"^(?:the|an?) (?=\w)", "", text)


def plain(answer: str) -> str:
    r"""Strip what carries no meaning: $, \text{}, bold, a full stop, brackets around one letter."""
    answer = re.sub(r"\s+", " ", answer)
    answer = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})|[£€]", "", answer.replace("\u2212", "-"))
    answer = re.sub(r"√ ?(\d+|\w)", r"\\sqrt{\1}", answer).replace("√", r"\sqrt")
    answer = answer.replace("π", r"\pi ").strip().strip("$*").strip().removesuffix(".").strip()
    return re.sub(r"^\((\w)\)$", r"\1", answer)


def has_format(response: str) -> bool:
    r"""Whether the response is <think>...</think>...\boxed{...}..., with one think block."""
    match = re.fullmatch(r"\s*<think>((?!</?think>).)*</think>(((?!</?think>).)*)", response, re.S)
    return bool(match and last_boxed(match[2]))


def is_correct(response: str, gold: str) -> bool:
    """Whether the response's answer means the same as `gold`. Never evaluates text as code."""
    answer = extract_answer(response)
    return answer is not None and same_answer(answer, gold)


@functools.lru_cache(maxsize=65536)
def same_answer(answer: str, gold: str) -> bool:
    """Compare as text, option letter, yes/no, image numbers; else as mathematics (math-verify)."""
    formulas = plain(answer), plain(gold)
    answer, gold = (text.casefold() for text in formulas)
    if answer == gold:
        return True
    if re.fullmatch(r"[a-z]", gold):
        return extract_choice(formulas[0]) == gold.upper()
    if gold in ("yes", "no", "true", "false"):
        return bool(re.match(rf"{gold}\b(?! (?:and|or)\b)", answer))
    if re.fullmatch(r"\d{1,2}(\s*,\s*\d{1,2})*", gold) and IMAGES.fullmatch(answer):
        return re.findall(r"\d+", answer) == re.findall(r"\d+", gold)  # a sequence: order counts
    if len(answer) > MathJudge.MAX_CHARS or not re.search(r"\d|\\", gold):
        return False  # words that differ are different answers, and no formula is that long
    return MATH_JUDGE.same(*(UNIT.sub("", formula) for formula in formulas))


class MathJudge:
    """math-verify in a process of its own, which ends itself when a question takes too long.

    NOTE: a signal would not do. 9^{9^{9^9}} hangs in one C call; only a watchdog thread outside of
    Python, which faulthandler has, gets a word in. The next question starts a new process.
    """
    SECONDS, MAX_CHARS = 5.0, 500
    PROGRAM = """
import faulthandler, json, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    *texts, seconds = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True)
    answer, gold = (parse(f"${text}$", parsing_timeout=None) for text in texts)
    print(verify(gold, answer, timeout_seconds=None), flush=True)
    faulthandler.cancel_dump_traceback_later()
"""
    process, timeouts = None, 0

    def same(self, answer: str, gold: str) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.PROGRAM], stdin=subprocess.PIPE, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            if self.process.stdout.readline() != "ready\n":
                raise RuntimeError("math-verify does not start; pip install -r requirements.txt")
        print(json.dumps([answer, gold, self.SECONDS]), file=self.process.stdin, flush=True)
        verdict = self.process.stdout.readline()  # empty if the process ended itself
        if not verdict:
            self.process.wait()
            self.timeouts += 1
        return verdict == "True\n"


MATH_JUDGE = MathJudge()


# ---- Model, images and prompts -------------------------------------------------------------------

class Picture(NamedTuple):
    """An image as the vision tower reads it."""
    pixels: torch.Tensor  # (patches, channels * 2 * 14 * 14)
    grid: torch.Tensor    # (1, 3): time, height and width in patches
    tokens: int           # places it takes in the prompt, one for 2 x 2 patches


@dataclass
class Prompt:
    """A question in one order, as the model reads it."""
    sample: Sample
    ids: list[int]
    pictures: list[Picture]


@dataclass
class Processor:
    """What turns samples into prompts, and responses into text."""
    tokenizer: transformers.PreTrainedTokenizerBase
    image_processor: transformers.BaseImageProcessor
    instruction: str
    image_id: int          # the token that stands where an image's features go
    pad_id: int
    eos_ids: list[int]
    banned_ids: list[int]  # image, video, vision: never sampled, and probability 0 in the loss


def load_pretrained(kind, name: str, **options):
    """kind.from_pretrained; SystemExit with one sentence if the checkpoint is not to be had."""
    path = SHORT_NAMES.get(name, name)
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        missing = path.startswith(("/", ".", "~")) and not Path(path).exists()
        reason = "no such folder" if missing else str(error).strip().split("\n")[0]
        raise SystemExit(f"Could not load {path!r} ({reason}). Without a network, pass a local "
                         "folder that holds the checkpoint: --model FOLDER") from None


def load_processor(name: str, cfg: Config) -> Processor:
    """Tokenizer and image processor of a checkpoint.

    NOTE: not AutoProcessor, which wants torchvision for its video part and would preprocess the
    images anew for every order.
    """
    if (kind := load_pretrained(AutoConfig, name).model_type) != "qwen2_5_vl":
        raise SystemExit(f"{name} is a {kind} model; perl.py knows the prompts of qwen2_5_vl only")
    tokenizer = load_pretrained(AutoTokenizer, name)
    image_processor = load_pretrained(AutoImageProcessor, name)
    eos_ids = load_pretrained(GenerationConfig, name).eos_token_id
    image_processor.size = {"longest_edge": cfg.max_pixels, "shortest_edge":  # pixels, both of them
                            min(image_processor.size["shortest_edge"], cfg.max_pixels)}
    eos_ids = {tokenizer.eos_token_id, *(eos_ids if isinstance(eos_ids, list) else [eos_ids])}
    banned = ["vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    return Processor(tokenizer, image_processor, cfg.instruction,
                     tokenizer.convert_tokens_to_ids("<|image_pad|>"), tokenizer.pad_token_id,
                     sorted(eos_ids - {None}),
                     tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in banned]))


def load_model(name: str, cfg: Config,
               device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint in float32: an update of 1e-6 vanishes in bfloat16. Safetensors only."""
    model = load_pretrained(Qwen2_5_VLForConditionalGeneration, name, dtype=torch.float32,
                            use_safetensors=True, attn_implementation="sdpa")
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.model.visual.requires_grad_(not cfg.freeze_vision)
    return model.to(device).eval()


def load_pictures(sample: Sample, processor: Processor) -> dict[str, Picture]:
    """Preprocess every image of a question once, for all its orders. Keys are the image paths."""
    pictures = {}
    for path in dict.fromkeys(sample.images):
        with Image.open(path) as image:
            inputs = processor.image_processor([image.convert("RGB")], return_tensors="pt")
        grid = inputs["image_grid_thw"]
        tokens = int(grid.prod()) // processor.image_processor.merge_size ** 2
        pictures[path] = Picture(inputs["pixel_values"], grid, tokens)
    return pictures


def prompt_text(sample: Sample, processor: Processor) -> str:
    """The prompt in chat format, one <|image_pad|> an image; <image_k> reads "image k"."""
    question = MENTION.sub(r"image \1", sample.question) + "\n" + processor.instruction
    content = [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
               for piece in re.split("(<image>)", question) if piece]
    return processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def encode_prompt(sample: Sample, processor: Processor,
                  pictures: dict[str, Picture] | None = None) -> Prompt:
    """Sample -> Prompt, each image placeholder widened to its image's tokens. Never truncates."""
    pictures = pictures or load_pictures(sample, processor)
    in_order = [pictures[path] for path in sample.images]
    pieces = prompt_text(sample, processor).split("<|image_pad|>")
    widened = [piece + "<|image_pad|>" * picture.tokens for piece, picture in zip(pieces, in_order)]
    ids = processor.tokenizer("".join(widened) + pieces[-1], add_special_tokens=False).input_ids
    found, wanted = ids.count(processor.image_id), sum(picture.tokens for picture in in_order)
    if len(pieces) != len(in_order) + 1 or found != wanted:
        raise ValueError(f"{sample.id}: {found} image tokens in the prompt, {wanted} in its images")
    return Prompt(sample, ids, in_order)


def prompt_length(sample: Sample, processor: Processor) -> int:
    """Tokens of a prompt, from the sizes of its images. ValueError for a strip of 200 : 1."""
    images = processor.image_processor
    length = len(processor.tokenizer(prompt_text(sample, processor)).input_ids)
    for path in sample.images:
        with Image.open(path) as image:
            try:
                patches = images.get_number_of_image_patches(image.height, image.width)
            except ValueError as error:
                raise ValueError(f"{sample.id}, field images: {path}: {error}") from None
        length += patches // images.merge_size ** 2 - 1
    return length


def load_questions(path: str, processor: Processor, cfg: Config,
                   accelerator: Accelerator) -> list[Sample]:
    """Samples whose prompts are short enough; the others are counted as dropped."""
    try:
        samples = load_samples(path)
        kept = [s for s in samples if prompt_length(s, processor) <= cfg.max_prompt_tokens]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    accelerator.print(f"{path}: {len(kept)} questions, {len(samples) - len(kept)} dropped whose "
                      f"prompts exceed {cfg.max_prompt_tokens} tokens")
    if not kept:
        raise SystemExit(f"{path}: none left; raise --max-prompt-tokens or lower --max-pixels")
    return kept


def encode_images(model, prompts: list[Prompt]) -> dict[int, torch.Tensor]:
    """Run the vision tower once over the distinct pictures: id(picture) -> features (tokens, D).

    It encodes each image on its own, so all orders and rollouts of a question can share them. They
    share the Picture object too, whose id tells it from others.
    """
    distinct = list({id(p): p for prompt in prompts for p in prompt.pictures}.values())
    pixels = torch.cat([picture.pixels for picture in distinct]).to(model.device)
    grids = torch.cat([picture.grid for picture in distinct]).to(model.device)
    features = model.get_image_features(pixels, grids).pooler_output
    return {id(picture): feature for picture, feature in zip(distinct, features)}


def collate(prompts: list[Prompt], responses: list[list[int]], features: dict[int, torch.Tensor],
            processor: Processor, device: torch.device) -> tuple[dict, torch.Tensor]:
    """Rows [padding, prompt | response, padding]: every response starts in the same column.

    Returns the model's inputs and the response mask (B, T). Example: prompts of 2 and 3 tokens with
    responses of 2 and 1 (for sampling, responses are empty):
        0 p p | r r        attention 0 1 1 1 1        response mask 1 1
        p p p | r 0                  1 1 1 1 0                      1 0
    NOTE: without mm_token_type_ids the model falls back to 1-D positions without a word.
    """
    P, T = max(len(prompt.ids) for prompt in prompts), max(map(len, responses))
    ids = torch.full((len(prompts), P + T), processor.pad_id)                       # (B, P + T)
    attention = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        columns = slice(P - len(prompt.ids), P + len(response))
        ids[row, columns] = torch.tensor(prompt.ids + response)
        attention[row, columns] = 1
    in_order = [picture for prompt in prompts for picture in prompt.pictures]
    inputs = {"input_ids": ids, "attention_mask": attention,
              "mm_token_type_ids": (ids == processor.image_id).int(),
              "image_grid_thw": torch.cat([picture.grid for picture in in_order])}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(
        pooler_output=[features[id(picture)] for picture in in_order])}
    return inputs, inputs["attention_mask"][:, P:].bool()


def autocast(model, cfg: Config):
    """bfloat16 arithmetic on a GPU; nothing on a CPU."""
    on_gpu = model.device.type == "cuda"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.bf16 and on_gpu)


# ---- Rollouts ------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One response to one order of one question: the currency between sampling, reward and loss."""
    prompt: Prompt             # what the loss is conditioned on: see --condition
    order: tuple[int, ...]     # image order it was sampled from
    gold: str                  # right answer in that order
    ids: list[int]             # response tokens, end token included
    text: str
    truncated: bool            # no end token within max_new_tokens
    accuracy: float = 0.0
    format: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: torch.Tensor | None = None  # (T,) under the policy that sampled it
    ref_logprobs: torch.Tensor | None = None  # (T,) under the frozen start model


@torch.no_grad()
def generate(model, processor: Processor, prompts: list[Prompt], n: int, cfg: Config,
             greedy: bool = False) -> list[list[list[int]]]:
    """n responses to each prompt, in the prompts' order: token ids up to and with the end token."""
    model.eval()  # NOTE: train mode with gradient checkpointing would switch the KV cache off
    longest_first = sorted(range(len(prompts)), key=lambda k: -len(prompts[k].ids))
    rows = [k for k in longest_first for _ in range(n)]
    responses = [[] for _ in prompts]
    sampling = GenerationConfig(  # from the very distribution that the loss scores; or greedy
        max_new_tokens=cfg.max_new_tokens, do_sample=not greedy,
        temperature=1.0 if greedy else cfg.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        suppress_tokens=processor.banned_ids, pad_token_id=processor.pad_id,
        eos_token_id=processor.eos_ids)
    # NOTE: what it leaves None, generate fills from the checkpoint's own; Qwen2.5-VL's say
    # top_k = 1, repetition_penalty = 1.05. So it takes their place meanwhile.
    own, model.generation_config = model.generation_config, sampling
    starts = range(0, len(rows), cfg.rollout_batch)
    for start in tqdm(starts, "generate", leave=False, disable=None):
        batch = rows[start:start + cfg.rollout_batch]
        chosen = [prompts[k] for k in batch]
        with autocast(model, cfg):
            features = encode_images(model, chosen)
            inputs, _ = collate(chosen, [[]] * len(chosen), features, processor, model.device)
            output = model.generate(**inputs, generation_config=sampling)           # (B, P + T)
        for k, tail in zip(batch, output[:, inputs["input_ids"].shape[1]:].tolist()):
            ends = [t for t, token in enumerate(tail) if token in processor.eos_ids]
            responses[k].append(tail[:ends[0] + 1] if ends else tail)
    model.generation_config = own  # checkpoints keep it
    return responses


def sample_groups(model, processor: Processor, samples: list[Sample], orders: list[list[tuple]],
                  n: int, cfg: Config, greedy: bool = False) -> list[list[Rollout]]:
    """Each sample in each of its orders, n graded responses an order: a list of rollouts a sample.

    Within a list, rollouts stand order by order: the first n answer the identity.
    """
    prompts = []
    for sample, its_orders in zip(samples, orders):
        pictures = load_pictures(sample, processor)
        prompts.append([encode_prompt(permute(sample, o), processor, pictures) for o in its_orders])
    flat = [prompt for group in prompts for prompt in group]
    responses = iter(generate(model, processor, flat, n, cfg, greedy))
    groups = []
    for its_prompts, its_orders in zip(prompts, orders):
        groups.append([])
        for prompt, order in zip(its_prompts, its_orders):
            scored_on = its_prompts[0] if cfg.condition == "clean" else prompt
            groups[-1] += [grade(scored_on, order, prompt.sample.answer, ids, processor, cfg)
                           for ids in next(responses)]
    return groups


def grade(prompt: Prompt, order: tuple[int, ...], gold: str, ids: list[int], processor: Processor,
          cfg: Config) -> Rollout:
    """Response tokens -> Rollout with its rewards."""
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    accuracy, well_formed = float(is_correct(text, gold)), float(has_format(text))
    return Rollout(prompt, order, gold, ids, text, ids[-1] not in processor.eos_ids, accuracy,
                   well_formed, cfg.accuracy_weight * accuracy + cfg.format_weight * well_formed)


# ---- Advantages and filter -----------------------------------------------------------------------

def group_advantages(rewards: torch.Tensor, std_normalization: bool = True) -> torch.Tensor:
    """Rewards (Q, R) -> advantages (Q, R); a row holds ALL rollouts of a question.      (Eq. 4-5)

    Rows without variance are zero. Example: [[1, 0, 0, 1], [1, 1, 1, 1]] gives
    [[1, -1, -1, 1], [0, 0, 0, 0]].
    """
    rewards = torch.as_tensor(rewards)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)                    # r - mean(r)
    if std_normalization:
        std = rewards.std(dim=1, keepdim=True, correction=0)                    # (Q, 1)
        advantages = advantages / std.clamp_min(torch.finfo(rewards.dtype).tiny)
    varied = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)               # (Q, 1)
    return advantages.where(varied, torch.zeros_like(advantages))


def set_advantages(groups: list[list[Rollout]], cfg: Config) -> None:
    """Write each rollout's advantage; --baseline per-order takes each order as its own group."""
    for group in groups:
        rewards = torch.tensor([rollout.reward for rollout in group])
        rows = cfg.n_permutations + 1 if cfg.baseline == "per-order" else 1
        advantages = group_advantages(rewards.view(rows, -1), cfg.std_normalization)
        for rollout, advantage in zip(group, advantages.flatten().tolist()):
            rollout.advantage = advantage


VERDICTS = ("kept", "all_right", "all_wrong", "too_easy", "too_hard", "flat")


def verdict(group: list[Rollout], low: float, high: float) -> str:
    """What becomes of a group. Kept: advantages, and a mean accuracy within [low, high].

    Example, bounds .1 and .9, 12 rollouts: 6 right is kept, 11 right too_easy, 12 right all_right.
    flat: no advantages for another reason, as with the per-order baseline.
    """
    mean = sum(rollout.accuracy for rollout in group) / len(group)
    if low <= mean <= high and any(rollout.advantage != 0 for rollout in group):
        return "kept"
    if mean in (0, 1):
        return "all_right" if mean else "all_wrong"
    if low <= mean <= high:
        return "flat"
    return "too_easy" if mean > high else "too_hard"


def resample_by_difficulty(scores: list[float], target: list[float], size: int,
                           rng: random.Random) -> list[int]:
    """Indices of about `size` questions, drawn so that their scores follow the histogram `target`.

    Bin k of len(target) bins holds the scores nearest to k / (len(target) - 1). A bin that is short
    of questions gives all it has; none is drawn twice. Example: 100 scores of 1.0 and 10 of 0.5,
    target half and half, size 40: the ten of 0.5 and twenty of 1.0.
    """
    bins = [[] for _ in target]
    for index, score in enumerate(scores):
        bins[round(score * (len(target) - 1))].append(index)
    kept, ends = [], [round(size * sum(target[:k]) / sum(target)) for k in range(len(target) + 1)]
    for members, start, end in zip(bins, ends, ends[1:]):  # quotas that add up to size
        kept += rng.sample(members, min(end - start, len(members)))
    return sorted(kept)


# ---- Log-probabilities and loss (Eq. 6) ----------------------------------------------------------

def response_logprobs(model, processor: Processor, rollouts: list[Rollout],
                      cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, T) of the response tokens at the sampling temperature, and their mask.

    Logits exist for `logit_chunk` tokens at a time and are made again in the backward pass: 152k
    floats for each token of a batch would not fit. Behind a response's end stand zeros.
    """
    prompts, responses = [r.prompt for r in rollouts], [r.ids for r in rollouts]
    with autocast(model, cfg):
        features = encode_images(model, prompts)
        inputs, mask = collate(prompts, responses, features, processor, model.device)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state       # (B, P + T, D)
        T = mask.shape[1]
        hidden = hidden[:, -T - 1:-1][mask]  # what comes before each token       (tokens, D)
        targets = inputs["input_ids"][:, -T:][mask]                             # (tokens,)
        chunks = [checkpoint(token_logprobs, model.lm_head, h, t, processor.banned_ids,
                             cfg.temperature, use_reentrant=False)
                  for h, t in zip(hidden.split(cfg.logit_chunk), targets.split(cfg.logit_chunk))]
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(chunks)), mask


def token_logprobs(lm_head, hidden: torch.Tensor, targets: torch.Tensor, banned_ids: list[int],
                   temperature: float) -> torch.Tensor:
    """Hidden states (N, D) and the tokens that followed (N,) -> their log-probabilities (N,)."""
    logits = lm_head(hidden).float()                                            # (N, V)
    logits[:, banned_ids] = -torch.inf  # as in sampling, where they are suppressed
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None]).squeeze(1)


@torch.no_grad()
def store_logprobs(model, processor: Processor, rollouts: list[Rollout], name: str,
                   cfg: Config) -> None:
    """Write the log-probabilities under `model` into the field `name` of each rollout."""
    model.eval()
    for batch in micro_batches(rollouts, cfg):
        logprobs, _ = response_logprobs(model, processor, batch, cfg)
        for rollout, row in zip(batch, logprobs):
            setattr(rollout, name, row[:len(rollout.ids)].clone())


def micro_batches(rollouts: list[Rollout], cfg: Config) -> list[list[Rollout]]:
    """Rollouts in batches of like length, longest first: running out of memory shows at once."""
    rollouts = sorted(rollouts, key=lambda r: -len(r.prompt.ids) - len(r.ids))
    return [rollouts[k:k + cfg.micro_batch] for k in range(0, len(rollouts), cfg.micro_batch)]


def stack(rows: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Rows of unequal length -> (B, T), zeros behind; None if the rows are None."""
    return None if rows[0] is None else pad_sequence(rows, batch_first=True)


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor,
                ref_logprobs: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor, *,
                clip_low: float, clip_high: float, beta: float,
                denominator: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Clipped surrogate less beta * KL, summed over kept tokens, over `denominator`.      (Eq. 6)

    logprobs, old_logprobs, ref_logprobs, mask: (B, T); advantages: (B,). Returns a scalar loss and
    two sums over tokens: `kl`, and `clipped`, how many lost their gradient. With the tokens of the
    whole update, on all processes, as denominator, micro-batches of any size add up to the same.
    """
    mask, advantages = mask.bool(), advantages[:, None]                         # (B, T), (B, 1)
    ratio = (logprobs - old_logprobs).where(mask, 0.0).exp()                    # pi / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # On policy the ratio is 1 and the sum near zero: the gradient counts, not the value.
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        log_ratio = (ref_logprobs - logprobs).where(mask, 0.0)
        kl = log_ratio.exp() - log_ratio - 1                                    # k3 estimate
    loss = -((objective - beta * kl) * mask).sum() / denominator
    n_clipped = ((clipped * advantages < ratio * advantages) & mask).sum()
    return loss, {"kl": float((kl.detach() * mask).sum()), "clipped": float(n_clipped)}


# ---- Evaluation inside training: does the answer depend on the order of the images? --------------

def evaluate(model, processor: Processor, samples: list[Sample], cfg: Config,
             accelerator: Accelerator) -> dict:
    """Greedy answers to every question in all its orders, up to cfg.eval_orders. Shares in [0, 1]:

    eval_accuracy, the mean over orders; eval_worst, right in every order; eval_bias, best order
    less worst, the paper's p(x_max) - p(x_min) (A.5); eval_sources, the accuracy by `source`.
    """
    mine = samples[accelerator.process_index::accelerator.num_processes]
    orders = [all_orders(sample, cfg.eval_orders) for sample in mine]
    groups = sample_groups(model, processor, mine, orders, 1, cfg, greedy=True)
    rows = gather_object([(sample.source, [rollout.accuracy for rollout in group])
                          for sample, group in zip(mine, groups)])
    by_source = {}
    for source, right in sorted(rows):
        by_source.setdefault(source, []).append(sum(right) / len(right))
    return {"eval_accuracy": sum(map(sum, by_source.values())) / len(rows),
            "eval_worst": sum(min(right) for _, right in rows) / len(rows),
            "eval_bias": sum(max(right) - min(right) for _, right in rows) / len(rows),
            "eval_sources": {s: sum(means) / len(means) for s, means in by_source.items()}}


# ---- Run folder, checkpoint and resume -----------------------------------------------------------

def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def append_line(path: Path, row: dict) -> None:
    """Add a row to a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSONL file that append_line wrote; a last line torn by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def newest(cfg: Config, pattern: str) -> Path | None:
    """What matches in the run folder, with the highest numbers: checkpoint-100, stage1-2/.. ."""
    return max(Path(cfg.out).glob(pattern), default=None, key=lambda path: [
        int(number) for number in re.findall(r"\d+", str(path.relative_to(cfg.out)))])


def open_run(cfg: Config, accelerator: Accelerator) -> None:
    """Make the run folder. Its top is the current run: an earlier one in it, of stage 1 say, moves
    to stage1-1/, stage1-2/ .., where later stages find it. Nothing is lost."""
    out = Path(cfg.out)
    if accelerator.is_main_process and not cfg.resume:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.json").exists():
            stage = json.loads((out / "config.json").read_text())["stage"]
            archive = out / f"stage{stage}-{1 + len(list(out.glob(f'stage{stage}-*')))}"
            archive.mkdir()
            for entry in sorted(out.iterdir()):
                if not entry.match("stage?-*"):
                    os.replace(entry, archive / entry.name)
            print(f"the earlier run in {out}, of stage {stage}, moved to {archive}")
        shutil.copy(__file__, out / "perl.py")
        write_atomic(out / "config.json", json.dumps(vars(cfg), indent=1))
    accelerator.wait_for_everyone()
    world, orders, n = accelerator.num_processes, cfg.n_permutations + 1, cfg.rollouts_per_order
    rollouts = cfg.questions_per_step * orders * n
    accelerator.print(
        "config: " + " ".join(f"{name}={value!r}" for name, value in vars(cfg).items())
        + f"\npython {sys.version.split()[0]}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, accelerate {accelerate.__version__}; {world} process(es) on "
        f"{accelerator.device}\nrun folder: {out}\nbatch: {cfg.questions_per_step} questions x "
        f"{orders} orders x {n} = {rollouts} rollouts, {cfg.updates_per_step} update(s), at most "
        f"{math.ceil(rollouts / world / cfg.micro_batch)} micro-batches a process")


@dataclass
class State:
    """What a run carries over a restart, beside weights and optimizer."""
    rng: random.Random                             # data order, permutations; same on all processes
    step: int = 0                                  # steps done
    pool: list[int] = field(default_factory=list)  # questions left in this epoch


def seed_torch(cfg: Config, step: int, accelerator: Accelerator) -> None:
    """Each step seeds its sampling, so that a resumed run draws what an unbroken one would."""
    seed = random.Random(f"{cfg.seed}, {step}, {accelerator.process_index}").getrandbits(60)
    torch.manual_seed(seed)


def save_checkpoint(cfg: Config, model, processor: Processor, optimizer, state: State,
                    accelerator: Accelerator) -> None:
    """Write OUT/checkpoint-STEP, which from_pretrained loads; then remove the one before."""
    if accelerator.is_main_process:
        out = Path(cfg.out)
        temporary, final = out / "checkpoint.tmp", out / f"checkpoint-{state.step}"
        shutil.rmtree(temporary, ignore_errors=True)
        for part in (model, processor.tokenizer, processor.image_processor):
            part.save_pretrained(temporary)
        torch.save({"step": state.step, "pool": state.pool, "rng": state.rng.getstate(),
                    "optimizer": optimizer.state_dict()}, temporary / "training_state.pt")
        os.replace(temporary, final)
        for other in set(out.glob("checkpoint-*")) - {final}:
            shutil.rmtree(other)
    accelerator.wait_for_everyone()


def load_state(cfg: Config, folder: Path | None, optimizer, state: State,
               accelerator: Accelerator) -> None:
    """Restore all that save_checkpoint wrote beside the model; cut the logs back to that step."""
    if folder:
        saved = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        state.step, state.pool = saved["step"], saved["pool"]
        state.rng.setstate(saved["rng"])
    if accelerator.is_main_process:
        for path in (Path(cfg.out) / "metrics.jsonl", Path(cfg.out) / "rollouts.jsonl"):
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in read_lines(path)
                                       if folder and row["step"] <= state.step))
    accelerator.print(f"resumed {cfg.out} after step {state.step}")


def catch_interrupt() -> threading.Event:
    """First Ctrl-C (or SIGTERM): finish the step, save, stop. Second: stop at once."""
    stop = threading.Event()

    def handle(number, frame):
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this step (again: at once)", flush=True)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


# ---- Stage 0: score the questions with the start model -------------------------------------------

def score(cfg: Config, processor: Processor, samples: list[Sample],
          accelerator: Accelerator) -> None:
    """Answer each training question K times. Writes scores.json, and the ids kept in kept.json."""
    path, target = Path(cfg.out) / "scores.json", [float(s) for s in cfg.score_target.split()]
    world, rank = accelerator.num_processes, accelerator.process_index
    model = load_model(cfg.model, cfg, accelerator.device)
    scores = json.loads(path.read_text()) if path.exists() else {}  # of the run that goes on
    for start in tqdm(range(0, len(samples), cfg.questions_per_step), "score", disable=None):
        batch = samples[start:start + cfg.questions_per_step]
        if all(sample.id in scores for sample in batch):
            continue
        seed_torch(cfg, start, accelerator)
        mine = batch[rank::world]
        orders = [all_orders(sample, 1) for sample in mine]  # as given
        groups = sample_groups(model, processor, mine, orders, cfg.score_rollouts, cfg)
        scores |= dict(gather_object([(sample.id, sum(r.accuracy for r in group) / len(group))
                                      for sample, group in zip(mine, groups)]))
        if accelerator.is_main_process:
            write_atomic(path, json.dumps(scores, indent=0))
    values = [scores[sample.id] for sample in samples]
    size = round(cfg.score_keep * len(samples))
    kept = resample_by_difficulty(values, target, size, random.Random(cfg.seed))
    if not kept:
        raise SystemExit(f"--score-target {cfg.score_target!r} keeps no question of {path}")
    if accelerator.is_main_process:
        write_atomic(path.with_name("kept.json"), json.dumps([samples[k].id for k in kept]))
    for title, some in (("scored", values), ("kept", [values[k] for k in kept])):
        counts = [sum(round(v * (len(target) - 1)) == k for v in some) for k in range(len(target))]
        accelerator.print(f"{title} {len(some)} questions, mean {sum(some) / len(some):.2f}, "
                          f"from score 0 to 1: {' '.join(map(str, counts))}")


# ---- Training (Algorithm 1) ----------------------------------------------------------------------

def draw_questions(state: State, n_questions: int, k: int) -> list[int]:
    """The next k question numbers; every epoch is a fresh shuffle."""
    drawn = []
    while len(drawn) < k:
        if not state.pool:
            state.pool = state.rng.sample(range(n_questions), n_questions)
        drawn.append(state.pool.pop())
    return drawn


def collect_groups(model, processor: Processor, questions: list[Sample], alpha: float, cfg: Config,
                   state: State, accelerator: Accelerator) -> dict[str, list]:
    """This process's groups of rollouts for a step, by their verdicts.

    With the online filter, questions are drawn on for groups that were dropped, until every process
    has its share of the batch or cfg.max_rounds is reached. All processes draw the same questions
    and orders, and take every num_processes-th of them.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    online = cfg.filter == "online"
    low, high = (cfg.filter_low, cfg.filter_high) if online else (0.0, 1.0)
    share = missing = cfg.questions_per_step // world
    groups = {name: [] for name in VERDICTS}
    for _ in range(cfg.max_rounds if online else 1):
        chosen = [questions[k] for k in draw_questions(state, len(questions), missing * world)]
        orders = [draw_orders(q, cfg.n_permutations, alpha, state.rng) for q in chosen]
        sampled = sample_groups(model, processor, chosen[rank::world], orders[rank::world],
                                cfg.rollouts_per_order, cfg)
        set_advantages(sampled, cfg)
        for group in sampled:
            groups[verdict(group, low, high)].append(group)
        missing = max(gather_object([share - len(groups["kept"])]))
        if missing <= 0:
            break
    return groups


def update(model, ref_model, optimizer, processor: Processor, kept: list[list[Rollout]],
           cfg: Config, accelerator: Accelerator) -> tuple[dict[str, float], float]:
    """Train on the kept groups, in cfg.updates_per_step parts.

    Returns sums over this process's tokens (how many, KL, clipped) and the mean gradient norm.
    """
    rollouts = [rollout for group in kept for rollout in group]
    if cfg.updates_per_step > 1:  # with one update, the policy trained is the one that sampled
        store_logprobs(model, processor, rollouts, "old_logprobs", cfg)
    if ref_model is not None:
        store_logprobs(ref_model, processor, rollouts, "ref_logprobs", cfg)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    sums, norms, parts = {"tokens": 0.0, "kl": 0.0, "clipped": 0.0}, [], cfg.updates_per_step
    model.train()
    for u in range(parts):
        part = kept[len(kept) * u // parts:len(kept) * (u + 1) // parts]
        some = [rollout for group in part for rollout in group]
        mine = sum(len(r.ids) for r in some)
        tokens = total({"tokens": mine}, accelerator)["tokens"]
        if tokens == 0:  # NOTE: AdamW moves weights on zero gradients too. All processes skip.
            continue
        for batch in micro_batches(some, cfg):
            logprobs, mask = response_logprobs(model, processor, batch, cfg)
            old = stack([r.old_logprobs for r in batch])
            loss, stats = policy_loss(
                logprobs, logprobs.detach() if old is None else old,
                stack([r.ref_logprobs for r in batch]),
                torch.tensor([r.advantage for r in batch], device=mask.device), mask,
                clip_low=cfg.clip_low, clip_high=cfg.clip_high, beta=cfg.beta, denominator=tokens)
            loss.backward()
            sums = {name: value + stats.get(name, 0.0) for name, value in sums.items()}
        for weight in weights if accelerator.num_processes > 1 else []:
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = accelerator.reduce(grad, "sum")
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        sums["tokens"] += mine
    model.eval()
    return sums, sum(norms) / max(len(norms), 1)


def total(values: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Each value summed over all processes."""
    rows = gather_object([values])
    return {name: sum(row[name] for row in rows) for name in values}


def step_metrics(groups: dict[str, list], sums: dict[str, float],
                 accelerator: Accelerator) -> dict[str, float]:
    """Metrics of one step over all processes. The README says what is healthy."""
    rollouts = [rollout for some in groups.values() for group in some for rollout in group]
    sums = total(sums | {
        "rollouts": len(rollouts), "accuracy": sum(r.accuracy for r in rollouts),
        "format": sum(r.format for r in rollouts), "reward": sum(r.reward for r in rollouts),
        "length": sum(len(r.ids) for r in rollouts),
        "truncated": sum(r.truncated for r in rollouts)}, accelerator)
    counts = total({name: len(some) for name, some in groups.items()}, accelerator)
    kept, tokens = counts.pop("kept"), max(sums["tokens"], 1)
    means = {name: sums[name] / sums["rollouts"]
             for name in ("accuracy", "format", "reward", "length", "truncated")}
    return {**means, "kept": kept, "dropped": sum(counts.values()), **counts,
            "kl": sums["kl"] / tokens, "clip_fraction": sums["clipped"] / tokens}


def step_line(m: dict, steps: int) -> str:
    """The metrics of a step for people: one dense line, and one where it was evaluated."""
    line = f"step {m['step']}/{steps}"
    if "accuracy" in m:
        dropped = ", ".join(f"{m[name]} {name.replace('_', ' ')}" for name in VERDICTS[1:]
                            if m[name])
        line += (f" | acc {m['accuracy']:.2f} fmt {m['format']:.2f} | kept {m['kept']}/"
                 f"{m['kept'] + m['dropped']}" + (f" ({dropped})" if dropped else "")
                 + f" | len {m['length']:.0f} cut {m['truncated']:.0%} | kl {m['kl']:.3f} clip "
                 f"{m['clip_fraction']:.2f} grad {m['grad_norm']:.2f} | gen "
                 f"{m['seconds_sample']:.1f}s train {m['seconds_update']:.1f}s | "
                 f"{m['peak_gb']:.1f} GB")
    if "eval_accuracy" in m:
        line += (f"\n  eval | accuracy {m['eval_accuracy']:.3f} worst order {m['eval_worst']:.3f} "
                 f"bias {m['eval_bias']:.3f} | " + " ".join(
                     f"{source} {share:.2f}" for source, share in m["eval_sources"].items()))
    return line


def peak_gb() -> float:
    """Peak memory in GB: of the GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def log_group(path: Path, step: int, group: list[Rollout]) -> None:
    """Write a group to rollouts.jsonl and print its first rollout."""
    for r in group:
        append_line(path, {"step": step, "id": r.prompt.sample.id, "order": r.order,
                           "question": r.prompt.sample.question, "gold": r.gold,
                           "response": r.text, "accuracy": r.accuracy, "format": r.format,
                           "reward": r.reward, "advantage": r.advantage})
    r = group[0]
    print(f"  {r.prompt.sample.id} in order {r.order}: {r.prompt.sample.question}\n  > {r.text}\n"
          f"  gold {r.gold} | accuracy {r.accuracy:.0f} format {r.format:.0f} "
          f"reward {r.reward:.1f} advantage {r.advantage:+.2f}")


def pick_up(cfg: Config, questions: list[Sample],
            accelerator: Accelerator) -> tuple[list[Sample], str]:
    """What earlier stages left: the questions to train on, and where the policy starts."""
    start, scored = cfg.model, None
    if cfg.filter == "offline" and (scored := newest(cfg, "stage0-*/kept.json")):
        kept = set(json.loads(scored.read_text()))
        if lost := kept - {question.id for question in questions}:
            raise SystemExit(f"{scored} names {len(lost)} questions that {cfg.data} has not, such "
                             f"as {min(lost)!r}; score these data with --stage 0")
        questions = [question for question in questions if question.id in kept]
    if cfg.stage == 2 and (trained := newest(cfg, "stage1-*/checkpoint-*")):
        start = str(trained)
    accelerator.print(f"training on {len(questions)} questions ({scored or 'all'}), on from {start}")
    return questions, start


def train(cfg: Config, processor: Processor, questions: list[Sample], held_out: list[Sample],
          accelerator: Accelerator) -> None:
    """Algorithm 1: sample permuted groups, drop what teaches nothing, update the policy."""
    out, is_main = Path(cfg.out), accelerator.is_main_process
    questions, start = pick_up(cfg, questions, accelerator)
    held_out = held_out[:cfg.eval_questions or None] if cfg.eval_every else []
    steps = cfg.steps or math.ceil(cfg.epochs * len(questions) / cfg.questions_per_step)

    resumed = newest(cfg, "checkpoint-*") if cfg.resume else None
    model = load_model(str(resumed or start), cfg, accelerator.device)
    ref_model = load_model(start, cfg, accelerator.device) if cfg.beta else None
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad],
                                  lr=cfg.lr, weight_decay=cfg.weight_decay)
    state = State(random.Random(cfg.seed))
    if cfg.resume:
        load_state(cfg, resumed, optimizer, state, accelerator)
    stop = catch_interrupt()

    for step in range(0 if held_out and not resumed else state.step + 1, steps + 1):
        metrics, clock = {"step": step}, time.time()
        seed_torch(cfg, step, accelerator)
        if step > 0:  # step 0 evaluates the start
            progress = (step - 1) / max(steps - 1, 1)
            alpha = cfg.alpha_start + (cfg.alpha_end - cfg.alpha_start) * progress
            groups = collect_groups(model, processor, questions, alpha, cfg, state, accelerator)
            sampled = time.time()
            sums, grad_norm = update(model, ref_model, optimizer, processor, groups["kept"], cfg,
                                     accelerator)
            metrics |= step_metrics(groups, sums, accelerator) | {
                "grad_norm": grad_norm, "alpha": alpha, "lr": cfg.lr,
                "seconds_sample": sampled - clock, "seconds_update": time.time() - sampled,
                "peak_gb": peak_gb(), "grader_timeouts": MATH_JUDGE.timeouts}
            if is_main and (step - 1) % cfg.log_every == 0:
                log_group(out / "rollouts.jsonl", step, sum(groups.values(), [])[0])
        clock = time.time()
        if held_out and (step % cfg.eval_every == 0 or step == steps):
            metrics |= evaluate(model, processor, held_out, cfg, accelerator)
            metrics["seconds_eval"] = time.time() - clock
        accelerator.print(step_line(metrics, steps))
        if is_main:
            append_line(out / "metrics.jsonl", metrics)
        state.step, last = step, step == steps or any(gather_object([stop.is_set()]))
        if last or step > 0 and step % cfg.save_every == 0:
            save_checkpoint(cfg, model, processor, optimizer, state, accelerator)
        if last:
            break
    accelerator.print(f"done: {newest(cfg, 'checkpoint-*')}" if state.step == steps else
                      f"stopped after step {state.step}; go on with --resume {out}")


def dry_run(cfg: Config, processor: Processor, questions: list[Sample]) -> None:
    """Show what the model would read: a question with the most images, in its orders."""
    sample = max(questions, key=lambda q: len(q.images))
    for order in draw_orders(sample, cfg.n_permutations, 1.0, random.Random(cfg.seed)):
        permuted = permute(sample, order)
        print(f"order {order}, {len(encode_prompt(permuted, processor).ids)} tokens, answer "
              f"{permuted.answer}: {prompt_text(permuted, processor)}")


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    accelerator = Accelerator()
    if cfg.cpu_threads:  # more are slower beside another busy process, and round differently
        torch.set_num_threads(cfg.cpu_threads)
    if cfg.questions_per_step % accelerator.num_processes:
        raise SystemExit(f"--questions-per-step {cfg.questions_per_step} does not divide into "
                         f"{accelerator.num_processes} processes")
    processor = load_processor(cfg.model, cfg)
    questions = load_questions(cfg.data, processor, cfg, accelerator)
    held_out = load_questions(cfg.eval_data, processor, cfg, accelerator) if cfg.eval_data else []
    if cfg.dry_run:
        return dry_run(cfg, processor, questions)
    open_run(cfg, accelerator)
    try:
        if cfg.stage == 0:
            score(cfg, processor, questions, accelerator)
        else:
            train(cfg, processor, questions, held_out, accelerator)
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; go on with --resume {cfg.out}") from None


if __name__ == "__main__":
    main()
