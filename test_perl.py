"""Tests of perl.py, in its order: they show by example what each part promises.

    python -m pytest test_perl.py        # one CPU core, no network, under 5 minutes
"""
import ast
import base64
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
import weakref
import zipfile
from collections import Counter
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pyarrow
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFile
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, Qwen2_5_VLProcessor

import eval as ev
import perl
from perl import Rollout, Sample, flatten

sys.path.insert(0, str(Path(perl.__file__).parent / "data_samples"))
import ablate
import curate
from ablation import cost, hashes, stats

HERE, TINY = Path(perl.__file__).parent, Path(perl.SHORT_NAMES["tiny"])
CPU = torch.device("cpu")
FIELDS = {field.name: field for field in dataclasses.fields(perl.Config)}
table = pytest.mark.parametrize
HOST, ALL_ON_HOST = perl.PLACES[1:]
torch.set_num_threads(1)

# ---- Helpers that all sections share ---------------------------------------------------
@pytest.fixture(autouse=True)
def signals():
    """signal.alarm(n) fails a test that hangs. A shell's background job ignores SIGINT: here it
    raises KeyboardInterrupt as usual."""
    handlers = {signal.SIGALRM: lambda *_: pytest.fail("still running"),
                signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)

@contextlib.contextmanager
def ends(message):
    """The block ends the program with one sentence that has this regular expression."""
    with pytest.raises(SystemExit, match=message) as end:
        yield end
    assert "\n" not in str(end.value)

def refuses(message, call, *args, **named):
    with ends(message):
        call(*args, **named)

def record(monkeypatch, name):
    calls, real = [], getattr(perl, name)
    def recorded(*args, **named):
        calls.append(args)
        return real(*args, **named)
    monkeypatch.setattr(perl, name, recorded)
    return calls

def tiny_config(**changes):
    """Settings for a few short rollouts of the tiny model: no KL, no filter, one update."""
    base = dict(max_new_tokens=40, updates_per_step=1, beta=0.0, filter="none",
                gradient_checkpointing=False)
    return dataclasses.replace(perl.parse_config([]), **base | changes)

def load_tiny(**changes):
    return perl.load_model("tiny", tiny_config(**changes), CPU)

PROCESSOR = perl.load_processor("tiny", tiny_config())
ACCELERATOR = perl.accelerate.Accelerator(cpu=True)

def process(world, rank=0, device=CPU):
    return SimpleNamespace(num_processes=world, process_index=rank, device=device, print=print)

GOOD = dict(id="q1", images=["a.png", "b.png", "c.png"], answer="3", order_rule="index",
            question="<image><image><image> Which shows what <image_2> shows?")
TEXT_ONLY = dict(id="q4", images=[], question="2 + 3 = ?", order_rule="keep", answer="5")
MISSING, IMAGES = None, "<image><image><image>"

def noise(width=84, height=56):
    return Image.effect_noise((width, height), 60).convert("RGB")

@pytest.fixture
def folder(tmp_path):
    """A data folder: images of 1, 6 and 10 tokens (of 28 x 28 pixels), and bad ones."""
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a.png", (28, 28)), ("b.png", (84, 56)), ("c.png", (56, 140)),
                       ("cut.jpg", (200, 200)), ("../outside.png", (28, 28))):
        noise(*size).save(data / name)
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:-3000])
    (data / "text.png").write_text("not a picture")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    return data

