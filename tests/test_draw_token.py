"""Drawing a token on every backend: against float64, filters, frequencies, kept tokens, odd scores, ops, messages."""

import math
import re

import pytest
import torch
from helpers import assert_within_budget, needs_extension
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.draw_token import check_sampling, draw_token
from dalle_fast.reference import filter_logits
from dalle_fast.reference.gumbel import noise_of_rows

BACKENDS = ["reference", pytest.param("cpp", marks=needs_extension)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", BACKENDS[1:])

SIZES = [1, 2, 5, 31, 128, 129, 1000, 8192]
TEMPERATURES = [0, 1e-38, 0.3, 1, 5]
TOP_P = [None, 1e-6, 0.5, 0.99, 1]
COND_SCALES = [None, 0, 1, 3, -1]
LARGEST_SEED = 2**63 - 1
LENGTH = 7  # tokens of an image
UNIT = 2.0**-24  # what rounding to float32 changes at most, relatively
LEAST_EXPONENT = -87.3  # e^x of less may be 0


def draw(logits, seeds, position=0, *, tokens=None, scores=None, **settings) -> tuple[Tensor, Tensor]:
    """All tokens (B, LENGTH), and the scores, from zeros where none are given."""
    tokens = torch.zeros(len(seeds), LENGTH, dtype=torch.int64) if tokens is None else tokens.clone()
    scores = torch.zeros(len(seeds)) if scores is None else scores.clone()
    draw_token(logits, seeds, torch.tensor(position), tokens, scores, **settings)
    return tokens, scores


def make(batch: int, codes: int, cond_scale: float | None = None, size: float = 2.0) -> tuple[Tensor, Tensor]:
    """Scores and seeds, small and large ones."""
    seeds = torch.randint(LARGEST_SEED, (batch,))
    seeds[: batch // 2] = torch.arange(batch // 2)
    seeds[-1] = LARGEST_SEED
    return size * torch.randn(batch if cond_scale is None else 2 * batch, codes), seeds


class Allowed:
    """The tokens that float32 may draw: those whose perturbed score is within rounding of the highest in float64.

    With unit u = 2^-24, guidance is off by u (3 |s (c - u)| + |guided|); z = (guided - max) / temperature by what both
    of its terms are, and by 3 u |z|; the noise by 4e-6, which the tests of gumbel_softmax hold it to; their sum by u of
    itself. A filter keeps a code possibly, or certainly, as these bounds allow. The sums that are held against top_p
    are off by as much as z, by 8e-8 (1 + |z|) of exp, and in any order by u a code.
    """

    def __init__(self, logits, seeds, position, temperature=1.0, top_k=None, top_p=None, cond_scale=None):
        logits = logits.double()
        codes = logits.shape[1]
        guided, error = logits, torch.zeros_like(logits)
        if cond_scale is not None:
            conditional, unconditional = logits.chunk(2)
            step = cond_scale * (conditional - unconditional)
            guided = unconditional + step
            error = UNIT * (3 * step.abs() + guided.abs())
        self.certain = self.possible = guided > -math.inf
        if temperature < torch.finfo(torch.float32).tiny:
            self.scores, self.error = guided, error
            return
        z = (guided - guided.amax(-1, keepdim=True)) / temperature
        error = (error + error.amax(-1, keepdim=True)) / temperature + 3 * UNIT * z.abs()
        # Those that matter to a sum are off by as much as the one among them that is off most.
        error = error.masked_fill(z == -math.inf, 0)
        error = error.maximum(error.masked_fill(z < LEAST_EXPONENT, 0).amax(-1, keepdim=True))
        if top_k is not None and top_k < codes:
            least, most = ((z + sign * error).topk(top_k).values[:, -1:] for sign in (-1, 1))
            self.certain, self.possible = self.certain & (z - error >= most), self.possible & (z + error >= least)
        if top_p is not None and top_p < 1:
            slack = 2 * (error.amin(-1, keepdim=True) + 8e-8 * (1 - LEAST_EXPONENT) + UNIT * codes)
            maybe_above = self._mass_above(z, self.possible, self.certain, -2 * error)
            surely_above = self._mass_above(z, self.certain, self.possible, 2 * error)
            # What has nothing above it stays whatever top_p is; else there is the highest, of 1 / K at least.
            self.certain = self.certain & ((maybe_above < top_p - slack) | (maybe_above < 0.5 / codes))
            self.possible = self.possible & (surely_above < top_p + slack)
        noise = noise_of_rows(seeds[:, None], torch.tensor(position).expand(len(z)), codes, dtype=torch.float64)
        self.scores = z + noise
        self.error = error + 4e-6 + UNIT * self.scores.abs()

    @staticmethod
    def _mass_above(z: Tensor, counted: Tensor, left: Tensor, shift: Tensor) -> Tensor:
        """For each code, the probability among ``left`` of the other codes ``counted`` with more than z + shift."""
        power = z.exp() * counted
        ordered, order = z.sort(dim=-1)
        before = torch.nn.functional.pad(power.gather(-1, order).cumsum(-1), (1, 0))
        up_to = torch.searchsorted(ordered, z + shift, right=True)
        own = torch.where(shift < 0, power, 0.0)
        return (before[:, -1:] - before.gather(-1, up_to) - own) / (z.exp() * left).sum(-1, keepdim=True)

    def check(self, tokens: Tensor) -> None:
        """Raise unless these may be drawn."""
        chosen = tokens[:, None]
        assert self.possible.gather(-1, chosen).all()
        reached = (self.scores + self.error).gather(-1, chosen).squeeze(-1)
        needed = (self.scores - self.error).masked_fill(~self.certain, -math.inf).amax(-1)
        assert (reached >= needed).all()


def check(backend: str, logits: Tensor, seeds: Tensor, position: int = 0, **settings) -> int:
    """Tokens and scores against float64. Returns how many tokens are others than those of float64."""
    tokens, scores = draw(logits, seeds, position, backend=backend, **settings)
    drawn = tokens[:, position]
    assert (tokens[:, torch.arange(LENGTH) != position] == 0).all()
    Allowed(logits, seeds, position, **settings).check(drawn)
    truth, same_dtype = (
        x[: len(seeds)].log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1) for x in (logits.double(), logits)
    )
    assert_within_budget(scores, same_dtype, truth)
    expected, _ = reference.draw_token(logits.double(), seeds, position, **settings)
    return int((drawn != expected).sum())


def some_top_k(codes: int) -> list[int | None]:
    return [None, 1, min(3, codes), codes]


@each_backend
@pytest.mark.parametrize("codes", SIZES)
def test_all_settings_against_float64(backend, codes):
    batch = 8 if codes > 1000 else 24
    others = drawn = 0
    for temperature in TEMPERATURES:
        for top_k in some_top_k(codes):
            for top_p in TOP_P:
                for cond_scale in COND_SCALES:
                    logits, seeds = make(batch, codes, cond_scale)
                    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}
                    others += check(backend, logits, seeds, drawn % LENGTH, **settings)
                    drawn += batch
    assert others <= 1e-3 * drawn


