#!/usr/bin/env python3
"""PeRL in one file: reinforcement learning on questions whose images are permuted.

Paper: Zhang, Ding, Zhang et al., "PeRL: Permutation-Enhanced Reinforcement Learning for
Interleaved Vision-Language Reasoning", NeurIPS 2025, arXiv 2506.14907. A vision-language
model that is asked "which image shows ...?" often prefers a position: reorder the images,
keep the question, and its answer changes. PeRL trains that away. One training step:

  1. Draw questions. Ask each in n_s + 1 orders of its images: the given one, and  (Eq. 1)
     n_s permuted ones, where the right answer moves along ("image 3" becomes "image 1").
  2. The policy answers each order n times: (n_s + 1) * n rollouts per question.
  3. Rules grade each rollout: 0.9 * right answer + 0.1 * right format.
  4. All rollouts of a question, whatever their order, form ONE group. The       (Eq. 4-5)
     advantage is the reward minus the group's mean, over its standard deviation.
  5. Groups that teach nothing are dropped: equal rewards; in stage 2, too easy or hard.
  6. AdamW maximizes the clipped objective minus beta times the KL divergence      (Eq. 6)
     from the start model. Each rollout is conditioned on the order it was sampled from.

Stage 0 scores the questions with the start model and resamples them by difficulty. Stage
1 explores: alpha, the probability of permuting, falls from 1 to 0. Stage 2 exploits: from
stage 1's policy, with alpha 0 and the online filter. The two stages are our choice.

Where this departs from the authors' code:
  - the standard deviation is the population's, as in the paper;
  - the data say how an answer moves (`order_rule`); rule `never` keeps the images in place;
  - permutations are distinct, and come from one random generator per run;
  - a group of equal rewards is left out of the loss, its KL included;
  - the number of updates per step does not grow with n_s;
  - no dual clip; log-ratios are bounded at +-20, so that exp stays finite;
  - in stage 2, KL is measured from stage 1's policy, its start model.

    python perl.py                                             # tiny model, CPU, minutes
    python perl.py --model Qwen2.5-VL-7B --stage 1             # 80 GB GPU, 120 GB host
    accelerate launch perl.py --model Qwen2.5-VL-7B --stage 1  # several GPUs

On a first reading, skip "Reading answers", "Shared compute" (--no-share) and "Memory and
machines". Shapes: Q questions, R = (n_s + 1) * n rollouts of each; B rows of a batch, P
prompts; L tokens of a prompt, T of a response, S of a row; D width, V vocabulary; H query
heads and h key heads, each d wide.
"""
import argparse
import contextlib
import copy
import dataclasses
import difflib
import fcntl
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch
import accelerate
import torch
import transformers
from accelerate.utils import InitProcessGroupKwargs, gather_object
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

Order = tuple[int, ...]  # of a question's images: new_images[j] = images[order[j]]
SAMPLES = Path(__file__).resolve().parent / "data_samples"

class UserError(SystemExit, ValueError):
    """An error that the user can fix. Uncaught, it ends the program with its message alone;
    a caller can catch it as the ValueError that it also is."""

def check(is_fine, message: str) -> None:
    """UserError with this message unless `is_fine`."""
    if not is_fine:
        raise UserError(message)

# ---- Config: every setting, with the paper's value where it gives one ------------------
def setting(default, prose: str):
    """A field of Config with its text for --help."""
    return field(default=default, metadata={"help": prose})

@dataclass
class Config:
    """Every setting is a flag: n_permutations is --n-permutations."""
    # What runs
    model: str = setting("tiny", "Hub id, folder, tiny, Qwen2.5-VL-7B, Qwen3-VL-8B, ...")
    data: str = setting(str(SAMPLES / "train.jsonl"), "JSONL file of training questions")
    eval_data: str = setting(str(SAMPLES / "test.jsonl"), "held-out questions; '': none")
    stage: int = setting(1, "0: score the questions; 1: explore; 2: exploit")
    out: str = setting("", "folder of the stages' run folders; '': runs/MODEL-seedSEED")
    resume: str = setting("", "run folder to continue, with its settings")
    seed: int = setting(0, "seeds data order, permutations and sampling")
    dry_run: bool = setting(False, "check data and settings, plan the memory, stop")
    # Permutation (Eq. 1)
    n_permutations: int = setting(1, "n_s: permuted orders per question; 0: plain GRPO")
    rollouts_per_order: int = setting(6, "n; if not given, 12 / (n_s + 1)")
    alpha_start: float = setting(1.0, "probability of permuting a question at first")
    alpha_end: float = setting(0.0, "the same at the last step; linear in between")
    alpha_steps: int = setting(0, "steps until alpha reaches its end; 0: all steps")
    # Reward
    accuracy_weight: float = setting(0.9, "reward of a right answer")
    format_weight: float = setting(0.1, "reward of <think>...</think>...\\boxed{...}")
    # Filter
    filter: str = setting("offline", "none; offline: stage 0's choice; online: bounds")
    filter_low: float = setting(0.1, "online: lowest mean accuracy of a kept group")
    filter_high: float = setting(0.9, "online: highest mean accuracy of a kept group")
    # Advantage and loss (Eq. 4-6)
    clip_low: float = setting(0.2, "pi / pi_old is clipped below 1 - this")
    clip_high: float = setting(0.2, "pi / pi_old is clipped above 1 + this")
    beta: float = setting(0.01, "weight of the KL term; 0: no reference model")
    # Optimization
    steps: int = setting(0, "training steps; 0: two passes over the data (paper)")
    questions_per_step: int = setting(128, "questions per step, over all processes")
    updates_per_step: int = setting(4, "optimizer updates per step")
    lr: float = setting(1e-6, "AdamW learning rate, constant; LoRA: 10 times the default")
    freeze_vision: bool = setting(False, "do not train the vision tower")
    # Prompts and sampling
    instruction: str = setting(
        "First think about the question as an internal monologue inside <think> "
        "</think>, then give the final answer inside \\boxed{}.", "text after every question")
    max_pixels: int = setting(262144, "larger images are scaled down to this many pixels")
    max_prompt_tokens: int = setting(8192, "longer prompts are dropped and counted")
    max_new_tokens: int = setting(2048, "longest response, in tokens")
    temperature: float = setting(1.0, "of sampling, and of the loss's log-probabilities")
    # Memory and speed: they change rounding and random draws, not the method
    share: bool = setting(True, "compute once what rollouts have in common")
    # At their defaults, both are lowered on a GPU with too little memory.
    rollout_batch: int = setting(384, "sequences sampled at a time; at least n")
    max_tokens_per_micro_batch: int = setting(16384, "tokens of a training pass")
    gradient_checkpointing: bool = setting(True, "recompute activations to save memory")
    dtype: str = setting("auto", "of the weights: bf16 or float32; auto: bf16 on a GPU")
    optimizer_device: str = setting("auto", "of AdamW's state: gpu, host or auto")
    lora_rank: int = setting(0, "train adapters of this rank instead of all weights")
    gpu_gb: float = setting(0, "with --dry-run: plan for a GPU with this memory")
    # Evaluation, logging, checkpoints; in steps
    eval_every: int = setting(50, "evaluate every N steps, at start and end; 0: never")
    eval_orders: int = setting(24, "evaluate a question in at most this many orders")
    log_every: int = setting(10, "print a rollout and log its group every N steps")
    save_every: int = setting(20, "write a checkpoint every N steps, and at the end")
    keep_checkpoints: int = setting(1, "newest checkpoints to keep; 0: all")
    report_to: str = setting("none", "also log to tensorboard, wandb or trackio")

    @property
    def folder(self) -> Path:
        """The run folder: OUT/stageN, or the one that --resume names."""
        return Path(self.resume or f"{self.out}/stage{self.stage}")

SHORT_NAMES = {"tiny": str(SAMPLES / "tiny")}
for short_name in ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen3-VL-2B",
                   "Qwen3-VL-4B", "Qwen3-VL-8B", "Qwen3-VL-32B"):
    SHORT_NAMES[short_name] = f"Qwen/{short_name}-Instruct"
# Precedence: a typed flag, then the stage's preset, then the model's, then the default.
MODEL_PRESETS = {"tiny": dict(
    questions_per_step=16, updates_per_step=1, lr=2e-5, beta=0.0, steps=40, eval_every=10,
    save_every=10, max_new_tokens=64, rollout_batch=512, max_tokens_per_micro_batch=4096,
    gradient_checkpointing=False)}
STAGE_PRESETS = {0: dict(), 1: dict(), 2: dict(alpha_start=0.0, filter="online")}
CHOICES = {"stage": (0, 1, 2), "filter": ("none", "offline", "online"),
           "dtype": ("auto", "bf16", "float32"), "optimizer_device": ("auto", "gpu", "host"),
           "report_to": ("none", "tensorboard", "wandb", "trackio")}
POSITIVE = {"rollouts_per_order", "questions_per_step", "updates_per_step", "temperature",
            "max_new_tokens", "eval_orders", "log_every", "save_every"}
# What --resume may change: how a step is computed, and how many there are.
RESUME_MAY_CHANGE = {"resume", "steps", "rollout_batch", "max_tokens_per_micro_batch",
                     "optimizer_device", "gradient_checkpointing"}

EPOCHS = 2              # passes over the training questions, if --steps is 0
ROLLOUTS = 12           # per question, if --rollouts-per-order is not given
MAX_ROUNDS = 4          # online filter: rounds of sampling to fill a batch
SCORE_ROLLOUTS = 10     # stage 0: answers to each question (K)
SCORE_KEEP = 0.5        # stage 0: share of the questions to keep, about
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0
MAX_SKIPPED = 3         # updates in a row with a non-finite gradient that end a run
LOG_RATIO_BOUND = 20.0  # e^20 is far outside any clip range, and finite in float32
LOGIT_CHUNK = 1024      # response tokens whose logits exist at a time: 152k floats each
LOGGED_HELD_OUT = 3     # held-out questions to log at each evaluation

def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")

def nearest(name: str, known) -> str:
    """Suffix of an error message: the known name that is closest to a misspelt one."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""

def parse_config(argv: list[str] | None = None) -> Config:
    """Command line -> Config. Invalid settings exit with an error message."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--setting value ...]", allow_abbrev=False)
    for f in dataclasses.fields(Config):
        prose = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
        options = {"type": f.type, "choices": CHOICES.get(f.name)}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        # Without defaults, `typed` has only the flags of the command line.
        parser.add_argument(flag_of(f.name), help=prose, default=argparse.SUPPRESS, **options)
    typed = vars(parser.parse_args(argv))
    for name, value in typed.items():
        if isinstance(value, (int, float)):
            check(0 <= value < math.inf, f"{flag_of(name)} {value} must be 0 or more, and finite")
            check(value or name not in POSITIVE, f"{flag_of(name)} must be more than 0")
    cfg = resumed_config(typed) if typed.get("resume") else new_config(typed)
    check(cfg.filter_low <= cfg.filter_high, "--filter-low is above --filter-high")
    check(cfg.dry_run or not cfg.gpu_gb, "--gpu-gb is for --dry-run only")
    return cfg

def new_config(typed: dict) -> Config:
    """Presets and typed flags -> Config."""
    preset = MODEL_PRESETS.get(typed.get("model", Config.model), {})
    cfg = Config(**preset | STAGE_PRESETS[typed.get("stage", Config.stage)] | typed)
    cfg.out = cfg.out or f"runs/{Path(cfg.model).name}-seed{cfg.seed}"
    if "data" in typed and "eval_data" not in typed:
        cfg.eval_data = ""  # the digits would say nothing about your questions
    if cfg.lora_rank and "lr" not in typed:
        cfg.lr *= 10  # adapters hardly move at the learning rate of full weights
    if "rollouts_per_order" not in typed:
        # Runs that differ in n_s stay comparable: equally many rollouts per question.
        cfg.rollouts_per_order, rest = divmod(ROLLOUTS, cfg.n_permutations + 1)
        check(rest == 0, f"set --rollouts-per-order: n_s + 1 does not divide {ROLLOUTS}")
    return cfg

def resumed_config(typed: dict) -> Config:
    """Settings of the run to continue, with the typed flags that --resume may change."""
    folder = stage_folder(typed["resume"])
    saved = Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for name, value in typed.items():
        before = getattr(saved, name)
        check(name in RESUME_MAY_CHANGE or value == before,
              f"{flag_of(name)} was {before}; another value needs a new run")
    # With more steps, alpha keeps the schedule of the run, then stays at its end.
    saved.alpha_steps = saved.alpha_steps or saved.steps
    return dataclasses.replace(saved, **typed | {"resume": str(folder)})

def stage_folder(path: str | Path) -> Path:
    """A run folder, or OUT -> the run folder; of OUT, the stage that was started last."""
    runs = [*Path(path).glob("started"), *Path(path).glob("stage[0-2]/started")]
    check(runs, f"{path} is not a run folder, such as runs/tiny-seed0/stage1")
    return max(runs, key=os.path.getmtime).parent