def write_rows(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path

def read_rows(path):
    """Rows of a JSONL file, by strict JSON: NaN and Infinity are none."""
    def refuse(constant):
        raise ValueError(f"{path}: {constant} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]

def json_of(path):
    return json.loads(path.read_text())

def table_rows(text):
    """The cells of a printed table, line by line; other lines are left out."""
    return [[cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in text.splitlines() if "|" in line]

def edit(path, **changes):
    """Change fields of a JSON file; None takes one out."""
    row = json_of(path) | changes
    path.write_text(json.dumps({name: x for name, x in row.items() if x is not None}))

@pytest.fixture
def questions(folder):
    """Questions with 3, 2, 1 and 0 images of different sizes, and prompts of four lengths."""
    pair = dict(id="q2", images=["b.png", "a.png"], question="<image> or <image>: bigger?",
                order_rule="index", answer="1")
    single = dict(id="q3", images=["c.png"], question="<image>?", order_rule="keep", answer="7")
    return perl.load_samples(write_rows(folder / "four.jsonl", GOOD, pair, single, TEXT_ONLY))

def sample(rule="keep", answer="x", n=3, question="?", movable=None):
    """A question whose images are named a, b, c and so on."""
    return Sample("s", tuple(perl.LETTERS[:n].lower()), question, answer, rule, movable)

def tokens_of(text):
    ids = PROCESSOR.tokenizer(text, add_special_tokens=False).input_ids
    return ids + PROCESSOR.eos_ids[-1:]

def written_groups(questions, rewards=(1.0, 0.1, 0.0, 0.0)):
    """Four rollouts of each question: two on the identity, two on the reversed order."""
    texts = (r"<think>one</think> \boxed{1}", "<think>a much longer thought", "3", "")
    groups = []
    for asked in questions:
        pictures, group = perl.load_pictures(asked, PROCESSOR), []
        identity = tuple(range(len(asked.images)))
        for k, (text, reward) in enumerate(zip(texts, rewards)):
            order = identity if k < 2 else identity[::-1]
            if k % 2 == 0:  # the next one shares it
                prompt = perl.encode_prompt(perl.permute(asked, order), PROCESSOR, pictures)
            group.append(Rollout(prompt, order, prompt.sample.answer, tokens_of(text), text,
                                 truncated=False, reward=reward))
        groups.append(group)
    perl.set_advantages(groups)
    return groups

def scored_group(accuracies, rewards=None):
    return [Rollout(None, (), "", [5], "", False, accuracy=float(accuracy), reward=float(reward))
            for accuracy, reward in zip(accuracies, rewards or accuracies)]

def run_update(model, optimizer, groups, cfg, reference=None):
    return perl.update(model, reference, optimizer, PROCESSOR, groups, cfg=cfg)

def gradient_of_update(model, groups, cfg, reference=None, lr=0.0):
    """Gradients that perl.update hands to the optimizer, flat, and its sums; lr: plain descent."""
    gradients = []
    class Recorder:
        @torch.no_grad()
        def step(self):
            for weight in model.parameters():
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                gradients.append(gradient.flatten())
                weight -= lr * gradient
            model.zero_grad()
            return 0.0
    sums, norms = run_update(model, Recorder(), groups, cfg, reference)
    assert len(norms) == cfg.updates_per_step
    return torch.cat(gradients), sums

def adamw_updates(model, steps, cfg, lr=1e-2):
    optimizer = perl.SplitAdamW(model, dataclasses.replace(cfg, lr=lr), ACCELERATOR)
    return [run_update(model, optimizer, groups, cfg) for groups in steps]

def flat_weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])

def answer_always(text, monkeypatch):
    """Put this answer in the place of perl.generate; returns whether its calls were greedy."""
    greedy_calls = []
    def generate(model, processor, prompts, n, cfg, *, greedy=False):
        greedy_calls.append(greedy)
        return [[tokens_of(text)] * n for _ in prompts]
    monkeypatch.setattr(perl, "generate", generate)
    return greedy_calls

def encoded_prompts(samples, processor=PROCESSOR):
    return [perl.encode_prompt(one, processor) for one in samples]

def all_asked(samples):
    """A prompt for each of the first two orders of each sample."""
    return encoded_prompts([perl.permute(one, order) for one in samples
                            for order in perl.all_orders(one, 2)])

def every_second_is_right(monkeypatch):
    """So every group has rewards that differ, and reaches the loss."""
    verdicts = itertools.cycle([True, False])
    monkeypatch.setattr(perl, "is_correct", lambda text, gold: next(verdicts))

# ---- Config ----------------------------------------------------------------------------
def test_every_field_is_read_and_explained_and_there_are_not_too_many(capsys):
    read = set()
    for path in (HERE / "perl.py", HERE / "eval.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read |= {node.attr} if getattr(node.value, "id", "") == "cfg" else set()
    assert not FIELDS.keys() - read and len(FIELDS) <= 45
    with pytest.raises(SystemExit):
        perl.parse_config(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text and len(field.metadata["help"]) > 10
        assert "".join(field.metadata["help"].split()) in text

@table("typed, expected", [
    ("--model Qwen2.5-VL-7B", dict(lr=1e-6, steps=0, questions_per_step=128, beta=0.01)),
    ("", dict(model="tiny", steps=40, stage=1, filter="offline", alpha_start=1.0, lr=2e-5)),
    ("--steps 7 --max-new-tokens 9", dict(steps=7, max_new_tokens=9, eval_every=10)),
    ("--stage 2", dict(filter="online", alpha_start=0.0, alpha_end=0.0, steps=40)),
    ("--stage 2 --filter none --lr 0.5 --no-share --alpha-start 0.5",
     dict(filter="none", lr=0.5, share=False, alpha_start=0.5)),
    ("--seed 3", dict(out="runs/tiny-seed3", folder=Path("runs/tiny-seed3/stage1"))),
    ("--model a/Big --stage 0", dict(folder=Path("runs/Big-seed0/stage0"))),
    # LoRA's default learning rate is 10 times that of full weights; a typed one stays.
    ("--lora-rank 4", dict(lr=pytest.approx(2e-4))),
    ("--lora-rank 4 --model x", dict(lr=pytest.approx(1e-5))),
    ("--lora-rank 4 --lr 3e-4", dict(lr=3e-4)),
    # Arms that differ in n_s have the same number of rollouts.
    *((f"--n-permutations {n_s}", dict(rollouts_per_order=n))
      for n_s, n in ((0, 12), (1, 6), (2, 4), (3, 3), ("4 --rollouts-per-order 2", 2)))])
def test_presets_and_their_precedence(typed, expected):
    for preset in (*perl.MODEL_PRESETS.values(), *perl.STAGE_PRESETS.values(), perl.CHOICES):
        assert preset.keys() <= FIELDS.keys()
    cfg = perl.parse_config(typed.split())
    assert {name: getattr(cfg, name) for name in expected} == expected

# Each is refused with a message that names the first flag.
BAD_FLAGS = (
    "--nonsense 1", "--step 3", "--stage 3", "--steps 1.5", "--lr fast", "--filter on",
    "--dtype fp8", "--optimizer-device disk", "--steps -1", "--beta nan", "--lr inf",
    "--temperature 0", "--max-new-tokens 0", "--rollouts-per-order 0", "--updates-per-step 0",
    "--questions-per-step 0", "--eval-orders 0", "--log-every 0", "--save-every 0",
    "--alpha-end -0.5", "--n-permutations -1", "--filter-low 0.9 --filter-high 0.1",
    "--gpu-gb 80")

@table("typed, message", [(typed, typed.split()[0]) for typed in BAD_FLAGS] + [
    ("--n-permutations 4", "set --rollouts-per-order")])
def test_bad_flags_end_the_program(typed, message, capsys):
    with pytest.raises(SystemExit) as end:
        perl.parse_config(typed.split(" "))
    assert end.value.code != 0 and message in str(end.value) + capsys.readouterr().err

@table("text", ["<|im_end|>", "a\0", "<image>"])
def test_an_instruction_that_breaks_the_prompt_is_refused(text):
    refuses("--instruction", perl.load_processor, "tiny", tiny_config(instruction=text))

@table("model, meant", [("Qwen2.5VL-7B", "Qwen2.5-VL-7B"), ("tinny", "tiny")])
def test_a_misspelt_model_gets_the_nearest_one_and_no_network_is_tried(model, meant, monkeypatch):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", die)
    refuses(f"; did you mean {meant}\\?$", perl.main, ["--model", model])

def saved_run(folder, **changes):
    folder.mkdir(parents=True)
    settings = vars(tiny_config(out=str(folder.parent), steps=4, **changes))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "started").touch()
    return folder

@table("typed, changed", [
    ("", {}), ("--steps 9", dict(steps=9)), ("--rollout-batch 24", dict(rollout_batch=24)),
    ("--max-tokens-per-micro-batch 99", dict(max_tokens_per_micro_batch=99)),
    ("--optimizer-device host", dict(optimizer_device="host")),
    ("--gradient-checkpointing", dict(gradient_checkpointing=True)),
    ("--max-new-tokens 40 --stage 1 --beta 0", {})])  # as they were
def test_resume_may_change_memory_and_steps(tmp_path, typed, changed):
    """Alpha keeps the schedule of the run, however many steps there are now."""
    for stage, schedule, alpha_steps in ((1, 0, 4), (2, 3, 3)):
        folder = saved_run(tmp_path / f"stage{stage}", alpha_steps=schedule)
        cfg = perl.parse_config(["--resume", str(folder), *typed.split()])
        same = dict(resume=str(folder), alpha_steps=alpha_steps)
        assert vars(cfg) == json_of(folder / "config.json") | same | changed

@table("typed", [
    "--max-new-tokens 9", "--lr 1", "--beta 0.5", "--n-permutations 2", "--stage 2", "--seed 1",
    "--rollouts-per-order 3", "--no-share", "--filter online", "--lora-rank 4", "--data x",
    "--questions-per-step 8", "--updates-per-step 2", "--temperature 0.5", "--dtype bf16",
    "--alpha-end 0.5", "--model x", "--freeze-vision", "--clip-high 0.3", "--out elsewhere"])
def test_resume_refuses_to_change_the_method_by_name(tmp_path, typed):
    folder, flag = saved_run(tmp_path / "stage1"), typed.split()[0].replace("--no-", "--")
    argv = ["--resume", str(folder), "--steps", "4", *typed.split()]
    refuses(f"{flag} was .*new run", perl.parse_config, argv)

def test_the_folder_that_resume_takes(tmp_path):
    first, second = saved_run(tmp_path / "stage1"), saved_run(tmp_path / "stage2")
    for written, newest_stage in ((1, first), (-1, second)):
        os.utime(first / "started", (written, written))
        os.utime(second / "started", (0, 0))
        assert perl.stage_folder(tmp_path) == newest_stage, "OUT: the stage begun last"
        assert perl.stage_folder(str(first)) == first and perl.stage_folder(second) == second
    checkpoint = first / "checkpoint-4"
    checkpoint.mkdir()
    shutil.copy(TINY / "config.json", checkpoint)  # the model's own lies there
    for path in (checkpoint, tmp_path / "stage1-1"):
        refuses(f"{path} is not a run folder", perl.parse_config, ["--resume", str(path)])

@table("expected, changes", [
    ([1, 0.75, 0.5, 0.25, 0], {}), ([1, 0.5, 0, 0, 0], dict(alpha_steps=3)), ([1], dict(steps=1)),
    ([0.25, 0.375, 0.5, 0.625, 0.75], dict(alpha_start=0.25, alpha_end=0.75)),
    ([1, 0.9, 0.8, 0.7, 0.6], dict(alpha_steps=11)), ([0.0] * 5, dict(alpha_start=0.0))])
def test_alpha_falls_linearly_over_its_steps_and_stays(monkeypatch, tmp_path, expected, changes):
    alphas = []
    groups = {name: [] for name in perl.VERDICTS} | {"flat": [scored_group([1])]}
    monkeypatch.setattr(perl, "collect_groups", lambda *args, alpha, **others: (
        alphas.append(alpha) or groups))
    for name in ("log_group", "save_checkpoint", "log_metrics"):
        monkeypatch.setattr(perl, name, lambda *args, **others: None)
    cfg = tiny_config(**dict(steps=5, out=str(tmp_path)) | changes)
    perl.train(cfg, PROCESSOR, [sample()], [], ACCELERATOR)
    assert alphas == pytest.approx(expected)

# ---- Samples and permutation (Eq. 1) ---------------------------------------------------
LAST_FIRST = (25, *range(25))  # of 26 images

@table("rule, answer, movable, order, images, expected", [
    # new_images[j] = images[order[j]]: with (2, 0, 1) the third image comes first
    ("keep", "42", None, (2, 0, 1), "cab", "42"),
    ("index", "3", None, (2, 0, 1), "cab", "1"), ("index", "1", None, (2, 0, 1), "cab", "2"),
    ("letter", "A", None, (2, 0, 1), "cab", "B"),
    ("sequence", "3,1,2", None, (2, 0, 1), "cab", "1,2,3"),
    ("sequence", "2, 3", None, (1, 0, 2), "bac", "1, 3"),
    # image a is a fixed reference, options A, B, C are the images b, c, d
    ("letter", "C", (1, 2, 3), (0, 3, 1, 2), "adbc", "A"),
    ("letter", "A", (1, 2, 3), (0, 3, 1, 2), "adbc", "B"),
    # movable positions need not be neighbours: options A, B are the images a, c
    ("letter", "A", (0, 2), (2, 1, 0, 3), "cbad", "B"),
    ("never", "True", None, (0, 1, 2), "abc", "True"), ("keep", "5", None, (), "", "5"),
    ("letter", "Z", None, LAST_FIRST, "zabcdefghijklmnopqrstuvwxy", "A"),
    ("sequence", "26,1,10", None, LAST_FIRST, "zabcdefghijklmnopqrstuvwxy", "1,2,11")])
def test_permute(rule, answer, movable, order, images, expected):
    before = sample(rule, answer, len(order), movable=movable)
    permuted = perl.permute(before, order)
    assert (permuted.images, permuted.answer) == (tuple(images), expected)
    new_position = [order.index(old) for old in range(len(order))]
    assert perl.move_answer(before, new_position) == expected

def test_permute_renumbers_mentions():
    asked = sample("index", "2", question=IMAGES + "<image_1> or <image_3>? <image_1>! 1")
    moved = perl.permute(asked, (2, 0, 1))
    assert moved.question == IMAGES + "<image_2> or <image_1>? <image_2>! 1"
    asked = sample("index", "2", n=26, question="<image_26> <image_1>")
    assert perl.permute(asked, LAST_FIRST).question == "<image_1> <image_2>"

@table("rule, movable, order", [
    ("never", None, (1, 0, 2)), ("keep", (1, 2), (1, 0, 2)), ("index", (0, 2), (0, 2, 1)),
    ("keep", None, (0, 0, 2)), ("keep", None, (0, 1)), ("keep", None, (0, 1, 3)),
    ("keep", None, ()), ("keep", None, (0, 1, 2, 3))])
def test_permute_refuses(rule, movable, order):
    with pytest.raises(ValueError, match="s: "):
        perl.permute(sample(rule, "1", movable=movable), order)

def test_drawn_orders_are_legal_distinct_and_from_one_generator():
    rng, asked = random.Random(0), sample(n=4, movable=(1, 2, 3))
    for _ in range(50):
        orders = perl.draw_orders(asked, 5, 1.0, rng)
        assert orders[0] == (0, 1, 2, 3) and len(set(orders)) == 6, "all 3! orders, each once"
        assert all(order[0] == 0 and sorted(order) == [0, 1, 2, 3] for order in orders)
    assert perl.draw_orders(asked, 0, 1.0, rng) == [(0, 1, 2, 3)]
    draws = []
    for rng in (random.Random(3), random.Random(3)):
        draws.append([perl.draw_orders(sample(n=5), 1, 1.0, rng)[1] for _ in range(20)])
    assert draws[0] == draws[1] and len(set(draws[0])) > 10, "reproducible, never reset"

@table("asked, count", [(sample("never"), 1), (sample(n=1), 1), (sample(n=0), 1),
                        (sample(n=4, movable=(2,)), 1), (sample(n=2), 2), (sample(n=4), 24),
                        (sample(n=4, movable=(0, 2, 3)), 6)])
def test_every_order_of_a_sample(asked, count):
    identity = tuple(range(len(asked.images)))
    assert perl.count_orders(asked) == count == len(set(perl.all_orders(asked, 24)))
    drawn = perl.draw_orders(asked, 30, 1.0, random.Random(0))
    assert drawn[0] == identity and len(drawn) == 31 and len(set(drawn)) == count
    # Beyond the cap, a fixed choice.
    capped = perl.all_orders(sample(n=5), 24)
    assert len(set(capped)) == 24 and capped[0] == (0, 1, 2, 3, 4)
    assert capped == perl.all_orders(sample(n=5), 24), "the same in every evaluation"
    assert capped != perl.all_orders(dataclasses.replace(sample(n=5), id="t"), 24)

def test_alpha_is_the_probability_that_a_question_is_permuted():
    rng, drawn = random.Random(0), {}
    for alpha in (0.0, 0.5, 1.0):
        drawn[alpha] = [perl.draw_orders(sample(), 2, alpha, rng) for _ in range(1000)]
    plain = {alpha: some.count([(0, 1, 2)] * 3) for alpha, some in drawn.items()}
    assert plain[0.0] == 1000 and plain[1.0] == 0 and 430 < plain[0.5] < 570
    assert {len(set(orders)) for orders in drawn[0.5]} == {1, 3}, "one draw for all of a question"
    counts = Counter(orders[1] for orders in drawn[1.0])
    assert len(counts) == 5 and min(counts.values()) > 140, "the 5 others are equally likely"

def test_load_samples(folder):
    letter = dict(id="q2", order_rule="letter", movable=[2, 1], answer=" B ", source="toy")
    path = write_rows(folder / "good.jsonl", GOOD, "", GOOD | letter, TEXT_ONLY)
    first, second, text_only = perl.load_samples(str(path))
    images = tuple(str(folder / name) for name in GOOD["images"])
    assert first == Sample("q1", images, GOOD["question"], "3", "index", (0, 1, 2), "")
    assert (second.movable, second.answer, second.source) == ((1, 2), "B", "toy")
    assert (text_only.images, text_only.movable) == ((), ())
    # An image may come twice where that is harmless.
    row = GOOD | dict(images=["a.png", "b.png", "a.png"])
    rows = [row | dict(answer="2"), row | dict(answer="1", order_rule="never"),
            row | dict(answer="Two of the images show it", order_rule="keep"),
            row | dict(answer="B", order_rule="letter", movable=[1, 2])]  # the reference's copy
    lines = [json.dumps(row | dict(id=f"q{k}")).encode() for k, row in enumerate(rows)]
    # So do a byte order mark, CRLF and a missing last newline no harm.
    for start, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n \r\n")):
        path.write_bytes(start + end.join(lines))
        assert [asked.id for asked in perl.load_samples(path)] == ["q0", "q1", "q2", "q3"]

BAD_FIELDS = {
    "id": [MISSING, 7, " ", "a\0", "\udfff"], "ansver": ["3"],
    "order_rule": [MISSING, "shuffle", ["keep"], "\0"],
    "source": [5, "<|im_end|>", "\ud83d"],
    "images": [MISSING, "a.png", {}, ["a.png", 1, "c.png"], ["a.png", "", "c.png"]],
    "question": [MISSING, [IMAGES], "<image><image> one too few", "no image", IMAGES + "<image>",
                 *(IMAGES + text for text in ("<image_4>", "<image_0>", "<|im_end|>", "\0",
                                              "<|image_pad|>", "A: <|video_pad|> B: x", "\ud83d",
                                              "<image_" + "9" * 5000 + ">"))],
    "answer": [MISSING, 3, "4", "0", "A", "", " ", "1,2", "<|im_end|>", "1\0", "\ud83d",
               "7" * 10**6],
    "movable": [[0, 3], [-1], [1, 1], "01", [True], [1.0], [10 ** 400]]}
BAD_ROWS = [  # one field, and changes to the rest of the row
    *(("answer", text, dict(order_rule="letter", movable=[1, 2]))
      for text in ("C", "1", "AB", "b")),
    *(("answer", text, dict(order_rule="sequence"))
      for text in ("1,1,2", "1,4", "1,,2", "0,1", "a,b", "1;2")),
    # A text-only question has no image that an answer could name, and no place for one.
    ("answer", "1", TEXT_ONLY | dict(order_rule="index")), ("question", "<image>?", TEXT_ONLY),
    ("answer", "A", TEXT_ONLY | dict(order_rule="letter")), ("movable", [0], TEXT_ONLY),
    ("question", "What does <image_1> show?", TEXT_ONLY),
    # What would not mean the same once the images have changed places.
    *(("answer", text, dict(order_rule="keep")) for text in ("Image 2", "a, <image_3>",
                                                             "x\nimages #1")),
    *(("images", ["a.png", "b.png", "a.png"], others) for others in (
        dict(answer="1"), dict(answer="C", order_rule="letter"),
        dict(answer="2,3", order_rule="sequence"))),
    ("answer", "A", dict(order_rule="letter", images=["a.png"] * 27, question="<image>" * 27))]
BAD_ROWS += [(field, value, {}) for field, values in BAD_FIELDS.items() for value in values]

@table("field, value, others", BAD_ROWS)
def test_a_bad_sample_is_named_by_file_line_and_field(folder, field, value, others):
    row = GOOD | others | {"id": "q2"} | {field: value}
    row = {name: value for name, value in row.items() if value is not MISSING}
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2, field {field}: ") as refusal:
        perl.load_samples(write_rows(folder / "bad.jsonl", GOOD, row))
    assert len(str(refusal.value)) < 500, "a line that a terminal can show"

@table("content, message", [
    (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)[:50]}".encode(), "line 2: not valid JSON"),  # torn
    # A JSON array: what was found, and what is accepted.
    (f"[{json.dumps(GOOD)}]".encode(), "line 1: a list, not a JSON object"),
    (json.dumps([GOOD], indent=1).encode(), "line 1: not valid JSON, one object a line"),
    (b'{"id":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 1: not valid JSON"),
    (b'{"id": ' + b"9" * 9000 + b"}", "line 1: not valid JSON"), (b'{"id": NaN}', "field"),
    (json.dumps(GOOD).encode("utf-16") * 2, "line 1"), (b'\n{"id": "\xff"}', "line 2"),
    (f"{json.dumps(GOOD)}\n".encode() * 2, "line 2, field id: "), (b"1", "line 1: a"),
    (b"", "no samples"), (b"\n \n", "no samples"), (MISSING, "is not a file")])
def test_bad_files(folder, content, message):
    if content is not MISSING:
        (folder / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl.*{message}"):
        perl.load_samples(folder / "bad.jsonl")

# ---- Model, images and prompts ---------------------------------------------------------
def bytes_of(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()

PNG, JPEG, OF_NO_FILE = bytes_of(noise(), "PNG"), bytes_of(noise(), "JPEG"), None
HUGE = bytes_of(Image.new("1", (20_000, 20_000)), "PNG")  # a small file
BAD_IMAGES = {  # name -> content, or how to make it; and what is said about it
    "truncated.png": (PNG[:len(PNG) // 2], "truncated"), "header.png": (PNG[:20], "Truncated"),
    "truncated.jpg": (JPEG[:len(JPEG) // 2], "truncated"), "zero.png": (b"", "cannot identify"),
    "bomb.png": (HUGE, "decompression bomb"), "pipe.png": (os.mkfifo, "is not a file"),
    "strip.png": (bytes_of(Image.new("RGB", (1, 300)), "PNG"), "is over 200 times longer"),
    "loop.png": (lambda path: path.symlink_to("loop.png"), "[Ss]ymlink loop|is not a file"),
    "out.png": (lambda path: path.symlink_to("../outside.png"), "is not a file in"),
    "../outside.png": (OF_NO_FILE, "is not a file in"), "none.png": (OF_NO_FILE, "is not a file"),
    "/etc/hostname": (OF_NO_FILE, "is not a file in"),
    "a\0.png": (OF_NO_FILE, "null byte|is not a file"),
    "\ud800.png": (OF_NO_FILE, "surrogates|is not a file"),
    "x" * 300 + ".png": (OF_NO_FILE, "too long|is not a file"),
    # What was found, and what is accepted. EPS would run a program to draw it.
    **{f"is.{kind}": (bytes_of(noise(), kind), f"is {kind}, not one of .*PNG")
       for kind in ("AVIF", "TIFF", "EPS")}}

@table("name", BAD_IMAGES)
def test_a_bad_image_is_named(folder, name):
    content, message = BAD_IMAGES[name]
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    elif content is not OF_NO_FILE:
        content(folder / name)
    row = GOOD | {"id": "q2", "images": ["a.png", name, "c.png"]}
    signal.alarm(20)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2, field images: .* ({message})"):
        perl.load_samples(write_rows(folder / "bad.jsonl", GOOD, row))

RED, BLUE, BLACK, WHITE = (255, 0, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)
GREYS = [BLACK, (128,) * 3, WHITE]

@table("name, mode, stored, seen", [
    ("rgba.png", "RGBA", [(*RED, 255), (0, 0, 0, 0), (0, 0, 0, 128)], [RED, WHITE, (127,) * 3]),
    ("la.png", "LA", [(0, 255), (0, 0)], [BLACK, WHITE]), ("1.png", "1", [0, 1], [BLACK, WHITE]),
    ("16.png", "I;16", [0, 32768, 65535], GREYS), ("grey.png", "L", [0, 128, 255], GREYS),
    ("palette.png", "P", [0, 1, 0], [RED, WHITE, RED]), ("rgb.bmp", "RGB", [RED], [RED]),
    ("cmyk.jpg", "CMYK", [(0, 255, 255, 0)] * 8, [RED] * 8)])
def test_pictures_of_all_kinds_are_read_as_they_look(folder, name, mode, stored, seen):
    image, options = Image.new(mode, (len(stored), 1)), {}
    if mode == "P":  # blue, number 1 of the palette, counts as transparent
        image.putpalette([*RED, *BLUE])
        options["transparency"] = 1
    image.putdata(stored)
    image.save(folder / name, **options)
    for file in (folder / name, io.BytesIO((folder / name).read_bytes())):
        read = perl.read_image(file)
        assert read.mode == "RGB" and read.size == image.size
        for k, colour in enumerate(seen):
            assert read.getpixel((k, 0)) == pytest.approx(colour, abs=2)

# Phones write a JPEG (MPO) with a second picture behind it.
@table("name, kind", [("moving.gif", "GIF"), ("moving.webp", "WEBP"), ("phone.jpg", "MPO")])
def test_of_several_pictures_the_first_is_read(folder, name, kind):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    first.save(folder / name, kind, save_all=True, append_images=[second])
    assert perl.read_image(folder / name).getpixel((4, 4)) == pytest.approx(RED, abs=2)

@table("orientation, undo", [(1, None), (2, 0), (3, 3), (4, 1), (5, 5), (6, 2), (7, 6), (8, 4)])
def test_exif_rotation_is_applied(folder, orientation, undo):
    """`undo`: the Image.Transpose that stores the picture so. Its length is known before."""
    upright, exif, path = Image.new("RGB", (112, 56), "white"), Image.Exif(), folder / "turned.jpg"
    upright.paste("black", (0, 0, 28, 28))  # a mark in the upper left corner
    exif[0x0112] = orientation
    (upright if undo is None else upright.transpose(undo)).save(path, exif=exif)
    read = perl.read_image(path)
    corners = [read.getpixel(place)[0] < 128 for place in ((9, 9), (99, 9), (9, 47), (99, 47))]
    assert read.size == (112, 56) and corners == [True, False, False, False]
    asked = Sample("x", (str(path),), "<image>?", "1", "index")
    prompt, plain = perl.encode_prompt(asked, PROCESSOR), PROCESSOR.image_processor([read])
    assert prompt.pictures[0].grid.tolist() == [[1, 4, 8]]
    assert torch.equal(prompt.pictures[0].pixels, torch.as_tensor(plain["pixel_values"]))
    assert len(prompt.ids) == perl.prompt_length(asked, PROCESSOR)

@table("order, tokens, mention", [((0, 1, 2), [1, 6, 10], 2), ((2, 0, 1), [10, 1, 6], 3)])
def test_prompt(questions, order, tokens, mention):
    asked, pictures = questions[0], perl.load_pictures(questions[0], PROCESSOR)
    prompt = perl.encode_prompt(perl.permute(asked, order), PROCESSOR, pictures)
    assert [picture.tokens for picture in prompt.pictures] == tokens
    assert all(p is pictures[asked.images[k]] for p, k in zip(prompt.pictures, order))
    text = PROCESSOR.tokenizer.decode(prompt.ids)
    runs = [run.count("<|image_pad|>") for run in text.split("<|vision_start|>")]
    assert runs == [0] + tokens and prompt.opening == ""
    assert f"what image {mention} shows" in text and tiny_config().instruction in text

@table("max_pixels, most_tokens", [(262144, 10), (4 * 28 * 28, 4)])
def test_long_prompts_are_dropped_and_counted(folder, questions, capsys, max_pixels, most_tokens):
    processor = perl.load_processor("tiny", tiny_config(max_pixels=max_pixels))
    prompts = encoded_prompts(questions, processor)
    assert max(p.tokens for prompt in prompts for p in prompt.pictures) <= most_tokens
    lengths = [len(prompt.ids) for prompt in prompts]
    def load(limit):
        cfg = tiny_config(max_prompt_tokens=limit)
        return perl.load_questions(str(folder / "four.jsonl"), processor, cfg, ACCELERATOR)
    for limit, kept in ((max(lengths), 4), (max(lengths) - 1, 3), (min(lengths), 1)):
        assert load(limit) == [asked for asked, n in zip(questions, lengths) if n <= limit]
        assert f"{kept} questions, {4 - kept} dropped" in capsys.readouterr().out
    refuses("no question is left", load, 5)

# Checkpoints laid out as the repositories of Qwen2.5-VL are.
TEXT_TEMPLATE = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + "
                 "message.content + '<|im_end|>\\n' }}{%- endfor %}")

@pytest.fixture
def real_layout(tmp_path):
    """The tiny checkpoint laid out as Qwen's: two templates, older names and fields."""
    folder = tmp_path / "real"
    shutil.copytree(TINY, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    edit(folder / "tokenizer_config.json", chat_template=TEXT_TEMPLATE)
    edit(folder / "preprocessor_config.json", size=None, min_pixels=784, max_pixels=12845056,
         image_processor_type="Qwen2_5_VLImageProcessor")
    return folder

def load_real(folder, **changes):
    return perl.load_model(str(folder), tiny_config(**changes), CPU)

def real_processor(folder):
    return perl.load_processor(str(folder), tiny_config())

def test_the_template_for_images_is_found_beside_that_for_text(real_layout, questions):
    assert AutoTokenizer.from_pretrained(real_layout).chat_template == TEXT_TEMPLATE
    real, saved = real_processor(real_layout), real_layout / "saved"
    ours, theirs = encoded_prompts(questions), encoded_prompts(questions, real)
    assert [prompt.ids for prompt in ours] == [prompt.ids for prompt in theirs]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert PROCESSOR.tokenizer.decode(ours[0].ids).startswith(system)
    ends_of_response = real.tokenizer.convert_ids_to_tokens(real.eos_ids)
    assert sorted(ends_of_response) == ["<|endoftext|>", "<|im_end|>"]
    size = real.image_processor.size
    assert (size["longest_edge"], size["shortest_edge"]) == (tiny_config().max_pixels, 784)
    real.tokenizer.save_pretrained(saved)
    real.image_processor.save_pretrained(saved)
    for found in (AutoTokenizer.from_pretrained(saved).chat_template,
                  Qwen2_5_VLProcessor.get_processor_dict(saved)[0]["chat_template"]):
        assert found == real.tokenizer.chat_template

@table("ending", ["<think>", "<think>\n\n"])
def test_a_template_that_opens_think_itself(real_layout, questions, monkeypatch, ending):
    """The end of the prompt is part of the response: a good one gets its whole reward."""
    path = real_layout / "chat_template.json"
    ending = "{% if add_generation_prompt %}" + ending + "{% endif %}"
    edit(path, chat_template=json_of(path)["chat_template"] + ending)
    processor = real_processor(real_layout)
    for text, reward in ((r"the last</think> so \boxed{3}", 1.0), (r"still \boxed{3}", 0.0),
                         (r"a</think>b</think>\boxed{3}", 0.9), (r"x</think>\boxed{2}", 0.1)):
        answer_always(text, monkeypatch)
        (rollout,), = perl.sample_groups(None, processor, questions[:1], [[(0, 1, 2)]],
                                         tiny_config(), n=1)
        assert rollout.prompt.opening == "<think>" and rollout.text == "<think>" + text
        assert rollout.ids == tokens_of(text), "the loss is on what was sampled"
        assert rollout.reward == pytest.approx(reward), text

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"

def rewrite_weights(folder, change):
    """Add to a checkpoint's tensors; None takes one out. Names of the real repositories."""
    path, weights = folder / "model.safetensors", {}
    for name, weight in load_file(path).items():
        name = name.replace("model.language_model.", "model.")
        weights[name.replace("model.visual.", "visual.")] = weight.clone()
    weights |= change(weights)
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path,
              metadata={"format": "pt"})

@table("change, message", [
    (lambda weights: {NORM: None}, "missing.keys .*language_model.norm.weight"),
    (lambda weights: {"visual.extra": torch.ones(2)}, "unexpected.keys .*visual.extra"),
    (lambda weights: {NORM: torch.ones(3)}, "mismatched.keys .*norm.weight"),
    (lambda weights: {HEAD: weights[EMBEDDING] * 2}, "another lm_head.weight")])
def test_a_weight_that_does_not_fit_is_refused_by_name(real_layout, change, message):
    rewrite_weights(real_layout, change)
    refuses(message, load_real, real_layout)

def test_heads_that_are_not_tied_and_a_tied_one_that_was_saved_twice(real_layout):
    rewrite_weights(real_layout, lambda weights: {HEAD: weights[EMBEDDING].clone()})
    assert torch.equal(flat_weights(load_real(real_layout)), flat_weights(load_tiny()))
    rewrite_weights(real_layout, lambda weights: {HEAD: weights[EMBEDDING] * 2})
    text_config = json_of(real_layout / "config.json")["text_config"]
    edit(real_layout / "config.json", tie_word_embeddings=False,
         text_config=text_config | dict(tie_word_embeddings=False))
    model = load_real(real_layout)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight * 2)

class Hostile:
    """Unpickled, it makes a folder."""
    def __init__(self, flag):
        self.flag = flag
    def __reduce__(self):
        return os.mkdir, (str(self.flag),)

def test_weights_cut_short_or_of_another_kind_and_no_pickle_is_run(real_layout, tmp_path):
    flag, path = tmp_path / "executed", real_layout / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refuses("could not load .*real", load_real, real_layout)
    path.unlink()
    torch.save({NORM: Hostile(flag)}, real_layout / "pytorch_model.bin")
    refuses("could not load .*real", load_real, real_layout)
    torch.save({NORM: Hostile(flag)}, tmp_path / "optimizer-0.pt")
    with pytest.raises(pickle.UnpicklingError):
        perl.SplitAdamW.load(None, tmp_path)
    assert not flag.exists()
    torch.load(tmp_path / "optimizer-0.pt", weights_only=False)
    assert flag.exists(), "it would have been"

def test_a_tokenizer_or_a_family_of_another_model_is_refused(real_layout, questions):
    path = real_layout / "config.json"
    config = json_of(path)
    rows = config["text_config"]["vocab_size"]  # of the embedding
    edit(path, text_config=config["text_config"] | {"vocab_size": rows + 64})
    refuses("mismatched.keys .*embed_tokens", load_real, real_layout)
    path.write_text(json.dumps(config | dict(image_token_id=1)))
    refuses("17 image tokens expected", encoded_prompts, questions, real_processor(real_layout))
    path.write_text(json.dumps(config | dict(model_type="llava")))
    refuses("is a llava, none of", real_processor, real_layout)

# ---- Rollouts and rewards --------------------------------------------------------------
def sample_and_record(model, prompts, n, cfg):
    """Rollouts; and of each, generate's scores and logits (T, V) for its tokens."""
    torch.manual_seed(0)
    rollouts, now, seen = [], [], {}
    next_inputs, generate = perl.next_inputs, model.generate
    def record_rows(model, processor, live, cache, cfg):
        now[:] = [row for _, row in live]
        return next_inputs(model, processor, live, cache, cfg)
    def record_scores(**inputs):
        output = generate(**inputs, return_dict_in_generate=True, output_scores=True,
                          output_logits=True)
        for b, row in enumerate(now):
            steps = [(s[b], logits[b]) for s, logits in zip(output.scores, output.logits)]
            seen[id(row)] = seen.get(id(row), []) + steps
        return output.sequences
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perl, "next_inputs", record_rows)
        patch.setattr(model, "generate", record_scores)
        responses = perl.generate(model, PROCESSOR, prompts, n, cfg)
    for prompt, rows in zip(prompts, responses):
        for row in rows:
            rollout = perl.make_rollout(row, prompt, (), PROCESSOR)
            scores, logits = zip(*seen[id(row)][:len(rollout.ids)])
            rollouts.append((rollout, torch.stack(scores).float(), torch.stack(logits).float()))
    return rollouts

@table("dtype, temperature, rollout_batch", [
    ("float32", 1.0, 96), ("float32", 0.7, 5), ("bf16", 1.0, 5)])
def test_logprobs_of_the_loss_are_those_of_sampling(questions, dtype, temperature, rollout_batch):
    """Whichever rows leave and join. In bfloat16, to its rounding; positions are in float32."""
    model, errors = load_tiny(dtype=dtype), []
    cfg = tiny_config(temperature=temperature, rollout_batch=rollout_batch, max_new_tokens=64)
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    recorded = sample_and_record(model, all_asked(questions), 2, cfg)
    rollouts = [rollout for rollout, _, _ in recorded]
    logprobs, mask = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    assert len(rollouts) == 12 and len({len(r.prompt.ids) for r in rollouts}) == 4
    assert mask.sum(1).tolist() == [len(r.ids) for r in rollouts]
    for row, (rollout, scores, _) in zip(logprobs, recorded):
        n = len(rollout.ids)
        expected = scores.log_softmax(-1)[torch.arange(n), torch.tensor(rollout.ids)]
        errors.append(row[:n] - expected)
        assert not row[n:].any()
    errors = torch.cat(errors).abs()
    assert errors.max() < 1e-4 if dtype == "float32" else errors.mean() < 0.02

@table("hostile", [
    dict(do_sample=True, top_k=1, top_p=0.001, temperature=1e-6, repetition_penalty=1.05),
    dict(exponential_decay_length_penalty=[2, 2.0]), dict(encoder_no_repeat_ngram_size=2),
    dict(top_h=0.5), dict(guidance_scale=3.0)], ids=lambda settings: list(settings)[-1])
def test_the_checkpoints_own_sampling_settings_do_not_leak_in(questions, tmp_path, hostile):
    shutil.copytree(TINY, tmp_path / "hostile")
    edit(tmp_path / "hostile" / "generation_config.json", **hostile)
    cfg, prompts = tiny_config(temperature=0.7, max_new_tokens=12), all_asked(questions)
    model = perl.load_model(str(tmp_path / "hostile"), cfg, CPU)
    own = model.generation_config
    for _, scores, logits in sample_and_record(model, prompts, 1, cfg):
        expected = logits / 0.7
        expected[:, PROCESSOR.banned_ids] = -torch.inf
        assert torch.allclose(scores, expected, atol=1e-5)
    assert model.generation_config is own
    assert {name: getattr(own, name) for name in hostile} == hostile

def test_a_rollout_is_graded_against_the_answer_of_its_order(questions, monkeypatch):
    answer_always(r"<think>x</think> \boxed{1}", monkeypatch)
    orders = [[(0, 1, 2), (2, 0, 1)]]  # in the second, the right image 3 comes first
    cfg = tiny_config(accuracy_weight=0.8, format_weight=0.2)
    group, = perl.sample_groups(None, PROCESSOR, questions[:1], orders, cfg, n=2)
    assert [r.order for r in group] == [(0, 1, 2)] * 2 + [(2, 0, 1)] * 2
    assert [r.gold for r in group] == ["3", "3", "1", "1"]
    assert [(r.accuracy, r.format) for r in group] == [(0, 1)] * 2 + [(1, 1)] * 2
    assert [r.reward for r in group] == pytest.approx([0.2, 0.2, 1.0, 1.0])
    assert group[2].prompt.pictures[0].tokens == 10, "the loss sees the order that was answered"
    # alpha 0: not permuted; equal orders share a row of the loss.
    orders = [perl.draw_orders(questions[0], 1, 0.0, random.Random(0))]
    group, = perl.sample_groups(None, PROCESSOR, questions[:1], orders, cfg, n=3)
    assert [len(row) for row in perl.pack(group, cfg)] == [6]

# ---- Advantages and filter (Eq. 4-5) ---------------------------------------------------
ROOT = 3 ** 0.5  # rewards 1, 0, 0, 0: mean 1/4, population std ROOT / 4

def test_group_advantages():
    rewards = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [0.1, 0.1, 0.1, 0.1 + 1e-6],
                            [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.7, 0.7]])
    third = [-1 / ROOT] * 3
    expected = torch.tensor([[ROOT] + third, [1, -1, 1, -1], third + [ROOT]])
    for dtype in (torch.float32, torch.float64):
        advantages = perl.group_advantages(rewards.to(dtype))
        assert torch.allclose(advantages[:3].float(), expected, atol=0.1)
        assert torch.allclose(advantages[:2].float(), expected[:2], atol=1e-6)
        assert not advantages[3:].any(), "exactly zero without variance"
    assert torch.equal(perl.group_advantages(rewards[3:].long()), torch.zeros(3, 4))
    assert torch.allclose(perl.group_advantages(rewards[:1].long()), expected[:1])
    for size in range(2, 40):  # rounding in the mean is no variance
        assert not perl.group_advantages(torch.full((1, size), 0.1)).any()
    groups = [scored_group([1, 0, 0, 0]), scored_group([1] * 4)]
    perl.set_advantages(groups)
    assert [r.advantage for r in groups[0]] == pytest.approx([ROOT] + third)
    assert [r.advantage for r in groups[1]] == [0] * 4
    assert [r.reward for r in groups[0]] == [1, 0, 0, 0], "the reward stays the reward"

@table("accuracies, rewards, bounds, expected", [
    ([1, 0, 0, 1], None, (0.1, 0.9), "kept"), ([1] * 9 + [0], None, (0.1, 0.9), "kept"),
    ([1] * 4, None, (0, 1), "all_right"), ([0] * 4, None, (0, 1), "all_wrong"),
    ([1] * 4, [1, 1, 1, 0.9], (0, 1), "kept"),  # the format differs
    ([1] * 4, [1, 1, 1, 0.9], (0.1, 0.9), "all_right"),
    ([0] * 4, [0, 0, 0, 0.1], (0.1, 0.9), "all_wrong"),
    ([1] * 11 + [0], None, (0.1, 0.9), "too_easy"), ([0] * 11 + [1], None, (0.1, 0.9), "too_hard"),
    ([1, 1, 0, 0], [0.1] * 4, (0, 1), "flat")])  # an accuracy weight of 0
def test_verdict(accuracies, rewards, bounds, expected):
    group, (low, high) = scored_group(accuracies, rewards), bounds
    perl.set_advantages([group])
    cfg = tiny_config(filter="online", filter_low=low, filter_high=high)
    assert perl.verdict(group, cfg) == expected
    widest = dataclasses.replace(cfg, filter_low=0, filter_high=1)
    for name in ("none", "offline"):  # they have no bounds
        cfg.filter = name
        assert perl.verdict(group, cfg) == perl.verdict(group, widest)

@table("answers, shares", [  # with a gradient; of these, equal as given; by permutation alone
    ([("given", 1), ("given", 1), ("moved", 0), ("moved", 0)], (1, 1, 1)),
    ([("given", 1), ("given", 1), ("moved", 0), ("moved", 1)], (1, 1, 0)),
    ([("given", 1), ("given", 0), ("moved", 1), ("moved", 1)], (1, 0, 0)),
    ([("given", 1), ("given", 0), ("given", 0)], (1, 0, 0)),
    ([("given", 1), ("moved", 1)], (0, 0, 0))])
def test_groups_that_have_a_gradient_and_those_that_owe_it_to_the_permutation(answers, shares):
    def metrics_of_groups(**groups):
        metrics = perl.step_metrics({name: [] for name in perl.VERDICTS} | groups, Counter())
        return [metrics[name] for name in ("with_gradient", "equal_as_given", "by_permutation")]

    group = [perl.Rollout(None, order, "1", [5], "", False, reward=reward)
             for order, reward in answers]
    # One that has a gradient without permutations too.
    other = [perl.Rollout(None, "given", "1", [5], "", False, reward=reward) for reward in (0, 1)]
    perl.set_advantages([group, other])
    assert metrics_of_groups(kept=[group]) == list(shares)
    both = metrics_of_groups(kept=[group], too_easy=[other])
    assert both == [(shares[0] + 1) / 2, shares[1] / (shares[0] + 1), shares[2] / (shares[0] + 1)]

def test_resample_by_difficulty():
    rng, scores = random.Random(0), [1.0] * 100 + [0.5] * 10
    target = [0] * 5 + [50] + [0] * 4 + [50]
    kept = perl.resample_by_difficulty(scores, target, 40, rng)
    assert Counter(scores[k] for k in kept) == {0.5: 10, 1.0: 20} and len(set(kept)) == 30
    scores = [k / 10 for k in range(11) for _ in range(200)]  # plenty: the target is met
    kept = perl.resample_by_difficulty(scores, perl.SCORE_TARGET, 990, rng)
    counts = Counter(round(scores[k] * 10) for k in kept)
    assert [counts[k] for k in range(11)] == [120, 110, 110, 120, 150, 170, 60, 50, 40, 30, 30]

# ---- Log-probabilities and loss (Eq. 6) ------------------------------------------------
def test_logprobs_equal_a_plain_forward_pass_of_transformers(questions):
    """One sequence at a time, without padding or shared features: neither has an influence."""
    model, rollouts = load_tiny(), flatten(written_groups(questions))
    logprobs, _ = perl.response_logprobs(model, PROCESSOR, rollouts, tiny_config())
    for rollout, row in zip(rollouts, logprobs):
        ids, n = torch.tensor([rollout.prompt.ids + rollout.ids]), len(rollout.ids)
        images, pictures = {}, rollout.prompt.pictures
        if pictures:
            images = dict(pixel_values=torch.cat([picture.pixels for picture in pictures]),
                          image_grid_thw=torch.cat([picture.grid for picture in pictures]))
        types = (ids == PROCESSOR.image_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=types, **images).logits
        logits[..., PROCESSOR.banned_ids] = -torch.inf
        expected = logits[0, -n - 1:-1].log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0]
        assert torch.allclose(row[:n], expected, atol=1e-5) and not row[n:].any()

def loss_of(logprobs, old, ref=None, advantages=(1.0,), mask=None, beta=0.0, denominator=4.0):
    mask = torch.ones(logprobs.shape) if mask is None else torch.tensor(mask)
    return perl.policy_loss(logprobs, old, ref, torch.tensor(advantages), mask, clip_low=0.2,
                            clip_high=0.3, beta=beta, denominator=denominator)

@table("denominator", [4, 8])
def test_clipped_surrogate_by_hand(denominator):
    # ratios 1.5, 0.5 under both signs, clipped to [0.8, 1.3]; min(ratio * A, clipped * A) is
    # A = +2:  2.6 (clipped), 1.0        A = -1:  -1.5, -0.8 (clipped)          sum 1.3
    logprobs = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    loss, stats = loss_of(logprobs, torch.zeros(2, 2), None, (2.0, -1.0), denominator=denominator)
    assert loss.item() == pytest.approx(-1.3 / denominator)
    assert (stats["clipped"], stats["kl"]) == (2, 0)
    assert stats["entropy"] == pytest.approx(-2 * math.log(1.5) - 2 * math.log(0.5))
    loss.backward()  # d(-ratio * A) / d log pi = -A * ratio where not clipped
    assert torch.allclose(logprobs.grad * denominator, torch.tensor([[0, -1.0], [1.5, 0]]))

def test_kl_by_hand():
    # k3 = q - log q - 1, q = pi_ref / pi: 1/2 gives 0.19315, 2 gives 0.30685. d/d log pi: 1 - q
    logprobs = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    reference = torch.tensor([[0.25, 1.0]]).log()
    loss, stats = loss_of(logprobs, logprobs.detach(), reference, (0.0,), beta=0.1)
    assert float(stats["kl"]) == pytest.approx(0.19315 + 0.30685, abs=1e-5)
    assert loss.item() == pytest.approx(0.1 * 0.5 / 4, abs=1e-6)
    loss.backward()
    assert torch.allclose(logprobs.grad, 0.1 / 4 * torch.tensor([[0.5, -1.0]]))

@table("garbage", [1e4, -1e4, math.inf, math.nan])
@table("where", [0, 1, 2])  # in the policy, the old policy or the reference
def test_masked_tokens_do_not_matter(garbage, where):
    results = []
    for behind in ([], [0.0], [garbage]):
        rows = [torch.tensor([[value] + [0.0] * len(behind)]) for value in (-1.0, -1.1, -1.3)]
        rows[where][0, 1:] = torch.tensor(behind)
        logprobs = rows[0].requires_grad_()
        loss, stats = loss_of(logprobs, *rows[1:], mask=[[1] + [0] * len(behind)], beta=0.1)
        loss.backward()
        assert not logprobs.grad[0, 1:].any()
        results.append([loss.item(), stats, logprobs.grad[0, 0].item()])
    assert results[1:] == results[:1] * 2

FAR = [0.0, -1e-30, -1.0, -19.0, -21.0, -100.0, -101.0, -1e4, -1e30, -3e38]

@table("advantage", [-1e3, -1.0, 0.0, 1.0, 1e3])
def test_the_loss_and_its_gradient_are_finite(advantage):
    pairs = torch.cartesian_prod(torch.tensor(FAR), torch.tensor(FAR))              # (100, 2)
    for old, ref in ((1, None), (0, 1), (1, 1)):
        logprobs = pairs[None, :, 0].clone().requires_grad_()
        reference = None if ref is None else pairs[None, :, ref]
        loss, stats = loss_of(logprobs, pairs[None, :, old], reference, (advantage,), beta=0.1)
        loss.backward()
        assert loss.isfinite() and logprobs.grad.isfinite().all()
        assert math.isfinite(stats["kl"]) and math.isfinite(stats["clipped"])

def test_inside_the_bound_the_loss_is_eq_6_to_the_bit():
    generator, results = torch.Generator().manual_seed(0), []
    logprobs, old, ref = -10 * torch.rand(3, 8, 50, generator=generator)
    old[0, :3] = logprobs[0, :3] + torch.tensor([19.9, -19.9, 0.0])
    advantages = torch.randn(8, generator=generator)
    mask = torch.rand(8, 50, generator=generator) < 0.8
    def eq_6(logprobs):
        ratio, kl = (logprobs - old).exp(), (ref - logprobs).exp() - (ref - logprobs) - 1
        clipped = ratio.clamp(0.8, 1.3) * advantages[:, None]
        objective = torch.minimum(ratio * advantages[:, None], clipped)
        return -((objective - 0.05 * kl) * mask).sum() / 77
    def ours(logprobs):
        return perl.policy_loss(logprobs, old, ref, advantages, mask, clip_low=0.2, clip_high=0.3,
                                beta=0.05, denominator=77)[0]
    for function in (eq_6, ours):
        policy = logprobs.clone().requires_grad_()
        results.append((function(policy), *torch.autograd.grad(function(policy), policy)))
    assert all(map(torch.equal, *results))

def test_pack_and_micro_batches():
    prompt, other = perl.Prompt(None, [1] * 4, []), perl.Prompt(None, [1] * 4, [])
    a, b, c, d = [Rollout(p, (), "", [5] * length, "", False)
                  for p, length in ((prompt, 2), (prompt, 2), (prompt, 3), (other, 9))]
    nine = tiny_config(max_tokens_per_micro_batch=9)
    assert perl.pack([a, b, c, d], nine) == [[a, b], [c], [d]]
    assert perl.pack([a, d, b, c], nine) == [[a], [d], [b, c]], "neighbours only; 9 tokens fit"
    assert perl.pack([a, b], tiny_config(share=False)) == [[a], [b]]
    assert perl.row_length([a, b]) == 8 and perl.loss_denominator([a, b, d]) == 13
    assert perl.micro_batches([a, b, c, d], nine) == [[d], [a, b], [c]], "longest first"
    for most, batches in ((26, [[d, a, b, c]]), (25, [[d], [a, b, c]])):
        cfg = tiny_config(max_tokens_per_micro_batch=most)
        assert perl.micro_batches([a, b, c, d], cfg) == batches
    assert perl.micro_batches([], nine) == perl.pack([], nine) == []

# ---- Training (Algorithm 1) ------------------------------------------------------------
def test_on_policy_gradient_is_minus_advantage_times_that_of_the_logprobs(questions):
    model, cfg, groups = load_tiny(), tiny_config(), written_groups(questions)
    gradient, sums = gradient_of_update(model, groups, cfg)
    rollouts = flatten(groups)
    tokens = sum(len(r.ids) for r in rollouts)
    logprobs, _ = perl.response_logprobs(model, PROCESSOR, rollouts, cfg)
    advantages = torch.tensor([r.advantage for r in rollouts])
    (-(advantages[:, None] * logprobs).sum() / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(gradient, expected, atol=1e-6) and sums["tokens"] == tokens
    assert expected.norm() > 1e-3

def test_nothing_to_learn_from_leaves_the_weights_bit_identical(questions):
    weights, cfg = [], tiny_config(updates_per_step=2)
    for steps in ([], [written_groups(questions)], [written_groups(questions), []]):
        model = load_tiny()  # AdamW with weight decay, and after the first step with momentum
        adamw_updates(model, steps, cfg)
        weights.append(flat_weights(model))
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])

@table("updates, forward_passes", [(1, 1), (2, 3)])
def test_old_logprobs_are_stored_and_used_only_for_several_updates(
        questions, monkeypatch, updates, forward_passes):
    calls, groups = record(monkeypatch, "response_logprobs"), written_groups(questions[:2])
    (sums, norms), = adamw_updates(load_tiny(), [groups], tiny_config(updates_per_step=updates))
    assert len(calls) == forward_passes and len(norms) == updates
    assert all((r.old_logprobs is None) == (updates == 1) for r in flatten(groups))
    assert (sums["clipped"] > 0) == (updates == 2), "the first update moved the second's ratio"

MIXED, RIGHT, WRONG, EASY = [1, 0, 0, 0], [1] * 4, [0] * 4, [1] * 11 + [0]

def collect(monkeypatch, script, accelerator=ACCELERATOR, **changes):
    """perl.collect_groups, the groups' accuracies scripted; and the ids it asked for, by round."""
    script, rounds = iter(script), []
    def sample_groups(model, processor, samples, orders, cfg, *, n):
        rounds.append([asked.id for asked in samples])
        assert n == cfg.rollouts_per_order and [len(own) for own in orders] == [2] * len(samples)
        return [scored_group(next(script)) for _ in samples]
    monkeypatch.setattr(perl, "sample_groups", sample_groups)
    asked = [dataclasses.replace(sample(), id=str(k)) for k in range(20)]
    cfg = tiny_config(questions_per_step=4, **changes)
    groups = perl.collect_groups(None, None, asked, perl.Progress(0, [], random.Random(0)),
                                 alpha=1.0, cfg=cfg, accelerator=accelerator)
    return groups, rounds

def test_idle_decode_slots_are_reported():
    text, end, pad = PROCESSOR.tokenizer("5").input_ids, PROCESSOR.eos_ids[-1], PROCESSOR.pad_id
    rows = [text + [end, pad, pad], text * 3 + [end], text * 4]  # of one call of generate
    prompt = perl.Prompt(sample(), [], [])
    rollouts = [perl.make_rollout(row, prompt, (), PROCESSOR) for row in rows]
    assert [(len(r.ids), r.idle, r.truncated) for r in rollouts] == [
        (2, 2, False), (4, 0, False), (4, 0, True)]
    groups = {name: [] for name in perl.VERDICTS} | {"kept": [rollouts]}
    metrics = perl.step_metrics(groups, Counter(tokens=10.0))
    assert [metrics[name] for name in ("idle", "length", "truncated")] == pytest.approx(
        [2 / 12, 10 / 3, 1 / 3])

def test_groups_without_variance_are_dropped_and_not_counted(monkeypatch):
    groups, rounds = collect(monkeypatch, [MIXED, RIGHT, WRONG, MIXED])
    assert [len(set(ids)) for ids in rounds] == [4]
    metrics = perl.step_metrics(groups, Counter(tokens=8.0, kl=2.0, clipped=4.0, entropy=6.0))
    counts = [metrics[name] for name in ("kept", "dropped", "all_right", "all_wrong")]
    assert counts == [2, 2, 1, 1] and metrics["accuracy"] == 6 / 16, "of all that were sampled"
    per_token = [metrics[name] for name in ("kl", "clip_fraction", "entropy")]
    assert per_token == [0.25, 0.5, 0.75], "of the tokens kept"

def test_online_filter_samples_until_the_batch_is_full(monkeypatch):
    online = dict(filter="online", filter_low=0.1, filter_high=0.9)
    script = [MIXED, RIGHT, EASY, MIXED, RIGHT, MIXED, MIXED]
    groups, rounds = collect(monkeypatch, script, **online)
    assert [len(ids) for ids in rounds] == [4, 2, 1] and len(set(flatten(rounds))) == 7
    assert [len(groups[name]) for name in ("kept", "all_right", "too_easy")] == [4, 2, 1]
    groups, rounds = collect(monkeypatch, [RIGHT] * 99, **online)
    assert not groups["kept"] and len(rounds) == perl.MAX_ROUNDS

def test_the_online_filter_fills_the_batch_of_all_processes(monkeypatch):
    """The other process has two groups; this one draws what both lack, and answers its part."""
    monkeypatch.setattr(perl, "gather_object", lambda own: own + [2])
    other = SimpleNamespace(num_processes=2, process_index=1)
    groups, rounds = collect(monkeypatch, [MIXED, RIGHT], filter="online", accelerator=other)
    assert [len(ids) for ids in rounds] == [2, 0, 0, 0] and len(groups["kept"]) == 1
    groups, rounds = collect(monkeypatch, [MIXED, MIXED], filter="online", accelerator=other)
    assert [len(ids) for ids in rounds] == [2] and len(groups["kept"]) == 2

def test_every_epoch_is_a_fresh_shuffle_of_all_questions():
    progress = perl.Progress(0, [], random.Random(0))
    drawn = flatten(perl.draw_questions(progress, 10, 4) for _ in range(5))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]

# ---- Evaluation over image orders ------------------------------------------------------
def test_evaluate_by_hand(folder, monkeypatch):
    greedy_calls = answer_always(r"<think>x</think> \boxed{1}", monkeypatch)
    row = dict(images=["a.png", "b.png"], question="<image><image>?")
    rows = [row | dict(id="right in 1 of 2 orders", order_rule="index", answer="1"),
            row | dict(id="right in its one order", order_rule="never", answer="1"),
            TEXT_ONLY | dict(id="wrong in its one order"),
            GOOD | dict(id="right in 2 of 6 orders")]
    held_out = perl.load_samples(write_rows(folder / "eval.jsonl", *rows))
    def evaluate(**changes):
        scores = perl.evaluate(None, PROCESSOR, held_out, tiny_config(out=str(folder), **changes),
                               ACCELERATOR, step=3)
        return [scores[f"eval_{name}"] for name in ("accuracy", "worst", "bias")]
    (folder / "stage1").mkdir()
    mean, worst, bias = (1 / 2 + 1 + 0 + 2 / 6) / 4, (0 + 1 + 0 + 0) / 4, (1 + 0 + 0 + 1) / 4
    assert evaluate() == pytest.approx([mean, worst, bias])
    logged = Counter(row["id"] for row in read_rows(folder / "stage1" / "held_out.jsonl"))
    assert list(logged.values()) == [2, 1, 1], "the first few questions in all their orders"
    assert evaluate(eval_orders=1) == [2 / 4, 2 / 4, 0], "only the given order"
    # A batch of questions at a time.
    assert evaluate(questions_per_step=3, eval_orders=1) == [2 / 4, 2 / 4, 0]
    assert greedy_calls == [True] * 4

# ---- Run folder: a run, its metrics and checkpoint -------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight real questions with four or more images, and three of them to evaluate."""
    target, source = tmp_path_factory.mktemp("digits"), HERE / "data_samples"
    rows = [row for row in read_rows(source / "test.jsonl")
            if len(row["images"]) > 3 and row["order_rule"] != "never"][:8]
    (target / "images").mkdir()
    for name in {name for row in rows for name in row["images"]}:
        shutil.copy(source / name, target / name)
    write_rows(target / "eval.jsonl", *rows[1:4])
    return write_rows(target / "train.jsonl", *rows)

def arguments(data, out, *more, **changes):
    flags = dict(data=data, eval_data=data.with_name("eval.jsonl"), out=out, steps=4,
                 questions_per_step=3, rollouts_per_order=3, max_new_tokens=48, eval_every=2,
                 eval_orders=2, updates_per_step=2, beta=0.01, save_every=2, log_every=2,
                 max_tokens_per_micro_batch=500, lr=5e-4) | changes
    return [text for name, value in flags.items()
            for text in ("--" + name.replace("_", "-"), str(value))] + list(more)

