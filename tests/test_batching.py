"""Batches: what they hold, how many images fit, and where the free memory is read."""

import os
import re

import pytest
import torch
from helpers import tiny_dalle
from hypothesis import given
from hypothesis import strategies as st

from dalle_fast import batching
from dalle_fast.batching import available_bytes, choose_batch_size, plan_batches
from dalle_fast.models.decoder import decoder_bytes

CPU = torch.device("cpu")


@given(prompts=st.integers(1, 20), images=st.integers(1, 20), batch_size=st.integers(1, 40))
def test_each_image_is_in_one_batch(prompts, images, batch_size):
    plan = plan_batches(prompts, images, batch_size)
    order = [prompt for chunk, count in plan for prompt in chunk for _ in range(count)]
    assert order == [prompt for prompt in range(prompts) for _ in range(images)]
    sizes = [len(chunk) * count for chunk, count in plan]
    assert 1 <= max(sizes) <= batch_size
    whole = max(1, batch_size // images)
    fewest = prompts * -(-images // batch_size) if images > batch_size else -(-prompts // whole)
    assert len(plan) == fewest
    assert len({(len(chunk), count) for chunk, count in plan}) <= 2


def test_batches_are_even():
    assert plan_batches(1, 96, 64) == [(range(1), 48)] * 2
    assert plan_batches(9, 1, 8) == [(range(5), 1), (range(5, 9), 1)]


@given(images=st.integers(1, 9), prompts=st.integers(1, 9), share=st.floats(0.1, 20), guided=st.booleans())
def test_the_largest_batch_that_fits(images, prompts, share, guided):
    model = MODEL
    budget = int(share * decoder_bytes(model, 1, 1, guided=guided)) + decoder_bytes(model, 1, 1, guided=guided)
    chosen = choose_batch_size(model, prompts, images, guided=guided, memory_budget=budget)

    def needed(batch_size):
        return max(
            decoder_bytes(model, len(chunk), count, guided=guided)
            for chunk, count in plan_batches(prompts, images, batch_size)
        )

    assert needed(chosen) <= budget
    larger = range(chosen + 1, prompts * images + 1)
    assert all(needed(size) > budget or needed(size) <= needed(chosen) for size in larger)


MODEL = tiny_dalle()


def test_what_is_free_is_the_default(monkeypatch):
    one = decoder_bytes(MODEL, 1, 1)
    monkeypatch.setattr(batching, "available_bytes", lambda device: one)
    assert choose_batch_size(MODEL, 1, 9) == 1
    assert choose_batch_size(MODEL, 1, 9, batch_size=9) == 9, "asked for"
    monkeypatch.setattr(batching, "available_bytes", lambda device: None)
    assert choose_batch_size(MODEL, 1, 9) == 9
    assert choose_batch_size(MODEL, 1, 999) == batching.LARGEST_BATCH["cpu"]
    monkeypatch.setattr(batching, "available_bytes", lambda device: one - 1)
    message = f"one image takes {one} bytes, and cpu has {one - 1} to spare; memory_budget sets another limit"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_batch_size(MODEL, 1, 9)


def test_half_of_the_free_memory(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    3000000 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(batching, "MEMINFO", meminfo)
    assert available_bytes(CPU) == 1_500_000 * 1024
    assert available_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("names", "pages"), [({"SC_AVPHYS_PAGES": 1, "SC_PHYS_PAGES": 2}, 100), ({"SC_PHYS_PAGES": 2}, 200), ({}, None)]
)
def test_the_free_memory_of_other_systems(tmp_path, monkeypatch, names, pages):
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\n")
    for path in ("meminfo", "none"):
        monkeypatch.setattr(batching, "MEMINFO", tmp_path / path)
        monkeypatch.setattr(os, "sysconf_names", names)
        monkeypatch.setattr(
            os, "sysconf", {"SC_AVPHYS_PAGES": 100, "SC_PHYS_PAGES": 200, "SC_PAGE_SIZE": 4096}.__getitem__
        )
        assert available_bytes(CPU) == (None if pages is None else pages * 2048)


def test_memory_of_a_gpu(monkeypatch):
    """What PyTorch holds and does not use counts as free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert available_bytes(torch.device("cuda")) == 1200
