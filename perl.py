#!/usr/bin/env python3
"""PeRL in one file: reinforcement learning on questions whose images are permuted.

Paper: Zhang, Ding, Zhang et al., "PeRL: Permutation-Enhanced Reinforcement Learning for
Interleaved Vision-Language Reasoning", NeurIPS 2025, arXiv 2506.14907; equations as there. A
vision-language model that is asked "which image shows ...?" often prefers a position to a
picture: reorder the images, and its answer changes. PeRL trains that away. One step of it:

  1. Draw questions. Each comes in n_s + 1 orders of its images: as given, and     (Eq. 1)
     permuted n_s times, the right answer moving along ("image 3" becomes "image 1").
  2. The policy answers each order n times: (n_s + 1) * n rollouts of a question.
  3. Rules grade each rollout: 0.9 * right answer + 0.1 * right format.
  4. All rollouts of a question, whatever their order, form ONE group: the         (Eq. 4-5)
     advantage is the reward less the group's mean, over its standard deviation.
  5. Groups that teach nothing are left out: equal rewards; in stage 2, too easy or hard.
  6. AdamW maximizes the clipped policy objective, each rollout conditioned on     (Eq. 6)
     the order it was sampled from, less beta times the KL divergence from the start model.

Stage 0 scores the questions with the start model and resamples them by difficulty; 1 explores
(the probability alpha of permuting falls from 1 to 0); 2 exploits (goes on from 1's checkpoint,
alpha 0, online filter of point 5). A stage is a preset of flags; that there are two is ours.

Where this departs from the released code: the paper's standard deviation (population); how an
answer moves is a field of the data (`order_rule`), statements about "left" and "right" stay
unpermuted; permutations are distinct, from one random generator; a group without variance is
left out of the loss, KL included; updates do not depend on n_s; no dual clip, no KL clamp.

    python perl.py                                             # tiny model, CPU, minutes
    python perl.py --model Qwen2.5-VL-7B --stage 1             # 80 GB GPU, 120 GB host
    accelerate launch perl.py --model Qwen2.5-VL-7B --stage 1  # several

A first reading may skip "Shared compute" (which --no-share does without) and "Memory and
machines". Arguments: processor a Processor, cfg a Config, accelerator an Accelerator, rng a
random.Random. Shapes: Q questions, R = (n_s + 1) * n rollouts of each; B rows of a batch, P
prompts; L tokens of a prompt, T of a response, S of a row; D width, V vocabulary; H heads of
queries and h of keys, each d wide.
"""
import argparse
import copy
import dataclasses
import fcntl
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Callable, NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch
import accelerate
import torch
import transformers
from accelerate.utils import InitProcessGroupKwargs, gather_object
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

Order = tuple[int, ...]  # of the images of a question: new_images[j] = images[order[j]]
SAMPLES = Path(__file__).resolve().parent / "data_samples"

# ---- Config: every setting, with the paper's value where it gives one ------------------

def setting(default, prose: str, *, least: float = 1e-9, most: float = 1e9):
    """A field of Config: its help text, and the bounds of a number, both inclusive."""
    return field(default=default, metadata={"help": prose, "least": least, "most": most})

