"""Reading folders and shards, their order, resuming, and bad samples in dalle_fast.data.sources."""

import io
import itertools
import json
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast.data.images import BadSample, augment_for_dvae, decode_image, to_tensor
from dalle_fast.data.sources import Loader, Sample, TarSource, TooManyBadSamples, open_source


def png(value, size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, value // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root, count):
    for i in range(count):
        folder = root / f"part{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(png(i))
        (folder / f"{i:03d}.txt").write_text(f" caption {i}\n")
    return root


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample_files(indices):
    for i in indices:
        yield f"{i:03d}.png", png(i)
        yield f"{i:03d}.txt", f"caption {i}".encode()


def write_shards(root, count, per_shard=7):
    root.mkdir(exist_ok=True)
    for shard, start in enumerate(range(0, count, per_shard)):
        write_tar(root / f"shard-{shard:02d}.tar", sample_files(range(start, min(count, start + per_shard))))
    return root


@pytest.fixture(params=["folder", "shards"])
def source(request, tmp_path):
    """40 good samples in either format; the shuffle buffer is smaller than the data set."""
    if request.param == "folder":
        return open_source(write_folder(tmp_path / "data", 40))
    root = write_shards(tmp_path / "data", 40)
    return TarSource(root, sorted(str(path) for path in root.iterdir()), shuffle_buffer=16)


def number(sample):
    return int(sample.caption.split()[1])


def numbers(source, seed, epoch, start=0):
    return [number(sample) for _, sample in source.read(seed, epoch, start)]


def as_number(sample, rng):
    """A transform that shows which sample came and what its rng drew."""
    return torch.tensor(number(sample)), torch.tensor(rng.random(), dtype=torch.float64)


def take(loader, count):
    return [tuple(slot.clone() for slot in batch) for batch in itertools.islice(loader, count)]


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


# Reading


def test_every_sample_comes_once_an_epoch(source):
    for seed, epoch in ((None, 0), (0, 0), (0, 1), (7, 0)):
        items = list(source.read(seed, epoch))
        assert [index for index, _ in items] == list(range(40))
        assert sorted(number(sample) for _, sample in items) == list(range(40))
        for _, sample in items:
            assert sample.image == png(number(sample))
            assert sample.key.endswith(f"{number(sample):03d}")


def test_order_is_a_function_of_seed_and_epoch(source):
    assert numbers(source, 3, 2) == numbers(source, 3, 2)
    orders = {tuple(numbers(source, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert numbers(source, None, 0) == numbers(source, None, 5)


def test_shuffle_mixes_shards(tmp_path):
    root = write_shards(tmp_path / "data", 200, per_shard=50)
    order = numbers(open_source(root), 0, 0)  # the default buffer holds all of it
    displacement = np.abs(np.subtract(order, range(200))).mean()
    assert 50 < displacement < 85  # a uniform permutation has 200 / 3 on average


def test_start_skips_exactly(source):
    whole = numbers(source, 5, 1)
    for start in (0, 1, 17, 39, 40):
        items = list(source.read(5, 1, start))
        assert [number(sample) for _, sample in items] == whole[start:]
        assert [index for index, _ in items] == list(range(start, 40))


def test_captions_come_in_the_order_on_disk(source):
    captions = list(source.captions())
    assert captions == [sample.caption for _, sample in source.read(None, 0)]
    assert sorted(captions) == sorted(f"caption {i}" for i in range(40))


def test_the_folder_format_knows_every_suffix(tmp_path):
    for i, suffix in enumerate(("png", "JPG", "jpeg", "webp", "bmp")):
        (tmp_path / f"{i}.{suffix}").write_bytes(b"image")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}", encoding="utf-8-sig")
    (tmp_path / "notes.txt").write_text("no image of this stem: not a sample")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"")
    assert numbers(open_source(tmp_path), None, 0) == [0, 1, 2, 3, 4]


def test_one_shard_and_a_brace_pattern(tmp_path):
    root = write_shards(tmp_path / "data", 21)
    assert numbers(open_source(root / "shard-01.tar"), None, 0) == list(range(7, 14))
    assert numbers(open_source(f"{root}/shard-{{01..02}}.tar"), None, 0) == list(range(7, 21))
    assert numbers(open_source(f"{root}/shard-{{00,02}}.tar"), None, 0) == [*range(7), *range(14, 21)]


def test_other_members_of_a_shard_are_ignored(tmp_path):
    files = [*sample_files([0]), ("000.json", b"{}"), ("000.pyd", b"not a pickle"), ("000.pkl", b"nor this")]
    assert numbers(open_source(write_tar(tmp_path / "a.tar", files)), None, 0) == [0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "path must be a folder or a .tar file, got"),
        ("none.tar", "path must exist, got"),
        ("shard-{00..99}.tar", "path must exist, got .*shard-03.tar"),
        ("shard-{00..99.tar", "path must be a brace pattern with balanced braces, got"),
        ("pipe:touch touched; cat a.tar", "path must exist, got"),
    ],
)
def test_open_source_names_what_is_missing(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(write_shards(tmp_path / "data", 21))
    with pytest.raises(ValueError, match=message):
        open_source(name)
    assert not (tmp_path / "data" / "touched").exists()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "caption.txt").write_text("a caption without an image")
    with pytest.raises(ValueError, match=r"path must hold images \(.png .jpg .jpeg .webp .bmp\).* or .tar shards") as e:
        open_source(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_a_folder_of_both_formats_is_refused(tmp_path):
    write_shards(tmp_path, 7)
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"images or \.tar shards and not both, got 1 images and 1 shards in"):
        open_source(tmp_path)


