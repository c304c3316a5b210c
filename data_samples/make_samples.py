#!/usr/bin/env python3
r"""Builds everything else in this folder, the same on every run:

    python make_samples.py --only data    # images/, train.jsonl, test.jsonl: seconds
    python make_samples.py --only data --first-share 0.5 --out DIR    # with another skew, elsewhere
    python make_samples.py --only data --kinds largest,match --out DIR    # only these in train.jsonl
    python make_samples.py --only data --more-images --out DIR    # a test set with 6 to 8 images
    python make_samples.py --only tiny    # tiny/, the start checkpoint: 7 minutes on one core
    python make_samples.py                # both

1. Images are real: the handwritten digits that come with scikit-learn (UCI, 8x8 pixels), enlarged
   to 28x28, which is one image token of Qwen2.5-VL (patches of 14 pixels, 2x2 of them merged).
   Train and test share no image.
2. Questions are of six kinds (KINDS). In the train set the right image stands first in 95 % of
   the questions (--first-share), as a favoured place does in much real data; in the test set it
   stands everywhere equally often (--first-share balanced: in the train set too).
3. The start checkpoint has Qwen2.5-VL's architecture and 0.5M parameters, and learns from
   demonstrations of two sorts. Careful ones read every image and keep a running state. Hasty ones
   stop after the first images and answer from what they have seen. Hasty ones are in the majority:
   the start model knows the format, reads digits and prefers early images, as real models do, and
   careful reading is something it samples now and then. That is what RL needs to begin.
"""
import argparse
import json
import random
import re
import shutil
import string
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import perl  # found through the line above

SEED = 7
TEST_IMAGES, TRAIN_IMAGES = 280, 900
TRAIN_COPIES = 6   # train questions for each test question
FIRST_SHARE = 0.95  # train: how often the right image stands first; else at one of the others

# Test questions of each kind, by number of images. Where an image is the answer, the number is a
# multiple of the places it can stand in, so that every place comes up equally often.
KINDS = {
    "largest": {2: 6, 3: 15, 4: 20, 5: 20},
    "smallest": {2: 6, 3: 15, 4: 20, 5: 20},
    "match": {3: 8, 4: 15, 5: 40},  # image 1 is a fixed reference, the others are options A, B, ...
    "count": {2: 14, 3: 18, 4: 14, 5: 14},
    "fraction": {2: 12, 3: 20, 4: 14, 5: 14},
    "order": {2: 4, 3: 4, 4: 4, 5: 4},
}
# --more-images: a test set with more images than the model was trained on.
MORE_IMAGES = {
    "largest": {6: 18, 7: 21, 8: 24},
    "smallest": {6: 18, 7: 21, 8: 24},
    "match": {6: 20, 7: 24, 8: 28},
    "count": {6: 17, 7: 17, 8: 17},
    "fraction": {6: 17, 7: 17, 8: 17},
}
# {all}: the images in a row; {list}: "<image>, <image> and <image>"; {labelled}: "Image 1: <image>
# Image 2: ..."; for match, {options}: "A: <image> B: ..." and {row}: the options without letters.
PHRASINGS = {
    "largest": ["{all}Which image shows the largest digit?",
                "{all}In which image is the highest digit? Give its number.",
                "Look at {list}. Which image shows the largest digit?",
                "{labelled} Which one shows the largest digit?"],
    "smallest": ["{all}Which image shows the smallest digit?",
                 "{all}In which image is the lowest digit? Give its number.",
                 "Look at {list}. Which image shows the smallest digit?",
                 "{labelled} Which one shows the smallest digit?"],
    "match": ["<image>Options: {options} Which option shows the same digit as <image_1>?",
              "This is the reference: <image> Which of these shows the same digit? {options}",
              "Compare <image> with the options A, B and so on: {row} Which has the same digit?"],
    "count": ["{all}How many of the images show an even digit?",
              "Look at {list}. How many of them show an even digit?",
              "{labelled} Count the images with an even digit, <image_{k}> included."],
    "fraction": ["{all}What fraction of the images shows a digit above 4?",
                 "Look at {list}. What fraction of them shows a digit above 4?",
                 "{labelled} Give the fraction of images with a digit above 4."],
    "order": ["{all}Going from the first image to the last, does the digit get larger?",
              "{all}Is the digit in the first image smaller than the digit in the last image?"],
}