@dataclass
class Config:
    # what runs
    model: str = setting("tiny", "Hub id, folder, tiny, Qwen2.5-VL-3B, -7B, -32B, -72B")
    data: str = setting(
        str(SAMPLES / "train.jsonl"), "training questions; several: a.jsonl*2,b.jsonl")
    eval_data: str = setting(str(SAMPLES / "test.jsonl"), "held-out questions; '': none")
    stage: int = setting(1, "0: score the questions; 1: explore; 2: exploit", least=0)
    out: str = setting("", "run folder, shared by the stages; '': runs/MODEL-seedSEED")
    resume: str = setting("", "run folder to go on with, on its own settings")
    seed: int = setting(0, "seeds data order, permutations and sampling", least=0)
    dry_run: bool = setting(False, "check data and settings, plan the memory, stop")
    # permutation (Eq. 1)
    n_permutations: int = setting(1, "n_s: permuted orders; 0: plain GRPO", least=0)
    rollouts_per_order: int = setting(6, "n; if not given, (n_s + 1) * n stays 12")
    alpha_start: float = setting(1.0, "probability of permuting at first", least=0, most=1)
    alpha_end: float = setting(0.0, "the same at last; linear", least=0, most=1)
    # reward
    accuracy_weight: float = setting(0.9, "reward for a right answer", least=0)
    format_weight: float = setting(0.1, "for <think>...</think>...\\boxed{...}", least=0)
    # filter
    filter: str = setting("offline", "none; offline: stage 0's choice, if any; online: bounds")
    filter_low: float = setting(0.1, "online: least accuracy of a group", least=0, most=1)
    filter_high: float = setting(0.9, "online: highest accuracy of a group", most=1)
    max_rounds: int = setting(4, "online: rounds of sampling to fill a batch")
    score_rollouts: int = setting(10, "stage 0: answers to each question (K)")
    score_keep: float = setting(0.5, "stage 0: share of the questions to keep", most=1)
    # advantage and loss (Eq. 4-6)
    clip_low: float = setting(0.2, "pi / pi_old is clipped below 1 - this", least=0)
    clip_high: float = setting(0.2, "pi / pi_old is clipped above 1 + this", least=0)
    beta: float = setting(0.01, "weight of KL; 0: no reference model", least=0)
    # optimization
    steps: int = setting(0, "rollout batches; 0: what --epochs needs", least=0)
    epochs: float = setting(2.0, "passes over the training questions, if steps is 0")
    questions_per_step: int = setting(128, "questions of a rollout batch, all processes")
    updates_per_step: int = setting(4, "optimizer updates on each rollout batch")
    lr: float = setting(1e-6, "AdamW learning rate, constant", least=0)
    weight_decay: float = setting(0.01, "AdamW weight decay", least=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    freeze_vision: bool = setting(False, "do not train the vision tower")
    # prompts and sampling
    instruction: str = setting(
        "First think about the question as an internal monologue inside <think> "
        "</think>, then give the final answer inside \\boxed{}.", "text after every question")
    max_pixels: int = setting(262144, "images are scaled down to at most so many pixels")
    max_prompt_tokens: int = setting(8192, "longer prompts are dropped and counted")
    max_new_tokens: int = setting(2048, "longest response, in tokens")
    temperature: float = setting(1.0, "of sampling, and of the loss's log-probabilities")
    # memory and speed: the method stays the same, random draws and rounding aside
    share: bool = setting(True, "compute once what rollouts have in common")
    rollout_batch: int = setting(384, "sequences sampled at one time; a prompt's n always fit")
    max_tokens_per_micro_batch: int = setting(16384, "of a backward pass; 4 times that to read")
    logit_chunk: int = setting(1024, "response tokens whose logits exist at one time")
    gradient_checkpointing: bool = setting(True, "recompute activations, save memory")
    cpu_threads: int = setting(0, "torch's threads on a CPU; 0: torch's choice", least=0)
    dtype: str = setting("auto", "of the weights: bf16, float32; auto: bf16 on a GPU")
    optimizer_device: str = setting("auto", "AdamW's float32 state: gpu, host; auto: if it fits")
    lora_rank: int = setting(0, "train adapters of this rank instead of all weights", least=0)
    gpu_gb: float = setting(0, "plan for GPUs of so much memory; 0: those at hand", least=0)
    # evaluation, logging, checkpoints; in steps
    eval_every: int = setting(50, "evaluate, at start and end too; 0: never", least=0)
    eval_orders: int = setting(24, "evaluate a question in all its orders, up to so many")
    eval_questions: int = setting(0, "evaluate on the first so many; 0: on all", least=0)
    log_every: int = setting(10, "print a rollout and write a whole group")
    log_held_out: int = setting(3, "held-out questions to write at each evaluation", least=0)
    save_every: int = setting(20, "write a checkpoint, at the end too")
    report_to: str = setting("none", "the metrics' copy: tensorboard, wandb, trackio")

# Over the defaults stand the model's preset, then the stage's, then a flag as typed.
MODEL_PRESETS = {"tiny": dict(
    questions_per_step=16, updates_per_step=1, lr=2e-5, beta=0.0, steps=40, max_new_tokens=64,
    rollout_batch=512, max_tokens_per_micro_batch=4096, gradient_checkpointing=False,
    cpu_threads=1, eval_every=10, save_every=10)}
STAGE_PRESETS = {0: dict(), 1: dict(), 2: dict(alpha_start=0.0, filter="online")}
CHOICES = {"stage": (0, 1, 2), "filter": ("none", "offline", "online"),
           "dtype": ("auto", "bf16", "float32"), "optimizer_device": ("auto", "gpu", "host"),
           "report_to": ("none", "tensorboard", "wandb", "trackio")}
SHORT_NAMES = {f"Qwen2.5-VL-{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct"
               for size in ("3B", "7B", "32B", "72B")} | {"tiny": str(SAMPLES / "tiny")}
# What no text may hold: tokens of the chat format, NUL, half a character ("\ud83d").
CONTROL = re.compile(r"<\|\w+\|>|[\0\ud800-\udfff]")

def parse_config(argv: list[str] | None = None) -> Config:
    """Command line -> Config; what makes no sense ends the program and says why."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s [--setting value ...]")
    for f in dataclasses.fields(Config):
        prose = f"{f.metadata['help']} [{f.default!r}]".replace("%", "%%")
        kind = {"type": f.type, "choices": CHOICES.get(f.name)}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, help=prose, default=argparse.SUPPRESS, **kind)
    typed = vars(parser.parse_args(argv))  # flags on the command line, nothing else
    try:
        return resumed_config(typed) if typed.get("resume") else new_config(typed)
    except ValueError as error:
        parser.error(str(error))

def new_config(typed: dict) -> Config:
    """Presets and typed flags -> Config. ValueError names a flag that makes no sense."""
    presets = MODEL_PRESETS.get(typed.get("model", Config.model), {})
    presets = presets | STAGE_PRESETS[typed.get("stage", Config.stage)]
    if "epochs" in typed:
        presets["steps"] = 0
    cfg = Config(**presets | typed)
    for f in dataclasses.fields(Config):
        value, least, most = getattr(cfg, f.name), f.metadata["least"], f.metadata["most"]
        flag = "--" + f.name.replace("_", "-")
        if f.type in (int, float) and not least <= value <= most:
            raise ValueError(f"{flag} {value} is not in {least:g} .. {most:g}")
        if f.type is str and CONTROL.search(value):
            raise ValueError(f"{flag} holds <|...|>, NUL or half a character")
    if cfg.filter_low > cfg.filter_high:
        raise ValueError("--filter-low lies above --filter-high: every group would be dropped")
    if cfg.lora_rank and "lr" not in typed:
        cfg.lr *= 10  # adapters hardly move at the rate of the weights
    if "n_permutations" in typed and "rollouts_per_order" not in typed:
        budget = (Config.n_permutations + 1) * Config.rollouts_per_order
        cfg.rollouts_per_order, rest = divmod(budget, cfg.n_permutations + 1)
        if rest:
            raise ValueError(f"--rollouts-per-order: {budget} does not divide by n_s + 1")
    cfg.out = cfg.out or f"runs/{Path(cfg.model).name}-seed{cfg.seed}"
    return cfg

def resumed_config(typed: dict) -> Config:
    """Settings of the run to go on with. ValueError: not there, damaged, changed."""
    path = Path(typed["resume"]) / "config.json"
    try:
        saved = json.loads(path.read_text()) | {"resume": typed["resume"], "out": typed["resume"]}
        cfg = Config(**saved)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: {path} is missing, damaged or too old: {error}") from None
    for name, value in typed.items():
        if saved.get(name) != value:
            raise ValueError(f"--resume: {name} was {saved.get(name)}; {value} needs a new run")
    return cfg

# ---- Samples and permutation (Eq. 1) ---------------------------------------------------

MENTION = re.compile(r"<image_(\d+)>")  # of image k; a bare <image> is where one stands

@dataclass(frozen=True)
class Sample:
    """One question. `movable`: 0-based positions that may change places (None: all)."""
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

class OrderRule(NamedTuple):
    """How an answer names images, so that it can follow them. Positions are 0-based."""
    pattern: str = r"(?s).+"  # regex of a whole answer
    name: str = r"(?!)"       # regex of an image's name in it; this one matches nothing
    position_of: Callable[[str, Sample], int] = None  # name -> position, or -1
    name_of: Callable[[int, Sample], str] = None      # position -> name

NUMBER = r"[1-9]\d{0,3}"
BY_NUMBER = (lambda name, sample: int(name) - 1, lambda position, sample: str(position + 1))

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # movable (1, 3): A names 1, B names 3
BY_LETTER = (lambda name, sample: dict(zip(LETTERS, sample.movable)).get(name, -1),
             lambda position, sample: LETTERS[sample.movable.index(position)])
ORDER_RULES = {
    # The answer stays as it is (the paper's S = 1); so it names no image by its number.
    "keep": OrderRule(r"(?is)(?!.*\bimages?[ _]?#?\d).+"),
    "never": OrderRule(),  # it depends on the order: the images may not change places
    "index": OrderRule(NUMBER, NUMBER, *BY_NUMBER),  # an image number
    "sequence": OrderRule(rf"{NUMBER}(\s*,\s*{NUMBER})*", NUMBER, *BY_NUMBER),  # "2,1,3"
    "letter": OrderRule("[A-Z]", "[A-Z]", *BY_LETTER)}

def load_samples(path: str | Path) -> list[Sample]:
    """Read a JSONL file. ValueError names file, line and field of what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; name a JSONL file of samples")
    samples, lines = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        sample = parse_sample(line, path.parent, f"{path}, line {number}")
        if sample.id in lines:
            raise ValueError(f"{path}, line {number}, field id: as in line {lines[sample.id]}")
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: the file holds no samples")
    return samples

def parse_sample(line: bytes, folder: Path, where: str) -> Sample:
    """One JSONL line -> Sample, image paths joined to `folder`. ValueError: unfit."""
    def require(is_fine, name: str, problem: str) -> None:
        if not is_fine:
            problem = problem if name in row else "is missing"  # fails any check
            raise ValueError(f"{where}, field {name}: {problem}")

    try:
        row = dict(json.loads(line))
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: not valid JSON of one object a line ({error})") from None
    for name in row:
        require(name in Sample.__dataclass_fields__, name, "is not a field of a sample")
    for name in ("id", "question", "answer", "order_rule", "source"):
        text = row.get(name, "")
        is_text = isinstance(text, str) and (text.strip() or name == "source")
        require(is_text, name, "must be a text, and not empty")
        require(not CONTROL.search(text), name, "holds <|...|>, NUL or half a character")
    rule = ORDER_RULES.get(row["order_rule"])
    require(rule, "order_rule", f"must be one of {', '.join(ORDER_RULES)}")

    images, movable, question = row.get("images"), row.get("movable"), row["question"]
    are_paths = isinstance(images, list) and all(type(i) is str and i for i in images)
    require(are_paths and images, "images", "must be a list of one or more paths")
    n = len(images)
    if movable is not None:
        whole = isinstance(movable, list) and all(type(k) is int for k in movable)
        distinct = whole and len(set(movable) & set(range(n))) == len(movable)
        require(distinct, "movable", f"must list distinct 0-based positions below {n}")
    places = question.count("<image>")
    require(places == n, "question", f"has {places} <image> placeholders for {n} images")
    for number in MENTION.findall(question):
        known = len(number) < 5 and 1 <= int(number) <= n  # int() takes 4300 digits
        require(known, "question", f"mentions image {number[:9]} of {n}")
    paths = [os.path.normpath(folder / image) for image in images]
    for path in paths:
        problem = image_problem(path, folder)
        require(not problem, "images", f"{path} {problem}")

    sample = Sample(**row | {"images": paths, "answer": row["answer"].strip()})
    problem = f"{sample.answer[:80]!r} does not fit {sample.order_rule}, movable {sample.movable}"
    require(re.fullmatch(rule.pattern, sample.answer), "answer", problem)
    named = [rule.position_of(name, sample) for name in re.findall(rule.name, sample.answer)]
    require(len(set(named) & set(range(n))) == len(named), "answer", problem)
    too_many = sample.order_rule == "letter" and len(sample.movable) > len(LETTERS)
    require(not too_many, "images", "has more options than there are letters")
    movable_paths = [paths[k] for k in sample.movable]
    twice = any(movable_paths.count(paths[k]) > 1 for k in named)  # then two are right
    require(not twice, "images", "has one twice that the answer names: order_rule never?")
    return sample

def image_problem(image: str, folder: Path) -> str:
    """Why `image` is no readable picture inside `folder`; '' if it is one."""
    try:
        if not Path(image).resolve().is_relative_to(folder.resolve()):
            return f"lies outside the JSONL's folder {folder}"
        if not Path(image).is_file():  # to open a pipe would wait for ever
            return "is no file"
        size = read_image(image).size  # whole: a truncated one has a size too
        if max(size) > 200 * min(size):
            return "is longer than 200 times its width, which the model does not take"
    except Exception as error:  # what a decoder raises on broken bytes is no closed list
        return f"is no readable image: {error}"
    return ""

def permute(sample: Sample, order: Order) -> Sample:
    """new_images[j] = images[order[j]]; answer and mentions follow.                   (Eq. 1)

    Example: order (2, 0, 1), order_rule index, answer "3". The third image now stands first:
    the answer is "1", <image_1> is now <image_2>. ValueError for an order that may not be."""
    if sorted(order) != list(range(len(sample.images))):
        raise ValueError(f"{sample.id}: {order} is no order of its images")
    moved = {old for new, old in enumerate(order) if new != old}
    if moved and (sample.order_rule == "never" or not moved <= set(sample.movable)):
        raise ValueError(f"{sample.id}: {order} moves images that must stay")
    new_position = {old: new for new, old in enumerate(order)}
    rule = ORDER_RULES[sample.order_rule]

    def rename(name: re.Match) -> str:
        return rule.name_of(new_position[rule.position_of(name[0], sample)], sample)

    def renumber(mention: re.Match) -> str:
        return f"<image_{new_position[int(mention[1]) - 1] + 1}>"

    return dataclasses.replace(
        sample, images=tuple(sample.images[old] for old in order),
        question=MENTION.sub(renumber, sample.question),
        answer=re.sub(rule.name, rename, sample.answer))        # y' = Lambda(y, sigma)

def count_orders(sample: Sample) -> int:
    """How many orders of its images the sample allows."""
    return 1 if sample.order_rule == "never" else math.factorial(len(sample.movable))

def draw_orders(sample: Sample, n_permutations: int, alpha: float, rng) -> list[Order]:
    """The identity, then n_permutations permuted orders; with probability 1 - alpha, one draw
    a sample, the identity in their place too (Algorithm 1). Orders are distinct until all of
    the sample have been drawn; then all may come again."""
    identity = tuple(range(len(sample.images)))
    if rng.random() >= alpha or count_orders(sample) == 1:
        return [identity] * (n_permutations + 1)
    orders, seen = [identity], {identity}
    while len(orders) <= n_permutations:
        order = list(identity)
        shuffled = rng.sample(sample.movable, len(sample.movable))
        for new, old in zip(sample.movable, shuffled):
            order[new] = old
        if tuple(order) not in seen:
            orders.append(tuple(order))
            seen.add(tuple(order))
        if len(seen) == count_orders(sample):
            seen.clear()
    return orders

def all_orders(sample: Sample, cap: int) -> list[Order]:
    """Every order of the sample, identity first; beyond `cap`, a fixed random choice."""
    return draw_orders(sample, min(cap, count_orders(sample)) - 1, 1.0, random.Random(sample.id))

# ---- Model, images and prompts ---------------------------------------------------------

# What is particular to Qwen2.5-VL: these four, and the lines marked FAMILY.
FAMILY = "qwen2_5_vl"
FAMILY_MODEL = transformers.Qwen2_5_VLForConditionalGeneration
IMAGE_TOKEN = "<|image_pad|>"  # stands where an image's features go, once for each
BANNED_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>"]  # never sampled, and of probability 0 in the loss

@dataclass(eq=False)
class Picture:
    """An image as the vision tower reads it; one object for all orders and rollouts."""
    pixels: Tensor  # (patches, channels * 2 * 14 * 14)
    grid: Tensor    # (1, 3): time, height and width in patches
    tokens: int     # places it takes in the prompt, one for 2 x 2 patches

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
    image_id: int
    pad_id: int
    eos_ids: list[int]
    banned_ids: list[int]

def load_pretrained(kind, name: str, **options):
    """kind.from_pretrained; SystemExit if the checkpoint is not to be had."""
    path = SHORT_NAMES.get(name, name)
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"--model: could not load {path!r}: {reason}") from None