def test_shuffle_buffer_must_be_positive():
    with pytest.raises(ValueError, match="shuffle_buffer must be >= 1, got 0"):
        TarSource("a", ["a"], shuffle_buffer=0)


# Bad samples

BAD_CAPTIONS = [
    (None, "missing caption", r"x must have a caption, got no x\.txt"),
    (b"", "empty caption", "caption of x must not be empty"),
    (b" \n\t", "empty caption", "caption of x must not be empty"),
    (b"caf\xe9 au lait", "caption not UTF-8", "caption of x must be UTF-8, got byte 0xe9 at 3"),
]


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("caption, reason, message", BAD_CAPTIONS)
def test_bad_captions_are_bad_samples(tmp_path, kind, caption, reason, message):
    if kind == "folder":
        write_folder(tmp_path, 2)
        (tmp_path / "x.png").write_bytes(png(9))
        if caption is not None:
            (tmp_path / "x.txt").write_bytes(caption)
    else:
        files = [*sample_files([0]), ("x.png", png(9)), *([] if caption is None else [("x.txt", caption)])]
        write_tar(tmp_path / "a.tar", [*files, *sample_files([1])])
    source = open_source(tmp_path)
    items = [item for _, item in source.read(None, 0)]
    (bad,) = (item for item in items if isinstance(item, BadSample))
    assert (bad.reason, bad.key) == (reason, "x")
    with pytest.raises(BadSample, match=message):
        raise bad
    assert sorted(number(item) for item in items if isinstance(item, Sample)) == [0, 1]
    assert sorted(source.captions()) == ["caption 0", "caption 1"]


def test_a_caption_without_an_image_in_a_shard(tmp_path):
    files = [("x.txt", b"alone"), *sample_files([0])]
    bad, good = (item for _, item in open_source(write_tar(tmp_path / "a.tar", files)).read(None, 0))
    assert (bad.reason, bad.key) == ("missing image", "x") and number(good) == 0
    assert "x must have an image, got none in" in str(bad)


def test_an_unreadable_file_is_a_bad_sample(tmp_path):
    write_folder(tmp_path, 1)
    source = open_source(tmp_path)
    image = tmp_path / "part0" / "000.png"
    image.unlink()
    image.mkdir()
    ((_, bad),) = source.read(None, 0)
    assert bad.reason == "unreadable file" and "must be readable, got" in str(bad)


