"""Digits records: addressed by (seed, source, index), disjoint splits, and answers that are true of the pictures."""

import hashlib
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from stepjax.config import DigitsSource, ImageConfig
from stepjax.data.digits import NUM_DIGITS, DigitsRecords, arithmetic_problems, solve
from stepjax.data.digits_render import MAX_SIZE, compose, load_scans, scatter_layout, strip_layout
from stepjax.processing.images import plan_views

TASKS = ("transcribe", "count", "add", "point", "arithmetic")
PICTURE_TASKS = TASKS[:-1]
SPLITS = ("train", "held_out")


def _records(task: Any, split: Any = "train", seed: int = 0, name: str | None = None):
    return DigitsRecords(DigitsSource(name=name or task, weight=1.0, task=task, split=split), seed)


def _image(record):
    return next(part["image"] for part in record["messages"][0]["content"] if part["type"] == "image")


def _prompt(record) -> str:
    content = record["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]


def _comparable(record):
    """The record with its image as bytes, so that == compares pixels."""
    if isinstance(record["messages"][0]["content"], str):
        return record
    image = _image(record)
    return {**record, "messages": [_prompt(record), image.mode, image.size, image.tobytes(), record["messages"][1]]}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_a_record_depends_on_its_index_alone(task, split):
    records = _records(task, split)
    forwards = [_comparable(records[i]) for i in range(20)]
    fresh = pickle.loads(pickle.dumps(records))
    backwards = [_comparable(fresh[np.int64(i)]) for i in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({str(record["messages"]) for record in forwards}) > 15


def test_another_process_makes_the_same_record():
    """String hashes are salted per process: none may reach the random numbers."""
    program = (
        "import hashlib; from stepjax.config import DigitsSource; from stepjax.data.digits import DigitsRecords\n"
        "record = DigitsRecords(DigitsSource(name='a', weight=1.0, task='count'), 3)[17]\n"
        "print(hashlib.sha256(record['messages'][0]['content'][0]['image'].tobytes()).hexdigest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    image = _image(_records("count", name="a", seed=3)[17])
    assert printed.strip() == hashlib.sha256(image.tobytes()).hexdigest()


def test_seed_and_source_name_change_the_records():
    def answers(records):
        return [records[i]["answer"]["text"] for i in range(10)]

    base = answers(_records("transcribe"))
    assert base != answers(_records("transcribe", seed=1))
    assert base != answers(_records("transcribe", name="other"))


def test_length_and_bounds():
    records = _records("count")
    assert len(records) == 10_000_000
    assert records[len(records) - 1]["id"] == "digits/count/train/9999999"
    for index in (-1, len(records)):
        with pytest.raises(IndexError, match=f"record {index} of count"):
            records[index]


def test_the_split_is_stratified_and_covers_every_scan():
    scans = load_scans()
    assert len(scans.images) == len(scans.labels) == 1797
    everything = [scan for split in SPLITS for ids in scans.by_class[split] for scan in ids]
    assert sorted(everything) == list(range(1797))
    for digit in range(10):
        train, held_out = (scans.by_class[split][digit] for split in SPLITS)
        assert {scans.labels[scan] for scan in train + held_out} == {digit}
        assert 0.19 < len(held_out) / len(train + held_out) < 0.21


def test_the_split_does_not_move():
    """A scan that changed sides would turn checkpoints' held-out scores into training scores."""
    held_out = sorted(scan for ids in load_scans().by_class["held_out"] for scan in ids)
    assert (len(held_out), held_out[:5], sum(held_out)) == (359, [8, 15, 23, 26, 31], 317249)


@pytest.mark.parametrize("task", PICTURE_TASKS)
def test_the_splits_share_no_scan(task):
    seen = {}
    for split in SPLITS:
        # Different seeds: the split must not depend on them.
        records = [_records(task, split, seed)[i] for seed in (0, 1) for i in range(150)]
        seen[split] = {scan for record in records for scan in record["scan_ids"]}
        assert len(seen[split]) > 150
    assert not seen["train"] & seen["held_out"]


def test_the_splits_share_no_arithmetic_problem_even_commuted():
    train, held_out = arithmetic_problems("train"), arithmetic_problems("held_out")
    assert len(train) + len(held_out) == 21 * 21 + 21 * 22 // 2
    assert 0.15 < len(held_out) / (len(train) + len(held_out)) < 0.25
    swapped = {(right, sign, left) if sign == "+" else (left, sign, right) for left, sign, right in train}
    assert not (set(train) | swapped) & set(held_out)
    for split in SPLITS:
        problems = {f"What is {left} {sign} {right}?" for left, sign, right in arithmetic_problems(split)}
        records = _records("arithmetic", split)
        assert {_prompt(records[i]) for i in range(200)} <= problems


def test_arithmetic_answers():
    for i in range(100):
        record = _records("arithmetic")[i]
        _, _, left, sign, right = _prompt(record).rstrip("?").split()
        expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert record["messages"][1]["content"] == record["answer"]["text"] == str(expected)
        assert expected >= 0 and record["scan_ids"] == []
    assert solve((7, "+", 12)) == 19 and solve((12, "-", 7)) == 5


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true_of_the_scans(split):
    labels = load_scans().labels
    for i in range(100):
        by_task = {task: _records(task, split)[i] for task in PICTURE_TASKS}
        digits = {task: [labels[scan] for scan in record["scan_ids"]] for task, record in by_task.items()}
        answers = {task: record["messages"][1]["content"] for task, record in by_task.items()}
        assert answers["transcribe"] == "".join(map(str, digits["transcribe"]))
        assert answers["count"] == str(len(digits["count"]))
        assert answers["add"] == str(sum(digits["add"]))
        assert len(set(digits["point"])) == len(digits["point"])
        assert _prompt(by_task["point"]) == f"Point at the digit {digits['point'][0]}."
        assert all(record["answer"]["text"] == answers[task] for task, record in by_task.items())


def test_the_number_of_digits_follows_its_distribution():
    for task in PICTURE_TASKS:
        counts = Counter(len(_records(task)[i]["scan_ids"]) for i in range(600))
        assert set(counts) == set(NUM_DIGITS[task])
        for n, probability in NUM_DIGITS[task].items():
            # 5 standard deviations of 600 draws are about 0.1.
            assert abs(counts[n] / 600 - probability) < 0.1, (task, n)


def test_held_out_transcriptions_have_three_digits():
    assert {len(_records("transcribe", "held_out")[i]["scan_ids"]) for i in range(50)} == {3}


def test_image_sizes_vary_and_both_kinds_of_views_occur():
    """With a global view of 56 to 80 pixels, some images are cut into crops and some are not."""
    sizes = [_image(_records(task)[i]).size for task in PICTURE_TASKS for i in range(150)]
    assert len(set(sizes)) > 200
    assert min(width for width, _ in sizes) < 24 and min(height for _, height in sizes) < 24
    assert max(width for width, _ in sizes) > 100 and max(height for _, height in sizes) > 60
    assert all(width <= MAX_SIZE[0] and height <= MAX_SIZE[1] for width, height in sizes)
    for global_size, crop_size in ((56, 28), (80, 40)):
        config = ImageConfig(global_size=global_size, crop_size=crop_size, patch_size=4, thin_side=8)
        num_crops = Counter(plan_views(width, height, config).num_crops for width, height in sizes)
        assert 0.02 * len(sizes) < num_crops[0] < 0.98 * len(sizes)
        assert len(num_crops) >= 5


def test_the_canvas_does_not_tell_how_many_digits_it_holds():
    areas: dict[int, list[int]] = {}
    for i in range(1800):  # a sixth of them for each number
        record = _records("count")[i]
        areas.setdefault(len(record["scan_ids"]), []).append(np.prod(_image(record).size))
    assert 0.85 < np.mean(areas[1]) / np.mean(areas[6]) < 1.15


@pytest.mark.parametrize("split", SPLITS)
def test_the_box_of_a_point_holds_the_digit(split):
    """The point is inside the box, ink is inside the box, and the paper around the box is light."""
    for i in range(60):
        record = _records("point", split)[i]
        grey_HW = np.asarray(_image(record).convert("L"), np.float32)
        height, width = grey_HW.shape
        box = np.array(record["answer"]["box"]) / 100 * (width, height, width, height)
        left, top, right, bottom = np.round(box).astype(int)
        np.testing.assert_allclose(box, (left, top, right, bottom), atol=1e-6)
        x, y = (int(value) for value in record["answer"]["text"].strip("()").split(", "))
        assert 0 <= x <= 99 and 0 <= y <= 99
        assert left <= (x + 0.5) / 100 * width <= right and top <= (y + 0.5) / 100 * height <= bottom

        paper, darkest = np.max(grey_HW), np.min(grey_HW)
        inside_HW = grey_HW[top:bottom, left:right]
        frame_HW = grey_HW[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1]
        assert inside_HW.mean() < paper - 0.15 * (paper - darkest)
        # A box ends where ink falls below a quarter of full. The darkest pixel may be less than full: hence the slack.
        ink, dark_ink = paper - 0.24 * (paper - darkest), paper - 0.32 * (paper - darkest)
        assert all(edge.min() <= ink for edge in (inside_HW[0], inside_HW[-1], inside_HW[:, 0], inside_HW[:, -1]))
        assert (frame_HW <= dark_ink).sum() == (inside_HW <= dark_ink).sum()


def test_no_digit_covers_another_or_leaves_the_image():
    rng = np.random.default_rng(0)
    num_scans = len(load_scans().images)
    for _ in range(200):
        layout = scatter_layout(rng, 6, capacity=6)
        image, digits = compose(rng, rng.integers(num_scans, size=6).tolist(), layout, augment=True)
        boxes = [digit.box() for digit in digits]
        assert image.size == (layout.width, layout.height)
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= layout.width and 0 <= top < bottom <= layout.height
            for other in boxes[:i]:
                assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom


def test_strips_read_from_left_to_right_at_about_one_side_a_digit():
    rng = np.random.default_rng(0)
    num_scans = len(load_scans().images)
    for _ in range(100):
        for n in range(1, 6):
            layout = strip_layout(rng, n)
            image, digits = compose(rng, rng.integers(num_scans, size=n).tolist(), layout, augment=True)
            boxes = [digit.box() for digit in digits]
            centres = [(left + right) / 2 for left, _, right, _ in boxes]
            assert centres == sorted(centres)
            assert 0.5 * n < image.width / image.height < 1.5 * n
            assert all(0 <= left < right <= image.width for left, _, right, _ in boxes)
            assert all(0 <= top < bottom <= image.height for _, top, _, bottom in boxes)


def test_only_training_pictures_are_augmented():
    def papers(split):
        return {_image(_records("count", split)[i]).getpixel((0, 0)) for i in range(30)}

    # A digit may touch the corner, hence 2 and not 1.
    assert len(papers("held_out")) <= 2
    assert len(papers("train")) == 30


def test_an_enlarged_scan_looks_like_its_scan():
    """Shrunk back to 8x8, a rendered digit correlates with its own scan better than with almost any other."""
    from sklearn.datasets import load_digits

    scans = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 64)
    scans = (scans - scans.mean(1, keepdims=True)) / scans.std(1, keepdims=True)
    rng = np.random.default_rng(0)
    best = []
    for scan in range(0, 1797, 60):
        layout = strip_layout(rng, 1)
        image, _ = compose(rng, [scan], layout, augment=False)
        left, top = (corner + (layout.box - layout.side) / 2 for corner in layout.corners[0])
        cell = image.convert("L").resize((8, 8), box=(left, top, left + layout.side, top + layout.side))
        ink = 255 - np.asarray(cell, np.float32).ravel()
        best.append(int(np.argmax(scans @ (ink - ink.mean()))) == scan)
    assert np.mean(best) > 0.9