def chat_template(name: str, tokenizer) -> str:
    """The checkpoint's template for images: the tokenizer's, if it takes them; else that of
    chat_template.json, which AutoTokenizer does not read; else that of the tiny model."""
    template = tokenizer.chat_template or ""
    path = transformers.utils.cached_file(SHORT_NAMES.get(name, name), "chat_template.json",
                                          _raise_exceptions_for_missing_entries=False)
    if path and IMAGE_TOKEN not in template:
        template = json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"]
    if IMAGE_TOKEN not in template:
        print(f"{name} has no chat template for images: prompts take plain ChatML")
        template = (SAMPLES / "tiny" / "chat_template.jinja").read_text()
    return template

def load_processor(name: str, cfg) -> Processor:
    """Tokenizer and image processor of a checkpoint. NOTE: not AutoProcessor, which wants
    torchvision for videos and would preprocess the images anew for every order."""
    config = load_pretrained(transformers.AutoConfig, name)
    if config.model_type != FAMILY:
        raise SystemExit(f"{name} is a {config.model_type} model; perl.py knows {FAMILY} only")
    tokenizer = load_pretrained(transformers.AutoTokenizer, name)
    tokenizer.chat_template = chat_template(name, tokenizer)  # checkpoints carry it on
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if len(tokenizer) > config.text_config.vocab_size or image_id != config.image_token_id:
        raise SystemExit(f"{name}: its tokenizer belongs to another model")
    image_processor = load_pretrained(transformers.AutoImageProcessor, name, config=config)
    least = min(image_processor.size["shortest_edge"], cfg.max_pixels)  # both in pixels
    image_processor.size = {"longest_edge": cfg.max_pixels, "shortest_edge": least}
    eos = load_pretrained(transformers.GenerationConfig, name).eos_token_id  # an id or a list
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    return Processor(tokenizer, image_processor, cfg.instruction, image_id,
                     pad_id=tokenizer.pad_token_id, eos_ids=sorted(eos_ids),
                     banned_ids=tokenizer.convert_tokens_to_ids(BANNED_TOKENS))

def load_model(name: str, cfg, device: torch.device) -> transformers.PreTrainedModel:
    """The checkpoint's model on the device, mapped from safetensors without a copy in between.
    SystemExit for a weight that the file lacks: the library would go on with random numbers."""
    as_bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and device.type == "cuda"
    model, report = load_pretrained(
        FAMILY_MODEL, name, dtype=torch.bfloat16 if as_bf16 else torch.float32,
        device_map={"": device}, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with its name
        attn_implementation="shared_prompt")  # sdpa where nothing is shared
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise SystemExit(f"{name}: {kind.replace('_', ' ')} such as {min(report[kind])}")
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.model.visual.requires_grad_(not cfg.freeze_vision)                # FAMILY
    return model.eval()

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # EPS would run Ghostscript

def read_image(file) -> Image.Image:
    """In RGB, upright (EXIF), transparent parts white; of an animation the first frame."""
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":  # convert would cut at 255, which leaves a white image
        image = image.point(lambda value: value / 256)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def load_pictures(sample: Sample, processor) -> dict[str, Picture]:
    """Path -> picture: each image preprocessed once, for all orders of its question."""
    pictures = {}
    for path in dict.fromkeys(sample.images):
        inputs = processor.image_processor([read_image(path)], return_tensors="pt")
        grid = inputs["image_grid_thw"]
        tokens = int(grid.prod()) // processor.image_processor.merge_size ** 2
        pictures[path] = Picture(inputs["pixel_values"], grid, tokens)
    return pictures

def prompt_text(sample: Sample, processor) -> str:
    """The prompt in chat format, one IMAGE_TOKEN an image; <image_k> reads "image k"."""
    question = MENTION.sub(r"image \1", sample.question) + "\n" + processor.instruction
    content = []
    for piece in re.split("(<image>)", question):
        if piece == "<image>":
            content.append({"type": "image"})
        elif piece:
            content.append({"type": "text", "text": piece})
    return processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)

def encode_prompt(sample: Sample, processor, pictures: dict[str, Picture] = None) -> Prompt:
    """Sample -> Prompt; a placeholder takes its image's tokens. Never truncates."""
    pictures = pictures or load_pictures(sample, processor)
    in_order = [pictures[path] for path in sample.images]
    text, *pieces = prompt_text(sample, processor).split(IMAGE_TOKEN)
    for picture, piece in zip(in_order, pieces):
        text += IMAGE_TOKEN * picture.tokens + piece
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    if ids.count(processor.image_id) != sum(picture.tokens for picture in in_order):
        raise ValueError(f"{sample.id}: the prompt has not the tokens of its images")
    return Prompt(sample, ids, in_order)

def prompt_length(sample: Sample, processor) -> int:
    """Tokens of a prompt, from its images' sizes; turned by EXIF or not makes no difference."""
    images = processor.image_processor
    length = len(processor.tokenizer(prompt_text(sample, processor)).input_ids)
    for path in sample.images:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            patches = images.get_number_of_image_patches(image.height, image.width)
        length += patches // images.merge_size ** 2 - 1
    return length

def load_questions(files: str, processor, cfg, accelerator) -> list[Sample]:
    """Samples of "a.jsonl*2,b.jsonl", a.jsonl's twice. Too long ones are dropped, counted."""
    try:
        samples = []
        for file in files.split(","):
            path, times = re.fullmatch(r"(.*?)(?:\*([1-9]))?", file).groups()
            samples += load_samples(path) * int(times or 1)
        if len({sample.id for sample in samples}) < len(set(samples)):
            raise ValueError(f"{files}, field id: an id occurs in two files")
        kept = [s for s in samples if prompt_length(s, processor) <= cfg.max_prompt_tokens]
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    accelerator.print(f"{files}: {len(kept)} questions, {len(samples) - len(kept)} dropped whose "
                      f"prompts exceed {cfg.max_prompt_tokens} tokens")
    if not kept:
        raise SystemExit(f"{files}: none left; raise --max-prompt-tokens or lower --max-pixels")
    return kept

def collate(prompts: list[Prompt], responses: list[list[list[int]]], model, processor,
            cfg) -> tuple[dict, list[list[int]]]:
    """Rows [padding, prompt, its responses] -> the model's inputs, and lengths of the parts.
    Example: a prompt of 2 tokens with responses a and b, and one of 3 tokens with c:
        p p a a b        segment lengths  [0, 2, 2, 1]
        . p p p c                         [1, 3, 1]
    To be sampled a row has no response; without sharing, at most one.
    NOTE: without mm_token_type_ids the model silently falls back to 1-D positions."""
    rows = [prompt.ids + sum(own, []) for prompt, own in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), processor.pad_id)                      # (B, S)
    mask, segment_lengths = torch.zeros_like(ids), []
    for k, row in enumerate(rows):
        padding = width - len(row)
        ids[k, padding:] = torch.tensor(row)
        mask[k, padding:] = 1
        segment_lengths.append([padding, len(prompts[k].ids), *map(len, responses[k])])
    in_order = sum((prompt.pictures for prompt in prompts), [])
    inputs = {"input_ids": ids, "attention_mask": mask,
              "mm_token_type_ids": (ids == processor.image_id).int(),           # FAMILY
              "image_grid_thw": torch.cat([picture.grid for picture in in_order])}
    if cfg.share:
        share_row(inputs, segment_lengths, in_order, model)
    else:
        inputs["pixel_values"] = torch.cat([picture.pixels for picture in in_order])
    return accelerate.utils.send_to_device(inputs, model.device), segment_lengths

# ---- Rollouts and rewards --------------------------------------------------------------

@dataclass
class Rollout:
    """A response to one order of a question: what sampling, reward and loss hand on."""
    prompt: Prompt             # in the order that was answered: so is the loss (Eq. 6)
    order: Order               # of the images
    gold: str                  # right answer in that order
    ids: list[int]             # response tokens, end token included
    text: str
    truncated: bool            # no end token within max_new_tokens
    idle: int = 0              # tokens decoded behind its end, while others went on
    accuracy: float = 0.0
    format: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = None  # (T,) under the policy that sampled it
    ref_logprobs: Tensor | None = None  # (T,) under the frozen start model

def seed_sampling(cfg, step: int, accelerator) -> None:
    """Each step seeds its sampling: a resumed run draws what an unbroken one would."""
    torch.manual_seed(1009 * (1_000_003 * cfg.seed + step) + accelerator.process_index)