@needs_extension
@pytest.mark.parametrize("codes", [1, 5, 129, 1000])
def test_cpu_levels(level, codes):
    others = drawn = 0
    for cond_scale in (None, 3):
        for temperature in (0, 0.5, 1):
            for filters in ({}, {"top_k": min(codes, 40)}, {"top_p": 0.9}, {"top_k": min(codes, 40), "top_p": 0.7}):
                logits, seeds = make(50, codes, cond_scale)
                others += check("cpp", logits, seeds, 2, temperature=temperature, cond_scale=cond_scale, **filters)
                drawn += 50
    assert others <= 1e-3 * drawn


@needs_extension
def test_the_same_bits_at_both_levels_with_fma():
    extension = backends.load_extension()
    before, results = extension.build_info()["cpu_level"], []
    logits, seeds = make(200, 1000, 2.0)
    try:
        for level in ("avx2", "avx512"):
            extension.set_cpu_level(level)
            for settings in ({}, {"top_k": 100, "top_p": 0.8}):
                results.append(draw(logits, seeds, backend="cpp", cond_scale=2.0, **settings))
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        extension.set_cpu_level(before)
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_backend
@pytest.mark.parametrize("size", [0.01, 30.0, 1e4])
def test_sizes_of_the_scores(backend, size):
    for filters in ({}, {"top_k": 30}, {"top_p": 0.8}, {"top_k": 100, "top_p": 0.5}):
        for cond_scale in (None, 2.5):
            check(backend, *make(200, 700, cond_scale, size), temperature=0.7, cond_scale=cond_scale, **filters)


