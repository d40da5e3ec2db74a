"""draw_token and the whole sampler on each kind of device: C++ on a CPU, Triton and captured graphs on a GPU."""

import pytest
import torch
from helpers import needs_extension, no_cuda_synchronisation, random_captions, tiny_dalle

from dalle_fast import reference, sampling
from dalle_fast.ops.draw_token import choose_kernel, draw_token
from dalle_fast.sampling import Sampler

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_extension), pytest.param("cuda", marks=needs_gpu)]
)

LENGTH = 9
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 64},
    {"top_p": 0.9},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.8, "cond_scale": 3.0},
]


def make_draw(device: str, batch: int, codes: int, guided: bool):
    """Logits, seeds, tokens, scores, and where tokens are kept."""
    logits = 3 * torch.randn(2 * batch if guided else batch, codes)
    seeds = torch.randint(2**63 - 1, (batch,))
    tokens, keep = torch.randint(codes, (batch, LENGTH)), torch.rand(batch, LENGTH) < 0.3
    return [x.to(device) for x in (logits, seeds, tokens, torch.zeros(batch), keep)]


@needs_gpu
def test_cuda_scores_take_triton():
    assert choose_kernel("auto", torch.empty(1, 8192, device="cuda")) == "triton"
    assert choose_kernel("auto", torch.empty(1, 8192, device="cuda", dtype=torch.float64)) is None
    assert choose_kernel("auto", torch.empty(1, 20_000, device="cuda")) is None


@each_device
@pytest.mark.parametrize("codes", [12, 1000, 8192, 16384])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_the_references(device, settings, codes):
    """Of its tokens on a CPU all but ties within rounding; each time the same ones."""
    if settings.get("top_k", 0) > codes:
        settings = settings | {"top_k": 5}
    batch = 200
    made = make_draw(device, batch, codes, "cond_scale" in settings)
    logits, seeds, tokens, scores, keep = made
    position = torch.tensor(4, device=device)
    found = []
    for _ in range(2):
        place, total = tokens.clone(), scores.clone()
        draw_token(logits, seeds, position, place, total, keep=keep, **settings)
        found.append((place, total))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    drawn, _ = reference.draw_token(logits.cpu(), seeds.cpu(), 4, **settings)
    expected = torch.where(keep[:, 4].cpu(), tokens[:, 4].cpu(), drawn)
    same = found[0][0][:, 4].cpu() == expected
    assert (~same).sum() <= 1
    others = [column for column in range(LENGTH) if column != 4]
    assert torch.equal(found[0][0][:, others], tokens[:, others])
    likelihoods = logits[:batch].cpu().double().log_softmax(-1).gather(-1, expected[:, None]).squeeze(-1)
    torch.testing.assert_close(found[0][1].cpu()[same].double(), likelihoods[same], rtol=1e-5, atol=1e-5)


@needs_gpu
def test_cuda_graph_of_a_draw():
    """Captured after one call, replayed on other scores at other positions."""
    logits, seeds, tokens, scores, keep = make_draw("cuda", 50, 8192, True)
    position = torch.tensor(0, device="cuda")
    settings = {"keep": keep, "temperature": 0.9, "top_k": 200, "top_p": 0.9, "cond_scale": 2.0}
    draw_token(logits, seeds, position, tokens.clone(), scores.clone(), **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw_token(logits, seeds, position, tokens, scores, **settings)
    for number in range(3):
        logits.normal_(std=3.0)
        position.fill_(2 * number)
        expected = tokens.clone(), scores.clone()
        draw_token(logits, seeds, position, *expected, **settings)
        graph.replay()
        assert torch.equal(tokens, expected[0]) and torch.equal(scores, expected[1])


def run(device: str, settings: dict, *, partly=False, model_options=None) -> tuple[Sampler, list]:
    """A sampler, and tokens and scores of two batches of it."""
    torch.manual_seed(1)
    model = tiny_dalle(layout="dalle", grid=(5, 6), width=32, **(model_options or {}))
    text = random_captions(model.config, [4, 2])
    model.to(device)
    sampler = Sampler(model, 2, 3, **settings)
    tokens = torch.randint(model.config.image_vocab_size, (2, model.config.image_len))
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[:, :7] = keep[:, 20:23] = True
    found = []
    for first in (5, 2**40):
        seeds = torch.arange(first, first + 6, device=device)
        known = {"tokens": tokens.to(device), "keep": keep.to(device)} if partly else {}
        found.append([x.cpu() for x in sampler.run(text.to(device), seeds, **known)])
    return sampler, found


def assert_same_images(found: list, expected: list) -> None:
    for (tokens, scores), (other_tokens, other_scores) in zip(found, expected, strict=True):
        assert torch.equal(tokens, other_tokens)
        torch.testing.assert_close(scores, other_scores, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "cond_scale": 1.5}], ids=str)