@torch.no_grad()
def generate(model, processor, prompts: list[Prompt], n: int, cfg,
             greedy: bool = False) -> list[list[list[int]]]:
    """n responses to each prompt, in the prompts' order; padded behind their ends."""
    model.eval()  # NOTE: train mode with checkpointing would switch the KV cache off
    sampling = transformers.GenerationConfig(  # what the loss scores; or greedy
        max_new_tokens=cfg.max_new_tokens, do_sample=not greedy, top_k=0, top_p=1.0,
        temperature=1.0 if greedy else cfg.temperature, repetition_penalty=1.0,
        suppress_tokens=processor.banned_ids, pad_token_id=processor.pad_id,
        eos_token_id=processor.eos_ids)
    # NOTE: generate fills what is None in it from the model's own; so that is swapped.
    own_config, model.generation_config = model.generation_config, sampling
    lengths = [len(prompt.ids) for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda k: -lengths[k])
    batches = fill(longest_first, lambda batch: len(batch) * n <= cfg.rollout_batch
                   and len(batch) * lengths[batch[0]] <= 4 * cfg.max_tokens_per_micro_batch)
    responses = [None] * len(prompts)
    for batch in tqdm(batches, "generate", leave=False, disable=None):
        chosen = [prompts[k] for k in batch]
        if not cfg.share:
            chosen = [prompt for prompt in chosen for _ in range(n)]
        inputs, _ = collate(chosen, [[]] * len(chosen), model, processor, cfg)
        if cfg.share:
            inputs = prefill(model, inputs, n)
        output = model.generate(**inputs, generation_config=sampling)       # (B, L + T)
        rows = output[:, inputs["input_ids"].shape[1]:].tolist()
        for position, k in enumerate(batch):
            responses[k] = rows[position * n:(position + 1) * n]
    model.generation_config = own_config  # checkpoints keep it
    return responses

def sample_groups(model, processor, samples: list[Sample], orders: list[list[Order]], n: int,
                  cfg, greedy: bool = False) -> list[list[Rollout]]:
    """n graded responses to each order of each sample: one list a sample, by order."""
    prompts = []
    for sample, sample_orders in zip(samples, orders):
        pictures = load_pictures(sample, processor)
        by_order = {order: encode_prompt(permute(sample, order), processor, pictures)
                    for order in sample_orders}  # equal orders share a prompt
        prompts.append([by_order[order] for order in sample_orders])
    responses = iter(generate(model, processor, sum(prompts, []), n, cfg, greedy))
    groups = []
    for sample_prompts, sample_orders in zip(prompts, orders):
        group = []
        for prompt, order in zip(sample_prompts, sample_orders):
            for row in next(responses):
                rollout = make_rollout(row, prompt, order, processor)
                grade(rollout, cfg)
                group.append(rollout)
        groups.append(group)
    return groups

def make_rollout(row: list[int], prompt: Prompt, order: Order, processor) -> Rollout:
    """A row of tokens from generate -> Rollout, not graded yet. The end token stays."""
    is_end = [token in processor.eos_ids for token in row]
    ids = row[:is_end.index(True) + 1] if any(is_end) else row
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return Rollout(prompt, order, prompt.sample.answer, ids, text, truncated=not any(is_end),
                   idle=len(row) - len(ids))

def grade(rollout: Rollout, cfg) -> None:
    """The reward of a rollout, by rules on its text (A.3.2)."""
    rollout.accuracy = float(is_correct(rollout.text, rollout.gold))
    rollout.format = float(has_format(rollout.text))
    rollout.reward = cfg.accuracy_weight * rollout.accuracy + cfg.format_weight * rollout.format

def has_format(response: str) -> bool:
    r"""Whether it is <think>...</think>...\boxed{...}..., with one think block."""
    match = re.fullmatch(r"\s*<think>((?!</?think>).)*</think>((?!</?think>).)*", response, re.S)
    return match is not None and bool(last_boxed(response.rpartition("</think>")[2]))

def is_correct(response: str, gold: str) -> bool:
    """Whether its answer means the same as `gold`. Never evaluates text as code."""
    answer = extract_answer(response)
    return answer is not None and same_answer(answer, gold)

DECLARATION = re.compile(  # "the answer is ...", "the best option: ..."; not "answer if"
    r"\b(?:answer|(?:correct|right|best|final) (?:option|choice))\b"
    r"(?:(?!\bif\b)[^.\n:=]){0,80}?"
    r"(?:\b(?:is|be)\b|:|=)[\s:]*(?=((?:[^.\n]|\.(?=\S)){1,300}))", re.IGNORECASE)

def extract_answer(response: str) -> str | None:
    r"""What a response states behind </think>: the last \boxed{}; else the last <answer>,
    closed or not; else what follows the last "the answer is". None: none, or an open <think>."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed or None
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)", text, re.DOTALL)
    if tagged:
        return tagged[-1].strip() or None
    declared = DECLARATION.findall(text) or [""]
    return re.sub(r"^\((\w+)\)$", r"\1", declared[-1].strip("*_ $")) or None

def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance, or None."""
    open_braces, boxes = [], {}  # where a box begins -> its content
    for brace in re.finditer(r"\\boxed\s*\{|(?<!\\)[{}]", text):
        if brace[0] != "}":
            open_braces.append(brace)
        elif open_braces:
            opening = open_braces.pop()
            if opening[0] != "{":
                boxes[opening.end()] = text[opening.end():brace.start()].strip()
    return boxes[max(boxes)] if boxes else None

# States a letter: alone ("B", "(B)", "option B") or as a label ("B. dogs").
STATED_LETTER = re.compile(r"(?:the )?(?:(?:option|choice|answer)(?: is)?:? )?\(?([A-Z])"
                           r"(?:$|\)|[.:](?=\s|$)|,? (?:because|since)\b)", re.IGNORECASE)
# A further letter that is no word ("A dog", "I think"): C in "B. cats or C. dogs".
FURTHER_LETTER = re.compile(r"(?<![\w'’\\])(?!A [a-z])[A-HJ-Z](?![\w'’(^*+-])")
IMAGE_NUMBERS = re.compile(r"(?:\d|[\s\[\]()#,;>→]|->|and|the|images?)+")  # "[3, 1, 2]"
UNIT = re.compile(r"(?<=\d) +(?:[kcm]?m|miles?|ft|k?g|m?l)(?:\^\{?[23]\}?|[²³]|/\w+)+$")

@functools.lru_cache(maxsize=65536)
def same_answer(answer: str, gold: str) -> bool:
    """Compare as text, option letter, yes/no, image numbers; else as mathematics."""
    formula, gold_formula = plain(answer), plain(gold)
    answer, gold = formula.casefold(), gold_formula.casefold()
    if answer == gold:
        return True
    if re.fullmatch(r"[a-z]", gold):
        stated = STATED_LETTER.match(formula)
        if stated is None or stated[1].casefold() != gold:
            return False
        return set(FURTHER_LETTER.findall(formula, stated.end())) <= {gold.upper()}
    if gold in ("yes", "no", "true", "false"):
        return re.match(rf"{gold}\b(?! (?:and|or)\b)", answer) is not None
    is_list = re.fullmatch(r"\d{1,2}(\s*,\s*\d{1,2})*", gold)
    if is_list and IMAGE_NUMBERS.fullmatch(answer):  # the order counts
        return re.findall(r"\d+", answer) == re.findall(r"\d+", gold)
    if len(answer) > MathJudge.MAX_CHARS or not re.search(r"\d|\\", gold):
        return False  # other words are another answer, and no formula is that long
    return MATH_JUDGE.same(UNIT.sub("", formula), UNIT.sub("", gold_formula))

def plain(answer: str) -> str:
    r"""Strip what means nothing: $, \text{}, bold, a full stop, brackets round a letter."""
    answer = re.sub(r"(?<!\\)\$", "", answer)  # amid a text it ends math-verify's reading
    answer = re.sub(r"\s+", " ", answer).replace("\u2212", "-").replace("π", r"\pi ")
    answer = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})|[£€]", "", answer)
    answer = re.sub(r"√ ?(\d+|\w)", r"\\sqrt{\1}", answer).replace("√", r"\sqrt")
    answer = answer.strip().strip("$*").strip().removesuffix(".").strip()
    return re.sub(r"^\((\w)\)$", r"\1", answer)

class MathJudge:
    """math-verify in a process of its own, out of reach of Ctrl-C, that ends itself after
    SECONDS. NOTE: 9^{9^{9^9}} is one C call: faulthandler's thread stops it, no signal does."""
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
                raise SystemExit("math-verify does not start: pip install math-verify")
        question = json.dumps([answer, gold, self.SECONDS])
        print(question, file=self.process.stdin, flush=True)
        verdict = self.process.stdout.readline()  # empty if the process ended itself
        if not verdict:
            self.process.wait()
            self.timeouts += 1
        return verdict == "True\n"

MATH_JUDGE = MathJudge()

# ---- Advantages and filter (Eq. 4-5) ---------------------------------------------------

def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards (Q, R) -> advantages (Q, R); a row holds ALL rollouts of a question. (Eq. 4-5)
    Example: [[1, 0, 0, 1], [1, 1, 1, 1]] gives [[1, -1, -1, 1], [0, 0, 0, 0]], exact zeros."""
    rewards = torch.as_tensor(rewards) + 0.0  # of integers, floats
    deviation = rewards - rewards.mean(dim=1, keepdim=True)                 # r - mean(r)
    std = rewards.std(dim=1, keepdim=True, correction=0)                    # (Q, 1)
    advantages = deviation / std.clamp_min(torch.finfo(rewards.dtype).tiny)
    varied = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)           # (Q, 1)
    return advantages.where(varied, torch.zeros_like(advantages))

def set_advantages(groups: list[list[Rollout]]) -> None:
    """Write each rollout's advantage among all of its question, whatever their orders."""
    for group in groups:
        rewards = torch.tensor([[rollout.reward for rollout in group]])     # (1, R)
        for rollout, advantage in zip(group, group_advantages(rewards)[0].tolist()):
            rollout.advantage = advantage