# ---- Samples and permutation (Eq. 1) ---------------------------------------------------
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MENTION = re.compile(r"<image_(\d+)>")  # names image k; <image> is where one stands
# The effect of a new order on the answer. It stays (the paper's S = 1), it names images and
# follows them, or it depends on the order in another way, so the images must not move.
# A new rule needs its name here, named_positions, and move_answer.
ORDER_RULES = ("keep", "index", "letter", "sequence", "never")
# No text may have a token of the chat format, NUL, or a surrogate (half a character).
CONTROL = re.compile(r"<\|\w+\|>|[\0\ud800-\udfff]")

@dataclass
class Sample:
    """One question. `movable`: 0-based positions that may move; all if not given."""
    id: str
    images: tuple[str, ...]  # paths; none for a text-only question
    question: str
    answer: str
    order_rule: str
    movable: tuple[int, ...] | None = None
    source: str = ""

    def __post_init__(self):
        self.images = tuple(self.images)
        movable = range(len(self.images)) if self.movable is None else sorted(self.movable)
        self.movable = () if self.order_rule == "never" else tuple(movable)

def load_samples(path: str | Path) -> list[Sample]:
    """Read a JSONL file. ValueError names the file, line and field of an error."""
    path, samples = Path(path), {}
    check(path.is_file(), f"{path} is not a file; name a JSONL file of samples")
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            sample = parse_sample(line, path.parent, where)
            check(sample.id not in samples, f"{where}, field id: an earlier line has it too")
            samples[sample.id] = sample
    check(samples, f"{path}: the file has no samples")
    return list(samples.values())

def parse_sample(line: bytes, folder: Path, where: str) -> Sample:
    """A JSONL line -> Sample, paths joined to `folder`. ValueError names the field."""
    def check_field(is_fine, name: str, problem: str) -> None:
        check(is_fine, f"{where}, field {name}: {problem}")

    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid JSON, one object a line ({error})") from None
    check(isinstance(row, dict), f"{where}: a {type(row).__name__}, not a JSON object")
    for name in row:
        check_field(name in Sample.__dataclass_fields__, name, "samples have no such field")
    for name in ("id", "question", "answer", "order_rule", "source"):
        text = row.get(name, "")
        is_text = isinstance(text, str) and (text.strip() or name == "source")
        check_field(is_text, name, "is missing, empty or not a text")
        check_field(not CONTROL.search(text), name, "contains <|...|>, NUL or a surrogate")
    check_field(row["order_rule"] in ORDER_RULES, "order_rule", f"is none of {ORDER_RULES}")
    images, question, movable = row.get("images"), row["question"], row.get("movable")
    check_field(isinstance(images, list), "images", "must be a list of paths, or []")
    n, paths = len(images), []
    check_field(isinstance(movable, list | None), "movable", "must be a list of positions")
    for k in movable or []:
        is_position = type(k) is int and 0 <= k < n and movable.count(k) == 1
        check_field(is_position, "movable", f"needs distinct positions from 0 to {n - 1}")
    places = question.count("<image>")
    check_field(places == n, "question", f"has {places} <image> for {n} images")
    for number in MENTION.findall(question):
        is_one = number in map(str, range(1, n + 1))
        check_field(is_one, "question", f"mentions image {number[:9]} of {n}")
    for image in images:
        try:
            paths.append(os.path.normpath(folder / image))
            path = Path(paths[-1]).resolve()
            # Opening a named pipe would wait for ever.
            check(path.is_file() and path.is_relative_to(folder.resolve()),
                  f"is not a file in {folder}")
            # Decode it all: a truncated file has a size too.
            size = read_image(path).size
            check(max(size) <= 200 * min(size), "is over 200 times longer than wide")
        except Exception as error:  # a decoder may raise anything on broken bytes
            raise UserError(f"{where}, field images: {image!s:.200} {error}") from None
    sample = Sample(**row | {"images": paths, "answer": row["answer"].strip()})
    named = named_positions(sample)
    check_field(named is not None, "answer", f"{sample.answer[:80]!r} does not fit "
                f"order_rule {sample.order_rule} with {n} images, movable {sample.movable}")
    movable_paths = [paths[k] for k in sample.movable]
    for k in named:
        check_field(movable_paths.count(paths[k]) < 2, "images",
                    "the right one occurs twice: use order_rule never")
    return sample

def named_positions(sample: Sample) -> list[int] | None:
    """0-based positions of the images that the answer names; None if it breaks its rule."""
    answer, rule = sample.answer, sample.order_rule
    if rule == "letter":
        options = dict(zip(LETTERS, sample.movable))
        fits = answer in options and len(options) == len(sample.movable)
        return [options[answer]] if fits else None
    if rule in ("index", "sequence"):
        numbers = re.split(r"\s*,\s*", answer) if rule == "sequence" else [answer]
        known = list(map(str, range(1, len(sample.images) + 1)))
        for number in numbers:
            if number not in known or numbers.count(number) > 1:
                return None
        return list(map(known.index, numbers))
    # An answer such as "image 2" would have to follow that image, so it cannot stay.
    names_one = re.search(r"\bimages?[ _]?#?\d", answer, re.IGNORECASE)
    return None if rule == "keep" and names_one else []

def permute(sample: Sample, order: Order) -> Sample:
    """new_images[j] = images[order[j]]; the answer and every <image_k> follow.    (Eq. 1)
    Example: order (2, 0, 1), order_rule index, answer "3". The third image now stands
    first: the answer becomes "1", and <image_1> becomes <image_2>.
    ValueError: not an order of these images, or it moves an image that must stay."""
    identity = list(range(len(sample.images)))
    check(sorted(order) == identity, f"{sample.id}: {order} is not an order of its images")
    for new, old in enumerate(order):
        check(new == old or old in sample.movable,
              f"{sample.id}: {order} moves image {old + 1}, which must stay")
    new_position = list(map(order.index, identity))
    images = tuple(sample.images[old] for old in order)
    question = renumber(sample.question, new_position, r"(?<=<image_)\d+(?=>)")
    return dataclasses.replace(sample, images=images, question=question,
                               answer=move_answer(sample, new_position))

def move_answer(sample: Sample, new_position: list[int]) -> str:
    """y' = Lambda(y, sigma): the answer once image `old` has moved to new_position[old]."""
    if sample.order_rule in ("index", "sequence"):        # "3"; "3,1,2": counted from 1
        return renumber(sample.answer, new_position)
    if sample.order_rule == "letter":                     # "B": the second movable image
        old = sample.movable[LETTERS.index(sample.answer)]
        return LETTERS[sample.movable.index(new_position[old])]
    return sample.answer                                  # "keep" and "never"

def renumber(text: str, new_position: list[int], numbers: str = r"\d+") -> str:
    """Replace numbers in `text`, which count images from 1, by their new numbers."""
    def new_number(number: re.Match) -> str:
        return str(new_position[int(number[0]) - 1] + 1)
    return re.sub(numbers, new_number, text)

def count_orders(sample: Sample) -> int:
    """The number of orders in which the sample may be asked."""
    return math.factorial(len(sample.movable))

def draw_orders(sample: Sample, n_permutations: int, alpha: float, rng) -> list[Order]:
    """The identity and n_permutations permuted orders, or the identity in their place."""
    # Alpha is the probability of permuting: one draw for the whole question.
    if rng.random() >= alpha:
        return [tuple(range(len(sample.images)))] * (n_permutations + 1)
    return distinct_orders(sample, n_permutations + 1, rng)

def distinct_orders(sample: Sample, n_orders: int, rng) -> list[Order]:
    """The identity and random other orders, which repeat once the sample has no more."""
    identity, total = tuple(range(len(sample.images))), count_orders(sample)
    orders = [identity] * (n_orders if total == 1 else 1)
    while len(orders) < n_orders:
        order = list(identity)
        shuffled = rng.sample(sample.movable, len(sample.movable))
        for new, old in zip(sample.movable, shuffled):
            order[new] = old
        # Once all are in use, the next round begins.
        this_round = orders[len(orders) // total * total:]
        if tuple(order) not in this_round:
            orders.append(tuple(order))
    return orders

def all_orders(sample: Sample, cap: int) -> list[Order]:
    """Every order of the sample, identity first; beyond `cap`, a fixed random choice."""
    return distinct_orders(sample, min(cap, count_orders(sample)), random.Random(sample.id))

# ---- Model, images and prompts ---------------------------------------------------------
# Another family must offer what the lines marked FAMILY use: a vision tower that encodes each
# image by itself, 3-D positions from get_rope_index, and Qwen's names for image tokens.
SHARED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*SHARED_FAMILIES, "qwen3_5")  # its recurrent layers keep no keys and values
FAMILY_MODEL = transformers.AutoModelForImageTextToText
IMAGE_TOKEN = "<|image_pad|>"  # one for each feature vector of an image
END_TOKENS = ["<|im_end|>", "<|endoftext|>"]  # of a response: in chat, and in plain text
BANNED_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>"]  # never sampled; probability 0 in the loss too

@dataclass(eq=False)
class Picture:
    """An image as the vision tower reads it; one object for all orders and rollouts."""
    pixels: Tensor  # (patches, channels * frames * patch size ** 2)
    grid: Tensor    # (1, 3): time, height and width in patches
    tokens: int     # its tokens in the prompt, one per 2 x 2 patches

@dataclass
class Prompt:
    """A question in one order, as the model reads it."""
    sample: Sample
    ids: list[int]
    pictures: list[Picture]
    opening: str = ""  # "<think>", if the chat template opens it for the response
    delta: int = 0     # positions minus tokens: an image takes fewer; set by prefill

def load_pretrained(kind, name: str, **options):
    """kind.from_pretrained. Exits if the checkpoint cannot be loaded."""
    path = SHORT_NAMES.get(name, name)
    check("/" in path or Path(path).is_dir(),
          f"--model {name}: no such model or folder{nearest(name, SHORT_NAMES)}")
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--model: could not load {path!r}: {reason}") from None

def load_processor(name: str, cfg) -> SimpleNamespace:
    """What turns samples into prompts, and response tokens into text."""
    check(not CONTROL.search(cfg.instruction) and "<image" not in cfg.instruction,
          "--instruction must not name images or contain <|...|>, NUL or a surrogate")
    config = load_pretrained(transformers.AutoConfig, name)
    families = SHARED_FAMILIES if cfg.share else FAMILIES
    check(config.model_type in families, f"{name} is a {config.model_type}, none of {families}; "
          f"--no-share takes {FAMILIES}")
    tokenizer = load_pretrained(transformers.AutoTokenizer, name)
    # Qwen keeps the chat template for images in a file of its own.
    others, _ = transformers.ProcessorMixin.get_processor_dict(SHORT_NAMES.get(name, name))
    tokenizer.chat_template = others.get("chat_template", tokenizer.chat_template)
    images = load_pretrained(transformers.AutoImageProcessor, name, config=config)
    # Qwen calls them edges, but they are numbers of pixels.
    smallest = min(images.size["shortest_edge"], cfg.max_pixels)
    images.size = {"longest_edge": cfg.max_pixels, "shortest_edge": smallest}
    # Not AutoProcessor, which would preprocess an image again for every order.
    return SimpleNamespace(
        tokenizer=tokenizer, image_processor=images, instruction=cfg.instruction,
        image_id=config.image_token_id, pad_id=tokenizer.pad_token_id,
        eos_ids=sorted(tokenizer.convert_tokens_to_ids(END_TOKENS)),
        banned_ids=tokenizer.convert_tokens_to_ids(BANNED_TOKENS))

def torch_dtype(cfg) -> torch.dtype:
    """Data type of the weights."""
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32

def load_model(name: str, cfg, device: torch.device) -> transformers.PreTrainedModel:
    """The checkpoint's model on a device. Exits if weights and config do not match."""
    model, report = load_pretrained(
        FAMILY_MODEL, name, dtype=torch_dtype(cfg), device_map={"": device}, use_safetensors=True,
        output_loading_info=True, ignore_mismatched_sizes=True,
        attn_implementation="shared_prompt")
    # transformers would fill these with random numbers.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not report[kind], f"{name}: {kind} {sorted(report[kind])[:1]}")
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    check(is_tied or not model.config.tie_word_embeddings,
          f"{name}: tie_word_embeddings is set, but its file has another lm_head.weight")
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # or a frozen vision tower gets gradients
    model.model.visual.requires_grad_(not cfg.freeze_vision)                # FAMILY
    return model.eval()

# Others could run programs (EPS runs Ghostscript). Some phones write MPO, JPEG's variant.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")