# --------------------------------------------------------------------------------------------------
# Images and questions
# --------------------------------------------------------------------------------------------------

def save_images(folder: Path) -> dict[str, dict[int, list[str]]]:
    """Write the digits as PNG; returns the paths by split and digit."""
    data = load_digits()
    shuffled = np.random.RandomState(SEED).permutation(len(data.target))
    splits = {"test": shuffled[:TEST_IMAGES], "train": shuffled[TEST_IMAGES:][:TRAIN_IMAGES]}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pools = {split: {digit: [] for digit in range(10)} for split in splits}
    for split, indices in splits.items():
        for index in indices:
            name = f"{split}_{index:04d}.png"
            picture = Image.fromarray(np.uint8(data.images[index] / 16 * 255))
            picture.resize((28, 28), Image.Resampling.BICUBIC).save(folder / name, optimize=True)
            pools[split][int(data.target[index])].append(f"images/{name}")
    return pools


def draw_digits(kind: str, n: int, rng: random.Random, place: int, yes: bool) -> list[int]:
    """Digits of n images, with one right answer. Where an image is the answer, it stands at `place`
    (0-based, among the images that may move); `yes` is the answer to a question of kind `order`."""
    if kind in ("count", "fraction"):
        return [rng.randrange(10) for _ in range(n)]
    digits = rng.sample(range(10), n)
    if kind == "match":
        digits[1 + place] = digits[0]
    elif kind == "order":
        digits = digits if (digits[0] < digits[-1]) == yes else digits[::-1]
    else:
        right = digits.index((max if kind == "largest" else min)(digits))
        digits[right], digits[place] = digits[place], digits[right]
    return digits


def gold_answer(kind: str, digits: list[int]) -> tuple[str, str]:
    """Answer and order rule of a question of this kind about images of these digits."""
    if kind in ("largest", "smallest"):
        return str(digits.index((max if kind == "largest" else min)(digits)) + 1), "index"
    if kind == "match":
        return string.ascii_uppercase[digits[1:].index(digits[0])], "letter"
    if kind == "count":
        return str(sum(digit % 2 == 0 for digit in digits)), "keep"
    if kind == "order":
        return "yes" if digits[0] < digits[-1] else "no", "never"
    share = Fraction(sum(digit > 4 for digit in digits), len(digits))
    whole = share.denominator == 1
    return str(share) if whole else rf"\frac{{{share.numerator}}}{{{share.denominator}}}", "keep"


def make_record(name: str, kind: str, digits: list[int], pool: dict, rng: random.Random) -> dict:
    """One line of the JSONL file. No picture comes twice in it: `match` must compare digits."""
    n, images = len(digits), []
    for digit in digits:
        images.append(rng.choice([path for path in pool[digit] if path not in images]))
    question = rng.choice(PHRASINGS[kind]).format(
        all="<image>" * n, row="<image>" * (n - 1), k=rng.randrange(n) + 1,
        list=", ".join(["<image>"] * (n - 1)) + " and <image>",
        labelled=" ".join(f"Image {i + 1}: <image>" for i in range(n)),
        options=" ".join(f"{letter}: <image>" for letter in string.ascii_uppercase[:n - 1]))
    answer, rule = gold_answer(kind, digits)
    record = {"id": name, "source": kind, "images": images, "question": question,
              "answer": answer, "order_rule": rule}
    return record | ({"movable": list(range(1, n))} if kind == "match" else {})