VERDICTS = ("kept", "all_right", "all_wrong", "too_easy", "too_hard", "flat")

def verdict(group: list[Rollout], cfg) -> str:
    """What becomes of a group. Kept: advantages, and a mean accuracy that --filter allows.
    Example, online, bounds .1 and .9, 12 rollouts: 6 right is kept, 11 too_easy, 12
    all_right. flat: no advantages for another reason, as with an accuracy weight of 0."""
    bounds = {"none": (0, 1), "offline": (0, 1), "online": (cfg.filter_low, cfg.filter_high)}
    low, high = bounds[cfg.filter]
    accuracy = mean(rollout.accuracy for rollout in group)
    in_bounds = low <= accuracy <= high
    if in_bounds and any(rollout.advantage != 0 for rollout in group):
        return "kept"
    if accuracy == 0 or accuracy == 1:
        return "all_right" if accuracy == 1 else "all_wrong"
    if in_bounds:
        return "flat"
    return "too_easy" if accuracy > high else "too_hard"

# Stage 0 keeps so many % of its questions with a score of 0, .1, .. 1 (read off Fig. 3b).
SCORE_TARGET = (12, 11, 11, 12, 15, 17, 6, 5, 4, 3, 3)

def resample_by_difficulty(scores: list[float], target: tuple, size: int, rng) -> list[int]:
    """Indices of about `size` questions, whose scores follow the histogram `target`. A bin
    that is short of questions gives all it has; none is drawn twice. Example: 100 scores of
    1.0 and 10 of 0.5, target half of each, size 40: the ten of 0.5 and twenty of 1.0."""
    bins = [[] for _ in target]
    for index, score in enumerate(scores):
        bins[round(score * (len(target) - 1))].append(index)
    kept = []
    for members, share in zip(bins, target):
        quota = round(size * share / sum(target))
        kept += rng.sample(members, min(quota, len(members)))
    return sorted(kept)

# ---- Log-probabilities and loss (Eq. 6) ------------------------------------------------

def predictors(hidden: Tensor, segment_lengths: list[list[int]]) -> Tensor:
    """From (B, S, D), the hidden states (tokens, D) that predict the response tokens: a token's
    left neighbour; for the first of a response, the prompt's last."""
    places = torch.arange(hidden[..., 0].numel()).view(hidden.shape[:2])  # (B, S), flattened
    chosen = []
    for row, lengths in zip(places, segment_lengths):
        padding, prompt, *responses = row.split(lengths)
        for response in responses:
            chosen += [prompt[-1:], response[:-1]]
    return hidden.flatten(0, 1)[torch.cat(chosen)]

def response_logprobs(model, processor, rollouts: list[Rollout], cfg) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the response tokens at the sampling temperature, and their
    mask; zeros behind a response's end. Logits exist for `logit_chunk` tokens at a time and
    are made again in the backward pass: 152k floats for each token would not fit."""
    rows = pack(rollouts, cfg)  # without sharing, one for each rollout
    prompts = [row[0].prompt for row in rows]
    responses = [[rollout.ids for rollout in row] for row in rows]
    inputs, segment_lengths = collate(prompts, responses, model, processor, cfg)
    targets = [torch.tensor(rollout.ids, device=model.device) for rollout in rollouts]
    hidden = model.model(**inputs, use_cache=False).last_hidden_state       # (rows, S, D)
    hidden = predictors(hidden, segment_lengths)                            # (tokens, D)
    chunks = zip(hidden.split(cfg.logit_chunk), torch.cat(targets).split(cfg.logit_chunk))
    logprobs = [checkpoint(token_logprobs, model.lm_head, *chunk, processor.banned_ids,
                           cfg.temperature, use_reentrant=False) for chunk in chunks]
    mask = stack([torch.ones_like(ids, dtype=torch.bool) for ids in targets])   # (B, T)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, torch.cat(logprobs)), mask

def token_logprobs(lm_head, hidden: Tensor, targets: Tensor, banned_ids: list[int],
                   temperature: float) -> Tensor:
    """Hidden states (N, D), the tokens that followed (N,) -> log-probabilities (N,)."""
    logits = lm_head(hidden).float()                                        # (N, V)
    logits[:, banned_ids] = -torch.inf  # as in sampling, where they are suppressed
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1)

@torch.no_grad()
def store_logprobs(model, processor, rollouts: list[Rollout], name: str, cfg) -> None:
    """Write the log-probabilities under `model` into the field `name` of each rollout."""
    model.eval()
    for batch in micro_batches(rollouts, cfg):
        logprobs, _ = response_logprobs(model, processor, batch, cfg)
        for rollout, row in zip(batch, logprobs):
            setattr(rollout, name, row[:len(rollout.ids)].clone())

def fill(items: list, fits: Callable[[list], bool]) -> list[list]:
    """Groups of items, in order: one joins the last group if fits(group + [item])."""
    groups = []
    for item in items:
        if not groups or not fits(groups[-1] + [item]):
            groups.append([])
        groups[-1].append(item)
    return groups

def row_length(row: list[Rollout]) -> int:
    """Tokens of a packed row: the prompt once, and the responses."""
    return len(row[0].prompt.ids) + sum(len(rollout.ids) for rollout in row)

def pack(rollouts: list[Rollout], cfg) -> list[list[Rollout]]:
    """Neighbours that answer the same prompt share a row, up to a micro-batch's tokens. Example:
    with at most 9, a prompt of 4 and responses of 2, 2 and 3: rows of 4 + 2 + 2 and 4 + 3."""
    limit = cfg.max_tokens_per_micro_batch if cfg.share else 0
    return fill(rollouts, lambda row: row[-1].prompt is row[0].prompt
                and row_length(row) <= limit)

def micro_batches(rollouts: list[Rollout], cfg) -> list[list[Rollout]]:
    """Rollouts in batches of rows, longest first: running out of memory shows at once."""
    rows = sorted(pack(rollouts, cfg), key=row_length, reverse=True)
    limit = cfg.max_tokens_per_micro_batch
    batches = fill(rows, lambda batch: len(batch) * row_length(batch[0]) <= limit)
    return [sum(batch, []) for batch in batches]

def stack(rows: list[Tensor | None]) -> Tensor | None:
    """Rows of unequal length -> (B, T), zeros behind; None if the rows are None."""
    return None if rows[0] is None else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

def policy_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
                advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float,
                beta: float, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Minus (clipped surrogate less beta * KL), summed over the mask, over `denominator`. (Eq. 6)
    logprobs, old_logprobs, ref_logprobs, mask: (B, T); advantages: (B,). Returns a scalar
    loss and two sums over tokens: `kl`, and `clipped`, how many lost their gradient. With
    the `loss_denominator` of the whole update, micro-batches add up to the same."""
    mask, advantages = mask.bool(), advantages[:, None]                 # (B, T), (B, 1)
    ratio = (logprobs - old_logprobs).where(mask, 0.0).exp()                # pi / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # With one update the ratio is 1: the value says little, its gradient counts.
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        log_ratio = (ref_logprobs - logprobs).where(mask, 0.0)
        kl = log_ratio.exp() - log_ratio - 1                                # k3 estimate
    loss = -((objective - beta * kl) * mask).sum() / denominator
    n_clipped = ((clipped * advantages < ratio * advantages) & mask).sum()
    return loss, {"kl": float((kl.detach() * mask).sum()), "clipped": float(n_clipped)}

def loss_denominator(rollouts: list[Rollout]) -> int:
    """What the loss is divided by, once summed over processes: response tokens."""
    return sum(len(rollout.ids) for rollout in rollouts)

# ---- Training (Algorithm 1) ------------------------------------------------------------

def draw_questions(pool: list[int], n_questions: int, k: int, rng) -> list[int]:
    """The next k question numbers from the pool; every epoch is a fresh shuffle."""
    drawn = []
    while len(drawn) < k:
        if not pool:
            pool += rng.sample(range(n_questions), n_questions)
        drawn.append(pool.pop())
    return drawn

def collect_groups(model, processor, questions: list[Sample], pool: list[int], alpha: float,
                   rng, cfg, accelerator) -> dict[str, list[list[Rollout]]]:
    """This process's groups of a step, by verdict. With the online filter, dropped questions
    are replaced until every process has its part of the batch, or for cfg.max_rounds."""
    world, rank = accelerator.num_processes, accelerator.process_index
    wanted = missing = cfg.questions_per_step // world
    groups = {name: [] for name in VERDICTS}
    for _ in range(1 if cfg.filter in ("none", "offline") else cfg.max_rounds):
        drawn = draw_questions(pool, len(questions), missing * world, rng)
        chosen = [questions[k] for k in drawn]
        orders = [draw_orders(sample, cfg.n_permutations, alpha, rng) for sample in chosen]
        sampled = sample_groups(model, processor, chosen[rank::world], orders[rank::world],
                                cfg.rollouts_per_order, cfg)
        set_advantages(sampled)
        for group in sampled:
            groups[verdict(group, cfg)].append(group)
        missing = max(gather_object([wanted - len(groups["kept"])]))
        if missing <= 0:
            break
    return groups