def test_cuda_sampler_draws_what_a_cpu_draws(settings, partly, monkeypatch):
    """From a captured graph, and step by step."""
    expected = run("cpu", settings, partly=partly)[1]
    sampler, found = run("cuda", settings, partly=partly)
    assert sampler.decoder._kernel == "triton" and list(sampler._graphs) == [partly]
    assert_same_images(found, expected)
    monkeypatch.setattr(sampling, "WARM_UP_STEPS", 10**9)
    eager, again = run("cuda", settings, partly=partly)
    assert not eager._graphs
    for (tokens, scores), (other_tokens, other_scores) in zip(found, again, strict=True):
        assert torch.equal(tokens, other_tokens) and torch.equal(scores, other_scores)


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_no_cuda_synchronisation_in_the_steps(captured, monkeypatch):
    if not captured:
        monkeypatch.setattr(sampling, "WARM_UP_STEPS", 10**9)
    sampler, _ = run("cuda", {"top_k": 5})
    assert bool(sampler._graphs) == captured
    text = random_captions(sampler.decoder.model.config, [4, 2]).cuda()
    sampler.decoder.prefill(text)
    with no_cuda_synchronisation():
        for _ in range(sampler.tokens.shape[1]):
            sampler._advance()
    assert sampler.decoder.position == sampler.tokens.shape[1]


@needs_gpu
def test_a_capture_that_is_interrupted_is_made_again(monkeypatch):
    monkeypatch.setattr(sampling, "WARM_UP_STEPS", 10**9)
    expected = run("cuda", {})[1]
    monkeypatch.setattr(sampling, "WARM_UP_STEPS", 2)
    step = Sampler._token_step
    interrupts = [KeyboardInterrupt]

    def interrupted(self):
        step(self)
        if torch.cuda.is_current_stream_capturing() and interrupts:
            raise interrupts.pop()

    monkeypatch.setattr(Sampler, "_token_step", interrupted)
    torch.manual_seed(1)
    model = tiny_dalle(layout="dalle", grid=(5, 6), width=32)
    text = random_captions(model.config, [4, 2]).cuda()
    sampler = Sampler(model.cuda(), 2, 3)
    seeds = torch.arange(5, 11, device="cuda")
    with pytest.raises(KeyboardInterrupt):
        sampler.run(text, seeds)
    tokens, scores = sampler.run(text, seeds)
    assert list(sampler._graphs) == [False]
    assert_same_images([[tokens.cpu(), scores.cpu()]], expected[:1])


@needs_gpu
def test_cuda_sampler_without_triton(monkeypatch):
    """Attention in plain PyTorch reads its position from the device, which a capture forbids."""
    expected = run("cpu", {"top_k": 5})[1]
    monkeypatch.setattr("dalle_fast.ops.backends.has_triton_backend", lambda device: False)
    sampler, found = run("cuda", {"top_k": 5})
    assert sampler.decoder._kernel is None and not sampler._graphs
    assert_same_images(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one():
    expected = run("cpu", {})[1]
    assert_same_images(run("cuda:0", {})[1], expected)
    assert torch.cuda.current_device() == 0
    sampler, found = run("cuda:1", {})
    assert list(sampler._graphs) == [False]
    assert_same_images(found, expected)