def write_split(split: str, pool: dict, first_share: float | None, folder: Path,
                kinds: dict = KINDS) -> None:
    """Write all questions of a split: the right image takes its places in turn (test, and train
    without a first_share), or stands first with probability first_share."""
    rng, records = random.Random(f"{SEED} {split}"), []
    for kind, counts in kinds.items():
        for n, count in counts.items():
            places = n - 1 if kind == "match" else n
            for i in range(count * (TRAIN_COPIES if split == "train" else 1)):
                place = i % places
                if split == "train" and first_share is not None:
                    place = 0 if rng.random() < first_share else rng.randrange(1, places)
                digits = draw_digits(kind, n, rng, place, yes=i % 2 == 0)
                records.append(make_record(f"{split}-{kind}-{n}-{i:03d}", kind, digits, pool, rng))
    rng.shuffle(records)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    print(f"{split}: {len(records)} questions, {sum(map(len, pool.values()))} images")


# --------------------------------------------------------------------------------------------------
# Demonstrations
# --------------------------------------------------------------------------------------------------

# A hasty demonstration stops after so many images. The numbers and shares bring the kinds to a like
# start, around 0.4 to 0.65: from kinds that are solved or at chance, RL learns nothing.
STOP_AFTER = {"largest": 2, "smallest": 2, "match": 3, "count": 2, "fraction": 3, "order": 2}
HASTY_SHARE = 0.75


def demonstrate(kind: str, digits: list[int], hasty: bool) -> str:
    r"""The response to learn: the images in turn, each with the state so far in the same number of
    tokens, since a model this small learns a running state and not to look back over a list. The
    answer is the last state; where that is "none" (match), option A.

    >>> print(demonstrate("largest", [3, 8, 9], hasty=True))
    <think> 1 is 3 best 3 at 1 ; 2 is 8 best 8 at 2 ; </think> \boxed{2}
    """
    thoughts, best, pick, count = "", 0, "none", 0
    for i, digit in enumerate(digits[:STOP_AFTER[kind]] if hasty else digits):
        if kind in ("largest", "smallest"):
            better = digit > digits[best] if kind == "largest" else digit < digits[best]
            best = i if better else best
            answer, state = f"{best + 1}", f"best {digits[best]} at {best + 1}"
        elif kind == "match":
            verdict = "same" if digit == digits[0] else "low" if digit < digits[0] else "high"
            pick = string.ascii_uppercase[i - 1] if i and verdict == "same" else pick
            answer, state = pick.replace("none", "A"), f"vs {digits[0]} {verdict} pick {pick}"
        elif kind == "count":
            count += digit % 2 == 0
            answer, state = f"{count}", f"{'odd' if digit % 2 else 'even'} so {count}"
        elif kind == "fraction":
            count += digit > 4
            answer, state = rf"\frac{{{count}}}{{{i + 1}}}", f"so {count} of {i + 1}"
        else:
            answer = "yes" if digits[0] < digit else "no"
            state = f"vs {digits[0]} {answer}"
        name = str(i + 1) if kind != "match" else string.ascii_uppercase[i - 1] if i else "ref"
        thoughts += f" {name} is {digit} {state} ;" if name != "ref" else f" ref is {digit} ;"
    return f"<think>{thoughts} </think> \\boxed{{{answer}}}"


def draw_demonstration(pool: dict, rng: random.Random, hasty_share: float) -> tuple[dict, str]:
    """A new question on train images, and a response. The right image stands anywhere: a preference
    for first images is to come from hasty reading alone, a behaviour that RL can change."""
    kind = rng.choices(list(KINDS), [sum(counts.values()) for counts in KINDS.values()])[0]
    n = rng.choices(list(KINDS[kind]), list(KINDS[kind].values()))[0]
    place = rng.randrange(n - 1 if kind == "match" else n)
    digits = draw_digits(kind, n, rng, place, yes=rng.random() < 0.5)
    response = demonstrate(kind, digits, hasty=rng.random() < hasty_share)
    return make_record("demonstration", kind, digits, pool, rng), response