def metrics_of(run):
    """metrics.jsonl without what may differ between equal runs: time and memory."""
    return [{name: value for name, value in row.items() if not name.startswith(("seconds", "peak"))}
            for row in read_rows(run / "metrics.jsonl")]

def weights_of(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])

def states_of(checkpoint):
    states = {}
    for path in checkpoint.glob("optimizer-*.pt"):
        states |= torch.load(path)
    return states

def files_of(folder):
    """All but config.json, which --resume writes anew."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "config.json"}

def assert_equal_runs(one, other, step=4):
    """Logs, weights, optimizer and random state agree to the last bit."""
    assert metrics_of(one) == metrics_of(other)
    for name in ("rollouts.jsonl", "held_out.jsonl"):
        assert perl.read_lines(one / name) == perl.read_lines(other / name), "missing: no rows"
    one, other = one / f"checkpoint-{step}", other / f"checkpoint-{step}"
    assert torch.equal(weights_of(one), weights_of(other))
    states, others = states_of(one), states_of(other)
    assert states.keys() == others.keys() != set()
    for name, state in states.items():
        assert all(torch.equal(value, others[name][key]) for key, value in state.items())
    progress, other_progress = (torch.load(path / "training_state.pt") for path in (one, other))
    assert progress == other_progress

def newest(run):
    """The one checkpoint of a run, by name; None if there is none."""
    names = [path.name for path in run.glob("checkpoint-*")]
    assert len(names) < 2
    return names[0] if names else None

class Killed(Exception):
    pass

def die(*_):
    raise Killed

def run_with(monkeypatch, name, call, event, argv):
    """perl.main(argv), with `event` happening before the call-th call of perl.`name`."""
    *owners, name = name.split(".")  # of "SplitAdamW.step": the class in perl
    owner = functools.reduce(getattr, owners, perl)
    real, calls = getattr(owner, name), []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: (
            calls.append(args) or len(calls) == call and event() or real(*args, **kwargs)))
        perl.main(argv)

@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    perl.main(arguments(data, out))
    return out / "stage1"

@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    """The same run, ended in its third step."""
    out = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        run_with(patch, "update", 3, die, arguments(data, out))
    return out / "stage1"

@pytest.fixture
def halted(half, tmp_path):
    return shutil.copytree(half, tmp_path / "halted" / "stage1")

def test_run_folder(straight, data):
    main_script = Path(sys.modules["__main__"].__file__).name  # pytest's, kept like a fork's
    names = {"config.json", "started", "perl.py", "metrics.jsonl", "rollouts.jsonl",
             "held_out.jsonl", "checkpoint-4", "best", main_script}
    assert {entry.name for entry in straight.iterdir()} == names
    assert (straight / "perl.py").read_bytes() == (HERE / "perl.py").read_bytes()
    config = json_of(straight / "config.json")
    assert config.keys() == FIELDS.keys() and (config["steps"], config["data"]) == (4, str(data))
    rollouts = read_rows(straight / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == [1] * 6 + [3] * 6, "groups: 2 orders of 3 rollouts"
    assert rollouts[0].keys() >= {"id", "order", "question", "response", "gold", "reward"}
    held_out = {step: [] for step in (0, 2, 4)}
    for row in read_rows(straight / "held_out.jsonl"):
        held_out[row["step"]].append((row["id"], row["order"]))
    assert held_out[0] == held_out[2] == held_out[4] and len({key for key, _ in held_out[0]}) == 3

def test_metrics(straight):
    rows = metrics_of(straight)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["eval_bias" in row for row in rows] == [True, False, True, False, True]
    for row in rows[0::2]:
        assert 0 <= row["eval_worst"] <= row["eval_accuracy"] <= 1 and 0 <= row["eval_bias"] <= 1
    assert [row["alpha"] for row in rows[1:]] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    for row in rows[1:]:
        assert row["kept"] + row["dropped"] == 3 and row["lr"] == 5e-4 and row["skipped"] == 0
        assert row["reward"] == pytest.approx(0.9 * row["accuracy"] + 0.1 * row["format"])
        for name in ("accuracy", "format", "truncated", "idle", "clip_fraction"):
            assert 0 <= row[name] <= 1
        assert 1 <= row["length"] <= 48 and row["kl"] >= 0 and row["grad_norm"] >= 0
        assert 0 < row["entropy"] < math.log(PROCESSOR.tokenizer.vocab_size) or not row["kept"]
    assert any(row["kept"] and row["kl"] > 0 for row in rows[1:]), "something was learned"

def test_checkpoint_is_a_whole_hugging_face_folder(straight):
    checkpoint, text = straight / "checkpoint-4", "<think> 1 is 5 </think> \\boxed{2}"
    trained = flat_weights(perl.FAMILY_MODEL.from_pretrained(checkpoint))
    assert not torch.equal(trained, flat_weights(perl.FAMILY_MODEL.from_pretrained(TINY)))
    new, old = (AutoTokenizer.from_pretrained(path) for path in (checkpoint, TINY))
    assert new(text).input_ids == old(text).input_ids and new.chat_template == old.chat_template
    assert AutoImageProcessor.from_pretrained(checkpoint).patch_size == 14
    new, old = (GenerationConfig.from_pretrained(path) for path in (checkpoint, TINY))
    assert new.eos_token_id == old.eos_token_id

@table("keep, kept", [(0, [1, 2, 3, 4]), (2, [3, 4])])
def test_best_weights_and_the_checkpoints_that_are_kept(data, tmp_path, monkeypatch, keep, kept):
    """best/ has the weights of the step whose eval_worst was the highest, the start included."""
    worst = iter([0.3, 0.2, 0.5, 0.6, 0.6])  # before training, and after each step
    monkeypatch.setattr(perl, "evaluate", lambda *_, **named: dict(
        eval_accuracy=0.6, eval_worst=next(worst), eval_bias=0.1, seconds_eval=1))
    perl.main(arguments(data, tmp_path, save_every=1, eval_every=1, keep_checkpoints=keep))
    run = tmp_path / "stage1"
    assert [path.name for path in perl.checkpoints(run)] == [f"checkpoint-{k}" for k in kept]
    assert torch.equal(weights_of(run / "best"), weights_of(run / "checkpoint-3"))
    assert not torch.equal(weights_of(run / "best"), weights_of(run / "checkpoint-4"))
    assert {path.name for path in run.glob("best*")} == {"best"}
    assert AutoTokenizer.from_pretrained(run / "best").chat_template

# ---- Run folder: killed and resumed ----------------------------------------------------
def send_me(signal_name):
    return lambda: os.kill(os.getpid(), getattr(signal, signal_name))

def kill_9(monkeypatch, name, call, argv):
    """run_with in a child process, which the event kills. What it prints is in OUT.log."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        perl.MATH_JUDGE.process = None  # the parent's: two would read its answers
        try:
            with open(f"{argv[argv.index('--out') + 1]}.log", "w") as log:
                with contextlib.redirect_stdout(log):
                    run_with(monkeypatch, name, call, send_me("SIGKILL"), argv)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

# Of os.replace the first two calls are for started and config.json.
@table("name, call, saved", [("update", 4, "checkpoint-2"), ("update", 2, None),
                             ("torch.save", 2, None), ("os.replace", 7, "checkpoint-2")])
def test_resume_after_kill_9_equals_no_kill(
        data, straight, tmp_path, monkeypatch, name, call, saved):
    """In step 4 and in step 2; amid the first checkpoint, and as the second one is put in place."""
    run = tmp_path / "killed" / "stage1"
    kill_9(monkeypatch, name, call, arguments(data, run.parent))
    assert newest(run) == saved
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "accu')  # a line torn by the kill
    perl.main(["--resume", str(run)])
    assert_equal_runs(run, straight)
    assert not (run / "checkpoint.tmp").exists()

def test_resume_of_a_lora_run_equals_no_kill(data, tmp_path, monkeypatch):
    whole, killed, flags = tmp_path / "whole", tmp_path / "killed", dict(lora_rank=4, lr=5e-3)
    perl.main(arguments(data, whole, **flags))
    kill_9(monkeypatch, "update", 4, arguments(data, killed, **flags))
    assert newest(killed / "stage1") == "checkpoint-2"
    perl.main(["--resume", str(killed)])
    assert_equal_runs(killed / "stage1", whole / "stage1")
    assert json_of(whole / "stage1" / "config.json")["lr"] == 5e-3, "as typed"
    assert any(row["kl"] > 0 for row in metrics_of(whole / "stage1")[1:])
    assert not torch.equal(weights_of(whole / "stage1" / "checkpoint-4"), weights_of(TINY))

# Where a step may be when the signal comes: a function, and which of its calls in steps 3 and 4.
PHASES = dict(draw_questions=1, draw_orders=5, load_pictures=5, encode_prompt=8, generate=2,
              grade=20, set_advantages=2, verdict=5, frozen_logprobs=3, policy_loss=2,
              step_metrics=2, log_group=1, append_line=8, evaluate=1, save_checkpoint=1)
PHASES |= {"SplitAdamW.step": 2, "shutil.rmtree": 1, "torch.save": 2, "os.replace": 5}

@table("part", range(4))
def test_ctrl_c_in_any_phase_of_a_step(straight, halted, monkeypatch, part):
    for phase in [*PHASES][part::4]:
        with ends("stopped; continue with --resume"):
            run_with(monkeypatch, phase, PHASES[phase], send_me("SIGINT"),
                     ["--resume", str(halted)])
        assert newest(halted) == "checkpoint-2", phase
    perl.main(["--resume", str(halted)])
    assert_equal_runs(halted, straight)

def test_stage_0_goes_on_after_the_last_batch_that_it_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(perl, "SCORE_TARGET", (1,) * 5)  # eight questions have a histogram
    run, argv = tmp_path / "stage0", arguments(data, tmp_path, stage=0)
    kill_9(monkeypatch, "sample_groups", 2, argv)
    assert len(json_of(run / "scores.json")) == 3, "a batch"
    batches = record(monkeypatch, "sample_groups")
    perl.main(["--resume", str(run)])
    assert [len(args[2]) for args in batches] == [3, 2], "the first three have their scores"
    perl.main(arguments(data, tmp_path / "whole", stage=0))
    for name in ("scores.json", "kept.json"):
        assert json_of(run / name) == json_of(tmp_path / "whole" / "stage0" / name)

# No file may become larger than this: weights (2 MB), optimizer's state (6 MB), a log.
@table("name, room", [("save_checkpoint", 10 ** 6), ("save_checkpoint", 4 * 10 ** 6),
                      ("append_line", 0)])
def test_a_full_disk_leaves_the_last_checkpoint_whole(straight, halted, monkeypatch, name, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)):
            run_with(monkeypatch, name, 1, fill, ["--resume", str(halted)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(halted) == "checkpoint-2"
    perl.main(["--resume", str(halted)])
    assert_equal_runs(halted, straight)
    assert not (halted / "checkpoint.tmp").exists()

def test_a_second_run_in_the_same_folder_is_refused(data, halted):
    out, before = halted.parent, files_of(halted.parent)
    with perl.only_run_in(out, ACCELERATOR):
        for argv in (arguments(data, out), arguments(data, out, stage=0), ["--resume", str(out)]):
            refuses(f"{out} .*another run is at work", perl.main, argv)
            assert files_of(out) == before
    with perl.only_run_in(out, ACCELERATOR):
        pass  # the lock went with the run

# ---- Run folder: what --resume takes, changes and refuses ------------------------------
def test_more_steps_equal_a_run_with_the_old_schedule_of_alpha(data, straight, tmp_path, capsys):
    """Without them, a finished run stays as it is."""
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    shutil.copytree(straight, longer / "stage1")
    before = files_of(longer)
    perl.main(["--resume", str(longer / "stage1")])
    assert f"done: {longer / 'stage1' / 'checkpoint-4'}" in capsys.readouterr().out
    assert files_of(longer) == before
    perl.main(["--resume", str(longer), "--steps", "6"])
    perl.main(arguments(data, whole, steps=6, alpha_steps=4))
    assert_equal_runs(longer / "stage1", whole / "stage1", step=6)
    assert [row["alpha"] for row in metrics_of(whole / "stage1")[4:]] == [0, 0, 0]

@table("change", ["fewer", "another", "reordered"])
def test_resume_names_training_data_that_changed(data, halted, change):
    rows = read_rows(data)
    rows = {"fewer": rows[:-1], "another": rows[:-1] + [rows[-1] | {"id": "another"}],
            "reordered": rows[::-1]}[change]
    edit(halted / "config.json", data=str(write_rows(data.with_name(f"{change}.jsonl"), *rows)))
    before = files_of(halted)
    with ends(f"training questions are not those of {halted}"):
        perl.main(["--resume", str(halted)])
    assert files_of(halted) == before

def test_a_tracker_takes_every_row_of_metrics(data, tmp_path, monkeypatch):
    kind, available = perl.accelerate.Accelerator, [*perl.accelerate.utils.LoggerType]
    started, logged, out = [], [], tmp_path / "run"
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: available)
    monkeypatch.setattr(kind, "init_trackers", lambda self, *args: started.append(args))
    monkeypatch.setattr(kind, "log", lambda self, row, step: logged.append((step, row)))
    monkeypatch.setattr(kind, "end_training", lambda self: logged.append("closed"))
    flags = dict(report_to="wandb", save_every=1, eval_every=0, steps=2, beta=0)
    with pytest.raises(Killed):
        run_with(monkeypatch, "update", 2, die, arguments(data, out, **flags))
    perl.main(["--resume", str(out)])
    rows = read_rows(out / "stage1" / "metrics.jsonl")
    assert logged == [(row["step"], row) for row in rows] + ["closed"]
    assert [config["steps"] for _, config in started] == [2, 2]
    available.clear()
    with pytest.warns(UserWarning), ends("pip install wandb"):
        perl.main(arguments(data, tmp_path / "none", **flags))
    assert not (tmp_path / "none").exists()

# ---- Run folder: stages ----------------------------------------------------------------
def test_stages_in_turn(data, tmp_path, monkeypatch, capsys):
    """0 chooses questions for 1, from whose policy 2 goes on. A folder that is there is renamed."""
    monkeypatch.setattr(perl, "SCORE_TARGET", (1,) * 3)
    out, short = tmp_path / "run", dict(steps=1, eval_every=0)
    perl.main(arguments(data, out, stage=0))
    scores, kept = (json_of(out / "stage0" / name) for name in ("scores.json", "kept.json"))
    assert scores.keys() == {asked.id for asked in perl.load_samples(data)} > set(kept) != set()
    assert all(score * 10 == pytest.approx(round(score * 10)) for score in scores.values())
    perl.main(arguments(data, out, stage=1, **short))
    assert f"\n{len(kept)} questions, " in capsys.readouterr().out
    assert {row["id"] for row in read_rows(out / "stage1" / "rollouts.jsonl")} <= set(kept)
    stage_1 = files_of(out)
    perl.main(arguments(data, out, stage=2, lr=0, **short))
    assert f"start model: {out / 'stage1' / 'checkpoint-1'}" in capsys.readouterr().out
    assert metrics_of(out / "stage2")[0]["alpha"] == 0
    trained, same = (weights_of(out / stage / "checkpoint-1") for stage in ("stage1", "stage2"))
    assert torch.equal(trained, same) and not torch.equal(trained, weights_of(TINY)), "at lr 0"
    moved = {f"stage2-1/{name}": text for name, text in files_of(out / "stage2").items()}
    perl.main(arguments(data, out, stage=2, lr=0, **short))  # once more
    assert f"is now {out / 'stage2-1'}" in capsys.readouterr().out
    assert (stage_1 | moved).items() <= files_of(out).items(), "nothing is lost"

def test_stage_2_needs_stage_1(data, tmp_path):
    refuses("has no checkpoint in", perl.main, arguments(data, tmp_path, stage=2))
    assert not [*tmp_path.glob("stage*")]

def test_runs_in_one_folder_lose_nothing_whatever_was_deleted(tmp_path):
    cfg = tiny_config(out=str(tmp_path))
    def start():
        perl.open_run(cfg, ACCELERATOR)
        (cfg.folder / "id").write_text(uuid.uuid4().hex)
        return (cfg.folder / "id").read_text()
    ids = [start() for _ in range(3)]
    shutil.rmtree(tmp_path / "stage1-1")
    ids.append(start())
    kept = {path.name: (path / "id").read_text() for path in tmp_path.glob("stage1*")}
    assert kept == {"stage1": ids[3], "stage1-1": ids[2], "stage1-2": ids[1]}

@table("n, right", [(1, True), (2, False), (12, True), (12, False)])
def test_stage_0_keeps_some_questions_whatever_their_scores(data, tmp_path, monkeypatch, n, right):
    answer_always(r"\boxed{1}", monkeypatch)
    monkeypatch.setattr(perl, "is_correct", lambda text, gold: right)
    rows = [row | {"id": f"{row['id']}-{copy}"} for copy in range(2) for row in read_rows(data)][:n]
    perl.main(arguments(write_rows(data.with_name(f"{n}.jsonl"), *rows), tmp_path, stage=0))
    kept, ids = json_of(tmp_path / "stage0" / "kept.json"), [row["id"] for row in rows]
    assert set(kept) <= set(ids) and 0 < len(set(kept)) == len(kept) <= n

@table("beta, models", [(0.0, 1), (0.1, 2)])
def test_without_kl_no_reference_model_is_loaded(data, tmp_path, monkeypatch, beta, models):
    loaded = record(monkeypatch, "load_model")
    monkeypatch.setattr(perl, "is_correct", lambda text, gold: False)
    monkeypatch.setattr(perl, "has_format", lambda text: False)  # so there is nothing to learn
    perl.main(arguments(data, tmp_path, beta=beta, steps=2, eval_every=0))
    assert len(loaded) == models
    assert [row["dropped"] for row in metrics_of(tmp_path / "stage1")] == [3, 3]
    assert torch.equal(weights_of(tmp_path / "stage1" / "checkpoint-2"), weights_of(TINY))

# ---- Reading answers -------------------------------------------------------------------
# gold ‖ right answers, divided by ¦ ‖ wrong answers that look right
ANSWERS = r"""
B ‖ B ¦ b ¦ (B) ¦ {B} ¦ [B] ¦ \text{B} ¦ \textit{B} ¦ \mathbf{(B)} ¦ **B** ¦ "B" ¦ B. ¦ Ｂ ¦ （B）
B ‖ $B$ ¦ \{B\} ¦ B. dogs ¦ B. a cat and a dog ¦ B: both ¦ B) dogs ¦ (B) A dog, I think
B ‖ B (dog) ¦ \text{B. dogs} ¦ Option B ¦ option (b) ¦ the answer is B
B ‖ The correct answer is (B). ¦ Answer: B ¦ B is correct ¦ B is the right answer
B ‖ B because image 2 shows it ¦ B, since A is not red ¦ 选B ¦ 答案是B ¦ 选项B ¦ 答案：B ¦ 应选B。 ¦ B选项正确 ‖
B ‖ ‖ C ¦ A or B ¦ B or A ¦ B. cats or C. dogs ¦ Both ¦ B and C ¦ (A) and (B) ¦ not B ¦ A, B
B ‖ ‖ AB ¦ Bob ¦ B or not B
A,C ‖ A,C ¦ A, C ¦ AC ¦ C, A ¦ C and A ¦ A and C ¦ (A), (C) ¦ (A)(C) ¦ \{A, C\} ‖ A ¦ C ¦ A,B
A,C ‖ ‖ A,B,C ¦ ABC ¦ A or C ¦ A,A,C
yes ‖ Yes ¦ yes. ¦ YES ‖ no ¦ not yes ¦ yes/no ¦ yes or no
2 ‖ 2 ¦ Picture 2 ¦ image 2 ¦ Image #2 ¦ the second image ¦ the 2nd picture ¦ Second photo
2 ‖ image_2 ¦ <image_2> ¦ Figure 2 ¦ 图2 ¦ 图片2 ¦ 第2张 ¦ 第2张图片 ¦ 第2张图 ¦ two ¦ Two ‖ 3 ¦ -2 ¦ 12
2 ‖ ‖ 22 ¦ 2,2 ¦ 2,1 ¦ 1,2 ¦ image 1 ¦ the third image ¦ 第3张 ¦ 图3 ¦ image 12 ¦ images 1 and 2
3,1,2 ‖ 3,1,2 ¦ 3, 1, 2 ¦ [3, 1, 2] ¦ (3,1,2) ¦ \{3,1,2\} ¦ 3 -> 1 -> 2 ¦ 3 \to 1 \to 2 ¦ 3→1→2
3,1,2 ‖ 3、1、2 ¦ 3，1，2 ¦ 3; 1; 2 ¦ 3 1 2 ¦ image 3, image 1, image 2
3,1,2 ‖ the third image, the first image, the second image ¦ 图3、图1、图2 ¦ 3, 1 and 2 ‖ 1,2,3 ¦ 3,1
3,1,2 ‖ ‖ 312 ¦ 3 ¦ 3,2,1 ¦ \{1,2,3\} ¦ 1.0,2,3 ¦ x=1,2,3 ¦ {1,2,3} ¦ 1→2→3 ¦ 3,1,2,4 ¦ 3,1,2,2
3,1,2 ‖ ‖ -3,1,2 ¦ 1、2、3
100,200 ‖ 100,200 ¦ 100, 200 ¦ 100，200 ‖ 200,100 ¦ 200, 100 ¦ 100 ¦ 300
1234 ‖ 1,234 ¦ 1234 ¦ 1{,}234 ¦ 1\,234 ¦ 1 234 ¦ 1234.0 ‖ 1,2,3,4 ¦ 1,235 ¦ 1.234
1,234 ‖ 1234 ¦ 1,234 ‖ 234 ¦ 1 ¦ 1.234 ¦ 2341
1000000 ‖ 1,000,000 ¦ 10^6 ¦ 1e6 ‖ 1,000,001 ¦ 100,000 ¦ 10^5 ¦ 1e7
2e-7 ‖ 2e-7 ¦ 2\times 10^{-7} ¦ 0.0000002 ‖ 1e-7 ¦ 0 ¦ 2e-8 ¦ 2e7
1.6\times10^{-19} ‖ 1.6e-19 ¦ 1.6 \times 10^{-19} ¦ 1.6·10⁻¹⁹ ‖ 9.1\times10^{-31}
1.6\times10^{-19} ‖ ‖ 1.6\times10^{19} ¦ 1.6 ¦ 1.6\times10^{-18}
6 ‖ 6 ¦ x=6 ¦ six ‖ 5=6 ¦ 5 \to 6 ¦ 6 \to 5 ¦ 6=5 ¦ 5→6 ¦ 5 or 6 ¦ 6 or 5 ¦ 5, 6 ¦ 5-6 ¦ 5~6
6 ‖ ‖ 5 \quad 6 ¦ 6\pm1 ¦ 6 \neq 5 ¦ x>6 ¦ 56 ¦ 65 ¦ 6?5
6:20 ‖ 6:20 ‖ 3:10 ¦ 6:21 ¦ 6:02 ¦ 20:6
2024-06-02 ‖ 2024-06-02 ¦ 2024–06–02 ‖ 2023-05-02 ¦ 2016 ¦ 2024-02-06 ¦ 2024-06-20
1:2 ‖ 1:2 ¦ 1 : 2 ‖ 2:1 ¦ 1:3 ¦ 2 ¦ 1,2
5 km ‖ 5 km ¦ 5km ¦ 5 kilometers ¦ 5 kilometres ¦ 5 \mathrm{~km} ¦ 5\,\text{km} ¦ 5 ‖ 5 m ¦ 5 cm
5 km ‖ ‖ 5000 m ¦ 5 km^2
9 \pi \mathrm{cm}^{2} ‖ 9\pi ¦ 9π cm² ¦ 9\pi\text{ cm}^2 ‖ 9 ¦ 9\pi cm ¦ 9\pi cm^3 ¦ 9\pi m^2
60^{\circ} ‖ 60 ¦ 60° ¦ 60^\circ ‖ 60 cm ¦ 61 ¦ 60% ¦ 60°C
50\% ‖ 50% ¦ 50 percent ¦ 50 ‖ 5% ¦ 500% ¦ 0.05 ¦ 50 cm
\frac{1}{2} ‖ 0.5 ¦ 2/4 ¦ \frac{3}{6} ¦ $\sqrt{0.25}$ ¦ ½ ¦ 1/2 ¦ \dfrac12 ‖ 0.33 ¦ 2 ¦ 1,2
\frac{1}{2} ‖ ‖ -\frac12
\frac{1}{3} ‖ 0.333333 ¦ 0.33333333 ¦ 1/3 ‖ 0.33 ¦ 0.333 ¦ 0.3 ¦ 0.334
\frac{1}{3000} ‖ ‖ 0.000333 ¦ 0.0003 ¦ 0
\frac{3}{2} ‖ 1\frac{1}{2} ¦ 1 1/2 ¦ 1½ ‖ 11/2 ¦ 5.5 ¦ 1 ¦ \frac12
2\sqrt{3} ‖ 2√3 ¦ 2 \sqrt 3 ¦ \sqrt{12} ‖ \sqrt{3} ¦ 3\sqrt{2} ¦ 2\sqrt[3]{3} ¦ 2√33
x^2+2x+1 ‖ (x+1)^2 ¦ x²+2x+1 ¦ 1+2x+x^2 ‖ (x-1)^2 ¦ x2+2x+1 ¦ (y+1)^2 ¦ x^2+2x
a+b ‖ b+a ¦ a + b ¦ (b+a) ‖ a-b ¦ ab ¦ a+c ¦ a+B
a^2-b^2 ‖ (a-b)(a+b) ¦ a²-b² ¦ -b^2+a^2 ‖ (a-b)^2 ¦ b^2-a^2 ¦ a2-b2 ¦ a^2+b^2
\pi R^2-\pi r^2 ‖ \pi R^2 - \pi r^2 ¦ πR²-πr² ‖ 0 ¦ \pi r^2-\pi R^2 ¦ \pi r^2 ¦ \pi R^2
y=-3x+2 ‖ y=2-3x ¦ -3x+2 ¦ 2-3x ‖ y=3x+2 ¦ x=-3y+2 ¦ z=2-3x ¦ 3x-2
x>3 ‖ x > 3 ¦ 3<x ¦ x>\frac{6}{2} ‖ x<3 ¦ x\ge 3 ¦ x=3 ¦ 3
(1,2) ‖ (1, 2) ¦ \left(1,2\right) ¦ （1，2） ‖ (2,1) ¦ [1,2] ¦ (1,2] ¦ (1,3)
\{1,2\} ‖ {2,1} ¦ \{2, 1\} ¦ \{1,2\} ‖ \{1,3\} ¦ \{1,1\} ¦ (1,2) ¦ [1,2]
2 or 8 ‖ 8 or 2 ¦ 2 or 8 ¦ 2, 8 ‖ 2 ¦ 8 ¦ 2 or 9 ¦ 28
(-\infty,1)\cup(3,4) ‖ (−∞,1)∪(3,4) ¦ (3,4)\cup(-\infty,1) ‖ (-\infty,1) ¦ (-\infty,1]\cup(3,4)
(-\infty,1)\cup(3,4) ‖ ‖ (-\infty,1)\cap(3,4) ¦ (-\infty,1),(3,4)
cat ‖ Cat ¦ a cat ¦ the cat ‖ dog ¦ cats ¦ a cat and a dog ¦ cat or dog"""

def test_every_answer_of_the_table():
    rows = []
    for line in ANSWERS.strip().splitlines():
        gold, *columns = line.split("‖")
        for verdict, column in zip((True, False), columns, strict=False):
            for answer in filter(str.strip, column.split("¦")):
                response = f"<think>t</think> \\boxed{{{answer.strip()}}}"
                rows.append((response, gold.strip(), verdict))
    assert len(rows) >= 260 and sum(not right for *_, right in rows) > len(rows) / 3
    assert [row for row in rows if perl.is_correct(*row[:2]) is not row[2]] == []

WRAPS = [r"\boxed{%s}", r"\boxed{[%s]}", r"\boxed{(%s)}", r"\boxed{\{%s\}}", r"\boxed{{%s}}",
         r"\boxed{$%s$}", r"\boxed{\text{%s}}", r"\boxed{x=%s}", r"\boxed{%s.}", r"\boxed{**%s**}",
         r"\boxed{\mathrm{%s}}", r"\boxed{\left(%s\right)}", r"\boxed{\text{Order} = %s}",
         r"\boxed{\left\{%s\right\}}", r"\boxed{\textbf{(%s)}}", r"\boxed{ %s }",
         r"\boxed{\mathbf{%s}}", "<answer>%s</answer>", "<answer>[%s]", r"\boxed{1,2,3} \boxed{%s}"]
JOINTS = [",", ", ", " -> ", r" \to ", "→", "、", "，", "; ", " and ", ", then ", ", image ", ".0, "]

@settings(max_examples=400, deadline=None)
@given(st.permutations(range(1, 6)), st.integers(2, 5), st.sampled_from(WRAPS),
       st.sampled_from(JOINTS), st.data())
def test_no_order_of_a_sequence_but_the_right_one_is_right(images, n, wrap, joint, data):
    gold, order = images[:n], data.draw(st.permutations(images[:n]))
    response = "<think>t</think>" + wrap % joint.join(map(str, order))
    assert perl.is_correct(response, ",".join(map(str, gold))) == (order == gold), response

@table("response, answer, well_formed", [
    (r"<think>a</think> \boxed{3}", "3", True), (r"<think> </think>\boxed{3}", "3", False),
    ("<think>\na\n</think>\n\nso \\boxed{\\{1, 2\\}} it is", r"\{1, 2\}", True),
    (r"<think>\boxed{1}</think> \boxed{2}", "2", True), (r"\boxed{3}", "3", False),
    (r"<think>\boxed{1}</think> so it is 2", None, False), (r"a</think>\boxed{3}", "3", False),
    (r"<think>\boxed{1} is it", None, False), (r"<think>a</think><think> \boxed{1}", None, False),
    (r"<think>a</think><think>b</think>\boxed{3}", "3", False), ("<answer> B", "B", False),
    (r"<think>a</think>\boxed{}", None, False), (r"\boxed{1} and \boxed{2", "1", False),
    ("<answer></answer>", None, False), ("<answer>1</answer><answer>B</answer>", "B", False),
    (r"<answer>1</answer> \boxed{2}", "2", False), ("The answer is (B).", None, False)])
def test_extract_answer_and_has_format(response, answer, well_formed):
    assert (perl.extract_answer(response), perl.has_format(response)) == (answer, well_formed)

def test_hostile_mathematics_ends_and_the_judge_lives_on(monkeypatch):
    monkeypatch.setattr(perl.MathJudge, "SECONDS", 1.0)
    signal.alarm(40)
    for hostile in ("9^{9^{9^9}}", "99999999!", "((((((9^9)^9)^9)^9)^9)^9)^9", "9e99999999"):
        assert not perl.is_correct(rf"\boxed{{{hostile}}}", "17")
    assert perl.MATH_JUDGE.timeouts, "at least one was stopped by the time bound"
    monkeypatch.undo()
    assert perl.is_correct(r"\boxed{\frac{4}{6}}", r"\frac{2}{3}")
    assert os.getsid(perl.MATH_JUDGE.process.pid) != os.getsid(0)

@table("hostile", [
    r"\boxed{" * 20_000, "the answer is 1" + " " * 100_000 + "2", "answer is" + "\n" * 100_000,
    r"\boxed{3" + " " * 5_000 + "x}", r"\boxed{" + r"\text " * 20_000 + "}", "<think>" * 20_000,
    "<answer>" * 20_000, r"\boxed{" + "(" * 20_000 + "}", *(
        rf"\boxed{{{unit * 120}}}" for unit in ("(", "1", " ", "the ", "answer ", "1,", "=", "x=",
                                              "and ", "²", "½", "第1张", "1 m", "\ud800"))],
    ids=ascii)
def test_hostile_text_ends(hostile):
    signal.alarm(5)
    for gold in ("3,1,2", "7/2", "B", "A,C", "yes", "5 km", r"\{1,2\}", "x=3", "cat"):
        assert not perl.is_correct(hostile, gold) and not perl.has_format(hostile)

def test_a_response_is_never_run_as_code(tmp_path):
    flag = tmp_path / "executed"
    for code in (f"__import__('os').system('touch {flag}')", f"open('{flag}', 'w')"):
        for text in (code, f"1+{code}", f"$ {code} $", f"= {code}", f"1.0*{code}", f"1 if {code}"):
            perl.is_correct(rf"\boxed{{{text}}}", r"\frac{1}{2}")
            perl.is_correct(r"\boxed{1}", text + "0")
    assert not flag.exists()

# ---- Shared compute: it changes the cost of a step and nothing else --------------------
PLAIN = dict(share=False)

@pytest.fixture
def asked(questions):
    """Five questions of unequal length: with 3, 2 and 1 images, and two with none."""
    return questions + [perl.Sample("t1", (), "What is 3 + 4? Think, then say it.", "7", "keep")]

def sample_watched(model, prompts, n, cfg):
    """Greedy rows up to their ends; and of each stretch, the number of prompts held and of
    different lengths of rows. Noise that depends on a row's prompt, number and length only ends
    rows at different times. In every stretch, the cache is held to its limits."""
    next_inputs, generate, rows, numbers, stretches = perl.next_inputs, model.generate, [], {}, []
    def watch(model, processor, live, cache, cfg):
        rows.clear()
        fresh, held, ages = Counter(), {id(prompt) for prompt, _ in live}, set()
        longest = max(len(prompt.ids) for prompt, _ in live)
        for prompt, row in live:
            if id(row) not in numbers:
                numbers[id(row)] = fresh[id(prompt)]
                fresh[id(prompt)] += 1
            rows.append((len(prompt.ids), numbers[id(row)], len(row)))
            ages.add(len(row))
        for layer in cache.layers:
            # A prompt's last token is read anew by each of its rows.
            assert layer.prompts.shape[1:4:2] == (len(held), longest - 1)
            assert max(ages) <= layer.rows.shape[3] <= max(ages) + 32
            assert {layer.prompts.dtype, layer.rows.dtype} == {model.dtype}
        assert len(live) <= max(cfg.rollout_batch, n)
        tokens = len(held) * longest * (1 if cfg.share else n)
        assert len(held) == 1 or tokens <= 4 * cfg.max_tokens_per_micro_batch
        stretches.append((len(held), len(ages)))
        return next_inputs(model, processor, live, cache, cfg)
    def with_noise(**inputs):
        start = inputs["input_ids"].shape[1]
        def noise(ids, scores):
            for logits, (prompt, number, age) in zip(scores, rows):
                seed = 7919 * prompt + 104729 * number + age + ids.shape[1] - start
                random_numbers = torch.Generator().manual_seed(seed)
                logits += 2 * torch.randn(len(logits), generator=random_numbers)
                logits[PROCESSOR.eos_ids[-1]] += 9.0 * (seed % 11 == 0)
            return scores
        return generate(**inputs, logits_processor=[noise])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perl, "next_inputs", watch)
        patch.setattr(model, "generate", with_noise)
        responses = perl.generate(model, PROCESSOR, prompts, n, cfg, greedy=True)
    for own in responses:
        assert len(own) == n and max(map(len, own)) <= cfg.max_new_tokens
    return [[perl.make_rollout(row, prompt, (), PROCESSOR).ids for row in own]
            for prompt, own in zip(prompts, responses)], stretches