def read_image(file) -> Image.Image:
    """A path or binary file -> RGB, upright (EXIF), on white, first frame."""
    with Image.open(file) as image:  # reads the header only
        check(image.format in IMAGE_FORMATS, f"is {image.format}, not one of {IMAGE_FORMATS}")
        image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # convert would clip 16 bits at 255: a white image
        image = image.point(lambda value: value / 256)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def load_pictures(sample: Sample, processor) -> dict[str, Picture]:
    """Path -> picture. Each image is preprocessed once for all orders of its question."""
    pictures = {}
    for path in set(sample.images):
        inputs = processor.image_processor([read_image(path)], return_tensors="pt")
        grid = inputs["image_grid_thw"]
        tokens = int(grid.prod()) // processor.image_processor.merge_size ** 2
        pictures[path] = Picture(inputs["pixel_values"], grid, tokens)
    return pictures

def spell_mentions(question: str) -> str:
    """<image_k> -> image k, as the model reads it."""
    return MENTION.sub(r"image \1", question)

def prompt_text(sample: Sample, processor) -> str:
    """The prompt in chat format, one IMAGE_TOKEN per image."""
    text = spell_mentions(sample.question) + "\n" + processor.instruction
    text = text.replace("<image>", f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>")  # FAMILY
    return processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)

def encode_prompt(sample: Sample, processor, pictures: dict | None = None) -> Prompt:
    """Sample -> Prompt. A placeholder becomes its image's tokens. Never truncates."""
    pictures = pictures or load_pictures(sample, processor)
    in_order = list(map(pictures.get, sample.images))
    text, *pieces = prompt_text(sample, processor).split(IMAGE_TOKEN)
    n_tokens = 0
    for picture, piece in zip(in_order, pieces, strict=True):
        text += IMAGE_TOKEN * picture.tokens + piece
        n_tokens += picture.tokens
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    check(ids.count(processor.image_id) == n_tokens,
          f"{sample.id}: {n_tokens} image tokens expected; is the tokenizer of another model?")
    opening = "<think>" if text.rstrip().endswith("<think>") else ""
    return Prompt(sample, ids, in_order, opening)

def prompt_length(sample: Sample, processor) -> int:
    """Tokens of the prompt, from the sizes of its images, which are not decoded."""
    images = processor.image_processor
    length = len(processor.tokenizer(prompt_text(sample, processor)).input_ids)
    for path in sample.images:
        with Image.open(path) as image:
            patches = images.get_number_of_image_patches(image.height, image.width)
        length += patches // images.merge_size ** 2 - 1  # one is counted
    return length

def load_questions(path: str, processor, cfg, accelerator) -> list[Sample]:
    """Samples of a file. Those whose prompts are too long are dropped and counted."""
    samples, longest = load_samples(path), cfg.max_prompt_tokens
    kept = [sample for sample in samples if prompt_length(sample, processor) <= longest]
    accelerator.print(f"{path}: {len(kept)} questions, {len(samples) - len(kept)} dropped "
                      f"with over {longest} tokens (--max-prompt-tokens)")
    check(kept, f"{path}: no question is left; a lower --max-pixels shortens prompts")
    return kept

def collate(prompts: list[Prompt], responses: list, model, processor, cfg) -> tuple:
    """Rows [padding, prompt, responses] -> the model's inputs, and their segment lengths.
    Example: a prompt of 2 tokens with responses a and b, and one of 3 tokens with c:
        p p a a b        segment lengths  [0, 2, 2, 1]
        . p p p c                         [1, 3, 1]"""
    rows, pictures, segment_lengths = [], [], []
    for prompt, own in zip(prompts, responses):
        rows.append(prompt.ids + flatten(own))
        pictures += prompt.pictures
    padded = processor.tokenizer.pad({"input_ids": rows}, padding_side="left",
                                     return_tensors="pt")
    ids = padded["input_ids"]                                               # (B, S)
    for row, prompt, own in zip(rows, prompts, responses):
        padding = ids.shape[1] - len(row)
        segment_lengths.append([padding, len(prompt.ids), *map(len, own)])
    grids = [torch.empty(0, 3, dtype=torch.long), *(picture.grid for picture in pictures)]
    # Without mm_token_type_ids the model silently falls back to 1-D positions.
    inputs = {"input_ids": ids, "attention_mask": padded["attention_mask"],
              "image_grid_thw": torch.cat(grids),
              "mm_token_type_ids": (ids == processor.image_id).int()}       # FAMILY
    if cfg.share:
        inputs |= shared_inputs(inputs, segment_lengths, pictures, model)
    elif pictures:
        inputs["pixel_values"] = torch.cat([picture.pixels for picture in pictures])
    return accelerate.utils.send_to_device(inputs, model.device), segment_lengths

def flatten(lists) -> list:
    """[[a, b], [c]] -> [a, b, c]"""
    return list(itertools.chain.from_iterable(lists))

# ---- Rollouts and rewards --------------------------------------------------------------
@dataclass
class Rollout:
    """A response to one order of a question, with all that reward and loss need."""
    prompt: Prompt             # in the order that was asked: the loss uses it too (Eq. 6)
    order: Order               # of the images
    gold: str                  # the right answer in that order
    ids: list[int]             # response tokens, end token included
    text: str                  # response text, the prompt's opening included
    truncated: bool            # no end token within max_new_tokens
    idle: int = 0              # tokens decoded after its end, until its stretch was over
    accuracy: float = 0.0
    format: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # (T,) under the policy that sampled it
    ref_logprobs: Tensor | None = None  # (T,) under the frozen start model

def seed_sampling(cfg, step: int, accelerator) -> None:
    """Seed the sampling of each step: a resumed run draws what an unbroken one would."""
    torch.manual_seed(1009 * (1_000_003 * cfg.seed + step) + accelerator.process_index)

@torch.no_grad()
def generate(model, processor, prompts: list[Prompt], n: int, cfg, *,
             greedy: bool = False) -> list[list[list[int]]]:
    """n responses to each prompt, in the prompts' order. Rows are decoded a stretch (1/16 of
    the limit) at a time; finished rows then make room. Without sharing, one stretch is all."""
    model.eval()  # train mode with checkpointing would switch the KV cache off
    sampling = transformers.GenerationConfig(
        max_new_tokens=math.ceil(cfg.max_new_tokens / 16) if cfg.share else cfg.max_new_tokens,
        do_sample=not greedy, top_k=0, top_p=1.0, repetition_penalty=1.0,
        temperature=1.0 if greedy else cfg.temperature, pad_token_id=processor.pad_id,
        eos_token_id=processor.eos_ids, suppress_tokens=processor.banned_ids)
    responses = [[[] for _ in range(n)] for _ in prompts]
    # Longest first: too little memory shows at once, and later prompts fit the cache's width.
    waiting = sorted(zip(prompts, responses), key=lambda pair: -len(pair[0].ids))
    live, cache = [], None  # live: (prompt, response so far), a row of the cache each
    bar = tqdm(total=len(prompts) * n, desc="generate", leave=False, disable=None)
    # generate fills fields that are None from the model's own config (Qwen ships top_k = 1
    # and a repetition penalty, which the loss knows nothing of). So that one is taken off.
    own_config, model.generation_config = model.generation_config, sampling
    while waiting or live:
        # Let prompts join while there is room: n rows of each within cfg.rollout_batch,
        # and all prompts, padded to the longest, within 4 micro-batches. If nothing is
        # live, one joins anyway. Without sharing, every row has its own prompt.
        cache = cache if live else Cache(layers=[])
        held = cache.layers[0].prompts.shape[1] if live else 0
        longest = max(len(prompt.ids) for prompt, _ in live or waiting)
        longest *= 1 if cfg.share else n
        room = 4 * cfg.max_tokens_per_micro_batch // longest - held
        count = max(min(room, (cfg.rollout_batch - len(live)) // n), 0 if live else 1)
        joining, waiting = waiting[:count], waiting[count:]
        if joining and cfg.share:
            cache = prefill(model, processor, joining, cfg, cache)
        for prompt, rows in joining:
            for row in rows:
                live.append((prompt, row))
        # Decode a stretch.
        inputs = next_inputs(model, processor, live, cache, cfg)
        output = model.generate(**inputs, generation_config=sampling)   # (B, .. + t)
        output = output[:, inputs["input_ids"].shape[1]:].tolist()
        # Take out what has ended.
        going_on = []
        for b, ((_, row), new) in enumerate(zip(live, output)):
            row += new[:cfg.max_new_tokens - len(row)]
            if len(row) < cfg.max_new_tokens and not set(new) & set(processor.eos_ids):
                going_on.append(b)
        bar.update(len(live) - len(going_on))
        live = [live[b] for b in going_on]
        for layer in cache.layers:
            layer.keep(going_on, live)
    model.generation_config = own_config  # checkpoints keep it
    return responses

def sample_groups(model, processor, samples: list[Sample], orders: list, cfg, *, n: int,
                  greedy: bool = False) -> list[list[Rollout]]:
    """n graded responses to each order of each sample: one group per sample, by order."""
    asked, prompts, groups = [], [], [[] for _ in samples]
    for sample, its_orders, group in zip(samples, orders, groups):
        pictures, by_order = load_pictures(sample, processor), {}
        for order in its_orders:
            if order not in by_order:  # equal orders share a prompt
                by_order[order] = encode_prompt(permute(sample, order), processor, pictures)
            asked.append((group, order))
            prompts.append(by_order[order])
    responses = generate(model, processor, prompts, n, cfg, greedy=greedy)
    for (group, order), prompt, rows in zip(asked, prompts, responses):
        for row in rows:
            group.append(make_rollout(row, prompt, order, processor))
            grade(group[-1], cfg)
    return groups

def make_rollout(row: list[int], prompt: Prompt, order: Order, processor) -> Rollout:
    """A row of tokens from generate -> Rollout, with its end token, not graded yet."""
    ids = []
    for token in row:
        ids.append(token)
        if token in processor.eos_ids:
            break
    text = prompt.opening + processor.tokenizer.decode(ids, skip_special_tokens=True)
    return Rollout(prompt, order, prompt.sample.answer, ids, text, idle=len(row) - len(ids),
                   truncated=ids[-1] not in processor.eos_ids)

def grade(rollout: Rollout, cfg) -> None:
    """The reward of a rollout, by rules on its text (A.3.2): see "Reading answers"."""
    rollout.accuracy = float(is_correct(rollout.text, rollout.gold))
    rollout.format = float(has_format(rollout.text))
    rollout.reward = cfg.accuracy_weight * rollout.accuracy + cfg.format_weight * rollout.format

def has_format(response: str) -> bool:
    r"""Whether it is <think>...</think>...\boxed{...}..., one think block, none empty."""
    match = re.fullmatch(r"\s*<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)",
                         response, re.DOTALL)
    return match is not None and match[1].strip() != "" and bool(last_boxed(match[2]))

def is_correct(response: str, gold: str) -> bool:
    """Whether its answer means the same as `gold`. Never evaluates text as code."""
    answer = extract_answer(response)
    return answer is not None and same_answer(answer, gold)

# ---- Advantages and filter (Eq. 4-5) ---------------------------------------------------
def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards (Q, R) -> advantages (Q, R); a row has ALL rollouts of a question. (Eq. 4-5)
    Example: [[1, 0, 0, 1], [1, 1, 1, 1]] gives [[1, -1, -1, 1], [0, 0, 0, 0]]."""
    rewards = torch.as_tensor(rewards) + 0.0  # convert integers to float
    deviation = rewards - rewards.mean(dim=1, keepdim=True)                 # r - mean(r)
    std = rewards.std(dim=1, keepdim=True, correction=0)                    # (Q, 1)
    advantages = deviation / std.clamp_min(torch.finfo(rewards.dtype).tiny)
    # Rounding in the mean must not turn equal rewards into tiny, then large, advantages.
    varied = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)           # (Q, 1)
    return advantages.where(varied, torch.zeros_like(advantages))

def set_advantages(groups: list[list[Rollout]]) -> None:
    """Set each rollout's advantage, compared with all of its question."""
    for group in groups:
        rewards = torch.tensor([[rollout.reward for rollout in group]])     # (1, R)
        for rollout, advantage in zip(group, group_advantages(rewards)[0].tolist()):
            rollout.advantage = advantage

VERDICTS = ("kept", "all_right", "all_wrong", "too_easy", "too_hard", "flat")

def verdict(group: list[Rollout], cfg) -> str:
    """Why a group is kept or dropped. Example, --filter online with bounds .1 and .9: of
    12 rollouts, 6 right is kept, 11 too_easy, 12 all_right."""
    low, high = (cfg.filter_low, cfg.filter_high) if cfg.filter == "online" else (0, 1)
    accuracy = mean(rollout.accuracy for rollout in group)
    in_bounds = low <= accuracy <= high
    if in_bounds and any(rollout.advantage != 0 for rollout in group):
        return "kept"
    if accuracy in (0, 1):
        return "all_right" if accuracy == 1 else "all_wrong"
    if in_bounds:  # equal rewards all the same: the accuracy's weight is 0
        return "flat"
    return "too_easy" if accuracy > high else "too_hard"

# Percent of the questions with score 0, .1, .. 1 that stage 0 aims at (read off Fig. 3b).
SCORE_TARGET = (12, 11, 11, 12, 15, 17, 6, 5, 4, 3, 3)

def resample_by_difficulty(scores: list[float], target: tuple, size: int, rng) -> list:
    """Indices of about `size` questions whose scores follow the histogram `target`. A bin
    gives at most what it has. Example: 100 scores of 1.0 and 10 of 0.5, target half of
    each, size 40: the ten of 0.5 and twenty of 1.0."""
    bins = [[] for _ in target]
    for index, score in enumerate(scores):
        bins[round(score * (len(target) - 1))].append(index)
    kept = []
    for members, share in zip(bins, target):
        quota = max(round(size * share / sum(target)), 1)
        kept += rng.sample(members, min(quota, len(members)))
    return sorted(kept)

# ---- Log-probabilities and loss (Eq. 6) ------------------------------------------------
def policy_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
                advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float,
                beta: float, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Minus (clipped surrogate - beta * KL), summed over the mask, / denominator.  (Eq. 6)
    logprobs, old_logprobs, ref_logprobs, mask: (B, T); advantages: (B,). Returns a scalar
    loss and sums over tokens: `kl`, `entropy` (-log pi), and `clipped`, the tokens without
    a gradient. denominator: that of the whole update, over all its micro-batches and
    processes, so that their losses and gradients add up to the update's."""
    mask, advantages = mask.bool(), advantages[:, None]                 # (B, T), (B, 1)
    log_ratio = (logprobs - old_logprobs).where(mask, 0.0)
    # Bounded, exp stays finite: inf * 0 in a clipped branch would be a NaN gradient.
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()        # pi / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        log_ratio_ref = (ref_logprobs - logprobs).where(mask, 0.0)
        log_ratio_ref = log_ratio_ref.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        kl = log_ratio_ref.exp() - log_ratio_ref - 1                        # k3 estimate
    loss = -((objective - beta * kl) * mask).sum() / denominator
    is_clipped = (clipped * advantages < ratio * advantages) & mask
    entropy = -logprobs.detach().where(mask, 0.0)
    return loss, {"kl": float((kl.detach() * mask).sum()), "entropy": float(entropy.sum()),
                  "clipped": float(is_clipped.sum())}

def loss_denominator(rollouts: list[Rollout]) -> int:
    """These rollouts' share of the loss denominator: their tokens."""
    return sum(len(rollout.ids) for rollout in rollouts)

def response_logprobs(model, processor, rollouts: list[Rollout], cfg) -> tuple:
    """Log-probabilities (B, T) of the response tokens at the sampling temperature, and
    their mask (B, T); zeros after a response's end."""
    prompts, responses, targets = [], [], []
    for row in pack(rollouts, cfg):  # a micro-batch falls into the same rows again
        prompts.append(row[0].prompt)
        responses.append([rollout.ids for rollout in row])
        targets += map(torch.tensor, responses[-1])
    inputs, segment_lengths = collate(prompts, responses, model, processor, cfg)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state       # (rows, S, D)
    # The hidden state to the left of a token predicts it. For the first token of a response
    # that is the prompt's last one.
    places, chosen = torch.arange(hidden[..., 0].numel()), []
    for row, lengths in zip(places.view(hidden.shape[:2]), segment_lengths):
        padding, prompt, *own = row.split(lengths)
        for response in own:
            chosen += [prompt[-1:], response[:-1]]
    hidden = hidden.flatten(0, 1)[torch.cat(chosen)]                        # (tokens, D)
    tokens = torch.cat(targets).to(hidden.device)                           # (tokens,)
    banned = torch.tensor(processor.banned_ids, device=hidden.device)
    # All logits at once would be huge: the backward pass computes them again by chunk.
    logprobs = []
    for chunk, ids in zip(hidden.split(LOGIT_CHUNK), tokens.split(LOGIT_CHUNK)):
        logprobs.append(checkpoint(token_logprobs, model.lm_head, chunk, ids, banned,
                                   cfg.temperature, use_reentrant=False))
    rows = torch.cat(logprobs).split(list(map(len, targets)))
    mask = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True).bool()
    return pad_sequence(rows, batch_first=True), mask                       # (B, T)

def token_logprobs(lm_head, hidden, targets, banned_ids, temperature: float) -> Tensor:
    """Hidden states (N, D) and the tokens after them (N,) -> log-probabilities (N,)."""
    logits = lm_head(hidden).float()                                        # (N, V)
    logits[:, banned_ids] = -torch.inf  # sampling suppresses them too
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1)