@each_backend
def test_positions_are_rows_of_the_noise(backend):
    logits, seeds = make(40, 300)
    columns = []
    for position in range(LENGTH):
        check(backend, logits, seeds, position)
        columns.append(draw(logits, seeds, position, backend=backend)[0][:, position])
    assert len(torch.stack(columns).unique(dim=0)) == LENGTH


@each_backend
def test_ties(backend):
    """At temperature 0 the first of equals; with a filter all of them stay."""
    logits = torch.zeros(2000, 200)
    logits[:, 50:60], logits[:, 150:160] = 2.0, 1.0
    seeds = torch.arange(2000)
    assert (draw(logits, seeds, temperature=0, backend=backend)[0][:, 0] == 50).all()
    for filters, expected in (
        ({"top_k": 1}, range(50, 60)),
        ({"top_k": 10}, range(50, 60)),
        ({"top_k": 11}, [*range(50, 60), *range(150, 160)]),
        ({"top_p": 1e-6}, range(50, 60)),
        ({"top_p": 0.262}, range(50, 60)),  # 0.2629
        ({"top_p": 0.264}, [*range(50, 60), *range(150, 160)]),
        ({"top_p": 0.359}, [*range(50, 60), *range(150, 160)]),  # 0.3596
        ({"top_p": 0.36}, range(200)),
        ({"top_k": 12, "top_p": 0.74}, [*range(50, 60), *range(150, 160)]),  # 0.731 of what top_k left
        ({"top_k": 12, "top_p": 0.73}, range(50, 60)),
    ):
        drawn = draw(logits, seeds, backend=backend, **filters)[0][:, 0]
        assert set(drawn.tolist()) <= set(expected)
        assert len(drawn.unique()) > 0.9 * len(expected)
        check(backend, logits, seeds, **filters)


@each_backend
@pytest.mark.parametrize("codes", [40, 8192])
def test_masked_codes_are_not_drawn(backend, codes):
    logits, seeds = make(300, codes)
    logits[:, ::3] = -math.inf
    logits[:, 17:] = -math.inf
    for settings in ({}, {"temperature": 0}, {"top_k": 14}, {"top_p": 0.999}, {"temperature": 1e30}):
        assert torch.isin(draw(logits, seeds, backend=backend, **settings)[0][:, 0], torch.arange(17)).all()
        check(backend, logits, seeds, **settings)


@each_backend
@pytest.mark.parametrize("cond_scale", [None, 3.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4, "top_p": 0.5}, {"temperature": 0}])
def test_nan(backend, cond_scale, filters):
    logits, seeds = make(4, 200, cond_scale)
    expected = draw(logits, seeds, backend=backend, cond_scale=cond_scale, **filters)
    logits[1, 150] = math.nan
    logits[2] = math.nan
    tokens, scores = draw(logits, seeds, backend=backend, cond_scale=cond_scale, **filters)
    assert scores.isnan().tolist() == [False, True, True, False]
    assert ((tokens >= 0) & (tokens < 200)).all()
    for found, one in zip((tokens, scores), expected, strict=True):
        assert torch.equal(found[::3], one[::3])