@table("first, n, changes", [
    (0, 1, {}), (0, 3, {}), (0, 3, dict(rollout_batch=12)), (0, 3, dict(rollout_batch=7)),
    (0, 3, dict(rollout_batch=1)), (0, 1, dict(rollout_batch=2)),
    (0, 3, dict(rollout_batch=9, max_tokens_per_micro_batch=30)), (0, 3, dict(max_new_tokens=1)),
    (0, 2, dict(rollout_batch=5, max_tokens_per_micro_batch=1)), (3, 3, {}),
    (3, 3, dict(rollout_batch=4))])  # from question 3 on: text only
def test_a_row_depends_on_neither_its_neighbours_nor_sharing(asked, first, n, changes):
    model, prompts, rows = load_tiny(), encoded_prompts(asked[first:]), []
    limit = dict(max_new_tokens=changes.get("max_new_tokens", 40))
    for way in ({}, changes, changes | PLAIN):
        cfg = tiny_config(**way | limit)
        rows.append(sample_watched(model, prompts, n, cfg)[0])
    assert rows[1] == rows[2] == rows[0]

@table("dtype, n, changes, several, joins", [
    ("bf16", 4, dict(rollout_batch=8), True, True),
    ("float32", 4, dict(rollout_batch=1), False, False),
    ("float32", 2, dict(max_tokens_per_micro_batch=10), False, False),
    ("float32", 2, dict(max_tokens_per_micro_batch=50), True, True)])
def test_prompts_join_while_others_are_at_work(asked, dtype, n, changes, several, joins):
    cfg = tiny_config(**dict(max_new_tokens=64) | changes)
    _, stretches = sample_watched(load_tiny(dtype=dtype), encoded_prompts(asked * 2), n, cfg)
    assert any(held > 1 for held, _ in stretches) == several
    assert any(ages > 1 for _, ages in stretches) == joins

def test_attention_in_bfloat16_is_as_exact_as_float32_scores_allow():
    torch.manual_seed(0)
    read = perl.DynamicLayer()
    read.keys, read.values = torch.randn(2, 3, 2, 50, 16).bfloat16()
    layer = perl.SharedPromptLayer(read, 4)
    for _ in range(20):
        layer.update(*torch.randn(2, 12, 2, 1, 16).bfloat16())
    query = (3 * torch.randn(12, 6, 1, 16)).bfloat16()
    ours = perl.decode_attention(query, layer, None, 0.25)[:, 0]                    # (B, H, d)
    prompts, rows = layer.prompts[:, layer.of], layer.rows[:, :, :, :layer.length]
    keys, values = torch.cat([prompts, rows], dim=3).double().repeat_interleave(3, dim=2)
    exact = ((query.double() @ keys.mT) * 0.25).softmax(-1) @ values                # (B, H, 1, d)
    assert (ours.double() - exact[:, :, 0]).abs().max() < 0.012
    assert (ours.double() - exact[:, :, 0]).abs().mean() < 0.001

def test_tree_attention_is_attention_under_the_mask_of_the_tree():
    """Lengths of padding, prompt and responses; the last row has fewer responses."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 8, 16) for heads in (4, 2, 2))
    lengths = [[1, 3, 2, 2], [0, 4, 1, 3], [2, 3, 3, 0]]
    out = perl.tree_attention(query, key, value, lengths, scaling=0.3)
    owners = torch.tensor([[-1, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 2, 2, 2],
                           [-1, -1, 0, 0, 0, 1, 1, 1]])
    sees = (owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])
    assert sees[0].tril()[7].tolist() == [False] + [True] * 3 + [False] * 2 + [True] * 2
    mask = sees.tril()[:, None] | (owners < 0)[:, None, :, None]  # padding sees anything
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask, scale=0.3)
    kept = owners >= 0
    assert torch.allclose(out[kept], expected.transpose(1, 2)[kept], atol=1e-6)

@table("first, base", [(0, {}), (0, dict(updates_per_step=2)), (0, dict(freeze_vision=True)),
                       (3, {})])  # from question 3 on: text only
def test_no_memory_setting_changes_logprobs_or_gradients(questions, monkeypatch, first, base):
    groups, reference, results = written_groups(questions[first:]), load_tiny(), []
    with torch.no_grad():
        reference.model.language_model.norm.weight.mul_(1.1)  # so that the KL term counts
    for chunk, changes in ((1024, PLAIN), (1024, {}), (3, dict(max_tokens_per_micro_batch=90)),
                           (1024, dict(max_tokens_per_micro_batch=1)),
                           (1024, dict(max_tokens_per_micro_batch=150,
                                       gradient_checkpointing=True))):
        monkeypatch.setattr(perl, "LOGIT_CHUNK", chunk)
        model, cfg = load_tiny(**base | changes), tiny_config(beta=0.1, **base | changes)
        logprobs = perl.response_logprobs(model, PROCESSOR, flatten(groups), cfg)[0]
        gradient, sums = gradient_of_update(model, groups, cfg, reference, lr=0.001)
        results.append((logprobs, gradient, sums))
        assert sums["kl"] > 0 and sums == pytest.approx(results[0][2], abs=1e-3)
        assert torch.allclose(logprobs, results[0][0], atol=1e-5)
        # A step between two updates lets rounding grow.
        atol = 1e-6 if cfg.updates_per_step == 1 else 1e-5
        assert torch.allclose(gradient, results[0][1], atol=atol, rtol=1e-4)
    names = [name for name, w in load_tiny().named_parameters() for _ in range(w.numel())]
    vision = torch.tensor(["visual" in name for name in names]).repeat(cfg.updates_per_step)
    is_trained = first == 0 and not cfg.freeze_vision
    assert (gradient[vision].abs().max() > 1e-4) == is_trained

@table("changes", [dict(freeze_vision=True), dict(lora_rank=2)], ids=str)
def test_a_frozen_tower_is_not_differentiated(questions, changes):
    cfg, calls = tiny_config(gradient_checkpointing=True, **changes), []
    model = load_tiny(gradient_checkpointing=True, **changes)
    if cfg.lora_rank:
        perl.add_lora(model, cfg)
    for block in model.model.visual.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    model.train()  # else nothing is recomputed
    rollouts = flatten(written_groups(questions))
    perl.response_logprobs(model, PROCESSOR, rollouts, cfg)[0].sum().backward()
    assert len(calls) == 2 and all(weight.grad is not None for weight in trained(model))

# ---- Shared compute: model families ----------------------------------------------------
TOKENS = dict(image_token_id=6, video_token_id=7, vision_start_token_id=3,
              vision_end_token_id=4, tie_word_embeddings=True)
TEXT = dict(vocab_size=532, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, eos_token_id=2, pad_token_id=0,
            bos_token_id=0)
ROPE = {"mrope_section": [4, 4, 4], "rope_theta": 10000.0, "rope_type": "default"}

def random_family(kind, folder):
    """A small random model of a family, with the tiny model's tokenizer and template."""
    if kind == "qwen3_vl":  # with features of three inner layers
        vision = dict(depth=3, hidden_size=48, intermediate_size=128, num_heads=4, patch_size=14,
                      out_hidden_size=96, num_position_embeddings=64,
                      deepstack_visual_indexes=[0, 1, 2])
        text = TEXT | dict(head_dim=24, rope_parameters=ROPE | {"mrope_interleaved": True})
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
    elif kind == "qwen3_5":  # three layers of four are recurrent
        vision = dict(depth=2, hidden_size=48, intermediate_size=128, num_heads=4, patch_size=14,
                      out_hidden_size=96, num_position_embeddings=64)
        linear = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=4,
                      linear_num_value_heads=4, head_dim=24)
        rope = ROPE | dict(partial_rotary_factor=1.0, mrope_interleaved=True)
        text = TEXT | linear | dict(tie_word_embeddings=True, rope_parameters=rope)
        config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision,
                                                   **TOKENS)
    else:
        vision = dict(depth=2, embed_dim=48, hidden_size=96, num_heads=4, patch_size=14)
        config = transformers.Qwen2VLConfig(text_config=TEXT | dict(rope_parameters=ROPE),
                                            vision_config=vision, **TOKENS)
    shutil.copytree(TINY, folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # large enough for images and order to matter
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.15)
    model.save_pretrained(folder)
    shutil.copy(TINY / "generation_config.json", folder)
    return str(folder)

def shared_and_plain(path, questions):
    results = []
    for share in (True, False):
        cfg = tiny_config(max_new_tokens=12, beta=0.01, updates_per_step=3, share=share,
                          gradient_checkpointing=True)
        model, processor = perl.load_model(path, cfg, CPU), perl.load_processor(path, cfg)
        orders = [perl.all_orders(question, 2) for question in questions]
        groups = perl.sample_groups(model, processor, questions, orders, cfg, n=2, greedy=True)
        rollouts = flatten(groups)
        for k, rollout in enumerate(rollouts):
            rollout.advantage = (1.0, 0.3, -0.7, 0.2, -1.2)[k % 5]
        logprobs = {id(r): row for r, row in perl.frozen_logprobs(model, processor, rollouts, cfg)}
        perl.add_gradients(model, processor, rollouts, 100, cfg)
        gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
        model.zero_grad()
        sums, norms = perl.update(
            model, perl.load_model(path, cfg, CPU), perl.SplitAdamW(model, cfg, ACCELERATOR),
            processor, groups, cfg=cfg)
        assert sums["kl"] > 0 and len(norms) == 3
        results.append(([r.ids for r in rollouts],
                        torch.cat([logprobs[id(r)] for r in rollouts]), torch.tensor(norms),
                        gradient))
    return results

@table("kind", ["qwen2_vl", "qwen3_vl"])
def test_another_family_shared_equals_plain(kind, questions, tmp_path, monkeypatch):
    """Where inner layers have features, they come in the layers' order: another would show."""
    path, encode_images = random_family(kind, tmp_path / kind), perl.encode_images
    (rows, logprobs, norms, gradient), plain = shared_and_plain(path, questions)
    assert (gradient - plain[3]).abs().max() < 1e-5 * plain[3].abs().max()
    assert rows == plain[0] and torch.allclose(logprobs, plain[1], atol=1e-5)
    assert torch.allclose(norms, plain[2], rtol=1e-5)
    if kind == "qwen3_vl":
        def reversed_levels(*args):
            output = encode_images(*args)
            output.deepstack_features = output.deepstack_features[::-1]
            return output
        monkeypatch.setattr(perl, "encode_images", reversed_levels)
        logprobs = shared_and_plain(path, questions)[0][1]
        assert logprobs.shape != plain[1].shape or not torch.allclose(logprobs, plain[1], atol=1e-3)

def test_a_qwen3_folder_trains_and_its_checkpoint_reloads(folder, tmp_path, monkeypatch):
    path = random_family("qwen3_vl", tmp_path / "qwen3_vl")
    monkeypatch.setattr(perl, "is_correct", lambda text, gold: len(text) % 2 == 0)
    rows = [dict(GOOD, id=f"q{k}", answer=str(1 + k % 3)) for k in range(4)]
    perl.main(["--model", path, "--data", str(write_rows(folder / "four.jsonl", *rows)),
               "--steps", "1", "--questions-per-step", "4", "--lr", "1e-3",
               "--max-new-tokens", "6", "--out", str(tmp_path / "run")])
    metrics, = read_rows(tmp_path / "run" / "stage1" / "metrics.jsonl")
    assert metrics["kept"] > 0 and metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    trained = perl.load_model(str(tmp_path / "run" / "stage1" / "checkpoint-1"), tiny_config(), CPU)
    assert not torch.equal(flat_weights(trained),
                           flat_weights(perl.load_model(path, tiny_config(), CPU)))

def test_qwen3_5_samples_and_trains_without_sharing_only(questions, tmp_path, monkeypatch):
    """A left-padded row of a batch has the log-probabilities that it has alone (its recurrent
    layers round more than attention does), and greedy decoding takes the most likely token."""
    path = random_family("qwen3_5", tmp_path / "qwen3_5")
    refuses("is a qwen3_5, .*--no-share takes", perl.load_processor, path, tiny_config())
    cfg = tiny_config(share=False, max_new_tokens=12, gradient_checkpointing=True)
    model, processor = perl.load_model(path, cfg, CPU), perl.load_processor(path, cfg)
    orders = [perl.all_orders(question, 2) for question in questions]
    groups = perl.sample_groups(model, processor, questions, orders, cfg, n=2, greedy=True)
    together = {id(r): row for r, row in
                perl.frozen_logprobs(model, processor, flatten(groups), cfg)}
    for rollout in flatten(groups):
        rollout.advantage = 1.0 if rollout.order[:1] == (0,) else -1.0
        (_, alone), = perl.frozen_logprobs(model, processor, [rollout], cfg)
        assert torch.allclose(alone, together[id(rollout)], atol=2e-3)
    sums, (norm,) = run_update(model, perl.SplitAdamW(model, cfg, ACCELERATOR), groups, cfg)
    assert sums["tokens"] > 0 and math.isfinite(norm) and norm > 0
    def is_likeliest(lm_head, hidden, targets, banned_ids, temperature):
        logits = lm_head(hidden)
        logits[:, banned_ids] = -torch.inf
        return (logits.argmax(dim=1) == targets).float()
    monkeypatch.setattr(perl, "token_logprobs", is_likeliest)
    model = perl.load_model(path, cfg, CPU)
    rows = [row for _, row in perl.frozen_logprobs(model, processor, flatten(groups), cfg)]
    assert torch.cat(rows).mean() > 0.98

# ---- Memory and machines ---------------------------------------------------------------
def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]

def backward(model, seed):
    """The same gradients for the same seed; the vision tower has seen no image, and has none."""
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=ids).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

def split_run(steps, accelerator=ACCELERATOR, passes=1, **changes):
    cfg = tiny_config(**dict(lr=1e-3) | changes)
    model, norms = perl.load_model("tiny", cfg, CPU), []
    optimizer = perl.SplitAdamW(model, cfg, accelerator)
    for step in range(steps):
        for k in range(passes):
            backward(model, step * passes + k)
        norms.append(optimizer.step())
    return model, optimizer, norms

@table("dtype", ["float32", "bf16"])
@table("max_grad_norm", [0.05, 1e9])
def test_on_one_process_it_is_adamw_bit_for_bit(monkeypatch, dtype, max_grad_norm):
    """In bfloat16, on float32 copies. A weight without a gradient has one of zeros."""
    monkeypatch.setattr(perl, "MAX_GRAD_NORM", max_grad_norm)
    monkeypatch.setattr(perl, "WEIGHT_DECAY", 0.1)
    model, optimizer, norms = split_run(3, dtype=dtype)
    plain, expected = load_tiny(dtype=dtype), []
    weights, masters = trained(plain), [weight.detach().float() for weight in trained(plain)]
    adamw = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1, fused=dtype == "bf16")
    for weight in weights:
        weight.grad_dtype = torch.float32
    for seed in range(3):
        backward(plain, seed)
        for weight in plain.model.visual.parameters():
            weight.grad = torch.zeros_like(weight, dtype=torch.float32)
        expected.append(float(torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)))
        for weight, master in zip(weights, masters):
            master.grad, weight.grad = weight.grad, None
        adamw.step()
        for weight, master in zip(weights, masters):
            weight.data.copy_(master)
    assert norms == expected and min(norms) > 0.05
    assert torch.equal(flat_weights(model), flat_weights(plain))
    for (name, weight), copied in zip(model.named_parameters(), masters):
        master = optimizer.masters[name]
        assert torch.equal(master, copied) and weight.grad is None
        is_copy = master.data_ptr() != weight.data_ptr()
        assert is_copy == (dtype == "bf16"), "a float32 weight needs no copy"

@table("changes", [{}, dict(dtype="bf16"), dict(freeze_vision=True)])
@table("max_grad_norm", [0.05, 1e9])
def test_gradients_summed_in_host_memory_give_the_same_weights(monkeypatch, changes, max_grad_norm):
    monkeypatch.setattr(perl, "MAX_GRAD_NORM", max_grad_norm)
    model, optimizer, norms = split_run(3, passes=2, optimizer_device="gpu", **changes)
    other, its, its_norms = split_run(3, passes=2, optimizer_device=ALL_ON_HOST, **changes)
    assert norms == its_norms and norms[0] > 0.05
    assert torch.equal(flat_weights(model), flat_weights(other))
    states = its.state_dict()
    for name, state in optimizer.state_dict().items():
        assert all(torch.equal(state[key], states[name][key]) for key in state)
    backward(other, 0)
    assert all(weight.grad is None for weight in trained(other)), "none is left on the GPU"

def test_a_bad_gradient_in_host_memory_is_skipped_and_forgotten():
    model, optimizer, _ = split_run(0, optimizer_device=ALL_ON_HOST)
    for bad in (math.nan, 0.0):
        before = flat_weights(model)
        backward(model, 0)
        next(iter(optimizer.sums.values())).view(-1)[3] += bad
        assert math.isfinite(optimizer.step()) == (bad == 0)
        assert torch.equal(before, flat_weights(model)) == (bad != 0)

def test_host_sums_of_several_processes_are_reduced_where_the_weights_are(monkeypatch):
    """NCCL takes no tensor of the host. All processes have the same gradients here."""
    reduced, alone = [], split_run(1)[2]
    def all_reduce(tensor):
        reduced.append(tensor.device)
        tensor *= 2
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, owner: None)
    for device in ("gpu", ALL_ON_HOST):
        model, _, norms = split_run(1, process(2), optimizer_device=device)
        assert norms == pytest.approx([2 * alone[0]])
    assert len(reduced) == 2 * len(trained(model))

@table("dtype", ["float32", "bf16"])
def test_the_optimizers_state_goes_over_to_other_numbers_of_processes(tmp_path, dtype):
    """Saved by three, read by two and by one, which goes on as if nothing had been."""
    model, optimizer, _ = split_run(2, dtype=dtype)
    states, loaded = optimizer.state_dict(), {}
    for rank in range(3):
        owned = split_run(0, process(3, rank))[1].masters
        torch.save({name: states[name] for name in owned}, tmp_path / f"optimizer-{rank}.pt")
    for rank in range(2):
        part = split_run(0, process(2, rank), dtype=dtype)[1]
        part.load(tmp_path)
        loaded |= part.state_dict()
    for name, state in states.items():
        mine = loaded.pop(name)
        assert mine.keys() == state.keys() >= {"master", "exp_avg", "exp_avg_sq", "step"}
        assert all(torch.equal(mine[key], state[key]) for key in state)
    assert not loaded
    resumed, again, _ = split_run(0, dtype=dtype)
    again.load(tmp_path)
    for each, its in ((model, optimizer), (resumed, again)):
        backward(each, 5)
        its.step()
    assert torch.equal(flat_weights(model), flat_weights(resumed))
    (tmp_path / "optimizer-1.pt").unlink()
    refuses("lacks the optimizer's state", again.load, tmp_path)

@table("share", [True, False])
def test_the_gradient_in_bfloat16_points_where_that_in_float32_does(questions, share):
    gradients = []
    for dtype in ("float32", "bf16"):
        cfg = tiny_config(dtype=dtype, share=share)
        model = perl.load_model("tiny", cfg, CPU)
        perl.SplitAdamW(model, cfg, ACCELERATOR)  # sets how gradients are summed
        gradients.append(gradient_of_update(model, written_groups(questions), cfg)[0])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.998

@table("dtype, rank", [("float32", 4), ("bf16", 16)])
def test_lora_trains_float32_adapters_beside_an_untouched_base(questions, tmp_path, dtype, rank):
    """Checkpoints are plain folders with the adapters merged."""
    cfg = tiny_config(lora_rank=rank, beta=0.1, dtype=dtype, lr=1e-2, out=str(tmp_path))
    model, start = perl.load_model("tiny", cfg, CPU), load_tiny(dtype=dtype)
    adapters, groups = perl.add_lora(model, cfg), written_groups(questions)
    scaled = {name: module.scaling["default"] for name, module in model.named_modules()
              if hasattr(module, "lora_A")}
    assert len(scaled) == 7 * model.config.text_config.num_hidden_layers
    assert not any("visual" in name for name in scaled)
    assert set(scaled.values()) == {2.0}, "whatever the rank"
    assert {weight.dtype for weight in trained(model)} == {torch.float32}
    optimizer = perl.SplitAdamW(model, cfg, ACCELERATOR)
    sums, (norm,) = run_update(model, optimizer, groups, cfg, adapters)
    assert sums["kl"] == 0 and norm > 0, "before training it is the start model, to the bit"
    assert run_update(model, optimizer, groups, cfg, adapters)[0]["kl"] > 0
    for rollout, logprobs in perl.frozen_logprobs(start, PROCESSOR, flatten(groups), cfg):
        assert torch.equal(rollout.ref_logprobs, logprobs), "the reference is the start model"
    base = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(weight, base[name]) for name, weight in start.state_dict().items())
    cfg.folder.mkdir()
    before = flat_weights(model)
    perl.save_checkpoint(cfg, perl.Progress(1, [], random.Random(0)), questions, PROCESSOR,
                         optimizer, model=model, reference=adapters, accelerator=ACCELERATOR)
    assert torch.equal(flat_weights(model), before), "merged in a copy"
    plain = perl.load_model(str(cfg.folder / "checkpoint-1"), cfg, CPU)
    assert plain.lm_head.weight is plain.get_input_embeddings().weight, "tied, as before"
    ours, theirs, without = (perl.response_logprobs(each, PROCESSOR, flatten(groups), cfg)[0]
                             for each in (model, plain, start))
    assert torch.allclose(ours, theirs, atol=1e-5 if dtype == "float32" else 0.5)
    assert (without - ours).abs().max() > 0.1

# ---- Memory and machines: what fits ----------------------------------------------------
def config_of(model, *argv, **changes):
    cfg = perl.parse_config(["--model", model, *argv])
    return dataclasses.replace(cfg, **dict(dtype="bf16") | changes)

def planned(model, capsys, accelerator=ACCELERATOR, **changes):
    """The parts that --dry-run prints, in GB, by name; and billions of trained parameters."""
    named = dict(gpu_gb=130, optimizer_device="host") | changes
    perl.plan_memory(config_of(model, "--dry-run", **named), accelerator)
    text = capsys.readouterr().out
    parts = {name: float(gb) for gb, name in re.findall(r"(?m)^ *([\d.]+)  (.+)$", text)}
    return parts, float(re.search(r"([\d.]+) billion parameters", text)[1])

@pytest.fixture
def model_7b(tmp_path):
    """The 7B's config.json alone: its plan needs no weights."""
    model_config("Qwen2.5-VL-7B").save_pretrained(tmp_path)
    return str(tmp_path)

def test_the_plan_of_the_7b(model_7b, capsys):
    parts, trained = planned(model_7b, capsys)
    assert trained == 8.292 and parts["weights"] == pytest.approx(16.58, abs=0.01)
    assert parts["gradients on the GPU"] == pytest.approx(4 * 8.292, abs=0.01)
    assert parts["AdamW's state"] == pytest.approx(12 * 8.292, abs=0.01)
    # A token's keys and values: 2 of them, 28 layers, 4 heads of 128 numbers of 2 bytes.
    cache = 2 * 28 * 4 * 128 * 2 * (384 * 2048 + 4 * 16384) / 1e9
    assert cache < parts["prompts, keys and values"] < 1.05 * cache
    assert parts["host memory"] == pytest.approx((12 + 2) * 8.292, abs=0.02), "AdamW, reference"
    scoring, trained = planned(model_7b, capsys, stage=0)
    assert trained == 0 and scoring["GPU in an update"] == pytest.approx(2 * 8.292, abs=0.02)
    double, _ = planned(model_7b, capsys, dtype="float32")
    assert double["weights"] == pytest.approx(2 * parts["weights"], abs=0.02)
    four, _ = planned(model_7b, capsys, accelerator=process(4))
    assert four["AdamW's state"] == pytest.approx(3 * 8.292, abs=0.01)
    assert four["host memory"] == pytest.approx((12 + 4 * 2) * 8.292, abs=0.02), "four references"
    # 7.616 is the language model; an adapter adds 64 * (inputs + outputs) numbers.
    for changes, expected in ((dict(freeze_vision=True), 7.616), (dict(lora_rank=64), 0.161)):
        other, fewer = planned(model_7b, capsys, **changes)
        assert fewer == expected
        assert other["AdamW's state"] == pytest.approx(12 * fewer, abs=0.01)
        assert other["gradients on the GPU"] == pytest.approx(4 * fewer, abs=0.01)

ALL = (384, 16384)  # the default sizes

@table("free, world, typed, place, sizes", [
    (200, 1, {}, "gpu", ALL), (120, 4, {}, "gpu", ALL), (141, 1, {}, HOST, ALL),
    (80, 1, {}, HOST, ALL), (48, 1, {}, ALL_ON_HOST, (192, 8192)),
    (200, 1, dict(optimizer_device="host"), HOST, ALL), (24, 1, {}, None, None),
    (141, 1, dict(optimizer_device="gpu"), None, None),
    (48, 1, dict(rollout_batch=300), None, None),
    (48, 1, dict(rollout_batch=90), ALL_ON_HOST, (90, 16384)),
    (24, 1, dict(lora_rank=64, max_prompt_tokens=2048), HOST, (24, 2048))])
def test_what_fits_a_card(monkeypatch, model_7b, capsys, free, world, typed, place, sizes):
    """Where AdamW's state and the gradients lie, and sizes where none were typed."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 1e9, 1e12))
    host_has(monkeypatch, 999)
    on_a_gpu, on_a_laptop = config_of(model_7b, **typed), config_of(model_7b, gpu_gb=free, **typed)
    for cfg, device in ((on_a_gpu, torch.device("cuda")), (on_a_laptop, CPU)):
        if place:
            assert perl.plan_memory(cfg, process(world, device=device)) == place
            chosen = cfg.rollout_batch, cfg.max_tokens_per_micro_batch
            assert chosen == sizes
            out = capsys.readouterr().out
            assert f"{chosen[0]} sequences" in out and f"{chosen[1]} tokens" in out and place in out
        else:
            with ends(r"needs .* GB \(GPU .*; there are"):
                perl.plan_memory(cfg, process(world, device=device))

def host_has(monkeypatch, gb):
    sizes = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": int(gb * 1e6)}
    monkeypatch.setattr(os, "sysconf", sizes.get)

@table("host, typed, device, world, message", [
    (100, {}, "cuda", 1, r"116.1 GB \(host .*; there are 100.0\)"), (120, {}, "cuda", 1, None),
    (120, {}, "cuda", 2, r"needs 132.7 GB \(host memory"),
    (20, dict(gpu_gb=80), "cuda", 1, None),  # planned for another machine
    # Weights twice, AdamW and a layer's work: a CPU has one memory.
    (150, dict(dtype="float32"), "cpu", 1, r"needs .* GB \(host .*; there are 150"),
    (999, dict(dtype="float32"), "cpu", 1, None)])
def test_host_memory_is_checked(monkeypatch, model_7b, host, typed, device, world, message):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    host_has(monkeypatch, host)
    cfg = config_of(model_7b, **typed)
    with ends(message) if message else contextlib.nullcontext():
        place = perl.plan_memory(cfg, process(world, device=torch.device(device)))
        assert (place == "gpu") == (device == "cpu"), "beside the weights"
        assert (cfg.rollout_batch, cfg.max_tokens_per_micro_batch) == ALL

@table("typed, device, dtype", [
    ({}, "cuda", "bf16"), ({}, "cpu", "float32"), (dict(gpu_gb=80.0), "cpu", "bf16"),
    (dict(dtype="float32"), "cuda", "float32"), (dict(dtype="bf16"), "cpu", "bf16")])
def test_dtype_auto_is_that_of_the_device(typed, device, dtype):
    cfg = dataclasses.replace(perl.parse_config([]), **typed)
    perl.fit_machine(cfg, torch.device(device))
    assert cfg.dtype == dtype

def test_chosen_sizes_are_kept_for_resume(data, tmp_path, monkeypatch):
    """A size at its default is lowered to what fits; config.json has what was chosen."""
    def plan_memory(cfg, accelerator):
        cfg.rollout_batch = 6
        return "host"
    monkeypatch.setattr(perl, "plan_memory", plan_memory)
    perl.main(arguments(data, tmp_path, rollout_batch=384, steps=1, eval_every=0))
    run = tmp_path / "stage1"
    assert json_of(run / "config.json")["rollout_batch"] == 6
    assert json_of(run / "config.json")["optimizer_device"] == "auto"
    assert perl.parse_config(["--resume", str(run)]).rollout_batch == 6

# ---- Memory and machines: a step of models of true size --------------------------------
# Published sizes. Windows of the vision tower take the same bytes as full attention.
ROPE_LARGE = dict(rope_type="default", rope_theta=1e6)
QWEN2_5 = dict(rope_parameters=ROPE_LARGE | dict(mrope_section=[16, 24, 24]))
TOWER_2_5 = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                 fullatt_block_indexes=list(range(32)))
TRUE_SIZES = {  # model type, language model, vision tower
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl", QWEN2_5 | dict(
            hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, vocab_size=151936,
            num_key_value_heads=2, intermediate_size=11008, tie_word_embeddings=True),
        TOWER_2_5 | dict(out_hidden_size=2048)),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl", QWEN2_5 | dict(
            hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, vocab_size=152064,
            num_key_value_heads=4, intermediate_size=18944, tie_word_embeddings=False),
        TOWER_2_5 | dict(out_hidden_size=3584)),
    "Qwen3-VL-8B": (
        "qwen3_vl", dict(
            hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, vocab_size=151936,
            num_key_value_heads=8, intermediate_size=12288, tie_word_embeddings=False,
            head_dim=128, rope_parameters=ROPE_LARGE | dict(mrope_section=[24, 20, 20])),
        dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16,
             out_hidden_size=4096, deepstack_visual_indexes=[8, 16, 24]))}

def model_config(name):
    kind, text, tower = TRUE_SIZES[name]
    ids = {key: value for key, value in json_of(TINY / "config.json").items()
           if key.endswith("token_id")}
    return transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config=tower,
        tie_word_embeddings=text["tie_word_embeddings"], **ids)

aten = torch.ops.aten
BY_INDEX = aten.index.Tensor, aten.index_put.default, aten.index_put_.default

def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors on the meta device, which have shapes but no numbers.
    Integers keep their numbers, on the CPU, so that code which reads them runs as it is."""
    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = tensors_in([*args, *kwargs.values()])
        on_meta = [x.is_meta for x in tensors]
        if func is aten._local_scalar_dense.default and any(on_meta):
            return 1.0 if tensors[0].is_floating_point() else 1  # any number does
        if any(on_meta) and func in BY_INDEX:
            places = []  # a mask of true and false says where, and so how many
            for index in args[1]:
                is_mask = index is not None and index.dtype == torch.bool
                places += index.nonzero().unbind(1) if is_mask else [index]
            args = (args[0], places, *args[2:])
        if any(on_meta) and not all(on_meta):
            args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
        elif not any(on_meta) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            dtype = tensors[0].dtype if tensors else kwargs.get("dtype") or torch.float32
            kwargs = kwargs if dtype.is_floating_point else kwargs | {"device": "cpu"}
        out = func(*args, **kwargs)
        for x in tensors_in([out]):
            if x.is_meta:
                self.count(x.untyped_storage())
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        def freed(_):
            del self.known[key]
            self.live -= size
        if key not in self.known:
            self.known[key] = weakref.ref(storage, freed)
            self.live += size
            self.peak = max(self.peak, self.live)

    def peak_of(self, function, *args, **named):
        """The peak in GB while it runs."""
        self.peak = self.live
        function(*args, **named)
        return self.peak / 1e9