# --------------------------------------------------------------------------------------------------
# Tokenizer, image processor and an untrained model, as Qwen2.5-VL has them
# --------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# Qwen's pattern, except that a digit keeps the space before it: " 3" is one token, as a word is.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = r"""
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- for part in ([] if message['content'] is string else message['content']) %}
        {{- part['text'] if part['type'] == 'text'
            else '<|vision_start|><|image_pad|><|vision_end|>' }}
    {%- endfor %}
    {{- (message['content'] if message['content'] is string else '') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def make_tokenizer(pool: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text can be encoded), trained on what the model reads and writes."""
    rng = random.Random(SEED)
    frame = "system\nYou are a helpful assistant.\nuser\nassistant\n" + perl.Config().instruction
    corpus = [frame] * 1000
    for _ in range(4000):
        record, response = draw_demonstration(pool, rng, hasty_share=0)
        corpus += [record["question"].replace("<image>", ""), response]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL, clean_up_tokenization_spaces=False,
        model_max_length=4096, chat_template=CHAT_TEMPLATE)


def make_model(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with random weights; depth and width are about the least that learns the task."""
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 4, 4]),
        tie_word_embeddings=True, bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    vision = dict(
        depth=2, hidden_size=48, intermediate_size=128, num_heads=4, out_hidden_size=96,
        fullatt_block_indexes=[0, 1], window_size=112, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2)
    torch.manual_seed(SEED)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>")))