@each_backend
@pytest.mark.parametrize("filters", [{}, {"top_k": 4, "top_p": 0.5}, {"temperature": 0}])
def test_infinite_scores(backend, filters):
    logits, seeds = make(3, 200)
    logits[0, [31, 170]] = math.inf
    logits[1] = -math.inf
    tokens, scores = draw(logits, seeds, backend=backend, **filters)
    assert tokens[0, 0] == 31 and 0 <= tokens[1, 0] < 200
    assert scores.isnan().tolist() == [True, True, False]


@each_backend
@pytest.mark.parametrize("cond_scale", [None, 2.0])
def test_kept_tokens_stay(backend, cond_scale):
    logits, seeds = make(60, 300, cond_scale)
    settings = {"cond_scale": cond_scale, "backend": backend}
    tokens, scores = draw(logits, seeds, 3, **settings)

    keep = torch.rand(60, LENGTH) < 0.5
    held = torch.randint(300, (60, LENGTH))
    kept, kept_scores = draw(logits, seeds, 3, tokens=held, keep=keep, **settings)
    stays = keep[:, 3]
    assert torch.equal(kept[:, 3], torch.where(stays, held[:, 3], tokens[:, 3]))
    assert torch.equal(kept[:, [0, 1, 2, 4, 5, 6]], held[:, [0, 1, 2, 4, 5, 6]])
    assert torch.equal(kept_scores[~stays], scores[~stays])
    truth, same_dtype = (x[:60].log_softmax(-1).gather(-1, kept[:, 3:4]).squeeze(-1) for x in (logits.double(), logits))
    assert_within_budget(kept_scores, same_dtype, truth)

    # What it would draw anyway, kept, has the same likelihood.
    again, same_scores = draw(logits, seeds, 3, tokens=tokens, keep=torch.ones_like(keep), **settings)
    assert torch.equal(again, tokens) and torch.equal(same_scores, scores)


@each_backend
def test_likelihoods_are_added_to_the_scores(backend):
    logits, seeds = make(20, 90)
    _, likelihoods = draw(logits, seeds, backend=backend)
    before = torch.randn(20)
    assert torch.equal(draw(logits, seeds, scores=before, backend=backend)[1], before + likelihoods)


@each_kernel
@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9}, {"cond_scale": 1.5, "top_p": 0.9}], ids=str)
def test_a_sample_does_not_depend_on_the_batch(backend, settings):
    """Tokens and scores, to the bit, for any number of threads."""
    logits, seeds = make(13, 3000, settings.get("cond_scale"))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(draw(logits, seeds, 1, backend=backend, **settings))
    finally:
        torch.set_num_threads(before)
    alone = []
    for sample in range(13):
        rows = logits[sample::13]
        alone.append(draw(rows.contiguous(), seeds[sample : sample + 1], 1, backend=backend, **settings))
    results.append(tuple(torch.cat(part) for part in zip(*alone, strict=True)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@each_backend
def test_no_samples(backend):
    tokens, scores = draw(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), backend=backend)
    assert tokens.shape == (0, LENGTH) and scores.shape == (0,)


def test_wider_scores():
    """The reference takes what float32 kernels do not."""
    logits, seeds = make(30, 100)
    logits = logits.double()
    tokens, scores = draw(logits, seeds, scores=torch.zeros(30, dtype=torch.float64))
    expected, likelihoods = reference.draw_token(logits, seeds, 0)
    assert torch.equal(tokens[:, 0], expected) and torch.equal(scores, likelihoods)


@each_backend
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.30, 0.25, 0.20, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, [0.30**2, 0.25**2, 0.20**2, 0.15**2, 0.07**2, 0.03**2]),
        ({"temperature": 2.0}, [0.30**0.5, 0.25**0.5, 0.20**0.5, 0.15**0.5, 0.07**0.5, 0.03**0.5]),
        ({"top_k": 3}, [0.30, 0.25, 0.20, 0, 0, 0]),
        ({"top_p": 0.6}, [0.30, 0.25, 0.20, 0, 0, 0]),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.7}, [0.30**2, 0.25**2, 0, 0, 0, 0]),
    ],
)
def test_frequencies_of_the_draw(backend, options, weights):
    """A chi-square test: with up to 5 degrees of freedom, 30 is exceeded once in 70,000 seeds."""
    count = 20_000
    logits = (torch.tensor([0.30, 0.25, 0.20, 0.15, 0.07, 0.03]).log() + 3).repeat(count, 1)
    tokens, _ = draw(logits, torch.arange(count), backend=backend, **options)
    drawn = tokens[:, 0].bincount(minlength=6).double()
    expected = torch.tensor(weights, dtype=torch.float64)
    expected *= count / expected.sum()
    possible = expected > 0
    assert not drawn[~possible].any()
    assert ((drawn - expected)[possible].square() / expected[possible]).sum() < 30