def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                    enable_gqa=False):
    """The memory of a GPU's kernel: no scores; a mask is copied in the query's dtype."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.device).to(q.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

def product_of_a_gpu(a, b):
    return torch.empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32, device=a.device)

def prompt_of_images(length, config):
    """One large image takes the bytes of many small ones. Its pixels are in host memory."""
    tower = config.vision_config
    side = 16 * tower.spatial_merge_size
    rows = (length - 16) // (side // tower.spatial_merge_size) * tower.spatial_merge_size
    numbers = tower.in_channels * tower.temporal_patch_size * tower.patch_size ** 2
    tokens = rows * side // tower.spatial_merge_size ** 2
    with _disable_current_modes():
        pixels = torch.empty(rows * side, numbers, device="meta")
    picture = perl.Picture(pixels, torch.tensor([[1, rows, side]]), tokens)
    ids = [config.vision_start_token_id] + [config.image_token_id] * tokens
    return perl.Prompt(None, ids + [0] * (length - len(ids)), [picture])

@torch.no_grad()
def sample_at_true_size(model, cfg):
    """perl.py's prefill, and a decoding step in which every row reaches its full length."""
    n, full = cfg.rollouts_per_order, cfg.max_new_tokens - 32  # the buffer grows by 32
    count = cfg.rollout_batch // n
    length = min(4 * cfg.max_tokens_per_micro_batch // count, cfg.max_prompt_tokens)
    joining = [(prompt_of_images(length, model.config), [[] for _ in range(n)])
               for _ in range(count)]
    cache = perl.prefill(model, PROCESSOR, joining, cfg, perl.Cache(layers=[]))
    for layer in cache.layers:
        shape = list(layer.rows.shape)
        shape[3] = layer.length = full
        layer.rows = layer.rows.new_empty(shape)
    joining[0][0].ids.pop()  # one prompt is padded, so that there is a mask
    rows = []
    for prompt, responses in joining:
        prompt.delta = 0
        rows += [(prompt, [0] * full) for _ in responses]
    inputs = perl.next_inputs(model, PROCESSOR, rows, cache, cfg)
    sampling = GenerationConfig(max_new_tokens=1, do_sample=True, top_k=0, temperature=0.9,
                                pad_token_id=0, eos_token_id=[1], suppress_tokens=[2, 3])
    model.generate(**inputs, generation_config=sampling)
    model.model.rope_deltas = None

def rollouts_at_true_size(cfg, config):
    """A full micro-batch of nearly nothing but images: the responses have 96 tokens."""
    n, tokens = cfg.rollouts_per_order, cfg.max_tokens_per_micro_batch
    length, rollouts = min(tokens, cfg.max_prompt_tokens) - 96 * n, []
    for _ in range(tokens // (length + 96 * n)):
        prompt = prompt_of_images(length, config)
        rollouts += [Rollout(prompt, (0,), "", [0] * 96, "", False, advantage=1.0)] * n
    return rollouts

def update_at_true_size(model, cfg, times, *, on_host):
    """add_gradients on a full micro-batch, beside the gradients of an earlier one."""
    hooks = []
    for weight in trained(model):
        weight.grad_dtype = torch.float32
        if on_host:  # in the place of SplitAdamW.add
            def drop(own):
                own.grad = None
            hooks.append(weight.register_post_accumulate_grad_hook(drop))
        else:
            weight.grad = torch.zeros_like(weight, dtype=torch.float32)
    model.train()
    for _ in range(times):
        perl.add_gradients(model, PROCESSOR, rollouts_at_true_size(cfg, model.config), 1, cfg)
    model.eval().zero_grad()
    for hook in hooks:
        hook.remove()

SMALL = dict(rollout_batch=48, max_tokens_per_micro_batch=4096, max_prompt_tokens=2048)
FULL = [("AdamW on the host", {}, HOST), ("gradients there too", {}, ALL_ON_HOST),
        ("--lora-rank 64", dict(lora_rank=64), HOST)]
PHASES_OF_MEMORY = {"sampling": "GPU while sampling", "update": "GPU in an update",
                    "KL reference": "GPU for the KL reference"}

@table("name, cases", [
    ("Qwen2.5-VL-3B", FULL), ("Qwen3-VL-8B", FULL[:2]), ("Qwen2.5-VL-7B", [
        ("48 sequences, gradients there too", SMALL, ALL_ON_HOST),
        ("--freeze-vision", dict(freeze_vision=True), HOST), *FULL])])
def test_true_size(name, cases, monkeypatch):
    """perl.py's own passes, run without numbers, and its arithmetic, which may be 15 % above and
    3 % below. Prints the README's table (pytest -s). Prompts of 8,192 tokens, or of 2,048."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(perl, "scaled_dot_product_attention", flash_attention)
    monkeypatch.setattr(perl, "product", product_of_a_gpu)
    live, measured = LiveBytes(), {}
    with live:
        config = model_config(name)
        with torch.device("meta"):
            model = perl.FAMILY_MODEL.from_config(config, dtype=torch.bfloat16,
                                                  attn_implementation="shared_prompt").eval()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        weights = live.live / 1e9
        for what, changes, place in cases:
            cfg, peaks = perl.Config(model=name, dtype="bf16", **changes), {}
            model.model.visual.requires_grad_(not cfg.freeze_vision)
            if cfg.lora_rank:
                perl.add_lora(model, cfg)
            elif changes == SMALL or place == HOST and not changes:
                peaks["sampling"] = live.peak_of(sample_at_true_size, model, cfg)
                rollouts = rollouts_at_true_size(cfg, config)
                peaks["KL reference"] = weights + live.peak_of(
                    perl.frozen_logprobs, model, PROCESSOR, rollouts, cfg)
            peaks["update"] = live.peak_of(
                update_at_true_size, model, cfg, 2 if what == FULL[0][0] else 1,
                on_host=place == ALL_ON_HOST)
            counted, row = perl.count_memory(model, cfg, place, 1), f"| {name} | {what} |"
            for phase, part in PHASES_OF_MEMORY.items():
                row += f" {peaks[phase]:.1f} ({counted[part]:.1f}) |" if phase in peaks else " |"
            print(row)
            for phase, peak in peaks.items():
                part = PHASES_OF_MEMORY[phase]
                assert 0.97 <= counted[part] / peak <= 1.15, (row, phase)
            measured[what] = max(peaks.values())
    small = measured.get("48 sequences, gradients there too", 0)
    assert small <= 46, "full fine-tuning of the 7B on a card of 48 GB"

# ---- Memory and machines: gradients and weights that are not finite --------------------
def spoil_gradients(monkeypatch, updates, bad=math.nan, rank=0):
    """`bad` losses in these updates, from 1, of one process. Returns which changed the weights."""
    every_second_is_right(monkeypatch)
    real, real_step, changed = perl.policy_loss, perl.SplitAdamW.step, []
    def policy_loss(*args, **more):
        loss, stats = real(*args, **more)
        if len(changed) + 1 in updates and int(os.environ.get("RANK", 0)) == rank:
            return loss * bad, dict.fromkeys(stats, bad)
        return loss, stats
    def step(self):
        before = [weight.detach().clone() for weight in self.weights.values()]
        changed.append(False)
        norm = real_step(self)
        changed[-1] = not all(map(torch.equal, before, self.weights.values()))
        return norm
    monkeypatch.setattr(perl, "policy_loss", policy_loss)
    monkeypatch.setattr(perl.SplitAdamW, "step", step)
    return changed

ONE_UPDATE = dict(updates_per_step=1, save_every=1, eval_every=0, questions_per_step=2,
                  max_new_tokens=16)

@table("updates, bad", [([2], math.inf), ([1, 2, 4], math.nan), ([2, 3, 4], math.nan)])
def test_an_update_with_a_gradient_that_is_not_finite_is_skipped_and_counted(
        data, tmp_path, monkeypatch, capsys, updates, bad):
    """Three in a row end the run, which goes on from its last good checkpoint."""
    run, ended = tmp_path / "stage1", updates == [2, 3, 4]
    with monkeypatch.context() as patch:
        changed = spoil_gradients(patch, updates, bad)
        with ends("3 updates in a row .* not finite") if ended else contextlib.nullcontext():
            perl.main(arguments(data, tmp_path, **ONE_UPDATE))
    rows = metrics_of(run)
    assert all(row["kept"] for row in rows), "every step has an update"
    assert changed == [k not in updates for k in (1, 2, 3, 4)]
    assert [row["skipped"] for row in rows] == [not each for each in changed][:len(rows)]
    assert [row["grad_norm"] > 0 for row in rows] == changed[:len(rows)]
    assert "skipped 1" in capsys.readouterr().out and len(rows) == 4 - ended
    assert newest(run) == f"checkpoint-{4 - ended}"
    perl.main(["--resume", str(run)])
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4]
    assert weights_of(run / "checkpoint-4").isfinite().all()

@table("flags", [dict(), dict(lora_rank=4)])
def test_a_weight_that_is_not_finite_reaches_no_checkpoint(data, tmp_path, monkeypatch, flags):
    def save_checkpoint(*args, model, real=perl.save_checkpoint, **kwargs):
        if args[1].step == 2:
            trained(model)[-1].data.view(-1)[0] = math.inf
        real(*args, model=model, **kwargs)
    monkeypatch.setattr(perl, "save_checkpoint", save_checkpoint)
    with ends("step 2: a weight is not finite"):
        perl.main(arguments(data, tmp_path, **ONE_UPDATE | flags))
    assert newest(tmp_path / "stage1") == "checkpoint-1"
    assert weights_of(tmp_path / "stage1" / "checkpoint-1").isfinite().all()

@table("share", [True, False])
def test_text_only_and_two_image_questions_train_and_evaluate_together(
        data, tmp_path, monkeypatch, share):
    images = [f"images/{path.name}" for path in sorted((data.parent / "images").iterdir())]
    rows = []
    for k in range(20):
        rows.append(dict(id=f"pair {k}", images=images[k % 4:k % 4 + 2], answer="2",
                         question="<image><image> Which one is larger?", order_rule="index"))
        rows.append(dict(id=f"text {k}", images=[], question=f"What is {k} plus 1?",
                         answer=str(k + 1), order_rule=("keep", "never")[k % 2]))
    mixed = write_rows(data.with_name("mixed.jsonl"), *rows)
    trained, sampled = record(monkeypatch, "update"), record(monkeypatch, "sample_groups")
    every_second_is_right(monkeypatch)
    perl.main(arguments(mixed, tmp_path, *["--no-share"] * (not share), eval_data=mixed, steps=1,
                        questions_per_step=40, rollouts_per_order=2, max_new_tokens=12))
    start, row = metrics_of(tmp_path / "stage1")
    assert row["kept"] == 40 and row["grad_norm"] > 0 and row["kl"] >= 0
    assert row.keys() >= {"eval_accuracy", "eval_worst", "eval_bias"} <= start.keys()
    for group in trained[0][4]:
        orders = {(0, 1): 2, (1, 0): 2} if group[0].prompt.sample.images else {(): 4}
        assert Counter(r.order for r in group) == orders
    for _, _, asked, orders, _ in (sampled[0], sampled[2]):  # the evaluations
        by_kind = {sample.id[:4]: its_orders for sample, its_orders in zip(asked, orders)}
        assert by_kind == {"text": [()], "pair": [(0, 1), (1, 0)]} and len(asked) == 40

# ---- Memory and machines: several processes --------------------------------------------
# Which of the three groups each process has; "empty": all of them on one process.
PARTS = dict(even=([0, 1], [2]), empty=([0, 1, 2], []))

def three_updates(accelerator, data, parts):
    """Gradient norms, weights and the optimizer's state after updates on parts[process]."""
    cfg, model = tiny_config(lr=1e-6), load_tiny()
    optimizer = perl.SplitAdamW(model, cfg, accelerator)
    questions = [dataclasses.replace(sample, order_rule="keep", movable=None)  # all may move
                 for sample in perl.load_samples(data)[:3]]
    groups, norms = written_groups(questions), []
    own = parts[accelerator.process_index] if accelerator.num_processes > 1 else [0, 1, 2]
    for _ in range(3):
        norms += perl.update(model, None, optimizer, PROCESSOR, [groups[k] for k in own],
                             cfg=cfg)[1]
    before = flat_weights(model)
    perl.update(model, None, optimizer, PROCESSOR, [], cfg=cfg)
    assert torch.equal(before, flat_weights(model)), "no group in any process: no update"
    return norms, before, optimizer.state_dict()

def two_processes(data, out):
    accelerator, patch = perl.start_processes(perl.Config()), pytest.MonkeyPatch()
    rank = accelerator.process_index
    with patch.context() as bound:
        bound.setattr(perl, "MAX_GRAD_NORM", 0.01)
        for case, parts in PARTS.items():
            torch.save(three_updates(accelerator, data, parts), out / f"{case}-{rank}.pt")
    # The end of a run takes the processes apart; that of the last one may.
    with patch.context() as bound:
        bound.setattr(perl.accelerate.Accelerator, "end_training", lambda self: None)
        for dtype in ("float32", "bf16"):
            flags = dict(questions_per_step=4, dtype=dtype, steps=3)
            flags |= dict(eval_data="") if dtype == "bf16" else {}
            first = out / f"first-{dtype}"
            perl.main(arguments(data, out / f"whole-{dtype}", **flags))
            with pytest.raises(Killed):
                run_with(bound, "update", 3, die, arguments(data, first, **flags))
            accelerator.wait_for_everyone()
            if rank == 0:
                shutil.copytree(first, out / f"one-{dtype}")
            accelerator.wait_for_everyone()
            perl.main(["--resume", str(first)])
        spoil_gradients(bound, [1, 2, 3], rank=1)
        with pytest.raises(SystemExit, match="3 updates in a row"):
            perl.main(arguments(data, out / "three", **ONE_UPDATE))
    spoil_gradients(patch, [2], rank=1)
    perl.main(arguments(data, out / "nan", **ONE_UPDATE))

# perl joins the processes before the tests, which make an accelerator of their own, are loaded.
LAUNCHED = """
import sys
sys.path[:0] = {paths!r}
import perl
perl.start_processes(perl.Config())
import {tests} as tests
tests.two_processes(*map(tests.Path, sys.argv[1:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = {name: value for name, value in os.environ.items()
         if not name.startswith("ACCELERATE") and name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

@pytest.fixture(scope="module")
def launched(data, tmp_path_factory):
    out, here = tmp_path_factory.mktemp("two"), Path(__file__)
    script = out / "two.py"
    script.write_text(LAUNCHED.format(paths=[str(HERE), str(here.parent)], tests=here.stem))
    ended = subprocess.run([*TORCHRUN, script, data, out], timeout=240, env=ALONE,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(f"done: {out / 'nan'}") == 1 and "2 process(es)" in ended.stdout
    return out

def test_two_processes_give_the_numbers_of_one(launched, data, monkeypatch):
    monkeypatch.setattr(perl, "MAX_GRAD_NORM", 0.01)
    start = flat_weights(load_tiny())
    for case, parts in PARTS.items():
        norms, weights, states = three_updates(ACCELERATOR, data, parts)
        both = [torch.load(launched / f"{case}-{rank}.pt") for rank in (0, 1)]
        for other_norms, other_weights, _ in both:
            assert len(norms) == 3 and other_norms == pytest.approx(norms, rel=1e-4)
            drift = (other_weights - weights).norm() / (weights - start).norm()
            assert drift < 0.01 and torch.equal(other_weights, both[0][1])
        parts = [both[0][2], both[1][2]]
        assert parts[0].keys() | parts[1].keys() == states.keys()
        sizes = [sum(state["master"].numel() for state in part.values()) for part in parts]
        assert sum(sizes) == len(start) and max(sizes) < 0.52 * len(start)
        for name, state in (parts[0] | parts[1]).items():  # the first moment: mean gradient
            error = (state["exp_avg"] - states[name]["exp_avg"]).norm()
            assert error <= 1e-4 * states[name]["exp_avg"].norm() + 1e-12

@table("dtype", ["float32", "bf16"])
def test_runs_of_two_processes_and_their_resume(launched, straight, dtype):
    """Three steps at a time; and two, then on: on two processes to the last bit, then on one."""
    whole, first, one = (launched / f"{name}-{dtype}" / "stage1"
                         for name in ("whole", "first", "one"))
    *start, _, last = rows = metrics_of(whole)
    assert [row["kept"] + row["dropped"] for row in rows[-3:]] == [4] * 3
    if dtype == "float32":  # the other run has no evaluation
        assert start[0] == metrics_of(straight)[0], "it does not depend on processes"
        assert last.keys() == metrics_of(straight)[-1].keys()
    assert_equal_runs(first, whole, step=3)
    assert {path.name for path in whole.iterdir()} >= {"two.py", "perl.py"}, "a fork is kept"
    assert newest(one) == "checkpoint-2" and len([*one.glob("*/optimizer-*")]) == 2
    perl.main(["--resume", str(one)])
    assert states_of(one / "checkpoint-3").keys() == states_of(whole / "checkpoint-3").keys()
    assert len([*one.glob("checkpoint-3/optimizer-*")]) == 1
    assert len([*whole.glob("checkpoint-3/optimizer-*")]) == 2

def test_a_gradient_that_is_not_finite_in_one_of_two_processes(launched):
    rows = metrics_of(launched / "nan" / "stage1")
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0] and all(row["kept"] for row in rows)
    weights = weights_of(launched / "nan" / "stage1" / "checkpoint-4")
    assert weights.isfinite().all() and not torch.equal(weights, weights_of(TINY))
    assert [row["skipped"] for row in metrics_of(launched / "three" / "stage1")] == [1, 1]

# ---- Main ------------------------------------------------------------------------------
def test_a_copy_named_my_perl_beside_the_data_is_a_whole_program(data, tmp_path):
    samples, script = tmp_path / "house" / "data_samples", tmp_path / "house" / "my_perl.py"
    shutil.copytree(data.parent, samples)
    shutil.copytree(TINY, samples / "tiny")
    shutil.copy(samples / "eval.jsonl", samples / "test.jsonl")
    text, guard = (HERE / "perl.py").read_text(), 'if __name__ == "__main__":\n'
    assert text.count(guard) == 1
    script.write_text(text.replace(guard, f"""
def tree_attention(*args, own=tree_attention):
    print("own attention")
    return own(*args)

{guard}    main([*sys.argv[1:], "--dry-run"])
    print("dry run ended")
"""))
    argv = "--steps 1 --questions-per-step 4 --eval-every 0 --max-new-tokens 32".split()
    ended = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True,
                           env=ALONE, cwd=tmp_path, timeout=120)
    assert ended.returncode == 0, ended.stderr
    dry, trained = ended.stdout.split("dry run ended\n")
    assert f"{samples / 'train.jsonl'}: 8 questions" in dry and "order (0, 1" in dry
    assert "own attention" not in dry and "own attention" in trained
    run = tmp_path / "runs" / "tiny-seed0" / "stage1"
    assert (run / "my_perl.py").read_bytes() == script.read_bytes()
    assert newest(run) == "checkpoint-1" and not (run / "perl.py").exists()
    assert [*run.parent.iterdir()] == [run], "the dry run wrote nothing"

@table("flag, value, message", [
    ("--model", "/no/such/model", "could not load '/no/such/model"),
    ("--data", "none.jsonl", "none.jsonl"), ("--data", TINY / "config.json", "config.json, line 1"),
    ("--eval-data", "none.jsonl", "none.jsonl"), ("--max-prompt-tokens", 5, "no question is left"),
    ("--out", TINY / "config.json", "cannot run in .*config.json"),
    ("--questions-per-step", 3, "--questions-per-step must be a multiple")])
def test_a_run_that_cannot_start_ends_with_one_sentence(
        data, tmp_path, monkeypatch, flag, value, message):
    if flag == "--questions-per-step":
        monkeypatch.setattr(perl.accelerate.Accelerator, "num_processes", 2)
    refuses(message, perl.main, arguments(data, tmp_path / "run") + [flag, str(value)])
    assert not (tmp_path / "run").exists()

# ---- Fuzz: FUZZ=N for N times as many examples, drawn anew each time -------------------
FUZZ, SEEN = int(os.environ.get("FUZZ", 0)), Counter()

def fuzz(n_examples, **drawn):
    """Call a test with n_examples draws; the same ones each time, unless FUZZ is set."""
    options = hypothesis.settings(
        max_examples=n_examples * max(FUZZ, 1), derandomize=not FUZZ, database=None, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck))
    return lambda test: options(given(**drawn)(test))

@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for k in range(5):
        noise(28 * (k + 1), 28).save(folder / f"g{k}.png")
    (folder / "empty.png").touch()
    return folder

def load_line(folder, row):
    """The samples of a file of one line, or none if a sentence refuses line 1."""
    (folder / "fuzz.jsonl").write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    try:
        return perl.load_samples(folder / "fuzz.jsonl")
    except perl.UserError as error:
        assert re.search(r"fuzz\.jsonl, line 1(, field (?s:.*))?: ", str(error)), error
        assert len(str(error)) < 2000
        return []

TEXTS = st.lists(st.text(max_size=4) | st.sampled_from([
    "Which?", " like ", "\n", "<image_1>", "<image_01>", "<image", "_1>", "<imagE>", "images",
    "{{x}}", "{% if %}", "<think>", "</think>", "<tool_call>", "<|", "|>", "im_end", "1", "B",
    "\\boxed{2}", "\U0001f600", '"', "\\", "\u202e", "\x1b", "\u2028",  # harmless; and harmful:
    "<image_2>", "<image_99>", "image 2", "<image>", "<|im_end|>", "\0", "\ud83d"]),
    max_size=3).map("".join)
JUNK = TEXTS | st.sampled_from([None, True, 3, 1.5, 10 ** 400, {}, [], [0, 0], [1, 0], ["\0"],
                                ["g0.png", "empty.png"], ["g0.png"], ["../g0.png"], ["."]])

@st.composite
def lines(draw):
    """A record: about half of them as they should be, the others with something wrong in them."""
    n = draw(st.sampled_from([0, 1, 2, 2, 3, 3, 3, 4, 5, 6, 26, 27]))
    images = [f"g{k % 5}.png" for k in draw(st.permutations(range(n)))]
    movable = draw(st.sampled_from([None, [k for k in range(n) if draw(st.booleans())]]))
    options = n if movable is None else len(movable)
    listed = draw(st.permutations(range(1, max(n, 1) + 1)))[:draw(st.integers(1, 4))]
    rule = draw(st.sampled_from(perl.ORDER_RULES))
    answer = {"index": str(listed[0]), "letter": perl.LETTERS[listed[0] % 26 % max(options, 1)],
              "sequence": draw(st.sampled_from([",", " , "])).join(map(str, listed))
              }.get(rule) or "7" + draw(TEXTS)
    pieces = draw(st.permutations(["<image>"] * n + [draw(TEXTS), draw(TEXTS)]))
    row = dict(id="q" + draw(TEXTS), images=images, question="".join(pieces), answer=answer,
               order_rule=rule, movable=movable)
    if draw(st.integers(0, 3)) == 0:
        row[draw(st.sampled_from([*row, "extra"]))] = draw(JUNK)
    if draw(st.integers(0, 9)) == 0:  # torn
        return json.dumps(row).encode()[:draw(st.integers(1, 40))]
    return row

def meaning(images, movable, sample):
    """What question and answer say with labels for names, read from the README's table alone."""
    def picture(number):
        return f"[{images[int(number) - 1]}]"
    question = re.sub(r"<image_(\d+)>", lambda found: picture(found[1]), sample.question)
    answer = sample.answer
    if sample.order_rule in ("index", "sequence"):
        answer = [picture(number) for number in answer.split(",")]
    if sample.order_rule == "letter":
        answer = picture(sorted(movable)["ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(answer)] + 1)
    if sample.order_rule == "keep":
        assert not re.search(r"\bimages?[\s_#]*\d", answer, re.IGNORECASE)
    return question, answer

def control_tokens(sample):
    ids = perl.encode_prompt(sample, PROCESSOR).ids
    assert len(ids) == perl.prompt_length(sample, PROCESSOR)
    controls = {*PROCESSOR.tokenizer.all_special_ids, *PROCESSOR.banned_ids, *PROCESSOR.eos_ids}
    return Counter(token for token in ids if token in controls)

@fuzz(250, row=lines(), rng=st.randoms(use_true_random=False))
def test_fuzz_records(fuzz_folder, row, rng):
    """A record is refused by name, or means the same in every order, without control tokens."""
    kept = load_line(fuzz_folder, row)
    SEEN["kept" if kept else "refused"] += 1
    for asked in kept:
        n, labels = len(asked.images), [f"picture {k}" for k in range(len(asked.images))]
        movable = list(range(n)) if row["movable"] is None else row["movable"]
        free = [] if asked.order_rule == "never" else sorted(movable)
        bare = dataclasses.replace(asked, question="<image>" * n)
        before, controls, answers = meaning(labels, movable, asked), control_tokens(bare), {}
        for order in perl.draw_orders(asked, 4, 1.0, rng):
            assert all(order[k] == k for k in range(n) if k not in free)
            permuted = perl.permute(asked, order)
            assert permuted.images == tuple(asked.images[old] for old in order)
            assert meaning([labels[old] for old in order], movable, permuted) == before
            assert control_tokens(permuted) == controls
            shown = permuted.images, permuted.question  # what the model sees has one answer
            assert answers.setdefault(shown, permuted.answer) == permuted.answer

def test_fuzz_ran():
    """Hypothesis may stop early: so the examples are counted. pytest -s shows them."""
    print(SEEN)
    assert SEEN.total() >= 200 * max(FUZZ, 1) and 0.1 < SEEN["kept"] / SEEN.total() < 0.9

# ---- The READMEs' forks and reading map ------------------------------------------------
def snippets_of(name):
    """The fork snippets of a README: its Python blocks that replace a part of perl.py."""
    blocks = re.findall(r"(?s)```python\n(.*?)```", (HERE / name).read_text())
    return [block for block in blocks if "import perl" in block]

SNIPPETS = snippets_of("README.md") + snippets_of("data_samples/README.md")
SNIPPETS += [Path(ablate.ARMS[name].fork).read_text() for name in ("per-order", "clean")]

def as_loss(ratios, advantages):
    """policy_loss of two rollouts of two tokens each, whose ratios to the old policy are given."""
    rollouts = [Rollout(None, (), "", [5, 5], "", False)] * 2
    loss, _ = perl.policy_loss(
        torch.tensor(ratios).log(), torch.zeros(2, 2), None, torch.tensor(advantages),
        torch.ones(2, 2), clip_low=0.2, clip_high=0.2, beta=0.0,
        denominator=perl.loss_denominator(rollouts))
    return loss.item()

def reward_of_100_tokens():
    rollout = Rollout(None, (), "5", [1] * 100, r"<think>x</think>\boxed{5}", False)
    perl.grade(rollout, tiny_config())
    return rollout.reward

def advantages_of(*rewards):
    return perl.group_advantages(torch.tensor([rewards]))[0].tolist()

def in_two_orders(accuracies):
    """Two rollouts each to a prompt as given, "g", and a permuted one, "p"."""
    return [dataclasses.replace(rollout, order=(k // 2,), prompt="ggpp"[k])
            for k, rollout in enumerate(scored_group(accuracies))]

def verdicts_of_two_orders():
    verdicts = []
    for accuracies in ([1, 0, 0, 0], [1, 0, 0, 1]):
        group = in_two_orders(accuracies)
        verdicts.append(perl.verdict(group, tiny_config(filter="disagree")))
    return verdicts

def two_orders(field):
    group = in_two_orders([1, 0, 0, 0])
    perl.set_advantages([group])
    return [getattr(r, field) for r in group]

def pairs():
    sample = Sample("s", tuple("abc"), "?", "1-3", "pair")
    return [perl.permute(sample, (2, 0, 1)).answer, perl.same_answer("1-3", "1-3"),
            perl.same_answer("2-4", "1-3"), perl.same_answer("1/2", "0.5")]

def judged_rewards():
    """Of responses of 0, 100 and 300 characters in two groups, which are wrong."""
    groups = [scored_group([0]), scored_group([0, 0])]
    for rollout, length in zip(flatten(groups), (0, 100, 300)):
        rollout.text = "x" * length
    perl.set_advantages(groups)
    return flatten((rollout.reward, rollout.advantage) for rollout in flatten(groups))

def tokens_with_gradient():
    """Which of five tokens of rising entropy have a gradient; by what ten tokens are divided."""
    hidden = torch.tensor([[9.0, 0], [4, 0], [2, 0], [1, 0], [0.5, 0]], requires_grad=True)
    logprobs = perl.token_logprobs(lambda rows: rows * 1, hidden, torch.zeros(5).long(),
                                   torch.zeros(0).long(), 1.0)
    assert torch.allclose(logprobs, torch.log_softmax(hidden, -1)[:, 0]), "the same values"
    logprobs.sum().backward()
    return hidden.grad.any(1).tolist(), perl.loss_denominator(scored_group([0, 0]))

FORKS = {  # the name in a snippet: what it changes, and what that is afterwards
    "shorter": (reward_of_100_tokens, pytest.approx(0.95)),
    "gspo": (lambda: as_loss([[2.0, 0.5], [1.1, 1.1]], [1.0, 2.0]),
             pytest.approx(-(1.0 + 2.2) / 2)),
    "centered": (lambda: advantages_of(1.0, 0, 0, 0) + advantages_of(*[0.1] * 3),
                 [0.75, -0.25, -0.25, -0.25, 0, 0, 0]),
    "only_permuted": (lambda: perl.draw_orders(sample(n=2), 0, 1.0, random.Random(0)), [(1, 0)]),
    "pair": (pairs, ["2-1", True, False, True]),
    "disagree": (verdicts_of_two_orders, ["kept", "agree"]),
    "per_order": (lambda: two_orders("advantage"), [1, -1, 0, 0]),
    "clean": (lambda: two_orders("prompt"), list("gggg")),
    "judged": (judged_rewards, pytest.approx([0.2, 0, 0.1, 1, 0.05, -1], abs=1e-5)),
    "high_entropy": (tokens_with_gradient, ([False] * 4 + [True], pytest.approx(0.4)))}

def replaced_by(snippet):
    """The names of perl that a snippet assigns to, or changes an entry of."""
    return set(re.findall(r"perl\.(\w+)(?=[^=\n]* \+?= )", snippet))

def test_the_readme_has_forks_of_a_few_lines():
    assert len(snippets_of("README.md")) >= 3
    for snippet in SNIPPETS:
        assert len(snippet.split("\n")) <= 21 and snippet.rstrip().endswith("perl.main()")
        unknown = replaced_by(snippet) - vars(perl).keys()
        assert replaced_by(snippet) and not unknown, f"without effect: perl.py has no {unknown}"
        assert any(name in snippet for name in FORKS), f"FORKS lacks a value to check:\n{snippet}"

@table("number", range(len(SNIPPETS)))
def test_a_fork_does_what_it_says_and_runs(data, tmp_path, monkeypatch, number):
    """Its values by hand; then a step from the command line on, which uses what it replaced."""
    snippet, started = SNIPPETS[number], []
    values = [FORKS[name] for name in FORKS if name in snippet]
    for name, value in vars(perl).copy().items():  # put back after the test, tables' entries too
        if name in replaced_by(snippet) | {"main"} or name.isupper() and isinstance(value, dict):
            monkeypatch.setattr(perl, name, dict(value) if isinstance(value, dict) else value)
    main, choices = perl.main, perl.CHOICES["filter"]
    assert all(value() != after for value, after in values), "each changes something"
    perl.main = lambda: started.append(number)
    exec(snippet, {"__name__": "__main__"})
    assert started == [number] and all(value() == after for value, after in values)
    replaced = [name for name in replaced_by(snippet) if callable(getattr(perl, name))]
    used = [record(monkeypatch, name) for name in replaced]
    new = [choice for choice in perl.CHOICES["filter"] if choice not in choices]
    main(arguments(data, tmp_path, filter=(new or ["none"])[0], steps=1, eval_every=0, beta=0,
                   alpha_end=1))
    assert all(used), replaced
    row, = metrics_of(tmp_path / "stage1")
    assert row["dropped"] == sum(row[name] for name in perl.VERDICTS[1:])
    assert row["kept"] + row["dropped"] >= 3

def test_a_judge_is_asked_once_per_batch_and_not_in_evaluation(data, tmp_path, monkeypatch):
    snippet, = [snippet for snippet in SNIPPETS if "def judged" in snippet]
    monkeypatch.setattr(perl, "set_advantages", perl.set_advantages)
    main, asked, names = perl.main, [], {}
    monkeypatch.setattr(perl, "main", lambda: None)
    exec(snippet, names)
    def judge(responses, judge=names["judge"]):
        asked.append(len(responses))
        return judge(responses)
    names["judge"] = judge
    main(arguments(data, tmp_path, filter="none", steps=2, eval_every=1))
    assert asked == [3 * 2 * 3] * 2, "questions x orders x rollouts, once in each step"

def test_the_reading_map():
    """README's table from the paper to the code: the places name their equations."""
    readme, code = (HERE / "README.md").read_text(), (HERE / "perl.py").read_text()
    table = readme.partition("| paper | code |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().split("\n")[1:]]
    assert len(rows) >= 8
    fields = {f.name for kind in (Sample, Rollout) for f in dataclasses.fields(kind)}
    for paper, places in rows:
        names, said = set(re.findall(r"`([A-Za-z_]+)`", places)) - fields, []
        assert names and names <= vars(perl).keys(), f"{paper}: not all of {places} is in perl.py"
        for name in names:
            if isinstance(getattr(perl, name), type(ends)):
                banner = code.partition(f"\ndef {name}(")[0].rpartition("# ---- ")[2].split("\n")[0]
                said.append(f"{getattr(perl, name).__doc__} {banner}")
        for place in re.findall(r"Eq\. [\d-]+|Algorithm 1|A\.[\d.]*\d", paper):
            found = [place in text for text in said]
            assert all(found) if place.startswith("Eq") else any(found), (place, names)

# ---- eval.py: answers in free text -----------------------------------------------------
OPTION_TEXTS = ["Left image", "Right image", "Both images", "Neither image"]
LATTER = ["the second image", "the third image"]
POINTS = ["Point A", "Point B", "Point C", "Point D"]

CHOICES = [
    (r"\boxed{\text{(C)}}", "C"), ("C. Both images", "C"), ("Both images", "C"), ("**C**", "C"),
    ("c", "C"), ("<answer>C", "C"), ("E", None), (" \n", None), (r"\boxed{A, C}", None),
    ("A and C", None), ("Not C.", None), ("I cannot tell.", None), ("B. cats or C. dogs", None),
    ("<think>the answer is C", None), ("<think>A or B?</think>\n\\boxed{C. Both images}", "C"),
    ("The answer is A. No, the answer is C.", "C"), ("(A) looks right. However, (C) fits.", "C"),
    ("option A looks right, but C fits better", "C"), ("(C) Both images. (A) shows one only.", "C"),
    ("The answer is C because A is not in the picture.", "C"),
    ("(A) Left image\n(B) Right image\n(C) Both images\n(D) Neither image", None),
    ("Both show it. (C)\n\nWhy the others are wrong:\n* **(A) Left.** It would be the correct "
     "answer if it was red.\n* **(B) Right.** No.", "C")]
OF_OPTIONS = [
    ("Image 3", LATTER, "B"), ("the 2nd picture", LATTER, "A"),
    ("(B) the second image", LATTER, "B"),  # a letter counts more than words
    ("Therefore, the second image is closer to the first than the third image.", LATTER, "A"),
    ("The second image is most similar. The third image has other colours.", LATTER, "A"),
    ("Point A is closer to the camera. Point B is further back.", POINTS[:2], "A"),
    ("Yes, the cat is under the car.", ["yes", "no"], "A"), (r"\boxed{14}", ["12", "14"], "B"),
    ("There are three people.", ["0", "3", "2", "1"], "B"), ("14", ["14", "14"], "A"),
    (r"\boxed{\frac12}", ["0.25", "0.5"], "B"), ("5 m", ["(A) 3 m", "(B) 5 m"], "B"),
    ("A unique shape is shown.", POINTS, None), ("In this answer a person is named.", POINTS, None),
    ("I cannot see a picture.", list("ABCDE"), None),
    ("It cannot be determined.", ["yes", "no", "cannot be determined"], "C"),
    ("Box B has the right curve and fits. Box A, on the other hand, is too small.",
     ["box A", "box B"], "B")]
OF_ANIMALS = [
    ("选C", "C"), ("答案是A。", "A"), ("不选A，选B。", "B"), ("A不正确，C正确", "C"),
    ("选项A和选项C都正确", None), ("A = 4, so I choose option B.", "B"),
    ("A = 2\nB = 5\nprint(A + B)", None), ("def area(B):\n    return 2 * B", None),
    ("```python\nB = 1\nprint(B)\n```\nSo the answer is C.", "C")]
@table("options, response, letter",
       [(OPTION_TEXTS, *row) for row in CHOICES] + [(row[1], row[0], row[2]) for row in OF_OPTIONS]
       + [(["cat", "dog", "cow", "pig"], *row) for row in OF_ANIMALS])
def test_extract_choice(options, response, letter):
    assert ev.extract_choice(response, options) == letter

@table("response, answer", [
    (r"<think>\boxed{1}</think> \boxed{2} \boxed{\frac{1}{3}} \boxed{4", r"\frac{1}{3}"),
    (r"<answer>2</answer> \boxed{3}", "3"), ("<answer>1</answer> <answer>2", "2"),
    ("The answer is (B).", "B"), ("The answer is 1. The answer is 3.5.", "3.5"),
    (r"<think>\boxed{2}", None), ("no idea", None), (r"\boxed{}", None)])
def test_stated_answer(response, answer):
    assert ev.stated_answer(response) == answer

@table("text, number", [
    (r"3\frac{1}{4}", 3.25), ("7 2/5", 7.4), (r"-1\frac12", -1.5), ("2½", 2.5), ("y = 9", 9),
    (r"6\times 10^2", 600), (r"4.5 \cdot 10^{-3}", 0.0045), ("8e2", 800), (r"3\pi", 3 * math.pi),
    (r"\approx 12", 12), ("€1,250.50", 1250.5), (r"7\text{ cm}^2", 7), ("15 km/h", 15),
    ("4 or 5", None), ("4 to 5", None), ("4=5", None), ("7:45", None), ("3x", None),
    (r"2\sqrt{3}", None), ("1/0", None), ("8" * 500, None), ("5" + " b" * 5000 + "!", None)])
def test_to_number(text, number):
    signal.alarm(10)
    assert ev.to_number(text) == (number if number is None else pytest.approx(number))

@table("response, answer", [
    ("**58**", "58"), ("There are 58 windows.", "58 windows"), ("It is 1,058.", "1,058"),
    ("First I see 20. So the sum is 58.", "58"), ("It is four.", "4"), ("I see 57 or 58.", None),
    ("The time is 5:58.", None), ("<think>It is 58", None), ("I cannot tell, maybe 58.", None),
    (r"\boxed{} 58", None), ("```python\nn = 58\nprint(n)\n```", None)])
def test_a_number_without_a_box_is_read_from_the_last_sentence(response, answer):
    assert graded(response, "number 0", "58")["answer"] == answer
    assert graded(response, "value", "(5, 8)")["answer"] is None, "only where a number is asked for"
    assert graded(response, "number 0", "58", truncated=True)["answer"] is None

# ---- eval.py: adapters -----------------------------------------------------------------
def graded(response, rule="choice", gold="B", options=("x", "y"), **more):
    row = {"id": "q", "k": 0, "order": [0], "orders": 1, "task": "", "rule": rule, "gold": gold,
           "options": list(options), "order_rule": "never", "movable": [0], "response": response,
           "truncated": False, "error": ""} | more
    row["answer"], row["right"] = ev.grade_row(row)
    return row

def place(image):
    return f"{image}.png"

def listed(*options):
    return "".join(f"\n({letter}) {option}" for letter, option in zip("ABCDE", options))

def with_images(n):
    return {f"image_{k}": k if k <= n else None for k in range(1, 7)}

# A row of each benchmark, in its layout; a number stands for an image.
MANTIS = {"id": "man", "question": "Which picture shows the oldest car? <image><image><image>",
          "images": [1, 2, 3], "answer": "(A)", "question_type": "multi-choice",
          "options": ["Image 3", "Image 1", "Image 2"], "data_source": "", "category": ""}
BLINK_TEXT = "Determine which one of the second or the third image has the first image's style."
BLINK = {"idx": "art", "sub_task": "Art_Style", "choices": LATTER, "answer": "(B)",
         "prompt": f"{BLINK_TEXT}\nSelect from the following choices.{listed(*LATTER)}"
         } | with_images(3)
MMIU_OPTIONS = "A: the first image\nB: the second image\nC: the third image"
MMIU = {"task": "forensic", "question": "Which of the three images is a real photo?", "output": "C",
        "input_image_path": [f"./2D-spatial/t/{k}.png" for k in range(3)], "options": MMIU_OPTIONS,
        "context": "Select from the following choices.\n" + MMIU_OPTIONS}
REMI = {"task": "Charts", "label": "2",
        "question": "<image1> <image2> How many of the two images show a bar chart?"
        } | with_images(2)
VISTA = {"pid": "1", "decoded_image": 1, "choices": None, "precision": 2.0, "answer": "1.45",
         "question_type": "free_form", "answer_type": "float", "query": "?",
         "metadata": {"task": "fqa"}}
VERSE = {"sample_index": "1", "problem_version": "Text Lite", "question": "?", "image": 1,
         "question_type": "free-form", "answer": r"Area $=9 \pi \mathrm{cm}^{2}$",
         "question_for_eval": "?"}
VISION = {"id": "1", "question": "<image1>?", "options": ["1", "3", "5"], "answer": "B",
          "subject": "logic", "decoded_image": 1}
MV_OPTIONS = "\n\n".join(f"<image_{k}>\n{letter}." for k, letter in enumerate("ABCD", 1))
MV_MATH = {"problem_id": 1, "question": f"Which?\n\n{MV_OPTIONS}\n\n<image_5>\n\n##",
           "answer": "C", "answer_type": "choice", "input_image": [f"{k}.png" for k in "qabcd"]}
MUIR = {"idx": "m", "task": "Retrieval", "question": "<image>Which image shows the same bird?",
        "options": ["<image>", "<image>", "<image>", "None of the choices provided"],
        "answer": "B", "image_list": [1, 2, 3, 4]}
MED = {"question_id": "med", "question": "Based on the CT images, what is the likeliest diagnosis?",
       "options": ["a cyst", "a stone", "a clot"], "correct_answer": "B"} | with_images(3)

def encoded(picture, kind):
    return {"bytes": bytes_of(picture, kind), "path": None}

PICTURE = encoded(Image.new("RGB", (30, 30)), "PNG")

def with_pictures(row):
    row = dict(row)
    for name, value in row.items():
        if value and name.startswith(("image", "decoded_image")):
            row[name] = [PICTURE] * len(value) if isinstance(value, list) else PICTURE
    return row

def write_parquet(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)

LAYOUTS = {  # where the rows lie; a right answer, its order rule and task; the row
    "mantis-eval": ("mantis_eval/test-0.parquet", "A", "keep", "multi-choice", MANTIS),
    "blink": ("Jigsaw/val-0.parquet", "B", "letter", "Art_Style", BLINK),
    "mmiu": ("all.parquet", "C", "letter", "forensic", MMIU),
    "mathvista": ("data/testmini-0.parquet", "1.449", "never", "fqa", VISTA),
    "mathverse": ("testmini.parquet", r"9\pi", "never", "Text Lite", VERSE),
    "mathvision": ("data/test-0.parquet", "B", "never", "logic", VISION),
    "remi": ("test.parquet", "2", "keep", "Charts", REMI),
    "mv-math": ("data/MV-MATH.json", "C", "letter", "choice", MV_MATH),
    "muirbench": ("data/test-0.parquet", "B", "letter", "Retrieval", MUIR),
    "medframeqa": ("data/test-0.parquet", "B", "keep", "", MED)}

@table("name", LAYOUTS)
def test_every_adapter_reads_what_the_hub_sends_and_a_local_copy(name, tmp_path, monkeypatch):
    (file, answer, rule, task, row), hub = LAYOUTS[name], ev.BENCHMARKS[name].hub
    folder, wanted = tmp_path / hub.split("/")[1], {file}
    (folder / file).parent.mkdir(parents=True)
    if file.endswith("json"):
        (folder / file).write_text(json.dumps([row, row]))
    else:
        write_parquet([with_pictures(row)] * 2, folder / file)
    if ev.BENCHMARKS[name].has_paths:
        wanted |= {"images.zip", "images/deep/q.png"}
        for path in row.get("input_image_path", []) + row.get("input_image", []):
            zipped = tmp_path / "zipped" / "images" / path  # in the zip's own inner folder
            zipped.parent.mkdir(parents=True, exist_ok=True)
            noise().save(zipped)
        shutil.make_archive(str(folder / "images"), "zip", tmp_path / "zipped")
    def download(asked, repo_type, allow_patterns):
        assert (asked, repo_type) == (hub, "dataset")
        files = [*wanted, "README.md", "archive/train-0.parquet", "other.json"]
        assert set(filter_repo_objects(files, allow_patterns=allow_patterns)) == wanted
        return str(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for data_dir in ("", str(tmp_path)):
        args = SimpleNamespace(data_dir=data_dir, out=str(tmp_path / "out"), limit=0)
        questions = ev.load_benchmark(name, args)
        assert len({q.sample.id for q in questions}) == 2
    for q in questions:
        assert (q.sample.order_rule, q.sample.source) == (rule, task)
        assert all(Path(image).exists() for image in q.sample.images)
        for text, right in ((answer, True), ("D", False)):
            row = graded(rf"\boxed{{{text}}}", q.rule, q.sample.answer, q.options)
            assert row["right"] is right
    args.data_dir = str(tmp_path / "none")
    refuses("--data-dir takes the Hub's files", ev.load_benchmark, name, args)

def test_mmiu_rows_without_a_gold_are_left_out_and_limit_spreads_evenly(tmp_path):
    rows = [MMIU | {"output": gold} for gold in ("A", "", None, "B", "C", "A")]
    write_parquet(rows, tmp_path / "MMIU-Benchmark" / "all.parquet")
    for limit, golds in ((0, ["A", "B", "C", "A"]), (2, ["A", "C"])):
        args = SimpleNamespace(data_dir=str(tmp_path), out=str(tmp_path / "out"), limit=limit)
        assert [q.sample.answer for q in ev.load_benchmark("mmiu", args)] == golds

def test_names_in_a_question_of_mantis_follow_their_images():
    row = MANTIS | {"question": "Is the first image brighter?", "images": [0, 1], "answer": "(B)",
                    "options": ["(A) First image", "Second image"]}
    q = ev.from_mantis(row, 0, place)
    assert (q.sample.answer, q.sample.order_rule, q.sample.movable) == ("B", "keep", (0, 1))
    assert q.sample.question == "<image><image>Is <image_1> brighter?\n(A) <image_1>\n(B) <image_2>"
    assert ev.options_in(q, (1, 0)) == ["image 2", "image 1"]

MV_LINES, MV_TEXTS = "A. A only\nB. B only\nC. none\nD. both", ("A only", "B only", "none", "both")
MV_PARTS = "(1) B (3, 5); (2) 7.5."

@table("adapter, row, changes, rule, gold, options", [
    (ev.from_mantis, MANTIS, dict(question_type="short-answer", options=[]), "text", "(A)", ()),
    (ev.from_mv_math, MV_MATH, {}, "choice", "C", ("",) * 4),  # its options are images
    (ev.from_mv_math, MV_MATH, dict(question=f"?\n{MV_LINES}\n\nPage 7 of 67"), "choice", "C",
     MV_TEXTS),
    (ev.from_mv_math, MV_MATH, dict(question=f"A: one\nB: two\n\nWhich is right?\n{MV_LINES}"),
     "choice", "C", MV_TEXTS),
    (ev.from_mv_math, MV_MATH, dict(answer_type="multi-step", answer=MV_PARTS), "parts", MV_PARTS,
     ()),
    (ev.from_mathvista, VISTA,
     dict(choices=["10", "12", "10"], answer="12", question_type="multi_choice"), "choice", "B",
     ("10", "12", "10")),
    (ev.from_mathvista, VISTA, {}, "number 2", "1.45", ()),
    (ev.from_mathvista, VISTA, dict(answer_type="integer"), "number 0", "1.45", ()),
    (ev.from_mathverse, VERSE, dict(question_type="multi-choice", answer="False",
                                    question_for_eval="()\nChoices:\nA:True\nB:False"),
     "choice", "B", ("True", "False")),  # a gold is an option's text, a letter, or two letters
    (ev.from_mathverse, VERSE, dict(question_type="multi-choice", answer="C\nD",
                                    question_for_eval="?\nA:w\nB:x\nC:y\nD:z"),
     "text", "C\nD", tuple("wxyz"))])
def test_rows_of_all_kinds(adapter, row, changes, rule, gold, options):
    q = adapter(row | changes, 0, place)
    assert (q.rule, q.sample.answer, q.options) == (rule, gold, options)

@table("rule, gold, options, right, wrong", [
    ("choice", "A", ("10", "12", "10"), ["A", "(C)"], ["(B)"]),  # both letters of one text
    ("choice", "C", ("",) * 4, ["C"], ["A", "B", "D"]),
    ("choice", "B", (r"180^\circ T", r"090^\circ T"), [r"\boxed{090^\circ T}"], [r"\boxed{A}"]),
    ("text", "C\nD", "wxyz", [r"\boxed{C, D}", r"\boxed{D and C}"],
     [r"\boxed{C}", r"\boxed{A, C, D}"]),
    ("number 2", "1.45", (), [r"\boxed{\$1.449}"], [r"\boxed{1.46}"]),
    ("number 0", "1400", (), [r"\boxed{1,400 apples}"], [r"\boxed{1,401 apples}"]),
    ("list", "[2007, 2008]", (), ["The answer is 2007 and 2008."], ["none"]),
    ("parts", "(1) $a=\\frac{1}{2}$; (2) $(3, 4)$；（3）7.5.", (),
     [r"\boxed{(1) \frac12 (2) (3,4) (3) 7.5}", r"\boxed{0.5}, \boxed{(3,4)}, last \boxed{7.5}"],
     [r"\boxed{(1) \frac12 (2) (3,4) (3) 7}", r"\boxed{7.5}"]),
    ("parts", "(1)(1) $3$, (2) $(1,2)$\n\n(2) 40 or 50", (), [r"\boxed{3, (1,2), 40 or 50}"],
     [r"\boxed{3, (1,2), 40}", r"\boxed{3, (2,1), 40 or 50}",
      r"<think>\boxed{3} \boxed{(1,2)}</think> \boxed{40 or 50}"])])
def test_each_rule_grades(rule, gold, options, right, wrong):
    assert all(graded(response, rule, gold, options)["right"] for response in right)
    assert not any(graded(response, rule, gold, options)["right"] for response in wrong)

@table("task, answer, label, right", [
    ("Clocks", "45", "35", True), ("Clocks", "46", "35", False), ("Clocks", "ten", "10", False),
    ("GeomShape", "103", "100", True), ("GeomShape", "104", "100", False),
    ("GeomCost", "$97", "100", True), ("EmojiAlgebra", "101", "100", True),
    ("EmojiAlgebra", "102", "100", False), ("EmojiAlgebra", "-100.5", "-100", True),
    ("RefCoco", "3", "1, 3", True), ("RefCoco", "2", "1,3", False), ("FuncRead", "f(x)", "f", True),
    ("IQ", "(b)", "B", True), ("Charts", "45%", "45", True), ("Isomorphism", "Yes", "1", True),
    ("Collisions", "no", "0", True), ("CodeEdit", "x += 1", "x+=1", True),
    ("Clocks", "no", "0", False)])
def test_remi_rules(task, answer, label, right):
    assert ev.remi_right(task, answer, label) == right

@table("gold, right, wrong", [
    (r"Area $=9 \pi \mathrm{cm}^{2}$", [r"9\pi", r"A = 9 \pi \text{ cm}^2"],
     [r"-9\pi", r"9\pi+1", r"90\pi", r"900\pi \text{ mm}^2", r"9\pi \text{ cm}^3"]),
    ("4.4 m", ["4.4", "4.4 m"], ["-4.4", "44", "440 cm", "4.4 cm"]),
    (r"\frac{1225\pi }{2} \text { units }^2", [r"\frac{1225\pi}{2}"], [r"\frac{1225}{2}"]),
    ("118掳T", ["118", "118°"], ["118.5"]), ("$5=s$", ["5", "s=5"], ["4"]),
    ("(90,5)", ["(x,y)=(90,5)"], ["(5,90)"]), ("$x=0$", ["x=0", "0"], ["y=0"]),
    ("$y_2=(x+2)^3$", ["(x+2)^3"], ["y_3=(x+2)^3"]),
    ("Surface Area $=603.186$ units $^{2}$", ["603.186", "SA = 603.186"], ["604.186"]),
    (r"$2 \angle O=\angle C-\angle A$", [r"2\angle O = \angle C-\angle A"],
     [r"$3 \angle O=\angle C-\angle A$"]),
    (r"\text { local maximum: }(-3,60) \text {, local minimum: }(3, -60)",
     ["(-3,60) (3, -60)"], ["(60, -3) (3, -60)"])])
def test_left_side_and_unit_are_optional(gold, right, wrong):
    assert all(ev.same_value(answer, gold) for answer in right)
    assert not any(ev.same_value(answer, gold) for answer in wrong)

# ---- eval.py: order labels -------------------------------------------------------------
LABELLED = read_rows(HERE / "data_samples" / "order_labels.jsonl")
DIGITS = sorted((HERE / "data_samples" / "images").glob("*.png"))

@table("part, least", [("rules", 61), ("held-out", 32), ("attack", 77), ("layouts", 97)])
def test_order_labels_other_than_never_are_right(part, least):
    """held-out: written without sight of the rules; attack: to find wrong labels."""
    found = 0
    for row in (row for row in LABELLED if row["set"] == part):
        question, n = row["question"], row["question"].count("<image>")
        gold = curate.gold_of(row["answer"], question, n)
        label = ev.infer_label(question, gold, n, row.get("style", "any"))
        if label.order_rule != "never":
            mentions = [int(k) for k in perl.MENTION.findall(label.question)]
            got = (label.order_rule, list(label.movable), label.answer, mentions)
            assert got == (row["order_rule"], row["movable"], row["gold"], row["mentions"]), row
            found += 1
    assert found >= least

@table("source, question, answer, reason", [
    ("any", "<image><image> Which image shows a cat?", "3", "answer unclear"),
    ("any", "<image><image> How many images show a cow?", "image 1", "the answer names an image"),
    ("any", "<image><image>\nA. 1\nB. 2", "E", "no gold"), ("any", "<image>?", "1", "one image"),
    ("muirbench", "<image><image>What lies between the two images?\n(A) a day\n(B) a year", "A",
     "words that may mean order, time or place")])
def test_a_never_has_a_reason(source, question, answer, reason):
    """order_labels.jsonl has 218 more of them, without reasons."""
    n = question.count("<image>")
    assert ev.label_or_reason(question, answer, n, source) == reason
    assert ev.infer_label(question, answer, n, source) == (question, answer, "never", None)

# ---- eval.py: what three models get on the benchmarks ----------------------------------
def measured(question, model, monkeypatch):
    """Mean, worst, bias and flip of a question in all orders of its images, which are named by
    their numbers. A model is a function of the sample that it sees: images, options, gold."""
    def ask(_model, _processor, samples, orders, cfg, n, greedy):
        texts = [[model(perl.permute(sample, order)) for order in some]
                 for sample, some in zip(samples, orders)]
        return [[SimpleNamespace(text=text, truncated=False) for text in some] for some in texts]
    monkeypatch.setattr(ev, "sample_groups", ask)
    question = question._replace(orders=ev.all_orders(question.sample, 24))
    rows = ev.answer_batch(None, None, [question], None)
    for row in rows:
        row["answer"], row["right"] = ev.grade_row(row)
    measures = ev.order_measures([rows])
    return [measures[name]["value"] for name in ("mean", "worst", "bias", "flip")]

def first_option_image(s):
    """The letter of the option that stands for the first image that may move."""
    names = ["image 1", "<image_1>", "the first image", "First image"]
    options = ev.listed_options(s.question)
    for k, option in enumerate(options):
        if option in names or option == "<image>" or option == "the second image" == options[0]:
            return f"({'ABCDE'[k]})"
    return "I like the picture best."

@table("adapter, row, rule, movable, always_a, first_image", [  # by a count over all orders
    (ev.from_blink, BLINK, "letter", (1, 2), (1/2, 0, 1, 1), (1/2, 0, 1, 1)),
    (ev.from_muirbench, MUIR, "letter", (1, 2, 3), (1/3, 0, 1, 1), (1/3, 0, 1, 1)),
    (ev.from_muirbench, MUIR | {"answer": "D"}, "keep", (1, 2, 3), (0, 0, 0, 1), (0, 0, 0, 1)),
    (ev.from_medframeqa, MED, "keep", (0, 1, 2), (0, 0, 0, 0), (0, 0, 0, 0)),
    (ev.from_medframeqa, MED | {"correct_answer": "A"}, "keep", (0, 1, 2), (1, 1, 0, 0), (0,) * 4),
    (ev.from_mantis, MANTIS, "keep", (0, 1, 2), (1, 1, 0, 0), (1/3, 0, 1, 1)),
    (ev.from_mmiu, MMIU, "letter", (0, 1, 2), (1/3, 0, 1, 1), (1/3, 0, 1, 1)),
    (ev.from_remi, REMI, "keep", (0, 1), (0, 0, 0, 0), (0, 0, 0, 0))])
def test_three_models_get_what_a_hand_count_gives(adapter, row, rule, movable, always_a,
                                                  first_image, monkeypatch):
    q = adapter(row, 0, place)
    assert (q.sample.order_rule, q.sample.movable) == (rule, movable)
    first = perl.permute(q.sample, tuple(range(len(q.sample.images))))
    right_image = perl.named_positions(first)
    def perfect(s):
        """Finds the right picture wherever it is; other answers are known."""
        if right_image:
            return "ABCDE"[s.movable.index(s.images.index(first.images[right_image[0]]))]
        return s.answer
    for model, wanted in ((perfect, (1, 1, 0, 0)), (lambda s: "A", always_a),
                          (first_option_image, first_image)):
        text = model if q.rule == "choice" else lambda s, m=model: rf"\boxed{{{m(s)}}}"
        assert measured(q, text, monkeypatch) == pytest.approx(wanted, abs=1e-6), model

# ---- eval.py: measures -----------------------------------------------------------------
def test_average_and_intervals():
    values = {"a": [1, 1, 0, 0], "b": [1]}
    assert ev.average(values) == 0.6 and ev.average(values, "tasks") == 0.75
    assert ev.bootstrap({"": [1, 1, 1]}) == [1, 1] and ev.bootstrap(values) == ev.bootstrap(values)
    # 1.96 * sqrt(.25 / 100) = .098
    assert ev.bootstrap({"": [0, 1] * 50}) == pytest.approx([0.402, 0.598], abs=0.02)
    assert ev.bootstrap({"a": [0, 0], "b": [1, 1]}, "tasks") == [0.5, 0.5]  # tasks are not redrawn
    assert ev.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # by hand
    assert ev.wilson(0, 18) == pytest.approx((0, 0.1759), abs=1e-4)

def group(answers, golds, orders, rule="index", n_orders=None, movable=None):
    rows = []
    for k, (answer, gold, order) in enumerate(zip(answers, golds, orders)):
        text = "" if answer == "?" else rf"\boxed{{{answer}}}"
        rows.append(graded(text, "text", gold, k=k, order=list(order), order_rule=rule,
                           orders=n_orders or len(orders),
                           movable=movable or [*range(len(order))]))
    return rows

def test_order_measures():
    swaps = [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)]
    right = group("2132", "2132", swaps)                # image 2 of the given order, found anywhere
    wrong = group("1213", "2132", swaps)                # always the same wrong picture
    first = group("2222", "2132", swaps)                # always says "second": right at first
    unread = group("????", "2132", swaps)
    m = ev.order_measures([right, wrong, first, unread])
    assert m["bias"]["n"] == 4
    values = {name: share["value"] for name, share in m.items() if name != "by position"}
    assert values == {"mean": (1 + 0 + 0.5 + 0) / 4, "worst": 0.25, "best": 0.5, "bias": 0.25,
                      "same choice": 0.5, "flip": 0.25, "unread": 0.25}
    def by_position(m):
        return {place: (share["value"], share["n"]) for place, share in m["by position"].items()}
    assert by_position(m) == {"1": (0.25, 4), "2": (0.5, 8), "3": (0.25, 4)}
    unfinished = ev.order_measures([group("21", "21", swaps[:2], n_orders=4)])
    assert unfinished["mean"]["value"] == 0.5 and unfinished["same choice"]["value"] == 0
    # Letters with a reference image, which is image 1.
    m = ev.order_measures([group("AB", "AB", swaps[0::2], "letter", movable=[1, 2])])
    assert m["same choice"]["value"] == 1 and by_position(m) == {"2": (1, 1), "3": (1, 1)}
    for answers, flips, unread in (("AAAA", 0, 0), ("AAAB", 1, 0), ("AA?A", 0, 1), ("AB??", 1, 1)):
        m = ev.order_measures([group(answers, "AAAA", swaps, "keep")])
        assert (m["flip"]["value"], m["unread"]["value"]) == (flips, unread)
        assert m["by position"] == {} and m["same choice"]["value"] == (answers == "AAAA")

# ---- eval.py: runs ---------------------------------------------------------------------
def run(out, *flags):
    ev.main(["--out", str(out), "--limit", "12", "--orders", "3", "--batch", "10", *flags])
    return (out / "tiny" / "digits" / "results.json").read_bytes()

def test_a_killed_run_goes_on_to_the_same_results(tmp_path, monkeypatch, capsys):
    whole, calls, sample_groups = run(tmp_path / "a"), [], ev.sample_groups
    assert json.loads(whole)["n"] == 12 and "bias" in capsys.readouterr().out
    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_groups(*args, **kwargs)
    monkeypatch.setattr(ev, "sample_groups", dies)
    with pytest.raises(SystemExit, match="run the same command again to continue"):
        run(tmp_path / "b")
    samples = tmp_path / "b" / "tiny" / "digits" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-30])  # a torn last line: its batch is asked again
    partial = json.loads(run(tmp_path / "b", "--score-only"))
    right = sum(task["value"] * task["n"] for task in partial["tasks"].values())
    assert partial["missing"] > 0 and partial["score"] == pytest.approx(right / 12)
    done = len(calls)
    assert run(tmp_path / "b") == whole
    rest = len(calls) - done
    assert run(tmp_path / "b") == whole == run(tmp_path / "b", "--score-only")
    assert run(tmp_path / "c") == whole and len(calls) == done + rest + rest + 1
    for flag, field in (("--orders", "orders"), ("--max-new-tokens", "max_new_tokens"),
                        ("--batch", "rollout_batch")):
        refuses(f"has answers with {field} .*, not 7; remove it", run, tmp_path / "b", flag, "7")

def test_failures_count_as_wrong_in_fixed_denominators(tmp_path, monkeypatch):
    noise(28, 28).save(tmp_path / "a.png")
    noise(3, 900).save(tmp_path / "thin.png")  # no aspect ratio for the vision tower
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    (tmp_path / "junk.png").write_bytes(b"junk")
    asked = [Sample(name, (str(tmp_path / f"{name}.png"),), "<image>Which?", "1", "keep")
             for name in ("a", "thin", "bomb", "junk", "missing")]
    monkeypatch.setattr(perl, "load_samples", lambda path: asked)
    ev.main(["--benchmarks", "mine.jsonl", "--out", str(tmp_path), "--max-new-tokens", "4"])
    r = json_of(tmp_path / "tiny" / "mine" / "results.json")
    assert (r["n"], r["errors"], r["unparsed"], r["truncated"], r["score"]) == (5, 4, 1, 1, 0)
    assert r["unread"] == 1 and r["config"]["labels"] == {"keep": 5}

def test_compare_is_paired_and_tells_what_was_read(tmp_path):
    """A reads 3 of 4 and B all; a fifth question, which A alone answered, is left out."""
    for name, texts in (("A", (r"\boxed{1}", r"\boxed{2}", r"\boxed{1}", "well", r"\boxed{1}")),
                        ("B", (r"\boxed{1}",) * 4)):
        rows = [graded(text, "text", "1", id=str(k)) for k, text in enumerate(texts)]
        # One question was asked in two orders, which B alone gets right in both.
        rows += [graded(r"\boxed{1}", "text", "1", id="two"),
                 graded(rf"\boxed{{{2 - (name == 'B')}}}", "text", "1", id="two", k=1)]
        (tmp_path / name / "digits").mkdir(parents=True)
        write_rows(tmp_path / name / "digits" / "samples.jsonl", *rows)
    heading, _, line = table_rows(ev.compare(tmp_path / "A", tmp_path / "B"))[-3:]
    cells = dict(zip(heading, line))
    assert [cells[name] for name in ("benchmark", "n", "A", "B", "no answer A", "no answer B")] == [
        "digits", "5", "60.0", "100.0", "20.0", "0.0"]
    assert cells["B - A [95 %]"].startswith("40.0 [")
    assert cells["where both were read"].startswith("25.0")
    assert cells["mean over orders"].startswith("50.0") and cells["worst order"].startswith("100.0")

# ---- eval.py: --ask --------------------------------------------------------------------
WHICH, SLOTS = "Which image shows a cat?", "Which is the cat? A: <image> B: <image> C: <image>"
ALL_THREE = {"a.png", "cat.png", "c.png"}
@table("question, says, agree, means", [
    (WHICH, "cat", "6 of 6 orders agree: cat.png", {"cat.png"}),
    (WHICH, "1", "2 of 6 orders agree: ", ALL_THREE),
    (WHICH, "7", "6 of 6 orders agree: no answer", {""}),
    (SLOTS, "A", "2 of 6 orders agree: ", ALL_THREE),
    (SLOTS.replace("A:", "Reference:").replace("B:", "A:").replace("C:", "B:"), "A",
     "1 of 2 orders agree: ", {"cat.png", "c.png"}),
    (WHICH + "\nA. the first image\nB. the second image\nC. the third image", "B",
     "2 of 6 orders agree: ", ALL_THREE),
    ("How many cats are there?", "2", "6 of 6 orders agree: 2", {""}),
    ("What is in image 2?\nA. a dog\nB. a cat", "B", "6 of 6 orders agree: B", {""})])
def test_ask_names_the_file_in_every_order(tmp_path, monkeypatch, capsys, question, says, agree,
                                           means):
    """says "cat": the number of the cat, wherever it stands."""
    def respond(model, processor, samples, orders, cfg, **kwargs):
        texts = [str(order.index(1) + 1) if says == "cat" else says for order in orders[0]]
        return [[SimpleNamespace(text=rf"\boxed{{{text}}}", truncated=False) for text in texts]]
    monkeypatch.setattr(ev, "sample_groups", respond)
    monkeypatch.chdir(tmp_path)
    for name in ALL_THREE:
        Image.new("RGB", (56, 56)).save(name)
    ev.main(["--ask", question, "a.png", "cat.png", "c.png", "--all-orders"])
    out = capsys.readouterr().out
    rows = table_rows(out)[2:]
    orders = [row[0] for row in rows]
    assert agree in out and {row[2] for row in rows} == means
    assert orders[0] == "a.png cat.png c.png", "the given order comes first"
    assert len(set(orders)) == len(orders) == int(agree.split()[2])
    ev.main(["--ask", question, "a.png", "cat.png", "c.png"])
    assert f"\n\\boxed{{{says.replace('cat', '2')}}}\n" in capsys.readouterr().out, "one order"

def test_ask_moves_what_the_question_names():
    text = "Is image 2 sharper than the third picture?"
    sample = ev.own_question(text, list(map(str, DIGITS[:3]))).sample
    asked = perl.permute(sample, (2, 0, 1)).question
    assert asked == "<image><image><image>Is <image_3> sharper than <image_1>?"

def test_ask_refuses_what_cannot_be_asked_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(ev, "start_model", lambda args: pytest.fail("too late"))
    refuses("gone.png is not a file", ev.main, ["--ask", WHICH, "gone.png"])
    refuses("mentions image 4 of 1", ev.main, ["--ask", "Is image 4 dark?", str(DIGITS[0])])

# ---- eval.py: --chart ------------------------------------------------------------------
def test_the_chart_shows_what_the_results_say(tmp_path, monkeypatch):
    """Mean next to worst order; a benchmark asked in one order has one bar a model."""
    def share(value):
        return {"value": value, "interval": [value - .1, value + .1], "n": 7}
    for model, value in (("A", .4), ("B", .6)):
        in_orders = {"mean": share(value), "worst": share(value - .2)}
        for name, orders in (("blink", in_orders), ("remi", {})):
            path = tmp_path / model / name / "results.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(share(value + .1) | {
                "score": value + .1, "orders": orders, "config": {"orders": 6}}))
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **named: (
        figures.append(self) or save(self, *args, **named)))
    ev.main(["--chart", str(tmp_path / "c.png"), str(tmp_path / "A"), str(tmp_path / "B")])
    assert Image.open(tmp_path / "c.png").width > 500
    axes, = figures[0].axes
    bars = [bar for bar in axes.patches if bar.get_height()]  # the legend's have none
    assert [(round(bar.get_height()), bool(bar.get_hatch())) for bar in bars] == [
        (40, False), (20, True), (60, False), (40, True), (50, False), (70, False)]
    spans = [[round(bound) for bound in line.get_ydata()] for line in axes.lines]
    assert spans == [[30, 50], [10, 30], [50, 70], [30, 50], [40, 60], [60, 80]]
    refuses("no results in .*gone", ev.main,
            ["--chart", str(tmp_path / "d.png"), str(tmp_path / "gone")])

# ---- eval.py: page of a run ------------------------------------------------------------
HOSTILE = "</script><script>document.title='broken'</script><b>bold</b> \\boxed{2}"

@pytest.fixture(scope="module")
def paged(straight, tmp_path_factory):
    """The folder of a run and its page. Added to it: first a group that is right in one of two
    orders, whose texts try to break out, and last answers that name no single image."""
    run = shutil.copytree(straight, tmp_path_factory.mktemp("paged") / "run")
    logged = read_rows(run / "rollouts.jsonl")
    added = logged[0] | dict(images=["gone.png"] * 2, response=HOSTILE, movable=[0, 1])
    first = [added | dict(id="q", order_rule="index", answer="1", order=order, gold=gold,
                          accuracy=right, reward=right)
             for order, gold, right in (([0, 1], "1", 0.0), ([1, 0], "2", 1.0))]
    golds = {"sequence": "2,1", "keep": "2", "letter": "B", "pair": "1-2"}
    last = [added | dict(step=2, id=rule, order_rule=rule, order=[0, 1], gold=gold)
            for rule, gold in golds.items()]
    write_rows(run / "rollouts.jsonl", *first, *logged, *last)
    ev.main(["--page", str(run)])
    return run

def test_the_page_of_a_run(paged, straight, tmp_path):
    text = (paged / "page.html").read_text()
    data = json.loads(re.search(r"const DATA = (.*);", text)[1])
    assert not re.search(r"(src|href)=|@import|url\(|NO_DATA", text), "it needs no other file"
    assert "<b>bold" not in text and text.count("</script>") == 1
    assert data["metrics"] == read_rows(paged / "metrics.jsonl")
    logged, images = read_rows(straight / "rollouts.jsonl"), data["images"]
    picture = images[logged[0]["images"][0]].partition(",")[2]
    Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert images["gone.png"] == ""
    hostile, first, _, *others = data["groups"]
    assert [rows[0]["right_image"] for rows in hostile["orders"]] == [0, 1]
    rewards = {row["reward"] for row in logged[:6]}
    assert (len(first["orders"]), first["verdict"] == "kept") == (2, len(rewards) > 1)
    assert [group["orders"][0][0]["right_image"] for group in others[:4]] == [-1, -1, 1, -1]
    held_out = [[row["step"] for row in group["orders"][0]] for group in others[4:]]
    assert held_out == [[0, 2, 4]] * 3, "a held-out question through the run"
    refuses("not a run folder", ev.main, ["--page", str(tmp_path)])
    forked = shutil.copytree(paged, tmp_path / "forked")
    edit(forked / "config.json", filter="disagree", beta=None)  # of a fork, which has no beta
    assert '"verdict": "disagree"' in ev.write_page(forked).read_text()

def in_browser(page, tmp_path, script=""):
    """The page as Chromium shows it after its script ran, and then this one."""
    browser, copy = shutil.which("chromium") or pytest.skip("no chromium"), tmp_path / "shown.html"
    copy.write_text(page.read_text() + f"<script>{script}</script>")
    flags = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
             f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} "
             "--dump-dom --window-size=1200,800")
    shown = subprocess.run([browser, *flags.split(), f"file://{copy}"], capture_output=True,
                           text=True, timeout=60).stdout
    return re.sub("(?s)<script>.*?</script>", "", shown)