def update(model, ref_model, optimizer, processor, kept: list[list[Rollout]], cfg,
           accelerator) -> tuple[dict[str, float], float]:
    """Train on the kept groups, in cfg.updates_per_step parts. Returns sums over this
    process's tokens (how many, KL, clipped) and the mean gradient norm."""
    rollouts = sum(kept, [])
    if cfg.updates_per_step > 1:  # with one, the policy trained is the one that sampled
        store_logprobs(model, processor, rollouts, "old_logprobs", cfg)
    if cfg.beta and cfg.lora_rank:  # the start model is this one without its adapters
        ref_model.disable_adapter_layers()
        store_logprobs(model, processor, rollouts, "ref_logprobs", cfg)
        ref_model.enable_adapter_layers()
    elif cfg.beta:  # it lies in host memory, and fits while there are no gradients
        store_logprobs(ref_model.to(model.device), processor, rollouts, "ref_logprobs", cfg)
        ref_model.to("cpu")
    sums, norms = {"tokens": 0.0, "kl": 0.0, "clipped": 0.0}, []
    model.train()
    for u in range(cfg.updates_per_step):
        begin = len(kept) * u // cfg.updates_per_step
        end = len(kept) * (u + 1) // cfg.updates_per_step
        part = sum(kept[begin:end], [])
        denominator = sum(gather_object([loss_denominator(part)]))
        if denominator == 0:  # NOTE: AdamW moves weights on zero gradients too. All skip.
            continue
        add_gradients(model, processor, part, denominator, sums, cfg)
        norms.append(optimizer.step())
    model.eval()
    return sums, sum(norms) / max(len(norms), 1)

def add_gradients(model, processor, rollouts: list[Rollout], denominator: float,
                  sums: dict[str, float], cfg) -> None:
    """Forward and backward passes of one update; adds to the sums over tokens."""
    for batch in micro_batches(rollouts, cfg):
        logprobs, mask = response_logprobs(model, processor, batch, cfg)
        old_logprobs = stack([rollout.old_logprobs for rollout in batch])
        if old_logprobs is None:
            old_logprobs = logprobs.detach()
        ref_logprobs = stack([rollout.ref_logprobs for rollout in batch])
        advantages = torch.tensor([rollout.advantage for rollout in batch], device=mask.device)
        loss, stats = policy_loss(
            logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_low=cfg.clip_low,
            clip_high=cfg.clip_high, beta=cfg.beta, denominator=denominator)
        loss.backward()
        stats["tokens"] = int(mask.sum())
        for name, value in stats.items():
            sums[name] += value

def step_metrics(groups: dict[str, list[list[Rollout]]], loss_sums: dict[str, float],
                 accelerator) -> dict[str, float]:
    """Metrics of one step over all processes. The README says what is healthy."""
    names = ("accuracy", "format", "reward", "truncated", "idle", "length")
    rows = [(r.accuracy, r.format, r.reward, r.truncated, r.idle, len(r.ids))
            for r in sum(sum(groups.values(), []), [])]
    metrics = dict(zip(names, map(mean, zip(*gather_object(rows)))))  # a column, its mean
    metrics["idle"] /= metrics["idle"] + metrics["length"]  # of all decode slots
    of_processes = gather_object([loss_sums | {name: len(groups[name]) for name in VERDICTS}])
    metrics |= {name: sum(own[name] for own in of_processes) for name in of_processes[0]}
    metrics["dropped"] = sum(metrics[name] for name in VERDICTS[1:])
    tokens = max(metrics.pop("tokens"), 1)
    metrics["kl"] /= tokens
    metrics["clip_fraction"] = metrics.pop("clipped") / tokens
    return metrics

STEP_LINE = (
    "step {step}/{steps} | acc {accuracy:.2f} fmt {format:.2f} | kept {kept} ({others}) | "
    "len {length:.0f} cut {truncated:.0%} idle {idle:.0%} | kl {kl:.3f} clip "
    "{clip_fraction:.2f} grad {grad_norm:.2f} | gen {seconds_sample:.1f}s train "
    "{seconds_update:.1f}s | {peak_gb:.1f} GB | {left:.1f}h left")

def peak_gb() -> float:
    """Peak memory in GB: of the GPU, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes on a Mac, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def find_questions(cfg, questions: list[Sample]) -> list[Sample]:
    """With --filter offline, those that a stage 0 in the run folder kept; else all."""
    path = newest(cfg, "stage0-*/kept.json") if cfg.filter == "offline" else None
    if path is None:
        return questions
    kept = set(json.loads(path.read_text()))
    if not kept <= {question.id for question in questions}:
        raise SystemExit(f"{path}: scored on other data than {cfg.data}; run --stage 0 again")
    return [question for question in questions if question.id in kept]

def train(cfg, processor, questions: list[Sample], held_out: list[Sample], accelerator) -> None:
    """Algorithm 1: sample permuted groups, drop what teaches nothing, update."""
    out, is_main = Path(cfg.out), accelerator.is_main_process
    questions = find_questions(cfg, questions)
    trained = newest(cfg, "stage1-*/checkpoint-*") if cfg.stage == 2 else None
    start = str(trained or cfg.model)  # of training, and what KL is measured from
    accelerator.print(f"training on {len(questions)} questions, from {start}")
    held_out = held_out[:cfg.eval_questions or None] if cfg.eval_every else []
    steps = cfg.steps or math.ceil(cfg.epochs * len(questions) / cfg.questions_per_step)

    resumed = newest(cfg, "checkpoint-*") if cfg.resume else None
    # With LoRA the weights stay the start's; a checkpoint's state has the adapters.
    weights = start if cfg.lora_rank else str(resumed or start)
    model, ref_model = load_model(weights, cfg, accelerator.device), None
    if cfg.lora_rank:
        ref_model = add_lora(model, cfg)
    elif cfg.beta:
        ref_model = load_model(start, cfg, torch.device("cpu"))
    optimizer = SplitAdamW(model, cfg, accelerator)
    rng, pool, step = random.Random(cfg.seed), [], 0
    if resumed:
        optimizer.load(resumed)
        state = torch.load(resumed / "training_state.pt", "cpu", weights_only=True)
        rng.setstate(state["rng"])
        pool, step = state["pool"], state["step"]
    if is_main and cfg.resume:
        cut_logs(out, step if resumed else -1)
    if held_out and not resumed:
        metrics = {"step": 0} | evaluate(model, processor, held_out, cfg, accelerator, step)
        accelerator.log(metrics, step=0)  # to the tracker of --report-to
        if is_main:
            append_line(out / "metrics.jsonl", metrics)

    for step in range(step + 1, steps + 1):
        began = time.time()
        seed_sampling(cfg, step, accelerator)
        progress = (step - 1) / max(steps - 1, 1)
        alpha = cfg.alpha_start + (cfg.alpha_end - cfg.alpha_start) * progress
        groups = collect_groups(model, processor, questions, pool, alpha, rng, cfg, accelerator)
        sampled_at = time.time()
        loss_sums, grad_norm = update(
            model, ref_model, optimizer, processor, groups["kept"], cfg, accelerator)
        metrics = {"step": step} | step_metrics(groups, loss_sums, accelerator) | {
            "grad_norm": grad_norm, "alpha": alpha, "lr": cfg.lr,
            "seconds_sample": sampled_at - began, "seconds_update": time.time() - sampled_at,
            "peak_gb": peak_gb(), "grader_timeouts": MATH_JUDGE.timeouts}
        dropped = [f"{metrics[name]} {name}" for name in VERDICTS[1:] if metrics[name]]
        others = ", ".join(dropped).replace("_", " ") or "all"
        left = (steps - step) * (time.time() - began) / 3600  # hours
        accelerator.print(STEP_LINE.format(**metrics, steps=steps, others=others, left=left))
        if is_main and (step - 1) % cfg.log_every == 0:
            log_group(out / "rollouts.jsonl", step, sum(groups.values(), [])[0], show=True)
        if held_out and (step % cfg.eval_every == 0 or step == steps):
            metrics |= evaluate(model, processor, held_out, cfg, accelerator, step)
        accelerator.log(metrics, step=step)
        if is_main:
            append_line(out / "metrics.jsonl", metrics)
        if step == steps or step % cfg.save_every == 0:
            save_checkpoint(cfg, step, model, ref_model, processor, optimizer, rng, pool,
                            accelerator)
    accelerator.print(f"done: {newest(cfg, 'checkpoint-*')}")

def score(cfg, processor, questions: list[Sample], accelerator) -> None:
    """Stage 0, the rollout filter: the start model answers each question K times. Writes
    scores.json, and the ids of the resampled set in kept.json."""
    path = Path(cfg.out) / "scores.json"
    questions = list(dict.fromkeys(questions))  # a file's weight counts in training only
    model = load_model(cfg.model, cfg, accelerator.device)
    scores = json.loads(path.read_text()) if path.exists() else {}  # resumed
    starts = range(0, len(questions), cfg.questions_per_step)
    for start in tqdm(starts, "score", disable=None):
        batch = questions[start:start + cfg.questions_per_step]
        if all(question.id in scores for question in batch):
            continue
        seed_sampling(cfg, start, accelerator)
        rows = accuracies(sample_orders(
            model, processor, batch, 1, cfg.score_rollouts, cfg, accelerator))
        scores |= {name: mean(row) for name, row in rows.items()}
        if accelerator.is_main_process:
            write_atomic(path, json.dumps(scores, indent=0))
    values = [scores[question.id] for question in questions]
    size = round(cfg.score_keep * len(questions))
    kept = resample_by_difficulty(values, SCORE_TARGET, size, random.Random(cfg.seed))
    if not kept:
        raise SystemExit(f"{path}: none kept; raise --score-keep")
    if accelerator.is_main_process:
        write_atomic(path.with_name("kept.json"), json.dumps([questions[k].id for k in kept]))
    accelerator.print(f"kept {len(kept)} of {len(questions)} questions; mean score "
                      f"{mean(values):.2f} -> {mean(values[k] for k in kept):.2f}")

# ---- Evaluation over image orders ------------------------------------------------------

def sample_orders(model, processor, samples: list[Sample], n_orders: int, n: int, cfg,
                  accelerator, greedy: bool = False) -> list[list[Rollout]]:
    """This process's part of the samples, each n times in up to n_orders orders: its groups."""
    mine = samples[accelerator.process_index::accelerator.num_processes]
    orders = [all_orders(sample, n_orders) for sample in mine]
    return sample_groups(model, processor, mine, orders, n, cfg, greedy)