@torch.no_grad()
def frozen_logprobs(model, processor, rollouts: list[Rollout], cfg) -> list[tuple]:
    """Pairs of a rollout and its tokens' log-probabilities (T,), without gradients."""
    model.eval()
    pairs = []
    for batch in micro_batches(rollouts, cfg):
        logprobs, _ = response_logprobs(model, processor, batch, cfg)       # (B, T)
        for rollout, row in zip(batch, logprobs):
            pairs.append((rollout, row[:len(rollout.ids)].clone()))
    return pairs

def pack(rollouts: list[Rollout], cfg) -> list[list[Rollout]]:
    """Neighbours with the same prompt share a row, up to a micro-batch's tokens. Example:
    at most 9, a prompt of 4 and responses of 2, 2 and 3: rows of 4 + 2 + 2 and 4 + 3."""
    rows = []
    for rollout in rollouts:
        fits = (cfg.share and rows and rows[-1][0].prompt is rollout.prompt and
                row_length(rows[-1] + [rollout]) <= cfg.max_tokens_per_micro_batch)
        if not fits:
            rows.append([])
        rows[-1].append(rollout)
    return rows

def row_length(row: list[Rollout]) -> int:
    """Tokens of a packed row: the prompt once, and the responses."""
    return len(row[0].prompt.ids) + sum(len(rollout.ids) for rollout in row)

def micro_batches(rollouts: list[Rollout], cfg) -> list[list[Rollout]]:
    """Rollouts in batches of rows, longest first: too little memory shows at once."""
    batches, n_rows, longest = [], 0, math.inf
    for row in sorted(pack(rollouts, cfg), key=row_length, reverse=True):
        # All rows of a batch are padded to its first, which is the longest.
        if (n_rows + 1) * longest > cfg.max_tokens_per_micro_batch:
            batches.append([])
            n_rows, longest = 0, row_length(row)
        batches[-1] += row
        n_rows += 1
    return batches

# ---- Training (Algorithm 1) ------------------------------------------------------------
@dataclass
class Progress:
    """All that a run needs to continue exactly, apart from weights and optimizer."""
    step: int
    pool: list[int]     # numbers of the questions that this epoch has not asked yet
    rng: random.Random  # draws questions and permutations; the same in all processes
    start: str = ""     # the model that training began with, and that KL is measured from
    best: float = 0.0   # highest eval_worst so far, the start model's included

def draw_questions(progress: Progress, n_questions: int, count: int) -> list[int]:
    """The numbers of the next `count` questions; every epoch is a fresh shuffle."""
    drawn = []
    while len(drawn) < count:
        if not progress.pool:
            progress.pool += progress.rng.sample(range(n_questions), n_questions)
        drawn.append(progress.pool.pop())
    return drawn

def collect_groups(model, processor, questions, progress, *, alpha, cfg, accelerator):
    """This process's groups of a step, by verdict."""
    world, rank = accelerator.num_processes, accelerator.process_index
    groups, missing = {name: [] for name in VERDICTS}, cfg.questions_per_step
    for _ in range(MAX_ROUNDS):
        # All processes draw the same questions and orders, and each answers its own part.
        chosen, orders = [], []
        for k in draw_questions(progress, len(questions), missing):
            chosen.append(questions[k])
            orders.append(draw_orders(questions[k], cfg.n_permutations, alpha, progress.rng))
        sampled = sample_groups(model, processor, chosen[rank::world], orders[rank::world],
                                cfg, n=cfg.rollouts_per_order)
        set_advantages(sampled)
        for group in sampled:
            groups[verdict(group, cfg)].append(group)
        # The online filter replaces dropped questions until the batch is full.
        missing = cfg.questions_per_step - sum(gather_object([len(groups["kept"])]))
        if missing == 0 or cfg.filter in ("none", "offline"):
            break
    return groups

def update(model, reference, optimizer, processor, kept, *, cfg) -> tuple:
    """Train on the kept groups -> sums over this process's tokens, and gradient norms."""
    rollouts = flatten(kept)
    if cfg.updates_per_step > 1:  # with one, the policy that trains is the one that sampled
        for rollout, logprobs in frozen_logprobs(model, processor, rollouts, cfg):
            rollout.old_logprobs = logprobs
    if cfg.beta:
        # The start model is the policy without its adapters, or a copy in host memory, for
        # which the GPU has room as long as there are no gradients.
        if cfg.lora_rank:
            reference.disable_adapter_layers()
            pairs = frozen_logprobs(model, processor, rollouts, cfg)
            reference.enable_adapter_layers()
        else:
            pairs = frozen_logprobs(reference.to(model.device), processor, rollouts, cfg)
            reference.to("cpu")
        for rollout, logprobs in pairs:
            rollout.ref_logprobs = logprobs
    sums, norms = Counter(), []
    model.train()
    for u in range(cfg.updates_per_step):
        begin = len(kept) * u // cfg.updates_per_step
        end = len(kept) * (u + 1) // cfg.updates_per_step
        part = flatten(kept[begin:end])
        denominator = sum(gather_object([loss_denominator(part)]))
        # AdamW moves weights on zero gradients too: with no tokens, all processes skip.
        if denominator > 0:
            sums.update(add_gradients(model, processor, part, denominator, cfg))
            norms.append(optimizer.step())
    model.eval()
    return sums, norms

def add_gradients(model, processor, rollouts: list[Rollout], denominator, cfg) -> Counter:
    """Forward and backward passes of an update -> policy_loss's sums, and `tokens`."""
    sums = Counter()
    for batch in micro_batches(rollouts, cfg):
        logprobs, mask = response_logprobs(model, processor, batch, cfg)    # (B, T)
        old_logprobs, ref_logprobs = logprobs.detach(), None
        if batch[0].old_logprobs is not None:
            old_logprobs = pad_sequence([r.old_logprobs for r in batch], batch_first=True)
        if batch[0].ref_logprobs is not None:
            ref_logprobs = pad_sequence([r.ref_logprobs for r in batch], batch_first=True)
        advantages = torch.tensor([r.advantage for r in batch], device=mask.device)
        loss, stats = policy_loss(
            logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_low=cfg.clip_low,
            clip_high=cfg.clip_high, beta=cfg.beta, denominator=denominator)
        loss.backward()
        if loss.isfinite():  # else the optimizer skips this update, and JSON has no NaN
            sums.update(stats, tokens=int(mask.sum()))
    return sums

def step_metrics(groups: dict[str, list[list[Rollout]]], loss_sums: Counter) -> dict:
    """Metrics of one step over all processes. The README says what is healthy."""
    sums, total, of_loss, metrics = Counter(), Counter(), Counter(), {}
    for name, own in groups.items():
        sums[name] += len(own)
        for group in own:
            rewards = {}  # the distinct ones of each order, the given order first
            for r in group:
                rewards.setdefault(r.order, set()).add(r.reward)
                sums.update(rollouts=1, accuracy=r.accuracy, format=r.format, reward=r.reward,
                            length=len(r.ids), truncated=r.truncated, idle=r.idle)
            n_distinct = list(map(len, rewards.values()))
            has_gradient = any(r.advantage != 0 for r in group)
            # A gradient? And would the given order, or every order, have none alone?
            sums.update(groups=1, with_gradient=has_gradient,
                        equal_as_given=has_gradient and n_distinct[0] == 1,
                        by_permutation=has_gradient and max(n_distinct) == 1)
    for of_groups, of_tokens in gather_object([(sums, loss_sums)]):
        total.update(of_groups)
        of_loss.update(of_tokens)
    for name in VERDICTS:
        metrics[name] = total[name]
    metrics["dropped"] = sum(metrics.values()) - metrics["kept"]
    for name in ("accuracy", "format", "reward", "length", "truncated"):
        metrics[name] = total[name] / total["rollouts"]
    metrics["with_gradient"] = total["with_gradient"] / total["groups"]
    for name in ("equal_as_given", "by_permutation"):
        metrics[name] = total[name] / max(total["with_gradient"], 1)
    # Idle is the part of all decoded tokens that came after the end of a response.
    metrics["idle"] = total["idle"] / (total["length"] + total["idle"])
    # Every statistic of policy_loss becomes a metric: its mean over tokens.
    for name in ("kl", "entropy", "clipped", *of_loss):
        metrics[name] = of_loss[name] / max(of_loss["tokens"], 1)
    metrics["clip_fraction"] = metrics.pop("clipped")
    metrics.pop("tokens", None)
    return metrics