def test_the_page_in_a_browser(paged, tmp_path):
    """Its script runs: curves are drawn, the group with the largest gap is shown, model text is
    text, and arrow keys lead to the held-out questions."""
    shown = in_browser(paged / "page.html", tmp_path)
    assert shown.count("<figure") == 7 and "<title>PeRL run</title>" in shown
    assert "Order 2, 1: 1 of 1 right" in shown and "Mean reward 0.500" in shown
    assert "&lt;b&gt;bold&lt;/b&gt;" in shown and "step 2: letter" in shown
    assert shown.count('class="right"') == 2, "the right image is framed in both orders"
    key = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    shown = in_browser(paged / "page.html", tmp_path, f"for (let k = 0; k < 99; k++) {key}")
    assert re.search("Held-out question .*, at every evaluation; orders: 2", shown)
    assert re.search("step 4: (right|wrong)", shown)

# ---- eval.py: --flip -------------------------------------------------------------------
def test_flip_asks_the_published_ids_in_six_orders_and_prints_both(tmp_path, capsys):
    ids = ("keep1", "keep2", "excluded", "border")
    med = [with_pictures(MED) | {"question_id": key} for key in ids]
    med[0]["question"] = "Which image comes first?"  # never, by our rules
    mantis = [with_pictures(MANTIS) | {"id": key} for key in ids]
    write_parquet(med, tmp_path / "MedFrameQA" / "data" / "test-0.parquet")
    write_parquet(mantis, tmp_path / "Mantis-Eval" / "mantis_eval" / "test-0.parquet")
    clone, classes = tmp_path / "facet-probe", ("keep", "keep", "exclude", "borderline")
    screen, rates = ["dataset,hf_id,classification"], ["model,dataset,k6_flip_rate,n_screened"]
    for name in ("mantis_eval", "medframeqa"):
        screen += [f"{name},{key},{label}" for key, label in zip(ids, classes)]
        rates.append(f"other-7b,{name},0.25,4")
    for file, lines in ((ev.SCREEN, screen), (ev.RATES, rates)):
        (clone / file).parent.mkdir(parents=True, exist_ok=True)
        (clone / file).write_text("\n".join(lines) + "\n")
    ev.main(["--flip", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"),
             "--max-new-tokens", "2"])
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if "|" in line}
    assert out.count("3 items") == 2 and "25.0 [4.6, 69.9]" in rows["other-7b"]
    assert "0.0 [0.0, 56.2]" in rows["tiny"], "no answer was read, so none flips; 3 items are few"
    assert "unread answer in %:  mantis-eval 100.0  medframeqa 100.0" in out
    for name in ("mantis-eval", "medframeqa"):
        asked = read_rows(tmp_path / "out" / "tiny" / "flip" / name / "samples.jsonl")
        assert len({(row["id"], *row["order"]) for row in asked}) == len(asked) == 18
        golds = Counter((row["id"], row["gold"]) for row in asked)
        assert list(golds.values()) == [6, 6, 6], "the gold stays"

