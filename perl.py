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
1 explores (on what 0 chose; the probability alpha of permuting falls from 1 to 0), 2 exploits (on
from 1's checkpoint, with the online filter of point 5). 1 and 2 are PRESETS over plain flags.

Where this departs from the paper or from its released code:
  - Standard deviation: the paper's population one; the code's is unbiased, plus 1e-6.
  - How an answer moves is a field of the data (`order_rule`), not code for each data set.
    Statements about "left" and "right" are not negated when images move: they are never permuted.
  - A question's permutations are distinct while it has any left; one generator draws for the run.
  - A group without variance leaves the loss whole; in the code it dilutes the token mean.
  - The number of updates per rollout batch does not depend on n_s. No dual clip, no KL clamp.

    python perl.py                                       # tiny model, real digits, CPU, minutes
    python perl.py --model Qwen2.5-VL-3B --beta 0        # one GPU
    accelerate launch perl.py --model Qwen2.5-VL-3B --beta 0    # several, a copy of the model each
    python perl.py --help                                # every setting

Shapes: Q questions, R = (n_s + 1) * n rollouts of a question; B rows of a batch, P prompts;
L tokens of a prompt, T of a response, S of a packed row; H heads, D hidden width, V vocabulary.
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
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

SAMPLES = Path(__file__).resolve().parent / "data_samples"

# ---- Config: every setting with one line of prose. Defaults are the paper's, where it gives them.

def setting(default, prose: str, least: float = 1e-9, most: float = 1e9):
    return field(default=default, metadata={"help": prose, "least": least, "most": most})

@dataclass
class Config:
    # what runs
    model: str = setting("tiny", "Hub id, folder, or tiny, Qwen2.5-VL-3B, -7B, -32B, -72B")
    data: str = setting(str(SAMPLES / "train.jsonl"), "training questions (format: README)")
    eval_data: str = setting(str(SAMPLES / "test.jsonl"), "held-out questions; '': no evaluation")
    stage: int = setting(1, "0: score the questions; 1: explore; 2: exploit", 0)
    out: str = setting("", "run folder, shared by the stages; '': runs/MODEL-seedSEED")
    resume: str = setting("", "run folder to go on with; its settings hold and may not change")
    seed: int = setting(0, "seeds data order, permutations and sampling", 0)
    dry_run: bool = setting(False, "check data and settings, show a question in its orders, stop")
    # permutation (Eq. 1)
    n_permutations: int = setting(1, "n_s: permuted orders beside the given one; 0: plain GRPO", 0)
    rollouts_per_order: int = setting(6, "n; follows --n-permutations so that (n_s + 1) * n stays")
    alpha_start: float = setting(1.0, "probability of permuting a question at the first step", 0, 1)
    alpha_end: float = setting(0.0, "the same at the last step; linear in between", 0, 1)
    # reward
    accuracy_weight: float = setting(0.9, "reward for a right answer", 0)
    format_weight: float = setting(0.1, "reward for <think>...</think>...\\boxed{...}", 0)
    # filter
    filter: str = setting("offline", "none; offline: train on stage 0's choice; online: see bounds")
    filter_low: float = setting(0.1, "online: groups of lower mean accuracy are dropped", 0, 1)
    filter_high: float = setting(0.9, "online: groups of higher mean accuracy are dropped", most=1)
    max_rounds: int = setting(4, "online: at most so many rounds of sampling to fill a batch")
    score_rollouts: int = setting(10, "stage 0: answers sampled for each question (K)")
    score_target: str = setting("12 11 11 12 15 17 6 5 4 3 3", "stage 0: % of score 0, .1 .. 1")
    score_keep: float = setting(0.5, "stage 0: share of the scored questions to keep", most=1)
    # advantage and loss (Eq. 4-6)
    baseline: str = setting("pooled", "group: pooled over all orders of a question, or per-order")
    std_normalization: bool = setting(True, "divide advantages by the group's standard deviation")
    condition: str = setting("permuted", "loss on the order sampled (permuted) or given (clean)")
    clip_low: float = setting(0.2, "the ratio pi / pi_old is clipped below 1 - this", 0)
    clip_high: float = setting(0.2, "the ratio pi / pi_old is clipped above 1 + this", 0)
    beta: float = setting(0.01, "weight of the KL divergence; 0: no reference model is loaded", 0)
    # optimization
    steps: int = setting(0, "rollout batches to train on; 0: what --epochs needs", 0)
    epochs: float = setting(2.0, "passes over the training questions, if steps is 0")
    questions_per_step: int = setting(128, "questions of a rollout batch, over all processes")
    updates_per_step: int = setting(4, "optimizer updates on each rollout batch")
    lr: float = setting(1e-6, "AdamW learning rate, constant", 0)
    weight_decay: float = setting(0.01, "AdamW weight decay", 0)
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
    share: bool = setting(True, "compute once what rollouts have in common; --no-share: plain way")
    rollout_batch: int = setting(96, "sequences in one call of generate, at least n")
    max_tokens_per_micro_batch: int = setting(16384, "tokens, padding too, in a forward and "
                                              "backward pass; a longer rollout goes alone")
    logit_chunk: int = setting(1024, "response tokens whose logits exist at one time")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    cpu_threads: int = setting(0, "torch's threads on a CPU; 0: as many as torch chooses", 0)
    bf16: bool = setting(True, "bfloat16 autocast on a GPU; weights and AdamW stay float32")
    # evaluation, logging, checkpoints; in steps
    eval_every: int = setting(50, "evaluate so often, and at start and end; 0: never", 0)
    eval_orders: int = setting(24, "evaluate each question in all its orders, up to this many")
    eval_questions: int = setting(0, "evaluate on the first so many questions; 0: on all", 0)
    log_every: int = setting(10, "print a rollout and write a whole group so often")
    save_every: int = setting(50, "write a checkpoint so often, and at the end")

PRESETS = {  # over the defaults: the model's, over it the stage's, over both the flags as typed
    "tiny": dict(questions_per_step=16, updates_per_step=1, lr=2e-5, beta=0.0, steps=40,
                 max_new_tokens=64, rollout_batch=512, max_tokens_per_micro_batch=4096,
                 gradient_checkpointing=False, cpu_threads=1, eval_every=10),
    1: dict(alpha_start=1.0, alpha_end=0.0, filter="offline"),
    2: dict(alpha_start=0.0, alpha_end=0.0, filter="online")}
CHOICES = {"stage": (0, 1, 2), "filter": ("none", "offline", "online"),
           "baseline": ("pooled", "per-order"), "condition": ("permuted", "clean")}
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
    if typed.get("resume"):  # that run's settings; a changed one would make it another run
        path = Path(typed["resume"]) / "config.json"
        if not path.exists() or (path.parent.parent / "config.json").exists():
            parser.error(f"--resume: no {path}, or its run was set aside by a later one in the "
                         "folder above; name the run folder (--out) of the run to go on with")
        saved = json.loads(path.read_text()) | {"resume": typed["resume"], "out": typed["resume"]}
        for name, value in typed.items():
            if saved[name] != value:
                parser.error(f"--resume: {name} was {saved[name]!r} in {path} and is {value!r} "
                             "now; a changed setting needs a new run")
        return Config(**saved)
    presets = PRESETS.get(typed.get("model", Config.model), {})
    presets = presets | PRESETS.get(typed.get("stage", Config.stage), {})
    cfg = Config(**(presets | ({"steps": 0} if "epochs" in typed else {}) | typed))
    for f in dataclasses.fields(Config):
        value, least, most = getattr(cfg, f.name), f.metadata["least"], f.metadata["most"]
        if type(value) in (int, float) and not least <= value <= most:
            parser.error(f"--{f.name.replace('_', '-')} {value} is not in {least:g} .. {most:g}")
    if "n_permutations" in typed and "rollouts_per_order" not in typed:
        budget = (Config.n_permutations + 1) * Config.rollouts_per_order
        cfg.rollouts_per_order, rest = divmod(budget, cfg.n_permutations + 1)
        if rest:
            parser.error(f"--n-permutations {cfg.n_permutations}: {budget} rollouts do not divide "
                         f"into {cfg.n_permutations + 1} orders; give --rollouts-per-order too")
    if not re.fullmatch(r"(?=.*[1-9].*)\d+(\.\d+)?( +\d+(\.\d+)?)+", cfg.score_target.strip()):
        parser.error(f"--score-target {cfg.score_target!r} is no list of shares such as '40 40 20'")
    if cfg.filter_low > cfg.filter_high:
        parser.error(f"--filter-low {cfg.filter_low} is above --filter-high {cfg.filter_high}")
    cfg.out = cfg.out or f"runs/{Path(cfg.model).name}-seed{cfg.seed}"
    return cfg

# ---- Samples and permutation (Eq. 1) -------------------------------------------------------------

ORDER_RULES = {  # what an answer must look like, and what becomes of it when images change places
    "keep": ("", ""),  # it stays as it is (the paper's S = 1)
    "index": (r"[1-9]\d*", "an image number"),  # is renumbered
    "letter": (r"[A-Z]", "the letter of a movable image"),  # k-th letter: k-th of them; is renamed
    "sequence": (r"[1-9]\d*(\s*,\s*[1-9]\d*)*", "different image numbers, as in '2,1,3'"),  # so are
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
    path, lines, samples = Path(path), {}, []
    if not path.is_file():
        raise ValueError(f"{path} is no file; name a JSONL file of samples")
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            samples.append(sample := parse_sample(line, path.parent, where))
            if lines.setdefault(sample.id, number) != number:
                raise ValueError(f"{where}, field id: {sample.id!r} stands in line "
                                 f"{lines[sample.id]} already; ids must be unique")
    if not samples:
        raise ValueError(f"{path}: the file holds no samples")
    return samples

def parse_sample(line: bytes, folder: Path, where: str) -> Sample:
    """One JSONL line -> Sample, image paths joined to `folder`. ValueError for anything unfit."""
    def require(holds, name, problem):
        if not holds:
            raise ValueError(f"{where}, field {name}: {problem if name in row else 'is missing'}")

    try:
        row = dict(json.loads(line))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not valid JSON of an object on one line ({error})") from None
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
    for image in paths:
        require(not (problem := image_problem(image, folder)), "images", f"{image} {problem}")
    sample = Sample(**(row | {"images": paths, "answer": row["answer"].strip()}))
    pattern, wanted = ORDER_RULES[sample.order_rule]
    n = len(sample.movable) if sample.order_rule == "letter" else len(images)
    named = [ord(name) - 64 if name.isalpha() else int(name)
             for name in re.findall(r"\d+|[A-Z]", sample.answer) if pattern]
    require(not pattern or re.fullmatch(pattern, sample.answer) and max(named) <= n
            and len(set(named)) == len(named), "answer",
            f"{sample.answer!r} is not {wanted} of the {n} (order_rule {sample.order_rule})")
    return sample

@functools.lru_cache(maxsize=65536)
def image_problem(image: str, folder: Path) -> str:
    """Why `image` is no readable picture inside `folder`, links followed; empty if it is one."""
    if not Path(image).resolve().is_relative_to(folder.resolve()):
        return f"lies outside the JSONL's folder {folder}"
    try:
        with Image.open(image) as picture:
            picture.load()  # verify() would not notice a truncated file
    except (OSError, SyntaxError, ValueError) as error:
        return f"is no readable image: {error}"
    return ""

def permute(sample: Sample, order: tuple[int, ...]) -> Sample:
    """Reorder the images: new_images[j] = images[order[j]]. Answer and mentions follow.     (Eq. 1)

    Example: order (2, 0, 1), order_rule index, answer "3". The third image now stands first, so the
    answer is "1"; a mention <image_1> is now <image_2>. ValueError if `order` is no permutation or
    moves an image that must stay."""
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
    each other as long as the sample has any left; then all its orders may come again."""
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
# A stated letter: alone or labelled, "B", "(B)", "B. dogs", "option B"; a second one spoils it.
LETTER = re.compile(r"(?:(?:option|choice|answer)\s*:?\s*)?\(?([A-Z])\)?(?:[.:),](.*))?", re.I | re.S)

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
        match = LETTER.fullmatch(formulas[0])
        others = re.findall(r"\b[A-Z]\b", match[2] or "") if match else []
        return bool(match) and {match[1].upper(), *others} == {gold.upper()}
    if gold in ("yes", "no", "true", "false"):
        return bool(re.match(rf"{gold}\b(?! (?:and|or)\b)", answer))
    if re.fullmatch(r"\d{1,2}(\s*,\s*\d{1,2})*", gold) and IMAGES.fullmatch(answer):
        return re.findall(r"\d+", answer) == re.findall(r"\d+", gold)  # a sequence: order counts
    if len(answer) > MathJudge.MAX_CHARS or not re.search(r"\d|\\", gold):
        return False  # words that differ are different answers, and no formula is that long
    return MATH_JUDGE.same(*(UNIT.sub("", formula) for formula in formulas))

class MathJudge:
    """math-verify in a process of its own, which ends itself when a question takes too long, and
    in a session of its own, where a terminal's Ctrl-C does not reach it.
    NOTE: a signal would not do. 9^{9^{9^9}} hangs in one C call; only a watchdog thread outside of
    Python, which faulthandler has, gets a word in. The next question starts a new process."""
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
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
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

@dataclass(eq=False)
class Picture:
    """An image as the vision tower reads it; one object for all orders and rollouts."""
    pixels: Tensor  # (patches, channels * 2 * 14 * 14)
    grid: Tensor    # (1, 3): time, height and width in patches
    tokens: int     # places it takes in the prompt, one for 2 x 2 patches
    features: Tensor | None = None  # (tokens, D), kept if the vision tower is frozen

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
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"Could not load {path!r} ({reason}). --model takes a Hub id, one of "
                         f"{', '.join(SHORT_NAMES)}, or without a network a local folder") from None

def load_processor(name: str, cfg: Config) -> Processor:
    """Tokenizer and image processor of a checkpoint.

    NOTE: not AutoProcessor, which wants torchvision for its video part and would preprocess the
    images anew for every order."""
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

def load_model(name: str, cfg: Config, device: torch.device) -> transformers.PreTrainedModel:
    """The checkpoint in float32: an update of 1e-6 vanishes in bfloat16. Safetensors only."""
    model = load_pretrained(Qwen2_5_VLForConditionalGeneration, name, dtype=torch.float32,
                            use_safetensors=True, attn_implementation="shared_prompt")  # see below
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

# What --share computes once, and why it is exact. A permutation changes the order of the images and
# nothing else, and the n rollouts of an order have their whole prompt in common:
#   - The vision tower sees each image alone: its features serve all (n_s + 1) * n rollouts.
#   - In a causal model a prompt does not see what follows it. Sampling keeps its keys and values
#     once for n responses; the loss has it in one row with them. There a token sees the prompt and
#     its own response, at the positions of a row of its own. Prompt p, responses a and b:
#             p p p a a b b   position
#         p   1 . . . . . .   0
#         p   1 1 . . . . .   1
#         p   1 1 1 . . . .   2
#         a   1 1 1 1 . . .   3
#         a   1 1 1 1 1 . .   4
#         b   1 1 1 . . 1 .   3
#         b   1 1 1 . . 1 1   4
# With --no-share each rollout has its own row and vision pass: the same numbers for far more work.

Features = dict[int, Tensor] | None  # id(picture) -> (tokens, D); None with --no-share

def fill(items: list, fits) -> list[list]:
    """Items in groups, in order: an item joins the last group if fits(group with it) holds."""
    groups = []
    for item in items:
        if groups and fits(groups[-1] + [item]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups

def encode_images(model, prompts: list[Prompt], cfg: Config, known: Features = None) -> Features:
    """Each distinct picture through the vision tower, unless `known` has it. With gradient
    checkpointing only the features stay in memory: the backward pass runs the tower again, for a
    micro-batch of pictures at a time."""
    def encode(some):
        pixels, grids = (torch.cat(parts).to(model.device)
                         for parts in zip(*((picture.pixels, picture.grid) for picture in some)))
        with autocast(model, cfg):
            return model.get_image_features(pixels, grids).pooler_output

    if not cfg.share:
        return None
    if cfg.gradient_checkpointing:
        encode = functools.partial(checkpoint, encode, use_reentrant=False)
    pictures = {id(picture): picture for prompt in prompts for picture in prompt.pictures}
    features = {key: (known or {}).get(key, p.features) for key, p in pictures.items()}
    missing = [picture for key, picture in pictures.items() if features[key] is None]
    limit = cfg.max_tokens_per_micro_batch
    for some in fill(missing, lambda group: sum(p.tokens for p in group) <= limit):
        for picture, feature in zip(some, encode(some)):
            if cfg.freeze_vision:
                picture.features = feature = feature.detach()
            features[id(picture)] = feature
    return features

def collate(prompts: list[Prompt], responses: list[list[list[int]]], features: Features, model,
            processor: Processor) -> tuple[dict, Tensor]:
    """Rows [padding, prompt, its responses] -> the model's inputs, and the owner of each token.

    Prompts of 2 and 3 tokens, one with responses a and b, one with c (to sample: without any):
        p p a a b        owner (B, S)  0 0 1 1 2
        p p p c c                      0 0 0 1 1        padding: -1
    NOTE: without mm_token_type_ids the model falls back to 1-D positions without a word."""
    rows = [[prompt.ids, *some] for prompt, some in zip(prompts, responses)]
    left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    ids = left([torch.tensor(sum(parts, [])) for parts in rows],                    # (B, S)
               padding_value=processor.pad_id)
    owner = left([torch.tensor([k for k, part in enumerate(parts) for _ in part])
                  for parts in rows], padding_value=-1)                             # (B, S)
    in_order = [picture for prompt in prompts for picture in prompt.pictures]
    inputs = {"input_ids": ids, "attention_mask": (owner >= 0).long(),
              "mm_token_type_ids": (ids == processor.image_id).int(),
              "image_grid_thw": torch.cat([picture.grid for picture in in_order])}
    is_tree = max(map(len, responses)) > 1
    if is_tree:  # a response's positions lack the columns of those before it
        begin, first = torch.searchsorted(owner, owner), (owner < 1).sum(dim=1, keepdim=True)
        positions, _ = model.model.get_rope_index(**inputs)                         # (3, B, S)
        inputs["position_ids"] = positions - (begin - first).clamp(min=0)
    if features is None:
        inputs["pixel_values"] = torch.cat([picture.pixels for picture in in_order])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if is_tree:  # in the mask's place: how many tokens are padding, prompt, each response
        inputs["attention_mask"] = {"full_attention": [(k + 1).bincount().tolist() for k in owner]}
    if features is not None:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(
            pooler_output=[features[id(picture)] for picture in in_order])}
    return inputs, owner

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
    idle: int = 0              # decode slots it took after its end, waiting for others
    accuracy: float = 0.0
    format: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # (T,) under the policy that sampled it
    ref_logprobs: Tensor | None = None  # (T,) under the frozen start model

class SharedPromptLayer(DynamicLayer):
    """KV cache of a layer. The first call brings the prompts' part (P, heads, L, d), which stays as
    it is; later ones get it beside the responses' growing part (B, heads, t, d), as pairs."""
    prompts = None

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)  # float32 from the rotary positions, under autocast too
        if self.prompts is None:
            self.prompts = keys, values
            return keys, values
        keys, values = super().update(keys, values)
        return (self.prompts[0], keys), (self.prompts[1], values)

    def get_seq_length(self) -> int:
        return (0 if self.prompts is None else self.prompts[0].shape[2]) + super().get_seq_length()

def shared_prompt_attention(module, query, key, value, attention_mask, **kwargs):
    """Where the cache gives pairs: one new token in each of P * n rows against the one copy of its
    prompt (L tokens) and its own response (t), one softmax over both. Else: a tree, or sdpa."""
    if isinstance(attention_mask, list):
        return tree_attention(query, key, value, attention_mask, kwargs["scaling"]), None
    if not isinstance(key, tuple):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    (keys, own_keys), (values, own_values) = key, value
    (P, h, L, d), B = keys.shape, len(query)  # g query heads share one of h heads of keys
    query = query.view(P, B // P, h, -1, d).float() * kwargs["scaling"]         # (P, n, h, g, d)
    own_keys, own_values = (own.view(P, B // P, h, -1, d) for own in (own_keys, own_values))
    with torch.autocast("cuda", enabled=False):  # bfloat16 would round the scores too far
        scores = torch.cat([torch.einsum("pnhgd,phld->pnhgl", query, keys.float()),
                            torch.einsum("pnhgd,pnhtd->pnhgt", query, own_keys.float())], dim=-1)
    if attention_mask is not None:  # (B, 1, 1, L + t); false at padding only
        scores = scores.masked_fill(~attention_mask.view(P, -1, 1, 1, scores.shape[-1]), -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    mixed = (torch.einsum("pnhgl,phld->pnhgd", weights[..., :L], values)
             + torch.einsum("pnhgt,pnhtd->pnhgd", weights[..., L:], own_values))
    return mixed.reshape(B, 1, -1, d), None                                     # (B, 1, H, d)

def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: list, scaling: float) -> Tensor:
    """Rows of padding, a prompt and its responses, with as many tokens as `tree` says. The prompt
    sees itself, a response the prompt and itself: other pairs are not computed. -> (B, S, H, d)"""
    rows, g = [], query.shape[1] // key.shape[1]  # g query heads share a head of keys
    for lengths, *qkv in zip(tree, query.split(1), key.split(1), value.split(1)):
        (padding, *queries), (_, *keys), (_, *values) = (x.split(lengths, dim=2) for x in qkv)
        rows.append([padding.to(value.dtype)])
        for k, q in enumerate(queries):
            seen = [torch.cat([x[part] for part in sorted({0, k})], dim=2) for x in (keys, values)]
            mask = q.new_ones(q.shape[2], seen[0].shape[2], dtype=torch.bool) if k else None
            rows[-1].append(torch.nn.functional.scaled_dot_product_attention(
                q, *(x.repeat_interleave(g, dim=1) for x in seen), is_causal=k == 0, scale=scaling,
                attn_mask=mask.tril(lengths[1]) if k else None))
    return torch.cat([torch.cat(row, dim=2) for row in rows]).transpose(1, 2)

transformers.AttentionInterface.register("shared_prompt", shared_prompt_attention)
transformers.AttentionMaskInterface.register("shared_prompt", sdpa_mask)

def prefill(model, inputs: dict, n: int) -> dict:
    """Read each prompt once, up to its last token -> inputs for generate, n rows to a prompt."""
    cache = Cache(layer_class_to_replicate=SharedPromptLayer)
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    model.model(**inputs | {name: inputs[name][:, :-1] for name in per_token},
                past_key_values=cache, use_cache=True)
    # By how much a prompt's positions fall short of its tokens; the model needs it a row.
    model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(n, dim=0)
    return {"past_key_values": cache, "input_ids": inputs["input_ids"].repeat_interleave(n, 0),
            "attention_mask": inputs["attention_mask"].repeat_interleave(n, 0)}

@torch.no_grad()
def generate(model, processor: Processor, prompts: list[Prompt], n: int, cfg: Config,
             greedy: bool = False) -> list[list[list[int]]]:
    """n responses to each prompt, in the prompts' order; behind its end token a row is padded."""
    model.eval()  # NOTE: train mode with gradient checkpointing would switch the KV cache off
    sampling = GenerationConfig(  # from the very distribution that the loss scores; or greedy
        max_new_tokens=cfg.max_new_tokens, do_sample=not greedy,
        temperature=1.0 if greedy else cfg.temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        suppress_tokens=processor.banned_ids, pad_token_id=processor.pad_id,
        eos_token_id=processor.eos_ids)
    # NOTE: what it leaves None, generate fills from the checkpoint's own; Qwen2.5-VL's say
    # top_k = 1, repetition_penalty = 1.05. So it takes their place meanwhile.
    own, model.generation_config = model.generation_config, sampling
    longest_first = sorted(range(len(prompts)), key=lambda k: -len(prompts[k].ids))
    size, responses, features = max(cfg.rollout_batch // n, 1), [None] * len(prompts), None
    for start in tqdm(range(0, len(prompts), size), "generate", leave=False, disable=None):
        batch = longest_first[start:start + size]
        chosen = [prompts[k] for k in batch for _ in range(1 if cfg.share else n)]
        features = encode_images(model, chosen, cfg, known=features)
        inputs, _ = collate(chosen, [[]] * len(chosen), features, model, processor)
        with autocast(model, cfg):
            if cfg.share:
                inputs = prefill(model, inputs, n)
            output = model.generate(**inputs, generation_config=sampling)           # (B, L + T)
        rows = output[:, inputs["input_ids"].shape[1]:].tolist()
        for position, k in enumerate(batch):
            responses[k] = rows[position * n:(position + 1) * n]
    model.generation_config = own  # checkpoints keep it
    return responses

def sample_groups(model, processor: Processor, samples: list[Sample], orders: list[list[tuple]],
                  n: int, cfg: Config, greedy: bool = False) -> list[list[Rollout]]:
    """Each sample in each of its orders, n graded responses an order: a list of rollouts a sample.
    Within a list, rollouts stand order by order: the first n answer the identity."""
    prompts = []
    for sample, its_orders in zip(samples, orders):
        pictures = load_pictures(sample, processor)
        by_order = {o: encode_prompt(permute(sample, o), processor, pictures) for o in its_orders}
        prompts.append([by_order[order] for order in its_orders])
    responses = iter(generate(model, processor, sum(prompts, []), n, cfg, greedy))
    return [[grade(its_prompts[0] if cfg.condition == "clean" else prompt, order,
                   prompt.sample.answer, row, processor, cfg)
             for prompt, order in zip(its_prompts, its_orders) for row in next(responses)]
            for its_prompts, its_orders in zip(prompts, orders)]

def grade(prompt: Prompt, order: tuple[int, ...], gold: str, row: list[int], processor: Processor,
          cfg: Config) -> Rollout:
    """A row of tokens from generate -> Rollout with its rewards. The end token stays."""
    ended = [token in processor.eos_ids for token in row]
    ids = row[:ended.index(True) + 1] if any(ended) else row
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    accuracy, well_formed = float(is_correct(text, gold)), float(has_format(text))
    reward = cfg.accuracy_weight * accuracy + cfg.format_weight * well_formed
    return Rollout(prompt, order, gold, ids, text, not any(ended), len(row) - len(ids), accuracy,
                   well_formed, reward)

# ---- Advantages and filter -----------------------------------------------------------------------

def group_advantages(rewards: Tensor, std_normalization: bool = True) -> Tensor:
    """Rewards (Q, R) -> advantages (Q, R); a row holds ALL rollouts of a question.      (Eq. 4-5)

    Rows without variance are zero. Example: [[1, 0, 0, 1], [1, 1, 1, 1]] gives
    [[1, -1, -1, 1], [0, 0, 0, 0]]."""
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
    flat: no advantages for another reason, as with the per-order baseline."""
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
    target half and half, size 40: the ten of 0.5 and twenty of 1.0."""
    bins = [[] for _ in target]
    for index, score in enumerate(scores):
        bins[round(score * (len(target) - 1))].append(index)
    kept, ends = [], [round(size * sum(target[:k]) / sum(target)) for k in range(len(target) + 1)]
    for members, start, end in zip(bins, ends, ends[1:]):  # quotas that add up to size
        kept += rng.sample(members, min(end - start, len(members)))
    return sorted(kept)

# ---- Log-probabilities and loss (Eq. 6) ----------------------------------------------------------

def response_logprobs(model, processor: Processor, rollouts: list[Rollout], cfg: Config,
                      features: Features = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the response tokens at the sampling temperature, and their mask.
    Logits exist for `logit_chunk` tokens at a time and are made again in the backward pass: 152k
    floats for each token of a batch would not fit. Behind a response's end stand zeros."""
    rows = pack(rollouts, cfg)
    prompts, responses = [row[0].prompt for row in rows], [[r.ids for r in row] for row in rows]
    features = encode_images(model, prompts, cfg, known=features)
    inputs, owner = collate(prompts, responses, features, model, processor)         # (B, S)
    row, column = (owner > 0).nonzero(as_tuple=True)                                # (tokens,)
    goes_on = owner[row, column] == owner[row, column - 1]
    before = torch.where(goes_on, column - 1, (owner <= 0).sum(dim=1)[row] - 1)     # prompt's end
    with autocast(model, cfg):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state           # (B, S, D)
        hidden, targets = hidden[row, before], inputs["input_ids"][row, column]     # (tokens, D)
        chunks = [checkpoint(token_logprobs, model.lm_head, h, t, processor.banned_ids,
                             cfg.temperature, use_reentrant=False)
                  for h, t in zip(hidden.split(cfg.logit_chunk), targets.split(cfg.logit_chunk))]
    mask = stack([torch.ones(len(r.ids), dtype=torch.bool) for r in rollouts]).to(model.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(chunks)), mask

def token_logprobs(lm_head, hidden: Tensor, targets: Tensor, banned_ids: list[int],
                   temperature: float) -> Tensor:
    """Hidden states (N, D) and the tokens that followed (N,) -> their log-probabilities (N,)."""
    logits = lm_head(hidden).float()                                            # (N, V)
    logits[:, banned_ids] = -torch.inf  # as in sampling, where they are suppressed
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None]).squeeze(1)

@torch.no_grad()
def store_logprobs(model, processor: Processor, rollouts: list[Rollout], name: str, cfg: Config):
    """Write the log-probabilities under `model` into the field `name` of each rollout."""
    model.eval()
    features = encode_images(model, [rollout.prompt for rollout in rollouts], cfg)
    for batch in micro_batches(rollouts, cfg):
        logprobs, _ = response_logprobs(model, processor, batch, cfg, features)
        for rollout, row in zip(batch, logprobs):
            setattr(rollout, name, row[:len(rollout.ids)].clone())

def row_length(row: list[Rollout]) -> int:
    return len(row[0].prompt.ids) + sum(len(rollout.ids) for rollout in row)

def pack(rollouts: list[Rollout], cfg: Config) -> list[list[Rollout]]:
    """Neighbours that answer the same prompt, in rows of at most a micro-batch's tokens.

    Example, at most 9 tokens: responses of 2, 2 and 3 tokens to a prompt of 4 make two rows, of
    4 + 2 + 2 and 4 + 3 tokens. With --no-share every row has one."""
    return fill(rollouts, lambda row: cfg.share and row[-1].prompt is row[0].prompt
                and row_length(row) <= cfg.max_tokens_per_micro_batch)

def micro_batches(rollouts: list[Rollout], cfg: Config) -> list[list[Rollout]]:
    """Rollouts in batches of packed rows, longest first: running out of memory shows at once."""
    rows = sorted(pack(rollouts, cfg), key=row_length, reverse=True)
    batches = fill(rows, lambda b: len(b) * row_length(b[0]) <= cfg.max_tokens_per_micro_batch)
    return [[rollout for row in batch for rollout in row] for batch in batches]

def stack(rows: list[Tensor | None]) -> Tensor | None:
    """Rows of unequal length -> (B, T), zeros behind; None if the rows are None."""
    return None if rows[0] is None else pad_sequence(rows, batch_first=True)

def policy_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
                advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float, beta: float,
                denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate less beta * KL, summed over kept tokens, over `denominator`.      (Eq. 6)

    logprobs, old_logprobs, ref_logprobs, mask: (B, T); advantages: (B,). Returns a scalar loss and
    two sums over tokens: `kl`, and `clipped`, how many lost their gradient. With the tokens of the
    whole update, on all processes, as denominator, micro-batches of any size add up to the same."""
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
    orders, n = cfg.n_permutations + 1, cfg.rollouts_per_order
    accelerator.print(
        f"config: {json.dumps(vars(cfg))}\npython {sys.version.split()[0]}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, accelerate "
        f"{accelerate.__version__}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device}\nrun folder: {out}\nbatch: {cfg.questions_per_step} questions x "
        f"{orders} orders x {n} = {cfg.questions_per_step * orders * n} rollouts, "
        f"{cfg.updates_per_step} update(s), {cfg.max_tokens_per_micro_batch} tokens a micro-batch")

def save_checkpoint(cfg: Config, step: int, model, processor: Processor, state: dict,
                    accelerator: Accelerator) -> None:
    """Write OUT/checkpoint-STEP, which from_pretrained loads; then remove the one before."""
    if accelerator.is_main_process:
        out = Path(cfg.out)
        temporary, final = out / "checkpoint.tmp", out / f"checkpoint-{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        for part in (model, processor.tokenizer, processor.image_processor):
            part.save_pretrained(temporary)
        torch.save(state, temporary / "training_state.pt")
        os.replace(temporary, final)
        for other in set(out.glob("checkpoint-*")) - {final}:
            shutil.rmtree(other)
    accelerator.wait_for_everyone()

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
        torch.manual_seed(1009 * (1_000_003 * cfg.seed + start) + rank)  # the same when resumed
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
        raise SystemExit(f"{path}: none kept; raise --score-keep or change --score-target")
    if accelerator.is_main_process:
        write_atomic(path.with_name("kept.json"), json.dumps([samples[k].id for k in kept]))
    accelerator.print(f"kept {len(kept)} of {len(samples)} questions; mean score "
                      f"{statistics.mean(values):.2f} -> "
                      f"{statistics.mean(values[k] for k in kept):.2f}")

# ---- Training (Algorithm 1), with evaluation over image orders -----------------------------------

def draw_questions(pool: list[int], n_questions: int, k: int, rng: random.Random) -> list[int]:
    """The next k question numbers from the pool; every epoch is a fresh shuffle."""
    drawn = []
    while len(drawn) < k:
        if not pool:
            pool += rng.sample(range(n_questions), n_questions)
        drawn.append(pool.pop())
    return drawn

def collect_groups(model, processor: Processor, questions: list[Sample], pool: list[int],
                   alpha: float, rng: random.Random, cfg: Config,
                   accelerator: Accelerator) -> dict[str, list]:
    """This process's groups of rollouts for a step, by their verdicts. With the online filter,
    questions are drawn on for groups that were dropped, until every process has its share of the
    batch or cfg.max_rounds is reached. All processes draw the same questions and orders, and take
    every num_processes-th of them."""
    world, rank = accelerator.num_processes, accelerator.process_index
    online = cfg.filter == "online"
    low, high = (cfg.filter_low, cfg.filter_high) if online else (0.0, 1.0)
    share = missing = cfg.questions_per_step // world
    groups = {name: [] for name in VERDICTS}
    for _ in range(cfg.max_rounds if online else 1):
        chosen = [questions[k] for k in draw_questions(pool, len(questions), missing * world, rng)]
        orders = [draw_orders(q, cfg.n_permutations, alpha, rng) for q in chosen]
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
    """Train on the kept groups, in cfg.updates_per_step parts. Returns sums over this process's
    tokens (how many, KL, clipped) and the mean gradient norm."""
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
        features = encode_images(model, [r.prompt for r in some], cfg) or {}
        # Micro-batches gather their gradients on copies; the vision tower gets the sum, once.
        copies = {key: feature.detach().float().requires_grad_(feature.requires_grad)
                  for key, feature in features.items()}
        for batch in micro_batches(some, cfg):
            logprobs, mask = response_logprobs(model, processor, batch, cfg, copies)
            old = stack([r.old_logprobs for r in batch])
            loss, stats = policy_loss(
                logprobs, logprobs.detach() if old is None else old,
                stack([r.ref_logprobs for r in batch]),
                torch.tensor([r.advantage for r in batch], device=mask.device), mask,
                clip_low=cfg.clip_low, clip_high=cfg.clip_high, beta=cfg.beta, denominator=tokens)
            loss.backward()
            sums = {name: value + stats.get(name, 0.0) for name, value in sums.items()}
        if reached := [key for key, copy in copies.items() if copy.grad is not None]:
            torch.autograd.backward([features[k] for k in reached],
                                    [copies[k].grad.to(features[k].dtype) for k in reached])
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
    sums = total(sums | {name: len(some) for name, some in groups.items()} | {
        name: sum(getattr(rollout, name) for rollout in rollouts)
        for name in ("accuracy", "format", "reward", "truncated", "idle")} | {
        "rollouts": len(rollouts), "length": sum(len(r.ids) for r in rollouts)}, accelerator)
    means = {name: sums[name] / sums["rollouts"]
             for name in ("accuracy", "format", "reward", "length", "truncated")}
    return means | {name: sums[name] for name in VERDICTS} | {
        "dropped": sum(sums[name] for name in VERDICTS[1:]),
        "idle": sums["idle"] / (sums["idle"] + sums["length"]),
        "kl": sums["kl"] / max(sums["tokens"], 1),
        "clip_fraction": sums["clipped"] / max(sums["tokens"], 1)}

STEP_LINE = (
    "step {step}/{steps} | acc {accuracy:.2f} fmt {format:.2f} | kept {kept} ({others}) | len "
    "{length:.0f} cut {truncated:.0%} idle {idle:.0%} | kl {kl:.3f} clip {clip_fraction:.2f} grad "
    "{grad_norm:.2f} | gen {seconds_sample:.1f}s train {seconds_update:.1f}s | {peak_gb:.1f} GB")
EVAL_LINE = "  eval | accuracy {eval_accuracy:.3f} worst {eval_worst:.3f} bias {eval_bias:.3f}"

def peak_gb() -> float:
    """Peak memory in GB: of the GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on macOS bytes
    return kilobytes / (1e9 if sys.platform == "darwin" else 1e6)

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

def evaluate(model, processor: Processor, samples: list[Sample], cfg: Config,
             accelerator: Accelerator) -> dict:
    """Greedy answers to every question in all its orders, up to cfg.eval_orders. Shares in [0, 1]:
    eval_accuracy, the mean over orders; eval_worst, right in every order; eval_bias, best order
    less worst, the paper's p(x_max) - p(x_min) (A.5)."""
    mine, rows = samples[accelerator.process_index::accelerator.num_processes], []
    for start in range(0, len(mine), cfg.questions_per_step):  # their images fit in memory
        some = mine[start:start + cfg.questions_per_step]
        orders = [all_orders(sample, cfg.eval_orders) for sample in some]
        groups = sample_groups(model, processor, some, orders, 1, cfg, greedy=True)
        rows += [[rollout.accuracy for rollout in group] for group in groups]
    rows = gather_object(rows)
    return {"eval_accuracy": statistics.mean(sum(row) / len(row) for row in rows),
            "eval_worst": statistics.mean(min(row) for row in rows),
            "eval_bias": statistics.mean(max(row) - min(row) for row in rows)}

def train(cfg: Config, processor: Processor, questions: list[Sample], held_out: list[Sample],
          accelerator: Accelerator) -> None:
    """Algorithm 1: sample permuted groups, drop what teaches nothing, update the policy."""
    out, is_main, start = Path(cfg.out), accelerator.is_main_process, cfg.model
    if scored := cfg.filter == "offline" and newest(cfg, "stage0-*/kept.json"):
        kept = set(json.loads(scored.read_text()))
        if lost := kept - {question.id for question in questions}:
            raise SystemExit(f"{scored} names {len(lost)} questions that {cfg.data} has not, such "
                             f"as {min(lost)!r}; score these data with --stage 0")
        questions = [question for question in questions if question.id in kept]
    if cfg.stage == 2 and (trained := newest(cfg, "stage1-*/checkpoint-*")):
        start = str(trained)
    accelerator.print(f"training on {len(questions)} questions ({scored or 'all'}), from {start}")
    held_out = held_out[:cfg.eval_questions or None] if cfg.eval_every else []
    steps = cfg.steps or math.ceil(cfg.epochs * len(questions) / cfg.questions_per_step)

    resumed = newest(cfg, "checkpoint-*") if cfg.resume else None
    model = load_model(str(resumed or start), cfg, accelerator.device)
    ref_model = load_model(start, cfg, accelerator.device) if cfg.beta else None
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad],
                                  lr=cfg.lr, weight_decay=cfg.weight_decay)
    rng, pool, step = random.Random(cfg.seed), [], 0
    if resumed:
        saved = torch.load(resumed / "training_state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        rng.setstate(saved["rng"])
        pool, step = saved["pool"], saved["step"]
    for log in (out / "metrics.jsonl", out / "rollouts.jsonl") if is_main and cfg.resume else ():
        rows = [row for row in read_lines(log) if resumed and row["step"] <= step]
        write_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
    stop = []

    def finish(number, frame):  # Ctrl-C or SIGTERM: finish the step, save, stop; again: at once
        signal.signal(number, signal.default_int_handler)
        print("\nstopping after this step, and saving (again: at once, unsaved)", flush=True)
        stop.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, finish)
    for step in range(0 if held_out and not resumed else step + 1, steps + 1):
        metrics, clock = {"step": step}, time.time()
        # Each step seeds its sampling: a resumed run draws what an unbroken one would.
        torch.manual_seed(1009 * (1_000_003 * cfg.seed + step) + accelerator.process_index)
        if step > 0:  # step 0 evaluates the start
            progress = (step - 1) / max(steps - 1, 1)
            alpha = cfg.alpha_start + (cfg.alpha_end - cfg.alpha_start) * progress
            groups = collect_groups(model, processor, questions, pool, alpha, rng, cfg, accelerator)
            sampled = time.time()
            sums, grad_norm = update(model, ref_model, optimizer, processor, groups["kept"], cfg,
                                     accelerator)
            metrics |= step_metrics(groups, sums, accelerator) | {
                "grad_norm": grad_norm, "alpha": alpha, "lr": cfg.lr,
                "seconds_sample": sampled - clock, "seconds_update": time.time() - sampled,
                "peak_gb": peak_gb(), "grader_timeouts": MATH_JUDGE.timeouts}
            others = ", ".join(f"{metrics[name]} {name.replace('_', ' ')}" for name in VERDICTS[1:]
                               if metrics[name]) or "all"
            accelerator.print(STEP_LINE.format(**metrics, steps=steps, others=others))
            if is_main and (step - 1) % cfg.log_every == 0:
                log_group(out / "rollouts.jsonl", step, sum(groups.values(), [])[0])
        clock = time.time()
        if held_out and (step % cfg.eval_every == 0 or step == steps):
            metrics |= evaluate(model, processor, held_out, cfg, accelerator)
            metrics["seconds_eval"] = time.time() - clock
            accelerator.print(EVAL_LINE.format(**metrics))
        if is_main:
            append_line(out / "metrics.jsonl", metrics)
        last = step == steps or any(gather_object([bool(stop)]))
        if last or step > 0 and step % cfg.save_every == 0:
            save_checkpoint(cfg, step, model, processor, {
                "step": step, "pool": pool, "rng": rng.getstate(),
                "optimizer": optimizer.state_dict()}, accelerator)
        if last:
            break
    accelerator.print(f"done: {newest(cfg, 'checkpoint-*')}" if step == steps else
                      f"stopped after step {step}; go on with --resume {out}")

# ---- Benchmark: what sharing saves in a step, on one question ------------------------------------

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
    wanted = cfg.eval_data and (cfg.stage or cfg.dry_run)  # stage 0 does not evaluate
    held_out = load_questions(cfg.eval_data, processor, cfg, accelerator) if wanted else []
    if cfg.dry_run:  # show what the model would read: a question with many images, in its orders
        sample = min(questions, key=lambda q: (q.order_rule in ("keep", "never"), -len(q.images)))
        for order in draw_orders(sample, cfg.n_permutations, 1.0, random.Random(cfg.seed)):
            asked = permute(sample, order)
            print(f"order {order}, {len(encode_prompt(asked, processor).ids)} tokens, "
                  f"answer {asked.answer}: {prompt_text(asked, processor)}")
        return
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