def accuracies(groups: list[list[Rollout]]) -> dict[str, list[float]]:
    """Id -> accuracies of a group's rollouts, from all processes."""
    rows = [(group[0].prompt.sample.id, [r.accuracy for r in group]) for group in groups]
    return dict(gather_object(rows))

def evaluate(model, processor, samples: list[Sample], cfg, accelerator,
             step: int | None = None) -> dict[str, float]:
    """Greedy answers to every question in all its orders, up to cfg.eval_orders. Shares in
    [0, 1]: eval_accuracy, the mean over orders; eval_worst, right in every order;
    eval_bias, best order less worst, the paper's p(x_max) - p(x_min) (A.5). A step logs a few."""
    rows, clock = {}, time.time()
    for start in range(0, len(samples), cfg.questions_per_step):  # a batch fits in memory
        batch = samples[start:start + cfg.questions_per_step]
        groups = sample_orders(model, processor, batch, cfg.eval_orders, 1, cfg, accelerator,
                               greedy=True)
        rows |= accuracies(groups)
        if step is not None and start == 0 and accelerator.is_main_process:
            for group in groups[:cfg.log_held_out]:
                log_group(Path(cfg.out) / "held_out.jsonl", step, group)
    metrics = {"eval_accuracy": mean(map(mean, rows.values())),
               "eval_worst": mean(map(min, rows.values())),
               "eval_bias": mean(max(row) - min(row) for row in rows.values()),
               "seconds_eval": time.time() - clock}
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
    """Rows that append_line wrote; a last line torn by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]

def cut_logs(out: Path, last_step: int) -> None:
    """Take back what a killed run logged behind the step that it goes on from."""
    for path in out.glob("*.jsonl"):
        rows = [row for row in read_lines(path) if row["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

def log_group(path: Path, step: int, group: list[Rollout], show: bool = False) -> None:
    """Add a group's rollouts to a JSONL file; show: print the last of them."""
    for r in group:
        asked = r.prompt.sample
        append_line(path, {
            "step": step, "id": asked.id, "images": asked.images, "movable": asked.movable,
            "order_rule": asked.order_rule, "order": r.order, "gold": r.gold,
            "question": asked.question, "response": r.text, "reward": r.reward,
            "accuracy": r.accuracy, "format": r.format, "advantage": r.advantage})
    if show:
        print(f"  {asked.id} in order {r.order}: {asked.question}\n  > {r.text}\n  "
              f"gold {r.gold} | accuracy {r.accuracy:.0f} format {r.format:.0f} "
              f"reward {r.reward:.1f} advantage {r.advantage:+.2f}")

def newest(cfg, pattern: str) -> Path | None:
    """The match in the run folder with the highest numbers: checkpoint-100, stage1-2/.. ."""
    return max(Path(cfg.out).glob(pattern), default=None, key=lambda path: [
        int(number) for number in re.findall(r"\d+", str(path.relative_to(cfg.out)))])

def open_run(cfg, accelerator) -> int:
    """Make and lock the run folder. What is at its top is the current run's; that of an earlier
    one moves to stage1-1/, stage1-2/ .., where later stages find it. Returns the lock."""
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        if accelerator.is_main_process:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if accelerator.is_main_process and not cfg.resume:
            if (out / "config.json").exists():
                stage = f"stage{json.loads((out / 'config.json').read_text())['stage']}"
                archive = out / f"{stage}-{1 + len(list(out.glob(stage + '-*')))}"
                archive.mkdir()
                for entry in set(out.iterdir()) - set(out.glob("stage?-*")):
                    os.replace(entry, archive / entry.name)
                print(f"the earlier run in {out} moved to {archive}")
            shutil.copy(__file__, out / "perl.py")
            write_atomic(out / "config.json", json.dumps(vars(cfg), indent=1))
    except (OSError, TypeError, ValueError, KeyError) as error:
        busy = "another run is at work there" if type(error) is BlockingIOError else repr(error)
        raise SystemExit(f"--out {out} is no folder to run in: {busy}") from None
    accelerator.wait_for_everyone()
    return lock

def save_checkpoint(cfg, step: int, model, ref_model, processor, optimizer,
                    rng, pool: list[int], accelerator) -> None:
    """OUT/checkpoint-STEP: a Hugging Face folder, and in it each process's part of the state."""
    out, is_main = Path(cfg.out), accelerator.is_main_process
    temporary, final = out / "checkpoint.tmp", out / f"checkpoint-{step}"
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        merged = copy.deepcopy(ref_model).merge_and_unload() if cfg.lora_rank else model
        merged.save_pretrained(temporary)
        processor.tokenizer.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        torch.save({"step": step, "pool": pool, "rng": rng.getstate()},
                   temporary / "training_state.pt")
    accelerator.wait_for_everyone()
    # NOTE: given a path, torch.save makes a RuntimeError of a full disk, not an OSError.
    with open(temporary / f"optimizer-{accelerator.process_index}.pt", "wb") as file:
        torch.save(optimizer.state_dict(), file)
    accelerator.wait_for_everyone()
    if is_main:
        os.replace(temporary, final)
        for other in set(out.glob("checkpoint-*")) - {final}:
            shutil.rmtree(other)

# ---- Shared compute: skip it on a first reading ----------------------------------------
# A permutation changes the order of the images and nothing else, and the n rollouts of an
# order have their whole prompt in common. So, with the same numbers up to rounding:
#   - The vision tower sees each image alone: its features serve all rollouts of a batch.
#   - A prompt does not see what follows it. Sampling keeps its keys and values once for n
#     responses; the loss has it in one row with them. There a token sees the prompt and its
#     own response, at the positions of a row of its own. Prompt p, responses a and b:
#             p p p a a b b   position
#         p   1 . . . . . .   0
#         p   1 1 . . . . .   1
#         p   1 1 1 . . . .   2
#         a   1 1 1 1 . . .   3
#         a   1 1 1 1 1 . .   4
#         b   1 1 1 . . 1 .   3
#         b   1 1 1 . . 1 1   4
# The seams: `pack` (without sharing, rows of one), the end of `collate`, `prefill` in
# `generate`, and the attention that `load_model` names. --no-share takes far more work.

def encode_images(model, pictures: list[Picture]) -> list[Tensor]:
    """Features (tokens, D) of each picture; one that comes several times is encoded once."""
    distinct = {id(picture): picture for picture in pictures}
    pixels = torch.cat([picture.pixels for picture in distinct.values()]).to(model.device)
    grids = torch.cat([picture.grid for picture in distinct.values()]).to(model.device)
    encoded = model.get_image_features(pixels, grids).pooler_output             # FAMILY
    features = dict(zip(distinct, encoded))
    return [features[id(picture)] for picture in pictures]

def share_row(inputs: dict, segment_lengths: list[list[int]], pictures: list[Picture],
              model) -> None:
    """Add image features to the inputs; where a row has several responses, also positions that
    restart behind the prompt for each, and in the mask's place the lengths of the parts."""
    if any(len(lengths) > 3 for lengths in segment_lengths):
        positions, _ = model.model.get_rope_index(**inputs)                     # FAMILY
        for row, (padding, prompt, *responses) in enumerate(segment_lengths):
            begin = padding + prompt
            first = positions[:, row, begin:begin + 1].clone()                  # (3, 1)
            for length in responses:
                positions[:, row, begin:begin + length] = first + torch.arange(length)
                begin += length
        inputs["position_ids"] = positions                                      # (3, B, S)
        inputs["attention_mask"] = {"full_attention": segment_lengths}
    features = transformers.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=encode_images(model, pictures))
    inputs["mm_encoder_outputs"] = {"image": features}

class SharedPromptLayer(DynamicLayer):
    """KV cache of a layer. The first call brings the prompts' part (P, heads, L, d), which
    stays; later ones get it beside the responses' growing part (B, heads, t, d), as pairs."""
    prompts = None

    def update(self, keys, values, *args, **kwargs):
        if self.prompts is None:  # contiguous, or each step would copy them
            self.prompts = keys.contiguous(), values.contiguous()
            return keys, values
        keys, values = super().update(keys, values)
        return (self.prompts[0], keys), (self.prompts[1], values)

    def get_seq_length(self) -> int:
        shared = 0 if self.prompts is None else self.prompts[0].shape[2]
        return shared + super().get_seq_length()