# ---- data_samples/curate.py: rows become samples ---------------------------------------
def digit(k, kind="PNG", mode="RGB"):
    with Image.open(DIGITS[k]) as image:
        return encoded(image.convert(mode), kind)["bytes"]

def mantis_row(k, paths, question, answer):
    images = [{"bytes": None, "path": path} for path in paths]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(k), "images": images, "conversation": talk, "source": "any"}

def write_mantis(folder, config, rows, contents, parts=("train_images.zip",)):
    """A subset of Mantis-Instruct as on the Hub: parquet, and the images in one or more zips."""
    folder = folder / "Mantis-Instruct" / config
    write_parquet(rows, folder / "train-00000-of-00001.parquet")
    if len(parts) > 1:
        (folder / "train_images_zips.txt").write_text("\n".join(parts))
    for k, part in enumerate(parts):
        with zipfile.ZipFile(folder / part, "w") as archive:
            for name in sorted(contents)[k::len(parts)]:
                archive.writestr(name, contents[name])

def image_of(k, **how):
    return {"bytes": digit(k, **how), "path": None}

def k12_row(k, question, answer, image):
    return {"id": str(k), "question": question, "answer": answer, "subject": "math",
            "image": image}

OPTIONS = "\nA. <image>\nB. <image>\nC. <image>"
DREAM = ("Answer the following multiple-choice question:\nHere are there images: <image> <image> "
         "<image>. If image {} is the reference image, which image of the other two is more "
         "similar to the reference image?\nOptions:\n(A) Image {}\n(B) Image {}")

PAIR_TRUE = ("Answer the following multiple-choice question:\n<image> <image> Here is a statement "
             "describing these 2 images: {} Is it true or false? \nOptions:\n(A) True\n(B) False")
CHOOSE = "Answer the following multiple-choice question:\n"
SHORT = "Answer the following question:\nIf image 3 is the reference image, "
SIMILAR = "which image of the other two is more similar to the reference image?"
OTHERS = ("which image of the other two images <image> <image> is more similar to the reference "
          "image? ")
ASSUME = "(Assume reference image is image 1 and the other two are image 2 and image 3)"
RETRIEVE = ("Given a detailed description, retrieve the target image among 10 minimally "
            "contrastive images\nDescription:\n{}")
THIS_TEXT = ("Given this detailed description:\nA man waves.\n"
             "Which image provided best matches the description?")
STATEMENTS = ("Both images show an even digit.", "The left image shows a four.",
              "The digit grew over time.")
SOURCES = ["mantis:nlvr2", "mantis:dreamsim", "mantis:iconqa", "mantis:imagecode", "mmk12",
           "hiyouga/geometry3k"]

def write_copies(folder, n):
    """n rows of each of SOURCES in its raw format, as data/*/prepare.py of Mantis writes them.
    One row of each has 16 digits as images; the second row of nlvr2 uses digit 0 once more."""
    rows, contents = {name: [] for name in SOURCES}, {}
    for k in range(n):
        digits = iter(range(16 * k, 16 * k + 16))
        text = RETRIEVE.format(f"A digit with {k} strokes.")
        for source, n_images, question, answer in (
                ("mantis:nlvr2", 2, PAIR_TRUE.format(STATEMENTS[k % 3]), "AB"[k % 2]),
                ("mantis:dreamsim", 3, DREAM.format(2, 1, 3), "AB"[k % 2]),
                ("mantis:iconqa", 4, f"<image>Which shape is like {k}?{OPTIONS}", "Answer: B"),
                ("mantis:imagecode", 5, "<image>" * 5 + text, f"Answer: Image {k % 5 + 1}")):
            paths = [f"{source}/{k}/{j}.png" for j in range(n_images)]
            contents |= {path: digit(next(digits)) for path in paths}
            if source == "mantis:nlvr2" and k == 1:
                paths[0] = f"{source}/0/0.png"
            rows[source].append(mantis_row(k, paths, question, answer))
        image = image_of(next(digits), mode=("RGB", "RGBA", "L", "P")[k % 4])
        rows["mmk12"].append(k12_row(k, f"As shown, AB = {k}. How long is CD?", f"$${k}$$", image))
        rows["hiyouga/geometry3k"].append({
            "images": [image_of(next(digits))], "answer": rf"{k}\sqrt{{2}}",
            "problem": "<image>Find x."})
    for source in SOURCES[:4]:
        name = source.partition(":")[2]
        own = {path: contents[path] for path in contents if path.startswith(source)}
        parts = ("part_0.zip", "part_1.zip") if name == "iconqa" else ("train_images.zip",)
        write_mantis(folder, name, rows[source], own, parts)
    for name, source in (("MMK12", "mmk12"), ("geometry3k", SOURCES[5])):
        write_parquet(rows[source], folder / name / "data" / "train-00000-of-00001.parquet")
    return folder

@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return write_copies(tmp_path_factory.mktemp("copies"), 12)

def run_curate(copies, out, *more, sources=SOURCES):
    curate.open_zip.cache_clear()
    curate.main([*sources, "--data-dir", str(copies), "--out", str(out), *more])
    return out

@pytest.fixture(scope="module")
def curated(copies, tmp_path_factory):
    return run_curate(copies, tmp_path_factory.mktemp("curated") / "out")

def test_rows_of_all_layouts_become_samples(curated):
    samples = {sample.id: sample for sample in perl.load_samples(curated / "train.jsonl")}
    assert list(Counter(s.source for s in samples.values()).values()) == [12] * 6
    dream, icon = samples["mantis-dreamsim-0000002"], samples["mantis-iconqa-0000001"]
    assert "<image_2> is the reference" in dream.question and "(A) <image_1>" in dream.question
    k12, geometry = samples["mmk12-0000003"], samples["geometry3k-0000002"]
    assert (k12.answer, k12.order_rule) == ("2", "never") and k12.question.startswith("<image>As")
    assert (geometry.answer, geometry.question) == (r"1\sqrt{2}", "<image>Find x.")
    for sample, first in ((dream, 18), (icon, 5), (k12, 46), (geometry, 31)):
        for k, path in enumerate(sample.images, first):  # the right picture stands at each place
            with Image.open(path) as image, Image.open(DIGITS[k]) as source:
                assert image.tobytes() == source.convert("RGB").tobytes()

# In wordings of data/*/prepare.py that write_copies lacks: config, question, answer; gold, rule,
# movable.
MANTIS_ROWS = [
    ("dreamsim", f"{CHOOSE}If <image> is the reference image, {OTHERS}{ASSUME}\n"
     "Options:\n(A) Image 2\n(B) Image 3", "A", "A", "keep", (1, 2)),
    ("dreamsim", f"<image> <image> <image> {SHORT}{SIMILAR}\n",
     "The image that is more similar to the reference image is image 1.", "1", "index", (0, 1, 2)),
    ("dreamsim", f"{SHORT}{SIMILAR} <image> <image> <image>. {ASSUME}\n",  # it contradicts itself
     "Image 2 is more similar to the reference image.", "2", "never", ()),
    ("imagecode", THIS_TEXT + "<image>" * 3, "Answer: Image 2", "2", "index", (0, 1, 2)),
    ("imagecode", THIS_TEXT + OPTIONS, "Answer: C", "C", "letter", (0, 1, 2)),
    ("iconqa", "<image>How many dots are there?\nA. 3\nB. 5", "Answer: B", "B", "never", ()),
    ("iconqa", "<image>The pencil is about (_) inches long.", "Answer: 4", "4", "never", ()),
    ("nlvr2", "<image><image> Which image shows a 3?", "The first image", "1", "index", (0, 1)),
    ("nlvr2", "<image><image> How many of the images show a 3?", "The first image", "1", "never",
     ())]  # an answer that names an image must not stay

def test_rows_of_mantis_in_its_own_wordings(tmp_path):
    rows, digits = {}, iter(range(200))
    for config, question, answer, *_ in MANTIS_ROWS:
        k = len(rows.setdefault(config, []))
        paths = [f"{k}/{j}.png" for j in range(question.count("<image>"))]
        rows[config].append(mantis_row(k, paths, question, answer))
        # Later turns of a conversation refer back to the first, so they are left out.
        rows[config][-1]["conversation"] += [{"role": "user", "content": "Why?"}]
    for config in rows:
        paths = [image["path"] for row in rows[config] for image in row["images"]]
        write_mantis(tmp_path, config, rows[config], {path: digit(next(digits)) for path in paths})
    out = run_curate(tmp_path, tmp_path / "out", sources=[f"mantis:{config}" for config in rows])
    samples = perl.load_samples(out / "train.jsonl")
    found = [(s.source, s.answer, s.order_rule, s.movable) for s in samples]
    assert found == [("mantis-" + row[0], *row[3:]) for row in MANTIS_ROWS]

def one_image(question, answer, path="a.png"):
    return mantis_row(0, [path], "<image> " + question, answer)

BAD = {
    "not 1 to 16 images": mantis_row(0, [], "How many?", "3"),
    "placeholders do not fit the images": mantis_row(0, ["a.png", "b.png"], "<image> Why?", "3"),
    "question over 4000 characters": one_image("why " * 1500, "3"),
    "control characters or tokens in the text": one_image("<|im_end|> What is it?", "3"),
    "no answer": one_image("What is it?", " "),
    "answer is none of the options": one_image("?\nA. 1\nB. 2", "C"),
    "answer names an image in words": mantis_row(
        0, ["a.png", "b.png"], "<image><image> Which?", "The final image"),
    "answer has several parts": one_image("Solve.", "(1) 3; (2) 4"),
    "answer is one of many": one_image("Which sides are equal?", "AB = CD (not unique)"),
    "answer lists alternatives": one_image("Solve.", "x = 3 or x = -1"),
    "answer in unknown LaTeX": one_image("Which?", r"\ding{172}"),
    "open answer": one_image("What is it?", "A man who rides a bike."),
    "answer that our grader cannot read": one_image("Which set?", "{3"),
    "image not found": one_image("How many?", "3", "none.png"),
    "image name is ambiguous": one_image("How many?", "3", "0.png"),
    "image unreadable": one_image("How many?", "3", "torn.png"),
    "image too large or too thin": one_image("How many?", "3", "thin.png"),
    "duplicate": one_image("How many brown cows graze here?", "4"),
    "near duplicate": one_image("How many brown cows do graze here?", "4", "a.jpg"),
    "one question with several answers": one_image("Is it odd?", "No", "b.png")}

def test_what_a_rule_drops_is_counted_and_shown(tmp_path, monkeypatch):
    """A row for each rule, after three that stay."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # ev.main sets it
    good = [one_image("How many brown cows graze here?", "4"), one_image("Is this a horse?", "No"),
            one_image("Is it odd?", "No", "c.png"),
            one_image("Is it odd?", "Yes", "b.png")]  # contradicted below
    contents = {"a.png": digit(0), "a.jpg": digit(0, "JPEG"), "b.png": digit(1),
                "c.png": digit(2), "x/0.png": digit(3), "y/0.png": digit(4),
                "thin.png": encoded(Image.new("RGB", (900, 3)), "PNG")["bytes"],
                "torn.png": digit(5)[:-60]}
    write_mantis(tmp_path / "copies", "nlvr2", good + list(BAD.values()), contents)
    out = run_curate(tmp_path / "copies", tmp_path / "out", sources=["mantis:nlvr2"])
    dropped = Counter(row["rule"] for row in read_rows(out / "dropped.jsonl"))
    assert dropped == dict.fromkeys(BAD, 1) | {"one question with several answers": 2}
    assert [s.id[-1] for s in perl.load_samples(out / "train.jsonl")] == ["1", "2", "3"]
    text = (out / "REPORT.md").read_text()
    assert all(f"| {rule} | " in text for rule in BAD)
    assert text.startswith(f"# 3 of {len(BAD) + 4} questions")

CIRCLES = "Statements: ① a ② b ③ c ④ d. Which are right?"
LABELS = "(1) a (2) b (3) c (4) d. Which are right?"

@table("answer, question, gold", [  # what is left of a gold, or the rule that drops it
    (r"$\number{24}$", "", "24"), (r"\boxed{\text{24}}", "", "24"), ("24 (students)", "", "24"),
    (r"24\mathrm{~cm}", "", "24 cm"), ("3.4.", CIRCLES, "③④"), ("3.4.", LABELS, "3, 4"),
    ("3 and 4", "", "3, 4"), ("3.4", LABELS, "3.4"), (r"$40^{\circ}$", "", r"40^{\circ}"),
    (r"$$\dfrac{35}{4}$$", "", r"\dfrac{35}{4}"), *[(gold, CIRCLES, gold) for gold in (
        "7 (mod 12)", "③④", "12, 5", r"(-\infty, 3]", "1 1/2", "black and white", "OR gate",
        r"2\sin (2x-\frac{\pi }{6})")],
    ("$$BD=CE$$ (not unique)", "", "answer is one of many"),
    ("(1)3;(2)5", "", "answer has several parts"), ("6 or 2", "", "answer lists alternatives"),
    (r"$$x \geqslant 2$$(or $$x > 2$$)", "", "answer lists alternatives"),
    ("It is reasonable because of it", "", "open answer"), ("", "", "no answer")])
def test_golds_are_unwrapped_so_that_a_natural_answer_meets_them_or_dropped(answer, question, gold):
    found = curate.unwrap_gold(curate.gold_of(answer, question, 1), question)
    if gold.startswith(("answer ", "open ", "no ")):
        with pytest.raises(curate.Dropped, match=gold):
            curate.check_gold(found)
    else:
        curate.check_gold(found)
        assert found == gold and perl.is_correct(rf"\boxed{{{gold}}}", gold)

@table("sources, message", [
    (["mmk13"], "a source is mantis:CONFIG"), (["a/x", "b/x"], "two sources have the same name"),
    (["hiyouga/MMK12"], "row 1: not the columns of MMK12"),
    (["mantis:iconqa"], "part_1.zip is missing")])
def test_a_source_that_cannot_be_read_ends_with_one_sentence(copies, tmp_path, sources, message):
    shutil.copytree(copies, tmp_path / "copies")
    (tmp_path / "copies" / "Mantis-Instruct" / "iconqa" / "part_1.zip").unlink()
    refuses(message, run_curate, tmp_path / "copies", tmp_path / "out", sources=sources)

def test_a_picture_is_measured_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(perl, "read_image", lambda file: pytest.fail("decoded"))
    for size in ((8000, 6000), (900, 8)):
        with pytest.raises(curate.Dropped, match="too large or too thin"):
            curate.decode(encoded(Image.new("1", size), "PNG")["bytes"])

# ---- data_samples/curate.py: benchmarks, held-out questions and limits -----------------
def test_benchmarks_are_kept_out(copies, tmp_path):
    """By the same pixels, by a JPEG of them, by 13 words; 13 words of a template do not count."""
    against, sources = tmp_path / "against", shutil.copytree(copies, tmp_path / "copies")
    write_parquet([{"question": "short", "image": image_of(18)}], against / "test.parquet")
    (against / "near.jpg").write_bytes(digit(6, "JPEG"))
    template = "is the reference image, which image of the other two is more similar to the"
    write_rows(against / "b.jsonl", {"deep": [{"q": template}]})
    leaked = "The two cars drive off at noon from towns ninety miles apart; when do they meet?"
    (against / "c.json").write_text(json.dumps([leaked.upper()]))
    k12 = [k12_row(k, question, "3", image_of(300 + k))
           for k, question in enumerate((leaked, "A car drives."))]
    write_parquet(k12, sources / "MMK12" / "data" / "train-00001.parquet")
    out = run_curate(sources, tmp_path / "out", "--against", str(against))
    dropped = {row["id"]: row["rule"] for row in read_rows(out / "dropped.jsonl")}
    assert dropped == {"mantis-dreamsim-0000002": "picture of a benchmark",
                       "mantis-iconqa-0000001": "near duplicate of a benchmark's picture",
                       "mmk12-0000013": "13 words of a benchmark"}
    asked = "Tell me which of the photos that follow has more cats than image 2 has, please."
    assert curate.runs_of(asked.replace("image 2", "<image_2>")) == curate.runs_of(asked) != set()

def drawing(seed):
    """A figure of thin lines, as in mathematics; another one for each seed."""
    rng, picture = random.Random(seed), Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        draw.line([rng.randrange(20, 220) for _ in range(4)], "black", 2)
    return picture

def test_a_scaled_jpeg_of_a_benchmarks_picture_is_found_and_no_other(tmp_path):
    for seed in range(60):
        drawing(seed).save(tmp_path / f"{seed}.png")
    benchmarks, nothing = curate.read_benchmarks([tmp_path]), curate.read_benchmarks([])
    copy = tmp_path / "copy.jpg"
    for seed in range(60):
        for picture, is_known in ((drawing(seed).resize((256, 192)), True),
                                  (drawing(1000 + seed), False)):
            picture.save(copy, quality=80)
            bits = curate.near_hash(perl.read_image(copy))
            assert benchmarks.shows(bits, copy) == is_known and not nothing.shows(bits, copy)

def test_held_out_questions_share_no_picture_and_every_source_gives_its_part():
    def question(k, source, *pictures):
        return {"id": f"{source}-{k:03d}", "source": source, "images": list(pictures)}
    apart = [question(k, "apart", f"a{k}") for k in range(60)]
    pairs = [question(k, "pairs", f"p{k // 2}." + "jp"[k % 2], f"q{k}") for k in range(30)]
    chain = [question(k, "chain", f"c{k}", f"c{k + 1}") for k in range(30)]
    samples = apart + pairs + chain
    held = curate.hold_out(samples, 24)
    by_source = Counter(name.partition("-")[0] for name in held)
    # A chain hangs together by its ends, so none of it fits into its part of 6.
    assert by_source == {"apart": 12, "pairs": 6}
    pictures = [{Path(path).stem for s in samples if (s["id"] in held) == part
                 for path in s["images"]} for part in (True, False)]
    assert not pictures[0] & pictures[1]
    assert held == curate.hold_out(samples[::-1], 24) != curate.hold_out(samples, 12)
    assert curate.hold_out(samples, 0) == set()

def test_a_limit_takes_random_rows_until_enough_are_kept(tmp_path):
    rows, contents = [], {}
    for k, word in enumerate("red big old wet shy odd sad fat ill new".split()):
        contents[f"{k}.png"] = digit(k)
        rows.append(one_image(f"How many {word} cows?", "4", f"{k}.png"))
        rows.append(one_image("How many?", "3", "none.png"))  # dropped
    write_mantis(tmp_path, "nlvr2", rows, contents)
    ids = {}
    for limit in (1, 6, 30):
        out = run_curate(tmp_path, tmp_path / f"out{limit}", sources=[f"mantis:nlvr2={limit}"])
        ids[limit] = [s.id for s in perl.load_samples(out / "train.jsonl")]
        assert len(ids[limit]) == min(limit, 10) and ids[limit] == sorted(ids[limit])
    assert ids[6] != ids[30][:6] and set(ids[1]) < set(ids[6]) < set(ids[30])
    log = read_rows(tmp_path / "out1" / ".work" / "mantis-nlvr2.jsonl")
    assert len(log) < 20, "one question is enough"

# ---- data_samples/curate.py: its report; killed and continued --------------------------
def test_a_killed_curation_goes_on_to_the_same_bytes(copies, curated, tmp_path, monkeypatch):
    out, calls, store = tmp_path / "out", [], curate.store_image
    def dies(*args):
        calls.append(args)
        return die() if len(calls) == 80 else store(*args)
    monkeypatch.setattr(curate, "store_image", dies)
    with pytest.raises(Killed):
        run_curate(copies, out)
    with open(out / ".work" / "mantis-iconqa.jsonl", "a") as file:
        file.write('{"sample": {"id"')  # a line torn by the kill
    assert not (out / "train.jsonl").exists()
    run_curate(copies, out)
    run_curate(copies, out)  # now there is nothing to do
    assert len(calls) == 80 + 192 - 76, "of 19 whole rows, no picture is stored again"
    for name in ("train.jsonl", "REPORT.md", "ten.jpg", "dropped.jsonl"):
        assert (out / name).read_bytes() == (curated / name).read_bytes()
    refuses("has other sources or code", run_curate, copies, out, sources=["mmk12"])

def test_the_report_says_what_was_kept_and_why_images_may_not_move(curated, tmp_path):
    text = (curated / "REPORT.md").read_text()
    assert text.startswith("# 72 of 72 questions") and "WARNING" not in text
    assert "44 of 48 with several images can be permuted (index 12, keep 20, letter 12)" in text
    # Where the right answers are: a favourite place would be learned.
    assert "| source | 1 | 2 | 3 | 4 | 5 | A | B | all |" in text
    assert "| mantis-iconqa: option image | 0 | 0 | 0 | 0 | 0 | 0 | 12 | 12 |" in text
    assert "| mantis-imagecode: image | 3 | 3 | 2 | 2 | 2 | 0 | 0 | 12 |" in text
    assert "| mantis-dreamsim: image | 6 | 0 | 6 | 0 | 0 | 0 | 0 | 12 |" in text
    assert "| words that may mean order, time or place | 0 | 4 | 0 | 4 |" in text
    assert "place (grew 4, time 4)\n  - `mantis-nlvr2-0000003`, answer `A`" in text
    rows = [mantis_row(0, ["0.png", "1.png"], "<image><image>Did it change?", "Yes")]
    write_mantis(tmp_path / "never", "nlvr2", rows, {f"{k}.png": digit(k) for k in range(2)})
    out = run_curate(tmp_path / "never", tmp_path / "none", sources=["mantis:nlvr2"])
    assert "WARNING: on the others PeRL is plain GRPO" in (out / "REPORT.md").read_text()

# ---- The README's recipe: from raw rows to the last table ------------------------------
def test_the_readmes_recipe_runs(tmp_path, monkeypatch, capsys):
    """Its own commands, one after the other: the tiny model in the 7B's place, two steps, 40 rows
    of each source in its raw format, and the held-out questions in the benchmarks' place."""
    section = (HERE / "README.md").read_text().partition("## Train the 7B")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    write_copies(tmp_path / "copies", 40)
    small = ["--steps", "2", "--questions-per-step", "4", "--max-new-tokens", "48",
             "--eval-orders", "6"]
    done, stage2 = Counter(), Path("runs/7b/stage2")
    for line in block.splitlines():
        text = " ".join(shlex.split(line, comments=True)).replace("Qwen2.5-VL-7B", "tiny")
        if not text:
            continue
        text = text.replace("--hold-out 300", "--hold-out 20")
        text = text.replace("--benchmarks all", "--benchmarks real/heldout.jsonl --orders 6")
        if "stage2/best" in text and not (stage2 / "best").exists():
            # It is written when eval_worst improves, which two steps may not do.
            shutil.copytree(stage2 / "checkpoint-2", stage2 / "best")
        script = re.search(r"\S+\.py", text)[0]
        argv = text.partition(script)[2].split()
        if script == "data_samples/curate.py":
            curate.main([*argv, "--data-dir", "copies"])
        elif script == "perl.py":
            perl.main(argv + small)
        else:
            ev.main(argv + ["--max-new-tokens", "48"] * ("--model" in argv))
        done[script] += 1
    assert done == {"data_samples/curate.py": 1, "perl.py": 4, "eval.py": 5}
    train, held = read_rows(Path("real/train.jsonl")), read_rows(Path("real/heldout.jsonl"))
    assert (len(train), len(held)) == (180, 20)
    scores, kept = (json_of(Path("runs/7b/stage0") / name) for name in ("scores.json", "kept.json"))
    assert len(scores) == 180 > 2 * len(kept) - 2
    for stage in (1, 2):
        metrics = read_rows(Path(f"runs/7b/stage{stage}/metrics.jsonl"))
        assert [row["step"] for row in metrics] == [0, 1, 2] and "eval_worst" in metrics[-1]
        assert stage == 2 or metrics[1]["kept"] + metrics[2]["kept"] > 0
    said = capsys.readouterr().out
    assert "start model: runs/7b/stage1/checkpoint-2" in said
    assert re.search(r"\| heldout +\| 20 ", said), "the two runs are compared"