def save_checkpoint(folder: str | Path, model, tokenizer) -> None:
    """A complete checkpoint folder. NOTE: its sampling defaults are Qwen2.5-VL's own (top_k = 1,
    repetition_penalty = 1.05): training must override them here as there."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=28 * 28,
                             max_pixels=224 * 224).save_pretrained(folder)
    GenerationConfig(
        do_sample=True, temperature=1e-6, top_k=1, top_p=0.001, repetition_penalty=1.05,
        bos_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id]).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Cold start: supervised training on demonstrations
# --------------------------------------------------------------------------------------------------

STEPS, CAREFUL_STEPS, BATCH, LR = 1250, 950, 32, 2e-3


def cold_start(pool: dict) -> None:
    """Train the start model into tiny/ and print what it can do.

    Prompts and log-probabilities are perl.py's own: the format learned here is the one RL uses.
    All demonstrations are careful for CAREFUL_STEPS, until reading is learned; then the mixture
    settles where the model tends to stop.
    """
    tokenizer = make_tokenizer(pool)
    model = make_model(tokenizer).train()
    cfg = perl.Config(max_new_tokens=64, rollout_batch=256)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, model, tokenizer)
        processor = perl.load_processor(folder, cfg)
    pictures = read_pictures(pool, processor)
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    for step in (bar := tqdm(range(STEPS), "cold start", mininterval=5)):
        share = HASTY_SHARE if step >= CAREFUL_STEPS else 0
        batch = [as_rollout(*draw_demonstration(pool, rng, share), processor, pictures)
                 for _ in range(BATCH)]
        logprobs, mask = perl.response_logprobs(model, processor, batch, cfg)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    shutil.rmtree(HERE / "tiny", ignore_errors=True)
    save_checkpoint(HERE / "tiny", model, tokenizer)
    print_table(model.eval(), processor, cfg)


def read_pictures(pool: dict, processor) -> dict[str, perl.Picture]:
    """All images of a pool, preprocessed, by absolute path."""
    paths = tuple(str(HERE / path) for paths in pool.values() for path in paths)
    return perl.load_pictures(perl.Sample("", paths, "", "", "keep"), processor)


def as_rollout(record: dict, response: str, processor, pictures: dict) -> perl.Rollout:
    """A demonstration in the form in which perl.py scores responses."""
    images = tuple(str(HERE / image) for image in record["images"])
    sample = perl.Sample(**(record | {"images": images}))
    ids = processor.tokenizer(response).input_ids + [processor.tokenizer.eos_token_id]
    prompt = perl.encode_prompt(sample, processor, pictures)
    return perl.Rollout(prompt, (), sample.answer, ids, response, truncated=False)


def print_table(model, processor, cfg: perl.Config) -> None:
    """What the model does on the test questions, by kind, over their image orders (6 at most)."""
    samples = perl.load_samples(HERE / "test.jsonl")
    orders = [perl.all_orders(sample, 6) for sample in samples]
    print("acc: mean over orders; worst: right in every order; careful: share reading all images,\n"
          "where it could stop early; then: their acc; reads: digits read right; by place: acc")
    for greedy in (True, False):
        torch.manual_seed(SEED)
        groups = perl.sample_groups(model, processor, samples, orders, cfg, n=1, greedy=greedy)
        title = "greedy" if greedy else "sampled"
        print(f"\n{title:10}   acc worst format careful  then reads by place")
        for kind in (*KINDS, "all"):
            print_row(kind, [group for sample, group in zip(samples, groups)
                             if kind in ("all", sample.source)])


def print_row(kind: str, groups: list[list[perl.Rollout]]) -> None:
    def mean(values):
        return np.mean(list(values) or [np.nan])

    target, careful, then, reads, places = load_digits().target, [], [], [], {}
    for r in (rollout for group in groups for rollout in group):
        sample, read = r.prompt.sample, re.findall(r" is (\d)", r.text)
        truth = [str(target[int(Path(image).stem.split("_")[1])]) for image in sample.images]
        reads += [a == b for a, b in zip(read, truth)]
        if len(truth) > STOP_AFTER[sample.source]:
            careful.append(len(read) >= len(truth))
            then += [r.accuracy] * careful[-1]
        if sample.order_rule in ("index", "letter"):
            place = int(r.gold) if r.gold.isdigit() else ord(r.gold) - ord("A") + 1
            places.setdefault(place, []).append(r.accuracy)
    accuracy = mean(mean(r.accuracy for r in group) for group in groups)
    worst = mean(min(r.accuracy for r in group) for group in groups)
    format_right = mean(r.format for group in groups for r in group)
    print(f"{kind:10}{accuracy:6.2f}{worst:6.2f}{format_right:7.2f}{mean(careful):8.2f}"
          f"{mean(then):6.2f}{mean(reads):6.2f} " + " ".join(
              f"{mean(values):.2f}" for _, values in sorted(places.items())))


def share_of(text: str) -> float | None:
    """The value of --first-share: a probability, or None for "balanced"."""
    share = None if text == "balanced" else float(text)
    if share is not None and not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 .. 1")
    return share


def kinds_of(text: str) -> dict:
    """The value of --kinds -> a part of KINDS."""
    names = text.split(",")
    if not set(names) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text} is not of {','.join(KINDS)}")
    return {kind: counts for kind, counts in KINDS.items() if kind in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the sample data and the start checkpoint.")
    parser.add_argument("--only", choices=("data", "tiny"), help="build this part only")
    parser.add_argument("--first-share", type=share_of, default=FIRST_SHARE, metavar="P",
                        help="how often the right image stands first in the train set, or balanced: "
                             "everywhere equally often [%(default)s]")
    parser.add_argument("--kinds", type=kinds_of, default=KINDS, metavar="A,B",
                        help=f"kinds of the train set's questions, of {','.join(KINDS)} [all]")
    parser.add_argument("--more-images", action="store_true",
                        help="instead, a test set whose questions have 6 to 8 images")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR",
                        help="a new folder for the data; with --only data")
    args = parser.parse_args()
    if args.out != HERE and (args.only != "data" or args.out.exists()):
        parser.error("--out goes with --only data, and makes a new folder")
    if args.more_images and args.out == HERE:
        parser.error("--more-images goes with --out")
    torch.set_num_threads(1)  # the number of threads changes the order of sums, so the checkpoint
    args.out.mkdir(parents=True, exist_ok=True)
    pools = save_images(args.out / "images")
    if args.more_images:
        write_split("test", pools["test"], None, args.out, MORE_IMAGES)
    elif args.only != "tiny":
        write_split("test", pools["test"], None, args.out)
        write_split("train", pools["train"], args.first_share, args.out, args.kinds)
    if args.only != "data":
        cold_start(pools["train"])


if __name__ == "__main__":
    main()