@pytest.mark.parametrize(
    "damage, survivors",
    [
        (lambda data: data[:4000], {0, 1}),  # amid a member or header
        (lambda data: data[:4096], {0, 1}),  # between two members: the tar reader alone sees a clean end
        (lambda data: data[:5000], {0, 1}),
        (lambda data: data[:4096] + b"\xff" * 512 + data[4608:], {0, 1}),  # a damaged header in the middle
        (lambda data: b"this is no tar file" * 100, set()),
        (lambda data: b"", set()),
    ],
)
def test_a_broken_tar_costs_one_bad_sample_and_what_follows_the_damage(tmp_path, damage, survivors):
    write_shards(tmp_path, 14)
    path = tmp_path / "shard-00.tar"
    # each sample takes four blocks of 512: two headers, a small image, a short caption
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(tmp_path)
    items = [item for _, item in source.read(None, 0)]
    broken = [item for item in items if isinstance(item, BadSample) and item.reason == "broken tar"]
    assert len(broken) == 1
    assert str(broken[0]).startswith(f"{path} must be a whole tar file, got a broken one: ")
    assert "\n" not in str(broken[0])
    assert {number(item) for item in items if isinstance(item, Sample)} == survivors | set(range(7, 14))
    assert set(source.captions()) >= {f"caption {i}" for i in survivors | set(range(7, 14))}


def test_a_vanished_shard_is_a_bad_sample(tmp_path):
    write_shards(tmp_path, 14)
    source = open_source(tmp_path)
    (tmp_path / "shard-00.tar").unlink()
    first, *rest = (item for _, item in source.read(None, 0))
    assert first.reason == "unreadable file" and len(rest) == 7


# Batches


def test_batches_never_span_epochs(source):
    batches = take(Loader(source, as_number, 12, seed=1), 6)
    for epoch in range(2):
        seen = torch.cat([batch[0] for batch in batches[3 * epoch : 3 * epoch + 3]]).tolist()
        assert seen == numbers(source, 1, epoch)[:36]


def test_the_ragged_tail_can_be_kept(source):
    sizes = [len(batch[0]) for batch in take(Loader(source, as_number, 12, seed=1, drop_last=False), 8)]
    assert sizes == [12, 12, 12, 4] * 2


def test_without_shuffle_the_order_on_disk_is_kept(source):
    batch, _ = next(iter(Loader(source, as_number, 40, seed=1, shuffle=False)))
    assert batch.tolist() == numbers(source, None, 0)


def test_every_position_has_its_own_random_stream(source):
    draws = torch.cat([batch[1] for batch in take(Loader(source, as_number, 20, seed=1), 6)])
    assert len(draws.unique()) == 120


def test_the_order_does_not_share_the_first_samples_random_stream(tmp_path):
    source = open_source(write_folder(tmp_path, 40))
    on_disk = numbers(source, None, 0)
    drawn = np.random.default_rng((1, 0, 0)).permutation(40)
    assert numbers(source, 1, 0) != [on_disk[i] for i in drawn]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing_but_the_thread(source, num_workers):
    names = set()

    def transform(sample, rng):
        names.add(threading.current_thread().name)
        return as_number(sample, rng)

    expected = take(Loader(source, as_number, 7, seed=2), 13)
    assert equal(take(Loader(source, transform, 7, seed=2, num_workers=num_workers), 13), expected)
    assert names and all(name.startswith("loader") for name in names)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("done", [0, 1, 3, 5, 6, 10])
def test_resume_is_bit_identical(source, num_workers, done):
    def transform(sample, rng):
        if number(sample) == 11:
            raise BadSample("no elevens")
        image = augment_for_dvae(decode_image(sample.image), 4, rng)
        return to_tensor(image), torch.tensor(number(sample)), torch.tensor(rng.random())

    options = {"seed": 4, "num_workers": num_workers}
    whole = Loader(source, transform, 8, **options)
    iterator = iter(whole)
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = [next(iterator) for _ in range(7)]
    resumed = Loader(source, transform, 8, **options)
    resumed.load_state_dict(state)
    assert equal(take(resumed, 7), expected)
    assert resumed.state_dict() == whole.state_dict()


def test_a_second_iterator_goes_on_where_the_first_stopped(source):
    expected = take(Loader(source, as_number, 8, seed=4), 5)
    loader = Loader(source, as_number, 8, seed=4, num_workers=2)
    assert equal(take(loader, 2) + take(loader, 3), expected)


def test_state_names_a_missing_field(source):
    with pytest.raises(ValueError, match="state must have the field seen, got bad, epoch, examples, index"):
        Loader(source, as_number, 8, seed=4).load_state_dict({"epoch": 0, "index": 0, "bad": {}, "examples": {}})