STEP_LINE = (
    "step {step}/{steps} | acc {accuracy:.2f} fmt {format:.2f} | kept {kept} dropped {dropped} "
    "(all right {all_right}, wrong {all_wrong}, too easy {too_easy}, hard {too_hard}, flat {flat}) "
    "| len {length:.0f} cut {truncated:.0%} idle {idle:.0%} | kl {kl:.3f} ent {entropy:.2f} "
    "clip {clip_fraction:.2f} grad {grad_norm:.2f} skipped {skipped} | gen {seconds_sample:.1f}s "
    "train {seconds_update:.1f}s | {left:.0f} min left")

def train(cfg, processor, questions: list, held_out: list, accelerator) -> None:
    """Algorithm 1: sample permuted groups, drop what teaches nothing, update."""
    folder, is_main = cfg.folder, accelerator.is_main_process
    resumed = newest_checkpoint(folder) if cfg.resume else None
    stage_1 = newest_checkpoint(folder.parent / "stage1") if cfg.stage == 2 else None
    progress = Progress(0, [], random.Random(cfg.seed), start=str(stage_1 or cfg.model))
    if resumed:
        progress = load_progress(resumed, questions)
    accelerator.print(f"start model: {progress.start}")
    # With LoRA, load the start model: the adapters are in the optimizer's state.
    weights = str(resumed) if resumed and not cfg.lora_rank else progress.start
    model, reference = load_model(weights, cfg, accelerator.device), None
    if cfg.lora_rank:
        reference = add_lora(model, cfg)  # the model again, with a switch for its adapters
    elif cfg.beta:
        reference = load_model(progress.start, cfg, torch.device("cpu"))
    optimizer = SplitAdamW(model, cfg, accelerator)
    if resumed:
        optimizer.load(resumed)
    if is_main and cfg.resume:
        cut_logs(folder, progress.step if resumed else -1)
    if held_out and not resumed:
        metrics = evaluate(model, processor, held_out, cfg, accelerator, step=0)
        log_metrics({"step": 0} | metrics, folder, accelerator)
        progress.best = metrics["eval_worst"]

    for step in range(progress.step + 1, cfg.steps + 1):
        began = time.time()
        seed_sampling(cfg, step, accelerator)
        # Explore first, exploit later: alpha falls linearly over its schedule.
        elapsed = min((step - 1) / max((cfg.alpha_steps or cfg.steps) - 1, 1), 1.0)
        alpha = cfg.alpha_start + (cfg.alpha_end - cfg.alpha_start) * elapsed
        # Sample (n_s + 1) * n rollouts of each question, grade them, keep what teaches.
        groups = collect_groups(model, processor, questions, progress, alpha=alpha,
                                cfg=cfg, accelerator=accelerator)
        sampled_at = time.time()
        # One rollout batch gives cfg.updates_per_step optimizer updates.
        sums, norms = update(model, reference, optimizer, processor, groups["kept"], cfg=cfg)
        progress.step = step
        # A norm that is not finite means that the optimizer left the weights alone.
        applied = list(filter(math.isfinite, norms))
        metrics = {"step": step} | step_metrics(groups, sums) | {
            "grad_norm": mean(applied or [0.0]), "skipped": len(norms) - len(applied),
            "alpha": alpha, "lr": cfg.lr, "seconds_sample": sampled_at - began,
            "seconds_update": time.time() - sampled_at, "grader_timeouts": MATH_JUDGE.timeouts}
        if accelerator.device.type == "cuda":
            metrics["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        left = (cfg.steps - step) * (time.time() - began) / 60
        accelerator.print(STEP_LINE.format(**metrics, steps=cfg.steps, left=left))
        if is_main and (step - 1) % cfg.log_every == 0:
            first = flatten(groups.values())[0]  # a kept one, if there is any
            log_group(folder / "rollouts.jsonl", step, first, show=True)
        if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(model, processor, held_out, cfg, accelerator, step=step)
            if metrics["eval_worst"] > progress.best:
                progress.best = metrics["eval_worst"]
                if is_main:
                    save_weights(folder / "best", model, reference, processor, cfg)
        log_metrics(metrics, folder, accelerator)
        if step == cfg.steps or step % cfg.save_every == 0:
            save_checkpoint(cfg, progress, questions, processor, optimizer, model=model,
                            reference=reference, accelerator=accelerator)
    accelerator.print(f"done: {newest_checkpoint(folder)}\nlook: python eval.py --page {folder}")

def score(cfg, processor, questions: list[Sample], accelerator) -> None:
    """Stage 0: each question's accuracy (scores.json), and a choice by it (kept.json)."""
    path = cfg.folder / "scores.json"
    model = load_model(cfg.model, cfg, accelerator.device)
    # A resumed run has the scores of whole batches, from the first question on.
    scores = json.loads(path.read_text()) if path.exists() else {}
    done = [question.id for question in questions[:len(scores)]]
    check(set(done) == set(scores), f"{path} is of other questions; start stage 0 again")
    starts = range(len(scores), len(questions), cfg.questions_per_step)
    # The bar is shown in log files too, since this can take hours.
    for start in tqdm(starts, "score", mininterval=10, disable=not accelerator.is_main_process):
        batch = questions[start:start + cfg.questions_per_step]
        seed_sampling(cfg, start, accelerator)
        groups = sample_orders(model, processor, batch, cfg, accelerator, n_orders=1,
                               n=SCORE_ROLLOUTS)
        for name, row in accuracies(groups).items():
            scores[name] = mean(row)
        if accelerator.is_main_process:
            write_atomic(path, json.dumps(scores, indent=0))
    values, size = [scores[q.id] for q in questions], round(SCORE_KEEP * len(questions))
    kept = resample_by_difficulty(values, SCORE_TARGET, size, random.Random(cfg.seed))
    if accelerator.is_main_process:
        write_atomic(cfg.folder / "kept.json", json.dumps([questions[k].id for k in kept]))
    accelerator.print(f"kept {len(kept)} of {len(questions)} questions; mean score "
                      f"{mean(values):.2f} -> {mean(values[k] for k in kept):.2f}")

# ---- Evaluation over image orders ------------------------------------------------------
def sample_orders(model, processor, samples: list[Sample], cfg, accelerator, *, n_orders,
                  n: int, greedy: bool = False) -> list[list[Rollout]]:
    """This process's part of the samples, answered n times in at most n_orders orders."""
    mine = samples[accelerator.process_index::accelerator.num_processes]
    orders = [all_orders(sample, n_orders) for sample in mine]
    return sample_groups(model, processor, mine, orders, cfg, n=n, greedy=greedy)

def accuracies(groups: list[list[Rollout]]) -> dict[str, list[float]]:
    """Question id -> accuracies of its rollouts, from all processes."""
    rows = {}
    for group in groups:
        rows[group[0].prompt.sample.id] = [rollout.accuracy for rollout in group]
    return dict(gather_object(list(rows.items())))

def evaluate(model, processor, samples: list, cfg, accelerator, *, step: int) -> dict:
    """Greedy answers to every question in at most cfg.eval_orders orders. Shares in [0, 1]:
    eval_accuracy, the mean over orders; eval_worst, right in every order; eval_bias, best
    order minus worst, the paper's p(x_max) - p(x_min) (A.5). Logs a few groups."""
    rows, began = {}, time.time()
    for start in range(0, len(samples), cfg.questions_per_step):
        batch = samples[start:start + cfg.questions_per_step]
        groups = sample_orders(model, processor, batch, cfg, accelerator,
                               n_orders=cfg.eval_orders, n=1, greedy=True)
        rows |= accuracies(groups)
        if start == 0 and accelerator.is_main_process:
            for group in groups[:LOGGED_HELD_OUT]:
                log_group(cfg.folder / "held_out.jsonl", step, group)
    worst, best = mean(map(min, rows.values())), mean(map(max, rows.values()))
    metrics = {"eval_accuracy": mean(map(mean, rows.values())), "eval_worst": worst,
               "eval_bias": best - worst, "seconds_eval": time.time() - began}
    accelerator.print("  eval | accuracy {eval_accuracy:.3f} worst {eval_worst:.3f} "
                      "bias {eval_bias:.3f}".format(**metrics))
    return metrics

# ---- Run folder: open, log, save, load -------------------------------------------------
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
    """Rows that append_line wrote. A last line torn by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return list(map(json.loads, lines))

def cut_logs(folder: Path, last_step: int) -> None:
    """Remove what a killed run logged after the step that it continues from."""
    for name in ("metrics.jsonl", "rollouts.jsonl", "held_out.jsonl"):
        rows = [row for row in read_lines(folder / name) if row["step"] <= last_step]
        write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))

def log_metrics(metrics: dict, folder: Path, accelerator) -> None:
    """To metrics.jsonl, and to the tracker of --report-to."""
    accelerator.log(metrics, step=metrics["step"])
    if accelerator.is_main_process:
        append_line(folder / "metrics.jsonl", metrics)

def log_group(path: Path, step: int, group: list[Rollout], show: bool = False) -> None:
    """Add a group's rollouts to a JSONL file; show: also print the last of them."""
    for r in group:
        asked = r.prompt.sample  # in this rollout's order
        append_line(path, {
            "step": step, **vars(asked), "order": r.order, "gold": r.gold, "response": r.text,
            "reward": r.reward, "accuracy": r.accuracy, "format": r.format,
            "advantage": r.advantage})
    if show:
        print(f"  {asked.id} in order {r.order}: {asked.question}\n  > {r.text}\n  "
              f"gold {r.gold} | reward {r.reward:.1f} advantage {r.advantage:+.2f}")

@contextlib.contextmanager
def only_run_in(out: Path, accelerator):
    """Lock a folder of stages: two runs at once would write into each other's files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        if accelerator.is_main_process:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        busy = "another run is at work there" if type(error) is BlockingIOError else error
        raise UserError(f"cannot run in {out} (--out): {busy}") from None
    try:
        yield
    finally:
        os.close(lock)

def open_run(cfg, accelerator) -> None:
    """Make the run folder, with config.json and the code."""
    folder = cfg.folder
    if accelerator.is_main_process and not cfg.resume:
        # An earlier run is renamed stage1-1, stage1-2 and so on: nothing is lost.
        number = 1
        while Path(f"{folder}-{number}").exists():
            number += 1
        if folder.exists():
            os.rename(folder, f"{folder}-{number}")
            print(f"the earlier run in {folder} is now {folder}-{number}")
        folder.mkdir()
        write_atomic(folder / "started", time.ctime())
        # A fork's main script is not perl.py: keep both.
        for code in {__file__, getattr(sys.modules["__main__"], "__file__", __file__)}:
            shutil.copy(code, folder)
    if accelerator.is_main_process:  # on --resume too: --steps may have changed
        write_atomic(folder / "config.json", json.dumps(vars(cfg) | {"resume": ""}, indent=1))
    accelerator.wait_for_everyone()

def kept_questions(cfg, questions: list[Sample]) -> list[Sample]:
    """With --filter offline, the questions that stage 0 kept, if it ran in this OUT."""
    path = cfg.folder.parent / "stage0" / "kept.json"
    if cfg.filter != "offline" or not path.exists():
        return questions
    kept = set(json.loads(path.read_text()))
    chosen = [question for question in questions if question.id in kept]
    check(len(chosen) == len(kept), f"{path} is not of {cfg.data}; run stage 0 again")
    return chosen

def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-STEP folders of a run, by step."""
    def step(path: Path) -> int:
        return int(path.name.removeprefix("checkpoint-"))
    return sorted(folder.glob("checkpoint-[0-9]*"), key=step)

def newest_checkpoint(folder: Path) -> Path | None:
    """The one with the highest step; None if there is none."""
    by_step = checkpoints(folder)
    return by_step[-1] if by_step else None

def load_progress(folder: Path, questions: list[Sample]) -> Progress:
    """The run's progress at a checkpoint. Exits if the training questions are others."""
    state = torch.load(folder / "training_state.pt")
    check(state.pop("questions") == [question.id for question in questions],
          f"the training questions are not those of {folder}; start a new run")
    rng = random.Random()
    rng.setstate(state["rng"])
    return Progress(**state | {"rng": rng})

def save_checkpoint(cfg, progress, questions, processor, optimizer, *, model, reference,
                    accelerator) -> None:
    """FOLDER/checkpoint-STEP: a Hugging Face folder, and the run's state."""
    temporary = cfg.folder / "checkpoint.tmp"
    check(all(weight.isfinite().all() for weight in model.parameters()),
          f"step {progress.step}: a weight is not finite; the older checkpoint stays")
    if accelerator.is_main_process:
        save_weights(temporary, model, reference, processor, cfg)
        ids, rng = [question.id for question in questions], progress.rng.getstate()
        state = vars(progress) | {"questions": ids, "rng": rng}
        torch.save(state, temporary / "training_state.pt")
    accelerator.wait_for_everyone()
    torch.save(optimizer.state_dict(), temporary / f"optimizer-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    # Older checkpoints go only when the new one is complete.
    if accelerator.is_main_process:
        os.replace(temporary, cfg.folder / f"checkpoint-{progress.step}")
        if cfg.keep_checkpoints:
            for other in checkpoints(cfg.folder)[:-cfg.keep_checkpoints]:
                shutil.rmtree(other)

def save_weights(folder: Path, model, reference, processor, cfg) -> None:
    """The policy as a Hugging Face folder. LoRA: merged."""
    temporary = folder.with_name("weights.tmp")  # a killed run leaves no half folder
    shutil.rmtree(temporary, ignore_errors=True)
    merged = copy.deepcopy(reference).merge_and_unload() if cfg.lora_rank else model
    merged.save_pretrained(temporary)
    processor.tokenizer.save_pretrained(temporary)
    processor.image_processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)

# ---- Reading answers: skip it on a first reading ---------------------------------------
def extract_answer(response: str) -> str | None:
    r"""The last \boxed{} after </think>, else the last <answer>, closed or not."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:  # it never closes
        return None
    tags = re.findall(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", text, re.DOTALL)
    boxed = last_boxed(text)
    return (tags[-1].strip() if boxed is None and tags else boxed) or None

def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance, or None."""
    open_braces, boxes = [], {}  # where a box begins -> its content
    for brace in re.finditer(r"\\boxed\s*\{|(?<!\\)[{}]", text):
        if brace[0] != "}":
            open_braces.append(brace)
        elif open_braces and (opening := open_braces.pop())[0] != "{":
            boxes[opening.end()] = text[opening.end():brace.start()].strip()
    return boxes[max(boxes)] if boxes else None

# NFKC alone reads x² as x2, 1½ as 11/2 and ①② as 12. The keys are Unicode's own tags.
SHAPES = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": " %s", "<circle>": "(%s)"}
FORMS = [  # (regex, the one form to compare), in this order
    (r"(?<=\^\{.)\}\^\{|\u200b", ""), ("[−–—‐]", "-"), ("[⁄÷]", "/"), ("、", ","),
    ("≤", r"\\le "), ("≥", r"\\ge "), ("∞", r"\\infty "), ("∪", r"\\cup "), ("。", "."),
    ("π", r"\\pi "), ("[×·]", r"\\times "), (r"√ ?\(?(\d+|\w)\)?", r"\\sqrt{\1}"),
    (r"\\(?:left|right)(?![a-z])|\\[,!;:()\[\]]|\\?\$|\*\*", ""), (r"\{,\}", ","),
    (r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r" \1 "), (r"\\%| ?percent", "%"), ("→", "->"),
    (r"(?:~|\s|\\ )+", " "), (r" ?\^ ?", "^"), (r"\^\{? ?\\circ ?\}?|\\degree", "°"),
    (r"\^(-?\d+|\w)", r"^{\1}")]

def normalize(text: str) -> str:
    r"""One spelling for Unicode forms, \text{}, $, spaces and a final full stop."""
    shapes = [SHAPES.get(unicodedata.decomposition(c).split(" ")[0], "%s") for c in text]
    text = "".join(shapes) % tuple(unicodedata.normalize("NFKC", c) for c in text)
    for regex, form in FORMS:
        text = re.sub(regex, form, text)
    return text.strip(" *`\"'").removesuffix(".").strip()

# The letter of "option B", "选B", "B. dogs", "B (dog)" or "B is correct", unless another
# follows that is no word ("A dog", "I think"), as in "B. cats or C. dogs".
LETTER = re.compile(
    r"(?i:(?:[a-z: ]*\b(?:option|choice|answer|is)\b[: ]*|[答案应选项是: ]*)[(\[{\\]*"
    r"([A-Z])(?:\\?[)\]}]|[.:](?=\s|$)|(?=$| \(|,? (?:because|since)\b|.{,3}正确"
    r"| is (?:the )?(?:correct|right))))(?!(?:.*[^\w'’\\])?(?!A [a-z])[A-HJ-Z](?!\w))")
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen "
           "fourteen fifteen sixteen seventeen eighteen nineteen twenty").split()