def prefill(model, inputs: dict, n: int) -> dict:
    """Read each prompt up to its last token -> inputs for generate, n rows a prompt."""
    cache = Cache(layer_class_to_replicate=SharedPromptLayer)
    but_last = {name: inputs[name][:, :-1]
                for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    model.model(**inputs | but_last, past_key_values=cache, use_cache=True)
    # By how much a prompt's positions fall short of its tokens; the model needs it a row.
    model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(n, 0)   # FAMILY
    return {"past_key_values": cache,
            "input_ids": inputs["input_ids"].repeat_interleave(n, dim=0),
            "attention_mask": inputs["attention_mask"].repeat_interleave(n, dim=0)}

def shared_prompt_attention(module, query, key, value, attention_mask, **kwargs):
    """The model's attention: packed rows, decoding against shared prompts, or sdpa."""
    scaling = kwargs["scaling"]
    if isinstance(attention_mask, list):  # segment lengths, from share_row
        return tree_attention(query, key, value, attention_mask, scaling), None
    if isinstance(key, tuple):  # prompts and responses, from SharedPromptLayer
        return decode_attention(query, key, value, attention_mask, scaling), None
    return SDPA(module, query, key, value, attention_mask, **kwargs)

SDPA = transformers.AttentionInterface()["sdpa"]
transformers.AttentionInterface.register("shared_prompt", shared_prompt_attention)
transformers.AttentionMaskInterface.register("shared_prompt", sdpa_mask)

def decode_attention(query: Tensor, key: tuple, value: tuple, mask: Tensor | None,
                     scaling: float) -> Tensor:
    """One new token in each of P * n rows against the one copy of its prompt (L tokens) and
    its own response (t tokens), one softmax over both. -> (B, 1, H, d)"""
    (keys, own_keys), (values, own_values) = key, value
    (P, h, L, d), B = keys.shape, len(query)  # g query heads share one of h heads of keys
    query = query.view(P, B // P, h, -1, d).float() * scaling           # (P, n, h, g, d)
    own_keys = own_keys.view(P, B // P, h, -1, d)                       # (P, n, h, t, d)
    own_values = own_values.view(P, B // P, h, -1, d)
    scores = torch.cat([  # in float32: bfloat16 would round them too far
        torch.einsum("pnhgd,phld->pnhgl", query, keys.float()),
        torch.einsum("pnhgd,pnhtd->pnhgt", query, own_keys.float())], dim=-1)
    if mask is not None:  # (B, 1, 1, L + t); false at padding only
        scores = scores.masked_fill(~mask.view(P, -1, 1, 1, mask.shape[-1]), -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    mixed = (torch.einsum("pnhgl,phld->pnhgd", weights[..., :L], values)
             + torch.einsum("pnhgt,pnhtd->pnhgd", weights[..., L:], own_values))
    return mixed.reshape(B, 1, -1, d)

def tree_attention(query: Tensor, key: Tensor, value: Tensor,
                   segment_lengths: list[list[int]], scaling: float) -> Tensor:
    """Packed rows: the prompt sees itself, a response the prompt and itself, other pairs are
    not computed. query (B, H, S, d), key and value (B, h, S, d) -> (B, S, H, d)"""
    shared_by = query.shape[1] // key.shape[1]  # so many query heads use one head of keys
    key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
    rows = []
    for b, lengths in enumerate(segment_lengths):
        padding, prompt, *responses = query[b:b + 1].split(lengths, dim=2)
        _, prompt_keys, *keys = key[b:b + 1].split(lengths, dim=2)
        _, prompt_values, *values = value[b:b + 1].split(lengths, dim=2)
        parts = [padding.to(value.dtype), scaled_dot_product_attention(
            prompt, prompt_keys, prompt_values, is_causal=True, scale=scaling)]
        for q, k, v in zip(responses, keys, values):
            seen_keys = torch.cat([prompt_keys, k], dim=2)
            seen_values = torch.cat([prompt_values, v], dim=2)
            mask = q.new_ones(q.shape[2], seen_keys.shape[2], dtype=torch.bool)
            mask = mask.tril(diagonal=prompt.shape[2])  # the prompt, and itself causally
            parts.append(scaled_dot_product_attention(
                q, seen_keys, seen_values, attn_mask=mask, scale=scaling))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).transpose(1, 2)

# ---- Memory and machines: skip it on a first reading -----------------------------------

class SplitAdamW:
    """AdamW on float32 copies of the weights (or on themselves), in host memory where the GPU is
    too small. Each tensor has one owner among the processes (ZeRO-1), which gets the gradients'
    sum, steps and broadcasts the weight. FSDP would gather split weights for every token."""
    def __init__(self, model, cfg, accelerator):
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.max_grad_norm = cfg.max_grad_norm
        self.weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        largest_first = sorted(self.weights, key=lambda name: -self.weights[name].numel())
        self.owners, load = {}, [0] * self.world
        for name in largest_first:
            self.weights[name].grad_dtype = torch.float32  # bfloat16 sums lose much
            self.owners[name] = load.index(min(load))
            load[self.owners[name]] += self.weights[name].numel()
        device = torch.device("cpu") if cfg.optimizer_device == "host" else model.device
        self.masters = {name: w.detach().to(device, torch.float32)
                        for name, w in self.weights.items() if self.owners[name] == self.rank}
        self.adamw = torch.optim.AdamW(
            self.masters.values(), lr=cfg.lr, weight_decay=cfg.weight_decay,
            fused=model.dtype != torch.float32)  # one pass: 6 times as fast on a host

    @torch.no_grad()
    def step(self) -> float:
        """Update the weights, drop the gradients. Returns their norm before clipping."""
        norms = []  # of what this process owns
        for name, weight in self.weights.items():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=torch.float32)
            if self.world > 1:
                torch.distributed.reduce(weight.grad, self.owners[name])
            if name in self.masters:
                norms.append(torch.linalg.vector_norm(weight.grad))
            else:
                weight.grad = None
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.world > 1:
            torch.distributed.all_reduce(norm.square_())
            norm.sqrt_()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for name, master in self.masters.items():  # the host holds one at a time
            weight = self.weights[name]
            master.grad = weight.grad.mul_(scale).to(master.device)
            weight.grad = None
            self.adamw.step()
            master.grad = None
            weight.copy_(master)
        if self.world > 1:
            for name, weight in self.weights.items():
                torch.distributed.broadcast(weight.detach(), self.owners[name])
        return float(norm)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Of each tensor that this process owns: float32 copy, moments, steps taken."""
        return {name: {"master": master} | self.adamw.state[master]
                for name, master in self.masters.items()}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take what this process owns from a checkpoint of any number of processes."""
        missing = set(self.masters)
        for path in folder.glob("optimizer-*.pt"):
            saved = torch.load(path, "cpu", mmap=True, weights_only=True)
            for name in missing & saved.keys():
                master, state = self.masters[name], saved[name]
                master.copy_(state.pop("master"))
                self.weights[name].copy_(master)
                for key, value in state.items():
                    self.adamw.state[master][key] = value.to(master.device, copy=True)
            missing -= saved.keys()
        if missing:
            raise SystemExit(f"{folder} lacks the optimizer's state of {min(missing)}")

def add_lora(model, cfg):
    """Freeze the model and put low-rank adapters in float32 beside the language layers'
    projections. Returns peft's wrapper, which switches and merges them."""
    from peft import LoraConfig, LoraModel
    from peft.tuners.tuners_utils import cast_adapter_dtype
    torch.manual_seed(cfg.seed)  # the same in all processes
    targets = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"      # FAMILY
    config = LoraConfig(r=cfg.lora_rank, lora_alpha=32, target_modules=targets)
    adapters = LoraModel(model, config, "default")
    cast_adapter_dtype(model, "default")  # to float32
    return adapters.eval()

def start_processes(cfg) -> accelerate.Accelerator:
    """Join the processes that a launcher started. All wait while one saves or evaluates, so the
    timeout is long; if one dies, the launcher ends the rest."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    # NOTE: without a GPU, accelerate joins processes only when told that it is on a CPU.
    accelerator = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(), kwargs_handlers=[waiting],
        log_with=None if cfg.report_to == "none" else cfg.report_to, project_dir=cfg.out)
    if cfg.report_to != "none" and not accelerator.log_with:  # accelerate drops it silently
        raise SystemExit(f"--report-to {cfg.report_to} needs: pip install {cfg.report_to}")
    return accelerator

# ---- Main ------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    """Parse, check, load the questions, run the stage."""
    cfg = parse_config(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = start_processes(cfg)
    if cfg.cpu_threads:  # more are slower beside a busy process, and round differently
        torch.set_num_threads(cfg.cpu_threads)
    elif accelerator.device.type == "cuda":  # for AdamW on the host
        torch.set_num_threads(max(os.cpu_count() // accelerator.num_processes, 1))
    if cfg.questions_per_step % accelerator.num_processes:
        raise SystemExit("--questions-per-step is not a multiple of the number of processes")
    processor = load_processor(cfg.model, cfg)
    questions = load_questions(cfg.data, processor, cfg, accelerator)
    if cfg.data == Config.data and cfg.model != "tiny":
        accelerator.print("NOTE: these are the sample digits; --data names your own questions")
    wanted = cfg.eval_data and (cfg.stage > 0 or cfg.dry_run)  # stage 0 does not evaluate
    held_out = load_questions(cfg.eval_data, processor, cfg, accelerator) if wanted else []
    orders, n = cfg.n_permutations + 1, cfg.rollouts_per_order
    accelerator.print(
        f"config: {json.dumps(vars(cfg))}\ntorch {torch.__version__}, transformers "
        f"{transformers.__version__}, accelerate {accelerate.__version__}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device}\nrun folder: {cfg.out}\n"
        f"batch: {cfg.questions_per_step} questions x {orders} orders x {n} = "
        f"{cfg.questions_per_step * orders * n} rollouts, {cfg.updates_per_step} update(s)")
    place = cfg.optimizer_device
    if cfg.dry_run or cfg.gpu_gb or accelerator.device.type == "cuda":
        sys.path.append(str(SAMPLES))
        import dry_run  # it plans the memory, and ends what will not fit
        place = dry_run.plan(cfg, processor, questions, accelerator)
    if cfg.dry_run:
        return
    lock = open_run(cfg, accelerator)
    cfg.optimizer_device = place  # config.json keeps what was asked
    accelerator.init_trackers("perl", vars(cfg))
    try:
        if cfg.stage == 0:
            score(cfg, processor, questions, accelerator)
        else:
            train(cfg, processor, questions, held_out, accelerator)
        accelerator.end_training()  # closes the tracker
    except (KeyboardInterrupt, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"{error!r}; go on with --resume {cfg.out}") from None
    finally:
        os.close(lock)

if __name__ == "__main__":
    main()