@each_backend
def test_a_tiny_temperature_is_arg_max(backend):
    logits = torch.randn(64, 9)
    for temperature in (1e-30, 1e-38, 1e-60):
        tokens, _ = draw(logits, torch.arange(64), temperature=temperature, backend=backend)
        assert torch.equal(tokens[:, 0], logits.argmax(dim=-1))


rows_of_logits = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6), min_size=1, max_size=4).map(
    torch.tensor
)


@given(logits=rows_of_logits, top_k=st.integers(1, 9))
def test_top_k_keeps_the_k_highest(logits, top_k):
    kept = filter_logits(logits, top_k=top_k)
    for row, filtered in zip(logits, kept, strict=True):
        floor = row.sort(descending=True).values[min(top_k, 6) - 1]
        assert torch.equal(filtered, torch.where(row >= floor, row, -math.inf))


@given(logits=rows_of_logits, top_p=st.floats(1e-3, 1, exclude_max=True))
def test_top_p_keeps_the_smallest_set_that_suffices(logits, top_p):
    kept = filter_logits(logits, top_p=top_p)
    rounding = 1e-5
    for row, filtered in zip(logits, kept, strict=True):
        inside = filtered > -math.inf
        assert torch.equal(filtered[inside], row[inside])
        probabilities = row.double().softmax(dim=-1)
        last = row[inside].min()  # and what ties with it
        assert probabilities[inside].sum() >= top_p - rounding
        assert probabilities[row > last].sum() < top_p + rounding
        if not inside.all():
            assert row[inside].min() >= row[~inside].max()


@given(logits=rows_of_logits)
def test_filters_that_keep_all(logits):
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=6, top_p=1.0), logits)


def test_top_p_comes_after_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = filter_logits(logits, top_k=2, top_p=0.5) > -math.inf
    assert kept.tolist() == [[True, False, False, False]], "0.4 of the 0.7 that are left"
    assert (filter_logits(logits, top_p=0.5) > -math.inf).tolist() == [[True, True, False, False]]


@needs_extension
@pytest.mark.parametrize("keep", [None, torch.tensor([[True, False], [False, False]])], ids=["drawn", "kept"])
@pytest.mark.parametrize("cond_scale", [None, 2.0])
def test_opcheck(keep, cond_scale):
    logits, seeds = make(2, 9, cond_scale)
    tokens, scores = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2)
    args = (logits, seeds, torch.tensor(0), keep, 1.0, 5, 0.9, cond_scale, tokens, scores)
    torch.library.opcheck(torch.ops.dalle_fast.draw_token_cpu.default, args)