ORDINALS = "0th first second third fourth fifth sixth seventh eighth ninth tenth".split()
NAMES = [  # names of images, numbers and units -> digits and symbols
    (r"(?<![\\A-Za-z])[A-Za-z]{3,}", lambda word: word[0].lower()), (" ?degrees?", "°"),
    (r"\b(?:the|an?) (?=[a-z\d]{2})", ""), (r"\b(?:picture|photo|figure)\b", "image"),
    *((rf"\b({name}|{k}[snrt][tdh]) image\b", str(k)) for k, name in enumerate(ORDINALS)),
    *((rf"\b{name}\b", str(k)) for k, name in enumerate(NUMBERS)),
    ("(?<![a-z])or(?![a-z])", "∨"),
    (r"<?(?:\bimage|图片?)[ _#]*(\d+)>?|第(\d+)[张幅]图?片?", r"\1\2"),
    (r"\b(m|c|d|k|)(?:illi|enti|eci|ilo)?(m|l|g)(?:et|it|ram)(?:er|re|)s?\b", r"\1\2"),
    (r"(\d [a-z]{3,})s\b", r"\1"), (r"(\d) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"(\d)[eE]\+?(-?\d+)", r"\1\\times 10^{\2}"), (r",? ?\b(?:and|then)\b", ","),
    (r"(?<=\d) ?(?:-?>|\\to| ) ?(?=\d)", ","), (r" (?![A-Za-z\d])|(?<![\d}i]) ", ""),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,234
    (r"(?<![\\°])([A-Z])", r"\1_{9}")]  # math-verify takes R for r, but not for r_9
NAMED = re.compile(r"^(?!\\frac|\\sqrt)(?:[\\A-Za-z][\w\\{}().']*)?= ?")  # "x=", "Area="
SEPARATOR = re.compile(r"[,;∨]+(?![^(\[{]*[)\]}])")  # not within brackets
# Brackets round a list, a value, its unit. "5m" may be a product, "5 m" has a unit.
QUANTITY = re.compile(
    r"(?:\\?(?P<open>[(\[{])(?![^(\[]*[)\]].))?(?P<value>.*?)"
    r"\\?(?P<close>(?(open)[)\]}]))(?:(?:(?<=[\d)}])|(?<=\\pi)) ?(?P<unit>[°%][CF]?"
    r"|(?:[kcdm]m|[km]g|(?<= )(?:[mglhs]|(?!million|thousand|dozen)[a-z]{3}[a-z ]*))"
    r"(?:\^\{[23]\})?(?:/\w+)?))?")
# What math-verify reads as a whole. Of words, dates and a = b = c it would read a part.
FORMULA = re.compile(
    r"(?i)(?!\d+([-/])\d+\1\d+$|.*=.*=|[^a-z]*=[^a-z]*$)(?:\d(?:\.(?=\d))?"
    r"|(?<!\d)\.(?=\d)|[-+*/^=<>()\[\]{}|!, ]|(?<![\d)])_|(?<![a-z\\])(?!to|is|in|no|vs)"
    r"[a-z]{1,2}(?![a-z])|\\(?:[dt]?frac|sqrt|pi|times|cdot|[pm][pm]|[lg]eq?|infty|c[ua]p"
    r"|sin|cos|tan|log|ln|alpha|beta|theta)(?![a-z]))+")

def same_answer(answer: str, gold: str) -> bool:
    """Compare as letters, as yes or no, else as values."""
    if len(answer) > MathJudge.MAX_CHARS + len(gold):
        return False
    answer, gold = normalize(answer), normalize(last_boxed(gold) or gold)
    if re.fullmatch("(?i)yes|no|true|false", gold):  # but not "yes or no"
        hedge = rf".*\b(?!{gold}\b)(?:yes|no|true|false|or)\b"
        return re.match(rf"(?i){gold}\b(?!{hedge})", answer) is not None
    wanted = re.sub(r"\band\b|[\s,;()]", "", gold)
    if re.fullmatch("[A-Z]+|[a-z]", wanted):  # a set, if in alphabetical order
        label = LETTER.match(answer)
        letters = label[1].upper() if label else re.sub(r"\band\b|[^\w/=]", "", answer)
        is_set = sorted(wanted) == list(wanted)
        return letters == wanted.upper() or is_set and sorted(letters) == list(wanted)
    for regex, name in NAMES:
        answer, gold = re.sub(regex, name, answer), re.sub(regex, name, gold)
    return same_value(answer, gold)

@functools.lru_cache(maxsize=65536)
def same_value(answer: str, gold: str) -> bool:
    """Compare units and brackets that both have, and values, by item or as formulas."""
    if ("=" in answer) != ("=" in gold):  # x = 3 is 3
        answer, gold = NAMED.sub("", answer), NAMED.sub("", gold)
    if answer == gold:
        return True
    mine, its = QUANTITY.fullmatch(answer), QUANTITY.fullmatch(gold)
    for part in ("open", "close", "unit"):
        if mine[part] and its[part] and mine[part] != its[part]:
            return False
    items, wanted = SEPARATOR.split(mine["value"]), SEPARATOR.split(its["value"])
    n_relations, n_wanted = (len(re.findall(r"[=<>]|\\[lg]e", t)) for t in (answer, gold))
    if len(items) != len(wanted) or n_relations != n_wanted:
        return False
    if len(items) > 1 and (its["open"] == "{" or "∨" in gold):  # a set has no order
        pairs = [[same_value(item, other) for item in items] for other in wanted]
        return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))
    if len(items) > 1:
        return all(map(same_value, items, wanted))
    formulas = items[0], wanted[0]
    return all(map(FORMULA.fullmatch, formulas)) and MATH_JUDGE.same(*formulas)

class MathJudge:
    """math-verify in a process of its own, out of reach of Ctrl-C, that ends itself after
    SECONDS. NOTE: 9^{9^{9^9}} is one C call: faulthandler's thread stops it, no signal does."""
    SECONDS, MAX_CHARS, process, timeouts = 5.0, 500, None, 0
    PROGRAM = """import faulthandler, json, sys
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import NormalizationConfig
rules = NormalizationConfig(malformed_operators=True)  # units stay: "ab" would be one
latex = [LatexExtractionConfig(normalization_config=rules)]
print("ready", flush=True)
for line in sys.stdin:
    *texts, seconds = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True)
    answer, gold = (parse(f"${text}$", latex, "no_fallback", parsing_timeout=None)
                    for text in texts)
    same = verify(gold, answer, timeout_seconds=None)
    if same and answer[0].is_number and gold[0].is_number:  # it rounds: 1e-7 is 2e-7
        gap, bound = (answer[0] - gold[0]).doit(), 5e-6 * abs(gold[0].evalf())
        same = gap == 0 if gap.is_Rational else abs(gap.evalf()) <= bound
    print(bool(same), flush=True)
    faulthandler.cancel_dump_traceback_later()
"""
    def same(self, answer: str, gold: str) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.PROGRAM], stdin=subprocess.PIPE, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
            if self.process.stdout.readline() != "ready\n":
                raise UserError("math-verify does not start: pip install math-verify")
        print(json.dumps([answer, gold, self.SECONDS]), file=self.process.stdin, flush=True)
        verdict = self.process.stdout.readline()  # empty if the process ended itself
        if not verdict:
            self.process.wait()
            self.timeouts += 1
        return verdict == "True\n"

MATH_JUDGE = MathJudge()

# ---- Shared compute: skip it on a first reading ----------------------------------------
# A permutation changes the order of the images and nothing else, and the n rollouts of an
# order have their whole prompt in common. So, with the same numbers up to rounding:
#   - The vision tower sees each image alone: its features serve all rollouts of a batch.
#   - A prompt does not see what follows it. Sampling keeps its keys and values once for n
#     responses; the loss has it in one row with them. There a token sees the prompt and
#     its own response, at the positions of a row of its own. Prompt p, responses a and b:
#             p p p a a b b   position
#         p   1 . . . . . .   0
#         p   1 1 . . . . .   1
#         p   1 1 1 . . . .   2
#         a   1 1 1 1 . . .   3
#         a   1 1 1 1 1 . .   4
#         b   1 1 1 . . 1 .   3
#         b   1 1 1 . . 1 1   4
# It enters the method at `pack`, at the end of `collate`, at the cache of `generate`, and as
# the attention that `load_model` names. --no-share is the simple, costly way.