# ---- data_samples/ablate.py ------------------------------------------------------------
def test_the_t_interval_and_test():
    """Half the width of [1, 2, 3, 4] by hand: 3.182 * 1.29099 / 2. Of two values, p is of a
    Cauchy distribution. A mean as large as half the width has p = 5 %, for each quantile."""
    assert stats.interval([1, 2, 3, 4]) == (2.5, pytest.approx(2.054, abs=1e-3))
    assert stats.interval([5.0]) == (5.0, math.inf)
    assert stats.p_value([0.0, 2.0]) == pytest.approx(0.5)
    assert stats.p_value([2.0, 2.0]) == 0 and stats.p_value([0.0, 0.0]) == 1
    for n in range(2, len(stats.T_QUANTILES) + 2):
        values = [float(k % 2) for k in range(n)]
        mean, half = stats.interval(values)
        shifted = [value - mean - half for value in values]
        assert stats.p_value(shifted) == pytest.approx(0.05, abs=1e-4)

@table("p_values, survivors", [
    ([0.001, 0.02, 0.04], [0, 1, 2]), ([0.04, 0.001, 0.03], [1]), ([0.02, 0.03, 0.04], []),
    ([0.04], [0]), ([], [])])
def test_holms_correction(p_values, survivors, monkeypatch):
    """The smallest of m p-values is compared with 5 % / m, the next with 5 % / (m - 1), .."""
    monkeypatch.setattr(stats, "p_value", lambda value: value)
    assert stats.holm(dict(enumerate(p_values))) == survivors

CODE = 'def f(x):\n    """What."""\n    return x + 1\n'

def test_comments_and_docstrings_do_not_change_the_hash_and_code_does(tmp_path):
    def hash_of(code):
        (tmp_path / "a.py").write_text(code)
        return hashes.code_hash(tmp_path / "a.py")
    same = [CODE.replace("return", "# why\n\n    return  "), CODE.replace("What", "Which"),
            CODE.replace('    """What."""\n', ""), '"""Module."""\n' + CODE]
    others = [CODE.replace("+ 1", "+ 2"), CODE + "f(1)\n", CODE.replace('"""What."""', 'y = "W"')]
    assert {hash_of(code) for code in same} == {hash_of(CODE)}
    assert hash_of(CODE) not in map(hash_of, others)

def test_the_hash_of_an_arm_covers_flags_fork_data_and_what_all_share(monkeypatch):
    monkeypatch.setattr(ablate, "base_hash", lambda: "base")
    def hash_of(**changes):
        arm = ablate.Arm("title", ("--seed 1",))._replace(**changes)
        return ablate.heading("name", arm, 0)["hash"]
    found = [hash_of(), hash_of(stages=("--seed 2",)), hash_of(stages=("--seed 1", "")),
             hash_of(data="--first-share 0.5"), hash_of(data="--first-share 0.8"),
             hash_of(more_images=True), hash_of(fork=ablate.ARMS["agree"].fork),
             hash_of(fork=ablate.ARMS["clean"].fork)]
    assert hash_of(title="other", rival="") == found[0]
    monkeypatch.setattr(ablate, "EVALUATION", "--eval-orders 2")
    found.append(hash_of())
    monkeypatch.undo()
    found.append(hash_of())  # another base
    assert len(set(found)) == len(found)

def write_run(out, worst):
    """metrics.jsonl of a run of two steps, with this worst order at its end."""
    step = dict(kept=1, dropped=3, seconds_sample=2.0, seconds_update=1.0, by_permutation=0.5,
                equal_as_given=0.75)
    evaluation = dict(eval_accuracy=0.75, eval_bias=0.25)
    for name in ("checkpoint-2", "best"):
        (out / "stage1" / name).mkdir(parents=True)
    write_rows(out / "stage1" / "metrics.jsonl", evaluation | dict(step=0, eval_worst=0.25),
               step | dict(step=1, with_gradient=0.5),
               step | evaluation | dict(step=2, with_gradient=0.0, eval_worst=worst))

class AtOnce(Executor):
    """Runs what is submitted before it returns, and takes back what a fork did to perl.py.
    Threads would not do: ast.parse is not safe."""
    def __init__(self, jobs):
        self.jobs = jobs

    def submit(self, task, *args):
        future, before = Future(), dict(vars(perl))
        try:
            future.set_result(task(*args))
        except BaseException as error:
            future.set_exception(error)
        for name in vars(perl).keys() - before.keys():
            delattr(perl, name)
        vars(perl).update(before)
        return future

@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """ablate.py on runs without training: worst order .5, .6 .. by seed, minus .1 for plain GRPO
    and .2 for another training set; those in `broken` fail. Returns what calls it, the runs
    started, `broken`, its file."""
    started, broken, path = [], set(), tmp_path / "ablation.jsonl"
    def trained(argv=None):
        argv = argv or sys.argv[1:]
        seed, out = int(argv[argv.index("--seed") + 1]), Path(argv[argv.index("--out") + 1])
        name = out.name.split("-seed")[0]
        started.append((name, seed))
        if (name, seed) in broken:
            raise SystemExit("out of memory")
        skewed = 0.2 * name.endswith("-0.5")
        write_run(out, 0.5 + seed / 10 - 0.1 * name.startswith("grpo") - skewed)
    def measured(checkpoint, path, n_orders, max_new_tokens):
        worst = 0.25
        if checkpoint != "tiny":
            worst = read_rows(Path(checkpoint).parent / "metrics.jsonl")[-1]["eval_worst"]
        return {"all": [0.75, worst, 0.25], "ask": [0.5, worst / 2, 0.25],
                "places": {"1": 1.0, "2": 0.5}}
    monkeypatch.setattr(perl, "main", trained)
    monkeypatch.setattr(sys, "argv", sys.argv)  # forks change both: put back after the test
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name, fake in dict(  # all in this process, whose output is the test's
            redirect_stdout=contextlib.nullcontext, redirect_stderr=contextlib.nullcontext,
            fresh_processes=AtOnce, base_hash=lambda: "now", measure=measured,
            made_data=lambda flags, scratch: scratch).items():
        monkeypatch.setattr(ablate, name, fake)
    def main(*flags, arms="perl,grpo", seeds="0-2"):
        started.clear()
        ablate.main(["--lines", str(path), "--scratch", str(tmp_path / "scratch"), "--jobs", "1",
                     "--arms", arms, "--seeds", seeds, *flags])
    return main, started, broken, path

def test_a_finished_run_is_not_run_again_until_its_code_changes(
        ablation, tmp_path, monkeypatch, capsys):
    main, started, _, path = ablation
    main(arms="clean,grpo,perl,start")
    pairs = [(name, seed) for seed in (0, 1, 2) for name in ("perl", "grpo")]
    assert started == pairs + [("clean", 0), ("clean", 1), ("clean", 2)], "in pairs, these first"
    assert not list(tmp_path.glob("scratch/*/*/[bc]*")), "their weights are not kept"
    main(seeds="2-3")
    assert sorted(started) == [("grpo", 3), ("perl", 3)]
    line, = [row for row in read_rows(path) if row["arm"] == "perl" and row["seed"] == 0]
    assert line.pop("cpu_seconds") > 0
    assert line == dict(
        ablate.heading("perl", ablate.ARMS["perl"], 0), flags=["--eval-every 10"], steps=2,
        curve=[[0, 0.75, 0.25, 0.25], [2, 0.75, 0.5, 0.25]], kept=0.25, with_gradient=0.25,
        equal_as_given=0.75, by_permutation=0.5, training_seconds=6.0,
        all=[0.75, 0.5, 0.25], ask=[0.5, 0.25, 0.25], places={"1": 1.0, "2": 0.5},
        more_all=[0.75, 0.5, 0.25], more_ask=[0.5, 0.25, 0.25], more_places={"1": 1.0, "2": 0.5})
    monkeypatch.setattr(ablate, "base_hash", lambda: "changed")
    capsys.readouterr()
    main(seeds="0")
    assert started == [("perl", 0), ("grpo", 0)]
    before, now = capsys.readouterr().out.split("another perl.py or other data: ")[1].split(
        "\n2 runs of perl.py changed")
    assert before.startswith("12 runs of perl.py now.") and "| plain GRPO  | 4 " in before
    assert "| plain GRPO | 1 " in now, "each code has tables of its own"

def test_recheck_keeps_the_runs_of_arms_with_equal_results(ablation, monkeypatch):
    main, started, broken, path = ablation
    arms = {name: ablate.ARMS[name] for name in ("perl", "grpo")}
    monkeypatch.setattr(ablate, "ARMS", arms)
    main()
    before = read_rows(path)
    monkeypatch.setattr(ablate, "base_hash", lambda: "changed")
    def other_for_grpo(checkpoint, *args, measure=ablate.measure, **named):
        changed = {"places": {}} if "grpo" in checkpoint else {}
        return measure(checkpoint, *args, **named) | changed
    monkeypatch.setattr(ablate, "measure", other_for_grpo)
    broken.add(("perl", 0))
    with ends("1 runs failed"):
        main("--recheck")
    assert started == [("perl", 0), ("grpo", 0)]
    assert read_rows(path)[:6] == before, "a failed run says nothing about the others"
    broken.clear()
    main("--recheck")
    assert started == [("perl", 0)]
    kept = {(row["arm"], row["seed"], row["code"], row.get("ran_on")) for row in read_rows(path)}
    assert kept == {("grpo", 0, "changed", None), ("perl", 0, "changed", None),
                    ("perl", 1, "changed", "now"), ("perl", 2, "changed", "now")}
    main()
    assert started == [("grpo", 1), ("grpo", 2)]

def test_a_failed_run_is_told_and_listed_and_run_again_and_stops_no_other(
        ablation, monkeypatch, capsys):
    """Code that changes during a run makes it fail too."""
    main, started, broken, path = ablation
    broken.add(("perl", 1))
    refuses("^1 runs failed$", main)
    assert len(started) == 6 and len(read_rows(path)) == 6
    out = capsys.readouterr().out
    assert "perl, seed 1: SystemExit: out of memory" in out
    assert "5 runs of perl.py now. Failed: perl, seed 1 (SystemExit: out of memory)." in out
    assert re.search(r"PeRL +\| 2 .*\n\| plain GRPO +\| 3 ", out)
    broken.clear()
    main()
    assert started == [("perl", 1)]
    assert "6 runs of perl.py now. Failed: none." in capsys.readouterr().out
    changes = itertools.count()
    monkeypatch.setattr(ablate, "base_hash", lambda: f"change {next(changes)}")
    refuses("^1 runs failed$", main, arms="perl", seeds="0")
    assert "code or data changed during the run" in capsys.readouterr().out

def test_runs_have_fresh_processes_and_their_failures_come_back(tmp_path, capfd):
    """perl.py refuses a negative seed: the process starts, ends and says why without training."""
    ablate.run_all([("clean", ablate.ARMS["clean"], -1)], 1, tmp_path / "a.jsonl",
                   tmp_path / "scratch")
    assert "clean, seed -1: UserError: --seed -1 must be" in capfd.readouterr().out
    assert (tmp_path / "scratch" / "clean-seed-1.log").exists()
    assert "--seed -1" in read_rows(tmp_path / "a.jsonl")[0]["failed"]
    assert perl.set_advantages.__name__ == "set_advantages", "the fork is not in this process"

def cells_of(text):
    return {name: cells for name, *cells in table_rows(text)}

def test_tables_by_hand(ablation):
    """PeRL's worst order is 50, 60 and 70 %, plain GRPO's .1 less, but seed 2 has only PeRL: the
    paired difference is over two seeds and without spread."""
    main, _, _, path = ablation
    main(arms="start,perl,grpo,perl-0.5,grpo-0.5,perl-120,grpo-120,grpo-images", seeds="0-1")
    main(arms="perl", seeds="2")
    texts = ablate.all_tables("now", ablate.last_lines(read_rows(path))["now"])
    arms, shares = cells_of(texts["arms"]), cells_of(texts["shares"])
    assert arms["PeRL"] == ["3", "75.0 ± 0.0", "60.0 ± 24.8", "25.0 ± 0.0", "", "", "25 %",
                            "25 %", "75 %", "50 %"]
    assert arms["plain GRPO"][4:6] == ["+0.0 ± 0.0", "**-10.0 ± 0.0**"]
    assert arms["start model"][:4] == ["1", "75.0", "25.0", "25.0"] and "n_s = 2" not in arms
    skewed = shares["plain GRPO, right image first: 0.5"]
    assert skewed[5] == "**-10.0 ± 0.0**", "against PeRL on the same training set"
    assert cells_of(texts["main"])["plain GRPO, 120 steps"][4] == "**-10.0 ± 0.0**"
    assert cells_of(texts["more"])["PeRL"][-1] == "100 / 50"
    assert cells_of(texts["images"])[ablate.ARMS["grpo-images"].title][2] == "22.5 ± 31.8"
    assert cells_of(texts["longer"])["2"] == ["2", "55.0 ± 63.5", "45.0 ± 63.5", "+10.0 ± 0.0"]
    assert texts["holm"].startswith("Of 6 paired differences")
    assert "3 have a 95 % interval without 0, and 3 survive" in texts["holm"]
    assert "- worst order below PeRL's: plain GRPO; plain GRPO, 120 steps; plain" in texts["holm"]
    assert "have not been started" in texts["runs"] and texts["runs"].startswith("16 runs")

def test_the_readmes_and_the_figure_show_the_runs_of_ablation_jsonl(tmp_path):
    """Made by `ablate.py --tables`; the figure notes the runs that it shows."""
    source, names, picture = HERE / "data_samples", set(), tmp_path / "ablation.png"
    by_code = ablate.last_lines(read_rows(source / "ablation.jsonl"))
    code = max(reversed(by_code), key=lambda code: len(by_code[code]))
    texts, between = ablate.all_tables(code, by_code[code]), r"(<!-- table: (\S+) -->\n).*?(<!-- /)"
    for readme in (HERE / "README.md", source / "README.md"):
        copy, text = tmp_path / "copy.md", readme.read_text()
        names |= {name for _, name, _ in re.findall(between, text, re.DOTALL)}
        copy.write_text(re.sub(between, r"\1\3", text, flags=re.DOTALL))
        ablate.write_tables(copy, texts)
        assert copy.read_text() == text, f"{readme}: run ablate.py --tables"
    assert names >= texts.keys() - {"main", "positions"}
    shutil.copy(source / "ablation.png", picture)
    before = picture.stat().st_mtime_ns
    ablate.draw(ablate.by_arm(by_code[code]), ablate.SHARES, picture)
    assert picture.stat().st_mtime_ns == before, "run ablate.py --tables"

FORK = """import perl
def no_advantages(groups):
    pass
perl.{name} = no_advantages
if __name__ == "__main__":
    perl.main()
"""

def test_a_users_fork_is_compared_and_changes_no_other_result(
        ablation, tmp_path, monkeypatch, capsys):
    """From any folder, with a module beside it and a flag of its own. Its lines are not in the
    committed file, and what it replaces does not measure it. Other flags or another text are
    another arm."""
    main, started, _, path = ablation
    main(seeds="0-1")
    committed, measure, real, used = path.read_text(), ablate.measure, perl.all_orders, []
    def noted(*args, **named):
        used.append(perl.all_orders)
        return measure(*args, **named)
    monkeypatch.setattr(ablate, "measure", noted)
    (tmp_path / "beside.py").write_text("NAME = 'set_advantages'\n")
    fork, text = tmp_path / "mine.py", "import sys, beside\nsys.argv.remove('--own')\n"
    text += FORK.format(name="all_orders").replace("if ", "if beside.NAME and ")
    fork.write_text(text)
    name = re.sub("[^A-Za-z0-9.]+", "-", str(fork)) + "-own"
    main("--fork", str(fork), "--flags=--own --beta 0.01", seeds="0-1")
    assert started == [(f"{name}-beta-0.01", 0), (f"{name}-beta-0.01", 1)]
    main("--fork", str(fork), "--flags=--own", seeds="1-2")
    assert sorted(started) == [(name, 1), (name, 2), ("grpo", 2), ("perl", 2)]
    assert path.read_text() == committed and set(used) == {real}
    fork.write_text(text.replace("pass", "return 1"))
    main("--fork", str(fork), "--flags=--own", seeds="0")
    assert started == [(name, 0)]
    capsys.readouterr()
    fork.write_text(text)  # after a change back, the first runs count again
    main("--fork", str(fork), "--flags=--own", seeds="1-2")
    cells = cells_of(capsys.readouterr().out.split("forks:\n")[-1])
    assert not started and cells["PeRL"][0] == "3"
    assert cells[f"{fork} --own"][0] == "2" and cells[f"{fork} --own --beta 0.01"][0] == "2"
    assert cells[f"{fork} --own"][-1].startswith("+10.0")

@table("text, message", [
    (FORK.format(name="set_advantage"),
     "sets perl.set_advantage, which perl.py does not have; did you mean set_advantages"),
    ("import perl\nperl.set_advantages = len\n", "does not call perl.main"),
    (FORK.format(name="set_advantages"), "unrecognized arguments: --bta")])
def test_a_fork_without_effect_is_refused_before_anything_runs(
        text, message, ablation, tmp_path, capsys):
    main, started, _, _ = ablation
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        main("--fork", str(tmp_path / "mine.py"), "--flags=--bta 1")
    assert message in f"{end.value} {capsys.readouterr().err}" and not started

def answered(text, order=(0, 1)):
    """A rollout of the answer `text` to a question whose first image is right."""
    asked = perl.permute(sample("index", "1", n=len(order)), order)
    accuracy = float(text == asked.answer)
    return Rollout(perl.Prompt(asked, [1], []), order, asked.answer, [1], rf"\boxed{{{text}}}",
                   truncated=False, accuracy=accuracy, reward=accuracy)

def load_fork(name):
    """Do what the fork of an arm does to perl.py -> its names."""
    return runpy.run_path(ablate.ARMS[name].fork, run_name="fork")

@table("text, order, given", [
    ("1", (0, 1), "1"), ("1", (1, 0), "2"), ("1", (2, 0, 1), "3"), ("3", (2, 0, 1), "2"),
    ("3", (1, 0), None), ("0", (1, 0), None), ("none", (1, 0), None), ("", (1, 0), None)])
def group_of(*texts, orders=((0, 1), (1, 0))):
    """Answers order by order, as many in each."""
    n = len(texts) // len(orders)
    return [answered(text, orders[k // n]) for k, text in enumerate(texts)]

TWICE, SWAP, TURN = ((0, 1), (0, 1)), ((0, 1), (1, 0)), ((0, 1, 2), (2, 0, 1))

@table("fork, orders, texts, rewards", [  # columns: the first answers of both, then the second
    ("agree", SWAP, "1121", [1.9, 1, 1.9, 0]), ("agree", SWAP, "2919", [0.9, 0, 0.9, 0]),
    ("agree", TURN, "23", [0.9, 0.9]), ("agree", TURN, "21", [0, 0]),
    ("agree-right", SWAP, "1121", [1.9, 1, 1.9, 0]),
    ("agree-right", SWAP, "2112", [0, 1.9, 0, 1.9]),
    ("agree", TWICE, "1111", [1, 1, 1, 1]), ("agree-right", TWICE, "1111", [1, 1, 1, 1])])
def test_rewards_of_later_papers(fork, orders, texts, rewards, monkeypatch):
    """Agreement pays whether right or wrong; being right together pays on top; a question in one
    order only has nothing to agree with."""
    monkeypatch.setattr(perl, "set_advantages", perl.set_advantages)
    group = group_of(*texts, orders=orders)
    runpy.run_path(ablate.ARMS[fork].fork, run_name="fork")
    perl.set_advantages([group])
    assert [rollout.reward for rollout in group] == pytest.approx(rewards)
    assert any(rollout.advantage for rollout in group) == (len(set(rewards)) > 1)

def test_permuting_follows_a_questions_own_gap(monkeypatch):
    """Stage 0 asks in two orders; training then permutes by the gap, evaluation as before."""
    groups, asked, rng = [], [], random.Random(0)
    for name, row in {"biased": [1, 1, 0, 0], "fair": [1, 0, 1, 0], "fixed": [1, 0]}.items():
        groups.append(group_of("1", "1", "1", "1")[:len(row)])
        for rollout, accuracy in zip(groups[-1], row):
            rollout.accuracy = float(accuracy)
            rollout.prompt.sample = dataclasses.replace(sample("keep"), id=name)
    def sample_orders(*args, n_orders, n):
        asked.append((n_orders, n))
        return groups
    monkeypatch.setattr(perl, "draw_orders", perl.draw_orders)
    monkeypatch.setattr(perl, "sample_orders", sample_orders)
    load_fork("adaptive")
    for stage in (0, 1):
        perl.sample_orders(None, None, [], tiny_config(stage=stage), ACCELERATOR, n_orders=1, n=4)
    assert asked == [(2, 2), (1, 4)]
    for name, permuted in (("biased", 40), ("fair", 0), ("fixed", 0), ("held out", 20)):
        asked_for = dataclasses.replace(sample("keep"), id=name)
        drawn = [perl.draw_orders(asked_for, 1, 0.5, rng)[1] != (0, 1, 2) for _ in range(40)]
        assert sum(drawn) == pytest.approx(permuted, abs=9 if name == "held out" else 0)

def test_a_checkpoint_is_measured_over_orders_kinds_and_positions(monkeypatch):
    """The first image is right: in order (1, 0) it stands second. Letters name image 2 and on.
    A question whose answer stays counts for `all` only."""
    letter = sample("letter", "B", movable=(1, 2))
    option = dataclasses.replace(answered("1"), prompt=perl.Prompt(letter, [1], []), gold="B",
                                 accuracy=0.0)
    kept = dataclasses.replace(option, prompt=perl.Prompt(sample(), [1], []), accuracy=1.0)
    groups = [group_of("1", "1", "1", "2"), [option], [kept]]
    def sample_groups(model, processor, samples, orders, cfg, *, n, greedy):
        assert len(samples) == 321 and max(map(len, orders)) == 6 and (n, greedy) == (1, True)
        assert cfg.max_new_tokens == 64
        return groups
    monkeypatch.setattr(perl, "sample_groups", sample_groups)
    found = ablate.measure("tiny", HERE / "data_samples/test.jsonl", 6, 64)
    assert found == {"all": [pytest.approx(1.75 / 3, abs=1e-5), 0.33333, 0.33333],
                     "ask": [0.375, 0.0, 0.5], "places": {"1": 1.0, "2": 0.5, "3": 0.0}}

def test_an_arm_runs_with_its_fork_and_stages_and_is_measured(tmp_path, monkeypatch, data):
    """Two stages of one step each, the second from the first's weights, with a fork of both."""
    for owner, name in ((perl, "main"), (perl, "set_advantages"), (sys, "argv")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    monkeypatch.setattr(sys, "path", sys.path.copy())
    measure, measured = ablate.measure, []
    def measure_few(checkpoint, path, n_orders, max_new_tokens):
        measured.append(checkpoint)
        return measure(checkpoint, data.with_name("eval.jsonl"), 2, 16)
    monkeypatch.setattr(ablate, "measure", measure_few)
    short = " ".join(arguments(data, "", steps=1, eval_every=1, beta=0)).replace("--out ", "")
    monkeypatch.setattr(ablate, "EVALUATION", short)
    arm = ablate.ARMS["agree"]._replace(stages=("--filter none", "--stage 2 --filter none"))
    line = ablate.run("agree", arm, 100, tmp_path)
    assert [point[0] for point in line["curve"]] == [0, 1, 0, 1] and line["steps"] == 2
    assert measured == [str(tmp_path / "agree-seed100/stage2/checkpoint-1")]
    assert len(line["all"]) == 3 and line["places"] and 0 <= line["with_gradient"] <= 1
    log = (tmp_path / "agree-seed100.log").read_text()
    assert log.count("step 1/1") == 2 and "stage1/checkpoint-1" in log
    assert (tmp_path / "agree-seed100/stage1/agree.py").exists(), "the fork is kept with its run"
    assert perl.set_advantages.__name__ == "agree"

def test_training_sets_are_made_once(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    make_samples, commands = pytest.importorskip("make_samples"), []
    def run(command):
        commands.append(command)
        monkeypatch.setattr(sys, "argv", list(map(str, command[1:])))
        make_samples.main()
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", run)
    balanced = ablate.made_data("--first-share balanced", tmp_path)
    assert ablate.made_data("--first-share balanced", tmp_path) == balanced and len(commands) == 1
    assert (balanced / "test.jsonl").read_bytes() == (HERE / "data_samples/test.jsonl").read_bytes()
    answers = Counter(row["answer"] for row in read_rows(balanced / "train.jsonl")
                      if row["source"] == "largest" and len(row["images"]) == 4)
    assert answers == dict.fromkeys("1234", 30)
    more = perl.load_samples(ablate.made_data(ablate.MORE_IMAGES, tmp_path) / "test.jsonl")
    assert Counter(len(one.images) for one in more) == {6: 90, 7: 100, 8: 110}
    answers = Counter(one.answer for one in more if (one.source, len(one.images)) == ("match", 6))
    assert sorted(answers) == list("ABCDE") and len(set(answers.values())) == 1

# ---- data_samples/ablate.py: --cost ----------------------------------------------------
def step_config(**changes):
    return dataclasses.replace(perl.parse_config([]), **dict(
        beta=0.0, max_new_tokens=5, max_tokens_per_micro_batch=16384) | changes)

@table("changes", [{}, PLAIN, dict(n_permutations=2, rollouts_per_order=2),
                   dict(max_tokens_per_micro_batch=50)])
def test_flops_by_arithmetic_are_those_of_a_whole_step(changes):
    """The parts that --cost prints add up to what torch counts in sampling and an update."""
    cfg, model, shape = step_config(**changes), load_tiny(), [3, 6, 10]
    endless = SimpleNamespace(**vars(PROCESSOR) | dict(
        banned_ids=PROCESSOR.banned_ids + PROCESSOR.eos_ids))
    rollouts = cost.full_rollouts(cfg, shape, model.config.vision_config, 40, PROCESSOR.image_id)
    prompts = [r.prompt for r in rollouts[::cfg.rollouts_per_order]]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        perl.generate(model, endless, prompts, cfg.rollouts_per_order, cfg)
        adamw_updates(model, [[rollouts]], cfg, lr=0.0)
    flops, _ = cost.count_flops(model.config, cfg, shape)
    assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-3)

def test_flops_at_the_size_of_the_7b():
    flops = {}
    for share in (False, True):
        cfg = step_config(max_new_tokens=256, share=share)
        flops[share], minimum = cost.count_flops(cost.QWEN_7B, cfg, [4, 256, 64])
    total = sum(flops[True].values())
    assert total <= 0.30 * sum(flops[False].values()) and total <= 1.15 * sum(minimum.values())
    assert all(0.95 < minimum[part] / flops[True][part] < 1.001 for part in minimum)

def test_the_last_line_of_cost_is_an_object(capsys):
    ablate.main(["--cost", "--images=2", "--image-tokens=4", "--text-tokens=9",
                 "--max-new-tokens=4", "--n-permutations=2"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert min(row.values()) > 0 and 100 < row["peak_mb_shared"] < 4000
    parts = [row[f"flops_shared_{part}"] for part in ("vision", "prefill", "decode", "loss")]
    assert sum(parts) == pytest.approx(row["flops_shared"])
    assert {"seconds_shared", "seconds_plain_sample", "peak_mb_plain"} <= row.keys()
    shared = row["flops_shared"]
    assert 0.9 < row["flops_minimum"] / shared <= 1 < row["flops_plain"] / shared