@each_backend
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()

    def step(logits, seeds, position, tokens, scores):
        draw_token(logits, seeds, position, tokens, scores, temperature=0.9, top_k=40, top_p=0.9, backend=backend)
        position += 1

    logits, seeds = make(6, 200)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        position, scores = torch.tensor(0), torch.zeros(6)
        tokens = torch.zeros(6, LENGTH, dtype=torch.int64)
        for _ in range(LENGTH):
            function(logits, seeds, position, tokens, scores)
        results.append((tokens, scores))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and >= 0, got inf"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"top_k": 10}, "top_k must be at most the 9 codes of the vocabulary, got 10"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
        ({"top_p": math.nan}, "top_p must be in (0, 1], got nan"),
        ({"cond_scale": math.inf}, "cond_scale must be finite, got inf"),
        ({"cond_scale": math.nan}, "cond_scale must be finite, got nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    logits, seeds = make(3, 9)
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(logits, seeds, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sampling(**{"temperature": 1.0, "top_k": None, "top_p": None} | settings, codes=9)


def test_settings_at_the_ends_of_their_ranges():
    check_sampling(0, 1, 1)
    check_sampling(5.0, None, 1e-9, 0.0)
    check_sampling(1.0, 9, None, -1.0, codes=9)
    check_sampling(1.0, 10**6, None)  # of an unknown vocabulary


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, cpp, reference, got 'fast'"):
        draw(*make(3, 9), backend="fast")


@needs_extension
def test_a_kernel_takes_float32():
    logits, seeds = make(3, 9)
    message = 'backend "cpp" of draw_token takes float32, got torch.float64; use backend="reference"'
    with pytest.raises(TypeError, match=re.escape(message)):
        draw(logits.double(), seeds, backend="cpp")


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(9)}, "logits must have two dimensions and at least one code, got shape (9)"),
        ({"logits": torch.zeros(3, 0)}, "logits must have two dimensions and at least one code, got shape (3, 0)"),
        ({"logits": torch.zeros(4, 9)}, "logits must have shape (3, 9), got (4, 9)"),
        ({"cond_scale": 2.0}, "logits must have shape (6, 9), got (3, 9)"),
        ({"logits": torch.zeros(9, 3).T}, "logits must be contiguous, got shape (3, 9) with strides (1, 3)"),
        ({"logits": torch.zeros(3, 9).half()}, "logits must have dtype Float, got Half"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, "seeds must have 3 elements, got 2"),
        ({"seeds": torch.zeros(3, dtype=torch.int32)}, "seeds must have dtype Long, got Int"),
        ({"position": torch.tensor(-1)}, "position must be in 0..6, got -1"),
        ({"position": torch.tensor(7)}, "position must be in 0..6, got 7"),
        ({"position": torch.arange(2)}, "position must have 1 elements, got 2"),
        ({"keep": torch.zeros(3, 5).bool()}, "keep must have shape (3, 7), got (3, 5)"),
        ({"keep": torch.zeros(3, 7)}, "keep must have dtype Bool, got Float"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens must have two dimensions, got shape (3)"),
        ({"tokens": torch.zeros(3, 7)}, "tokens must have dtype Long, got Float"),
        ({"scores": torch.zeros(1)}, "scores must have 3 elements, got 1"),
        (
            {"keep": torch.ones(3, 7).bool(), "tokens": torch.full((3, 7), 9)},
            "tokens that are kept must be in 0..8, got 9",
        ),
        (
            {"keep": torch.ones(3, 7).bool(), "tokens": torch.full((3, 7), -1)},
            "tokens that are kept must be in 0..8, got -1",
        ),
    ],
)
def test_messages_of_the_cpu_op(changes, message):
    args = {
        "logits": torch.zeros(3, 9),
        "seeds": torch.arange(3),
        "position": torch.tensor(0),
        "keep": None,
        "temperature": 1.0,
        "top_k": 9,
        "top_p": 1.0,
        "cond_scale": None,
        "tokens": torch.zeros(3, LENGTH, dtype=torch.int64),
        "scores": torch.zeros(3),
    } | changes
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dalle_fast.draw_token_cpu(*args.values())