def encode_images(model, pictures: list[Picture]):
    """The vision tower's output, as the model takes it back: the features of each picture. Each
    distinct picture is encoded once."""
    distinct = list(dict.fromkeys(pictures))
    pixels = torch.cat([picture.pixels for picture in distinct]).to(model.device)
    grids = torch.cat([picture.grid for picture in distinct]).to(model.device)
    output = model.get_image_features(pixels, grids)                            # FAMILY

    def in_order(features: list[Tensor]) -> list[Tensor]:
        return [features[distinct.index(picture)] for picture in pictures]
    output.pooler_output = in_order(output.pooler_output)
    if "deepstack_features" in output:  # Qwen3-VL: inner layers' features, a list by layer
        output.deepstack_features = list(map(in_order, output.deepstack_features))
    return output

def shared_inputs(inputs: dict, segment_lengths: list, pictures: list, model) -> dict:
    """More inputs for `collate`: image features, positions, segment lengths."""
    added = {}
    if pictures:
        added["mm_encoder_outputs"] = {"image": encode_images(model, pictures)}
    if max(map(len, segment_lengths)) <= 3:
        return added
    # Every response of a row continues from the prompt's last position.
    positions, _ = model.model.get_rope_index(**inputs)                         # FAMILY
    for row, (padding, prompt, *responses) in enumerate(segment_lengths):
        begin = padding + prompt
        first = positions[:, row, begin:begin + 1].clone()                      # (3, 1)
        for length in responses:
            positions[:, row, begin:begin + length] = first + torch.arange(length)
            begin += length
    added["position_ids"] = positions                                       # (3, B, S)
    # The model passes a 4-D mask on as it is. tree_attention reads lengths from this one.
    lengths = pad_sequence(list(map(torch.tensor, segment_lengths)), batch_first=True)
    added["attention_mask"] = lengths[:, None, None, :]     # (B, 1, 1, segments), int64
    return added

class SharedPromptLayer(DynamicLayer):
    """KV cache of a layer: P prompts, and B rows of responses. Row b is response nth[b] to
    prompt of[b]. Prompts and rows are padded on the left to equal lengths."""
    def __init__(self, read: DynamicLayer, n: int):
        super().__init__()
        self.prompts = torch.stack([read.keys, read.values])                # (2, P, h, L, d)
        index = torch.arange(len(read.keys) * n, device=read.keys.device)
        self.of, self.nth, self.n = index // n, index % n, n
        self.rows, self.length = self.prompts[:, self.of, :, :0], 0         # (2, B, h, t, d)

    def update(self, keys, values, *args, **kwargs):
        if self.length == self.rows.shape[3]:  # copying all rows at every token is slow
            self.rows = pad(self.rows, (0, 0, 0, 32))
        self.rows[:, :, :, self.length] = torch.stack([keys, values])[:, :, :, 0]
        self.length += 1
        return self, self  # for decode_attention

    def get_seq_length(self) -> int:
        return self.prompts.shape[3] + self.length

    def add(self, other) -> None:
        """Append another layer, which has only prompts so far, none longer than these."""
        self.of = torch.cat([self.of, other.of + self.prompts.shape[1]])
        self.nth = torch.cat([self.nth, other.nth])
        missing = self.prompts.shape[3] - other.prompts.shape[3]
        self.prompts = torch.cat([self.prompts, pad(other.prompts, (0, 0, missing, 0))], dim=1)
        self.rows = torch.cat([self.rows, pad(other.rows, (0, 0, self.length, 0))], dim=1)

    def keep(self, rows: list[int], live: list[tuple]) -> None:
        """Drop other rows, prompts without a row, and columns where all are padding."""
        kept, self.of = self.of[rows].unique(return_inverse=True)
        self.nth = self.nth[rows]
        longest = max((len(prompt.ids) - 1 for prompt, _ in live), default=0)
        self.prompts = self.prompts[:, kept, :, self.prompts.shape[3] - longest:]
        end, self.length = self.length, max((len(row) for _, row in live), default=0)
        self.rows = self.rows[:, rows, :, end - self.length:end]

def prefill(model, processor, joining: list[tuple], cfg, cache: Cache) -> Cache:
    """Read each prompt up to its last token, and add it to the cache with its empty rows."""
    prompts, responses = zip(*joining)
    inputs, _ = collate(prompts, [[]] * len(prompts), model, processor, cfg)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = inputs[name][:, :-1]
    read = Cache(layer_class_to_replicate=DynamicLayer)
    model.model(**inputs, past_key_values=read, use_cache=True)
    for prompt, delta in zip(prompts, model.model.rope_deltas.flatten().tolist()):  # FAMILY
        prompt.delta = delta
    layers = [SharedPromptLayer(layer, n=len(responses[0])) for layer in read.layers]
    for layer, new in zip(cache.layers, layers):
        layer.add(new)
    return cache if cache.layers else Cache(layers=layers)

def next_inputs(model, processor, live: list[tuple], cache: Cache, cfg) -> dict:
    """For generate: the last token of each row; without sharing, the whole prompts."""
    if not cfg.share:
        prompts, _ = zip(*live)
        return collate(prompts, [[]] * len(prompts), model, processor, cfg)[0]
    last, deltas, prompt_mask, own_mask = [], [], [], []
    for prompt, row in live:
        # The last token of each row is not in the cache yet.
        last.append((prompt.ids + row)[-1:])
        deltas.append([prompt.delta])
        prompt_mask.append(torch.ones(len(prompt.ids) - 1, dtype=torch.long))
        own_mask.append(torch.ones(len(row) + 1, dtype=torch.long))
    left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    mask = torch.cat([left(prompt_mask), left(own_mask)], dim=1)            # (B, L + t + 1)
    model.model.rope_deltas = torch.tensor(deltas, device=model.device)         # FAMILY
    return {"past_key_values": cache, "attention_mask": mask.to(model.device),
            "input_ids": torch.tensor(last, device=model.device)}

def shared_prompt_attention(module, query, key, value, attention_mask, **kwargs):
    """The model's attention: packed rows, decoding from shared prompts, or plain sdpa."""
    scaling = kwargs["scaling"]
    if attention_mask is not None and attention_mask.dtype == torch.long:  # segment lengths
        lengths = attention_mask[:, 0, 0].tolist()
        return tree_attention(query, key, value, lengths, scaling), None
    if isinstance(key, SharedPromptLayer):
        return decode_attention(query, key, attention_mask, scaling), None
    return SDPA(module, query, key, value, attention_mask, **kwargs)

SDPA = transformers.AttentionInterface()["sdpa"]
transformers.AttentionInterface.register("shared_prompt", shared_prompt_attention)
transformers.AttentionMaskInterface.register("shared_prompt", sdpa_mask)

def decode_attention(query: Tensor, layer: SharedPromptLayer, mask: Tensor | None,
                     scaling: float) -> Tensor:
    """One new token in each of B rows against the one copy of its prompt (L tokens) and its own
    response (t tokens), with one softmax over both. (B, H, 1, d) -> (B, 1, H, d)"""
    keys, values = layer.prompts                                            # (P, h, L, d)
    own_keys, own_values = layer.rows[:, :, :, :layer.length]               # (B, h, t, d)
    # g query heads share one of h key heads.
    query = query.view(len(query), keys.shape[1], -1, keys.shape[3])        # (B, h, g, d)
    scores = torch.cat([by_prompt(query, keys.mT, layer), product(query, own_keys.mT)], dim=-1)
    if mask is not None:  # (B, 1, 1, L + t); false at padding only
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores * scaling).softmax(dim=-1).to(values.dtype)           # (B, h, g, L + t)
    weights, own_weights = weights.split([keys.shape[2], layer.length], dim=-1)
    mixed = by_prompt(weights, values, layer) + product(own_weights, own_values)
    return mixed.to(values.dtype).reshape(len(query), 1, -1, keys.shape[3])

def by_prompt(x: Tensor, matrices: Tensor, layer: SharedPromptLayer) -> Tensor:
    """Rows (B, h, g, i) times their prompts' matrices (P, h, i, j) -> (B, h, g, j). The rows of
    a prompt are one product, in which finished rows are zeros."""
    places = x.new_zeros(*matrices.shape[:2], layer.n, *x.shape[2:])        # (P, h, n, g, i)
    at = (layer.of, slice(None), layer.nth)
    places[at] = x
    return product(places.flatten(2, 3), matrices).unflatten(2, places.shape[2:4])[at]

def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (bfloat16 rounds too far). A GPU makes no float32 copies for it."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        c = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return c.unflatten(0, a.shape[:2])
    return a.float() @ b.float()

def tree_attention(query: Tensor, key: Tensor, value: Tensor,
                   segment_lengths: list[list[int]], scaling: float) -> Tensor:
    """Packed rows: the prompt sees itself, a response the prompt and itself.
    query (B, H, S, d), key and value (B, h, S, d) -> (B, S, H, d)"""
    shared_by = query.shape[1] // key.shape[1]  # query heads per key head
    key = key.repeat_interleave(shared_by, dim=1)
    value = value.repeat_interleave(shared_by, dim=1)
    rows = []
    for b, lengths in enumerate(segment_lengths):
        padding, *queries = query[b:b + 1].split(lengths, dim=2)
        keys = key[b:b + 1].split(lengths, dim=2)[1:]
        values = value[b:b + 1].split(lengths, dim=2)[1:]
        attended = [padding.to(value.dtype), scaled_dot_product_attention(
            queries[0], keys[0], values[0], is_causal=True, scale=scaling)]
        for q, k, v in zip(queries[1:], keys[1:], values[1:]):
            if q.shape[2] == 0:  # this row has fewer responses than another
                continue
            # A response sees the prompt, and itself causally.
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
            mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(lengths[1])
            attended.append(scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scaling))
        rows.append(torch.cat(attended, dim=2))
    return torch.cat(rows).transpose(1, 2)

# ---- Memory and machines: skip it on a first reading -----------------------------------
PLACES = ("gpu", "host", "host, with the gradients")  # of AdamW's state

class SplitAdamW:
    """AdamW on float32 copies of the weights, on the GPU or in host memory. A tensor has
    one owner among the processes (ZeRO-1). FSDP would gather weights for every token.
    Gradients can be summed in host memory too: then the GPU has one at a time, and a
    micro-batch moves 4 bytes per trained parameter over the bus (7B: 33 GB)."""
    def __init__(self, model, cfg, accelerator):
        self.world, self.skipped = accelerator.num_processes, 0
        self.weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.owners, self.masters, self.adamw = {}, {}, {}
        self.sums = {}  # of gradients, if they are in host memory
        device = torch.device("cpu") if cfg.optimizer_device in PLACES[1:] else model.device
        load = [0] * self.world
        for name in sorted(self.weights, key=lambda name: -self.weights[name].numel()):
            weight = self.weights[name]
            weight.grad_dtype = torch.float32  # sums in bfloat16 lose much
            if cfg.optimizer_device == PLACES[2]:
                if not self.sums:  # the first is the largest; pinned memory is the fast way
                    self.buffer = torch.empty(weight.numel(), pin_memory=weight.is_cuda)
                self.sums[name] = torch.zeros_like(weight, dtype=torch.float32, device="cpu")
                weight.register_post_accumulate_grad_hook(functools.partial(self.add, name))
            # It goes to the process with the fewest numbers so far.
            owner = self.owners[name] = load.index(min(load))
            load[owner] += weight.numel()
            if owner == accelerator.process_index:
                # The copy is the weight itself if that is in float32 and on the device.
                # One AdamW per tensor: then one gradient at a time is in host memory.
                self.masters[name] = weight.detach().to(device, torch.float32)
                self.adamw[name] = torch.optim.AdamW(
                    [self.masters[name]], lr=cfg.lr, weight_decay=WEIGHT_DECAY,
                    fused=model.dtype != torch.float32)  # 6 times as fast on a host

    @torch.no_grad()
    def add(self, name: str, weight: Tensor) -> None:
        """Move a gradient that has just been computed into its sum in host memory."""
        self.sums[name] += self.buffer[:weight.numel()].view_as(weight).copy_(weight.grad)
        weight.grad = None

    @torch.no_grad()
    def step(self) -> float:
        """Sum gradients over processes, clip, update the weights. Returns the norm before
        clipping. If that is not finite, no weight changes, in any process."""
        gradients = {}
        for name, weight in self.weights.items():
            if weight.grad is None and not self.sums:
                weight.grad = torch.zeros_like(weight, dtype=torch.float32)
            gradients[name] = self.sums.get(name, weight.grad)
            if self.world > 1:
                # NCCL reduces only what is on a GPU: a sum of the host goes there and back.
                on_device = gradients[name].to(weight.device)
                torch.distributed.all_reduce(on_device)
                gradients[name].copy_(on_device)
        total = torch.nn.utils.get_total_norm(gradients.values())
        scale, norm = (MAX_GRAD_NORM / (total + 1e-6)).clamp(max=1.0), float(total)
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        check(self.skipped < MAX_SKIPPED,
              f"{MAX_SKIPPED} updates in a row had a gradient that is not finite")
        for name, weight in self.weights.items():
            if not self.skipped and name in self.masters:
                master = self.masters[name]
                master.grad = gradients[name].mul_(scale).to(master.device)
                self.adamw[name].step()
                master.grad = None
                weight.copy_(master)
            if not self.skipped and self.world > 1:
                torch.distributed.broadcast(weight.detach(), self.owners[name])
            weight.grad = None
        for gradient in self.sums.values():
            gradient.zero_()
        return norm

    def state_dict(self) -> dict[str, dict]:
        """Of each tensor that this process owns: the float32 copy, and AdamW's state."""
        return {name: {"master": master} | self.adamw[name].state[master]
                for name, master in self.masters.items()}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take what this process owns from a checkpoint of any number of processes."""
        saved = {}
        for path in folder.glob("optimizer-*.pt"):
            saved |= torch.load(path, "cpu", mmap=True)  # on the disk until it is copied
        for name, weight in self.weights.items():
            check(name in saved, f"{folder} lacks the optimizer's state of {name}")
            # Adapters are nowhere else, so every process needs all of these weights.
            weight.copy_(saved[name]["master"])
        for name, master in self.masters.items():
            master.copy_(saved[name].pop("master"))
            for key, value in saved[name].items():
                self.adamw[name].state[master][key] = value.to(master.device, copy=True)

def add_lora(model, cfg):
    """Freeze the model and add low-rank adapters. Returns peft's wrapper."""
    from peft import LoraConfig, LoraModel
    from peft.tuners.tuners_utils import cast_adapter_dtype
    torch.manual_seed(cfg.seed)  # the same in all processes
    targets = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"      # FAMILY
    # alpha = 2 r scales the adapters' output by 2, whatever the rank.
    config = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules=targets)
    adapters = LoraModel(model, config, "default")
    cast_adapter_dtype(model, "default")  # to float32
    return adapters.eval()