def test_corrupt_images_are_skipped_and_counted(tmp_path):
    write_folder(tmp_path, 30)
    (tmp_path / "part0" / "003.png").write_bytes(png(3)[:40])
    (tmp_path / "part1" / "004.png").write_bytes(png(4, size=2))
    (tmp_path / "part2" / "005.txt").write_bytes(b"")

    def transform(sample, rng):
        return to_tensor(augment_for_dvae(decode_image(sample.image), 8, rng)), torch.tensor(number(sample))

    loader = Loader(open_source(tmp_path), transform, 27, seed=0, max_bad_share=0.1)
    for epoch in (1, 2):
        _, seen = next(iter(loader))
        assert sorted(seen.tolist()) == [0, 1, 2, *range(6, 30)]
        assert sum(loader.bad.values()) <= 3 * epoch
    next(iter(loader))
    assert loader.bad.keys() == {"corrupt image", "small image", "empty caption"}


def test_the_run_stops_at_the_end_of_an_epoch_with_too_many_bad_samples(tmp_path):
    write_folder(tmp_path, 12)
    (tmp_path / "part0" / "003.txt").unlink()
    loader = Loader(open_source(tmp_path), as_number, 4, seed=0)
    message = (
        r"at most 5% of samples may be bad, got 1 of 12; "
        r"most often missing caption \(1, for example part0/003\)"
    )
    with pytest.raises(TooManyBadSamples, match=message):
        take(loader, 100)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_run_stops_early_in_a_large_bad_data_set(tmp_path, num_workers):
    write_folder(tmp_path, 150)

    def transform(sample, rng):
        if number(sample) % 2:
            raise BadSample("odd", reason="odd number")
        return as_number(sample, rng)

    loader = Loader(open_source(tmp_path), transform, 10, seed=0, shuffle=False, num_workers=num_workers)
    batches = []
    with pytest.raises(TooManyBadSamples, match=r"got \d+ of 100; most often odd number"):
        batches.extend(loader)
    assert 3 <= len(batches) <= 7


def test_an_allowed_share_of_bad_samples_goes_on(tmp_path):
    write_folder(tmp_path, 40)
    (tmp_path / "part0" / "003.txt").unlink()
    loader = Loader(open_source(tmp_path), as_number, 39, seed=0, max_bad_share=0.05)
    assert len(take(loader, 6)) == 6
    assert loader.bad["missing caption"] >= 5


def test_other_errors_of_a_transform_are_not_swallowed(source):
    def transform(sample, rng):
        raise ValueError("a mistake in the caller's code")

    for num_workers in (0, 2):
        with pytest.raises(ValueError, match="a mistake in the caller's code"):
            next(iter(Loader(source, transform, 4, seed=0, num_workers=num_workers)))


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path):
    loader = Loader(open_source(write_folder(tmp_path, 12)), as_number, 64, seed=0)
    message = "batch_size must be at most the number of usable samples, got batch_size 64 with 12 samples"
    with pytest.raises(ValueError, match=message):
        next(iter(loader))


def test_no_usable_sample_is_refused_whatever_share_may_be_bad(tmp_path):
    write_folder(tmp_path, 2)
    for caption in tmp_path.rglob("*.txt"):
        caption.unlink()
    loader = Loader(open_source(tmp_path), as_number, 1, seed=0, max_bad_share=1.0, drop_last=False)
    with pytest.raises(ValueError, match="got batch_size 1 with 0 samples"):
        next(iter(loader))


def test_a_shard_without_samples_is_refused(tmp_path):
    loader = Loader(open_source(write_tar(tmp_path / "a.tar", [("readme.md", b"-")])), as_number, 1, seed=0)
    with pytest.raises(ValueError, match=r"data set must hold at least one captioned image, got none in .*a.tar"):
        next(iter(loader))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"num_workers": -2}, "num_workers must be >= 0, got -2"),
        ({"max_bad_share": 1.5}, r"max_bad_share must be in \[0, 1\], got 1.5"),
    ],
)
def test_loader_arguments_are_checked(source, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(source, as_number, **{"batch_size": 4, "seed": 0, **options})