def model_without_numbers(cfg) -> transformers.PreTrainedModel:
    """The model to train, from its config.json alone, on the meta device."""
    config = load_pretrained(transformers.AutoConfig, cfg.model)
    with torch.device("meta"):
        model = FAMILY_MODEL.from_config(config, dtype=torch_dtype(cfg))
        model.model.visual.requires_grad_(not cfg.freeze_vision)                # FAMILY
        if cfg.lora_rank:
            add_lora(model, cfg)
    return model

def count_memory(model, cfg, place: str, world: int) -> dict[str, float]:
    """GB that a run needs, by part, from a model without numbers. The constants come from counts
    of live bytes (test_true_size), which these sums miss by 2 % downward to 12 % upward."""
    text, tower, n = model.config.text_config, model.config.vision_config, cfg.rollouts_per_order
    size, width, vocabulary = model.dtype.itemsize, text.hidden_size, text.vocab_size
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    weights = model.get_memory_footprint(return_buffers=False)
    trained = model.num_parameters(only_trainable=True) if cfg.stage > 0 else 0
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim  # by a token
    image_width = tower.spatial_merge_size ** 2 * len(model.model.visual.patch_embed.proj.weight)
    image = 26 * image_width  # numbers in the tower's widest place for one image token
    # Prompts are read before their rows grow. To grow, rows are copied, layer by layer.
    prompts = max(4 * cfg.max_tokens_per_micro_batch,
                  cfg.max_prompt_tokens * (1 if cfg.share else n))
    rows = cfg.rollout_batch * cfg.max_new_tokens
    sampling = size * (prompts * cached + max(1.05 * rows * cached, prompts * image))
    # For the backward pass, an update keeps what each layer computes, or its input to compute
    # that again. A packed response has its prompt's keys and values; LoRA works in float32.
    tokens = size * max(cfg.max_tokens_per_micro_batch, cfg.max_prompt_tokens + cfg.max_new_tokens)
    of_prompt = 2 * n * text.num_attention_heads * head_dim if cfg.share else 0
    layer = (4 * text.intermediate_size + 12 * width + of_prompt) * (1.4 if cfg.lora_rank else 1)
    kept, kept_images = text.num_hidden_layers * width, (tower.depth + 12) * image_width
    if not cfg.gradient_checkpointing:
        kept, kept_images = text.num_hidden_layers * layer, tower.depth * image
    kept += 0 if cfg.freeze_vision or cfg.lora_rank else kept_images
    # At work is a layer, a chunk of logits, or sums of the largest gradient, that of the head.
    logits, largest = 18 * LOGIT_CHUNK * vocabulary, min(vocabulary * width, trained)
    activations = tokens * kept + max(1.35 * tokens * layer, logits, 8 * largest)
    activations *= trained > 0  # stage 0 only samples
    adamw, gradients = 12 * trained / world, 4 * trained
    reference = weights if cfg.beta and trained and not cfg.lora_rank else 0
    always, host = (weights + adamw, 0) if place == "gpu" else (weights, adamw)
    if place == PLACES[2]:
        gradients, host = 4 * largest, host + gradients
    parts = {
        "weights": weights, "AdamW's state": adamw, "prompts, keys and values": sampling,
        "gradients on the GPU": gradients, "activations of an update": activations,
        "GPU while sampling": always + sampling,
        "GPU for the KL reference": always + reference + max(tokens * image, logits),
        "GPU in an update": always + gradients + activations,
        "host memory": (host + reference) * int(os.environ.get("LOCAL_WORLD_SIZE", world))}
    return {name: count / 1e9 for name, count in parts.items()}

def plan_memory(cfg, accelerator) -> str:
    """Where AdamW's state goes, one of PLACES. On a GPU with too little memory, lowers sizes at
    their default. Exits if nothing fits."""
    gpu, host = math.inf, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if cfg.gpu_gb:  # a plan for another machine
        gpu, host = cfg.gpu_gb, math.inf
    elif accelerator.device.type == "cuda":
        gpu = torch.cuda.mem_get_info()[0] / 1e9
    # The process with the least decides. CUDA and fragmentation take 8 %.
    gpu, host = min(gather_object([0.92 * gpu])), min(gather_object([host]))
    room = {"GPU while sampling": gpu, "GPU for the KL reference": gpu, "GPU in an update": gpu,
            "host memory": host}
    places = {"gpu": PLACES[:1], "host": PLACES[1:]}.get(cfg.optimizer_device, PLACES)
    # Large sizes come first: they save more time than the place of AdamW's state.
    model, plans, lacks = model_without_numbers(cfg), [], []
    for halvings, place in itertools.product(range(5 if gpu < math.inf else 1), places):
        sized = dataclasses.replace(cfg)
        if cfg.rollout_batch == Config.rollout_batch:
            sized.rollout_batch = max(cfg.rollout_batch >> halvings, cfg.rollouts_per_order)
        if cfg.max_tokens_per_micro_batch == Config.max_tokens_per_micro_batch:
            sized.max_tokens_per_micro_batch >>= min(halvings, 3)
        parts = count_memory(model, sized, place, accelerator.num_processes)
        if gpu == math.inf:  # on a CPU, one memory holds all
            parts["host memory"] += max(parts["GPU while sampling"], parts["GPU in an update"])
        plans.append((sized, place, parts))
        lacks.append(sum(max(parts[name] - room[name], 0) for name in room))
    # The first that fits is taken, else the one that lacks least is shown.
    sized, place, parts = plans[lacks.index(min(lacks))]
    if cfg.dry_run:
        trained = parts["AdamW's state"] * accelerator.num_processes / 12
        accelerator.print(f"{trained:.3f} billion parameters to train; in GB:")
        for name, gb in parts.items():
            accelerator.print(f"{gb:9.2f}  {name}")
    for name in room:
        check(parts[name] <= room[name],
              f"{cfg.model} needs {parts[name]:.1f} GB ({name}; there are {room[name]:.1f}) at "
              f"--rollout-batch {sized.rollout_batch} --max-tokens-per-micro-batch "
              f"{sized.max_tokens_per_micro_batch}; less: --lora-rank 64, --max-prompt-tokens "
              "2048, --max-new-tokens 512, --beta 0")
    cfg.rollout_batch = sized.rollout_batch
    cfg.max_tokens_per_micro_batch = sized.max_tokens_per_micro_batch
    where = place if gpu < math.inf else "host"
    accelerator.print(f"memory: {cfg.rollout_batch} sequences at a time, micro-batches of "
                      f"{cfg.max_tokens_per_micro_batch} tokens, AdamW's state on the {where}")
    return place

def start_processes(cfg) -> accelerate.Accelerator:
    """Join the processes that a launcher started."""
    # All wait while one saves. If one dies, the launcher stops the others.
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    # Without a GPU, accelerate joins processes only when told that it is on a CPU.
    tracker = None if cfg.report_to == "none" else cfg.report_to
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(), log_with=tracker, kwargs_handlers=[waiting],
        project_dir=cfg.folder)
    # accelerate silently drops a tracker that is not installed.
    check(accelerator.log_with or not tracker, f"--report-to needs: pip install {tracker}")
    return accelerator

def fit_machine(cfg, device: torch.device, n_processes: int = 1) -> None:
    """Set the CPU threads that suit the model and device, and what dtype auto means."""
    on_gpu = device.type == "cuda"
    if cfg.model == "tiny":
        torch.set_num_threads(1)  # more are slower when other programs run
    elif on_gpu:  # for AdamW in host memory
        torch.set_num_threads(max(os.cpu_count() // n_processes, 1))
    if cfg.dtype == "auto":
        # Before any model is loaded: the reference on the host needs the policy's type.
        cfg.dtype = "bf16" if on_gpu or cfg.gpu_gb else "float32"

# ---- Main ------------------------------------------------------------------------------
def print_start(cfg, questions: list[Sample], accelerator) -> None:
    """Versions, device, run folder, settings that differ, questions, batch arithmetic."""
    changed = []
    for name, value in vars(cfg).items():
        if value != getattr(Config, name):
            changed.append(f"{name}={value}")
    # If hardly any question can be permuted (see `order_rule`), PeRL is plain GRPO.
    permutable = sum(count_orders(question) > 1 for question in questions)
    orders, n = cfg.n_permutations + 1, cfg.rollouts_per_order
    accelerator.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device}\n"
        f"run folder: {cfg.folder}\nsettings: {'  '.join(changed)}\n"
        f"{len(questions)} questions, {permutable} of which can be permuted\n"
        f"batch: {cfg.questions_per_step} questions x {orders} orders x {n} = "
        f"{cfg.questions_per_step * orders * n} rollouts, {cfg.updates_per_step} update(s)")

def show_orders(sample: Sample, processor, cfg, accelerator) -> None:
    """Print a question in its orders, as the model reads it."""
    for order in draw_orders(sample, cfg.n_permutations, 1.0, random.Random(cfg.seed)):
        asked = permute(sample, order)
        length, text = prompt_length(asked, processor), prompt_text(asked, processor)
        accelerator.print(f"order {order}, {length} tokens, answer {asked.answer}: {text}")

def main(argv: list[str] | None = None) -> None:
    """Parse, check, load the questions, run the stage."""
    cfg = parse_config(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = start_processes(cfg)
    fit_machine(cfg, accelerator.device, accelerator.num_processes)
    check(cfg.questions_per_step % accelerator.num_processes == 0,
          "--questions-per-step must be a multiple of the number of processes")
    continues = cfg.resume and newest_checkpoint(cfg.folder)
    if cfg.stage == 2 and not (continues or cfg.dry_run):
        check(newest_checkpoint(cfg.folder.parent / "stage1"),
              f"--stage 2 starts from stage 1, which has no checkpoint in {cfg.out} (--out)")
    processor = load_processor(cfg.model, cfg)
    questions, held_out = load_questions(cfg.data, processor, cfg, accelerator), []
    if cfg.stage > 0:
        questions = kept_questions(cfg, questions)
        cfg.steps = cfg.steps or math.ceil(EPOCHS * len(questions) / cfg.questions_per_step)
        if cfg.eval_data and cfg.eval_every:
            held_out = load_questions(cfg.eval_data, processor, cfg, accelerator)
    print_start(cfg, questions, accelerator)
    place = plan_memory(cfg, accelerator)
    if cfg.dry_run:
        show_orders(max(questions, key=count_orders), processor, cfg, accelerator)
        return
    try:
        with only_run_in(cfg.folder.parent, accelerator):
            open_run(cfg, accelerator)
            cfg.optimizer_device = place  # config.json keeps what was asked for
            accelerator.init_trackers("perl", vars(cfg))
            if cfg.stage == 0:
                score(cfg, processor, questions, accelerator)
            else:
                train(cfg, processor, questions, held_out, accelerator)
            accelerator.end_training()  # closes the tracker
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; continue with --resume {cfg.folder}") from None

if __name__ == "__main__":
    main()
