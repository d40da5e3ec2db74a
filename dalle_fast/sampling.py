"""Drawing image tokens, one after the other.

    token_step   scores of token p -> guidance -> temperature -> top k -> top p -> draw, seeded -> p + 1

Each image has a seed, and its tokens are a function of the model, the caption, the settings and that seed alone: token
p is the arg-max of the filtered scores plus Gumbel noise that Philox makes of the seed and p
(``dalle_fast.reference.draw_token``). So an image can be drawn again by itself, whatever was drawn beside it. On a CPU
with the C++ ops that is true to the bit, but where prompts keep different first tokens; elsewhere the sizes of a batch
may change how sums are rounded, and with it, rarely, a token.

On a GPU the step is captured once as a CUDA graph and then replayed. Nothing in it waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dalle_fast.models.decoder import Decoder
from dalle_fast.models.transformer import Dalle
from dalle_fast.ops.draw_token import bind_draw_token, check_sampling, draw_token

__all__ = ["Sampler", "check_sampling", "draw_seeds", "sample_tokens"]

WARM_UP_STEPS = 2  # before a step is captured: they compile and load the kernels, which a capture cannot hold
LARGEST_SEED = 2**63 - 1


class Sampler:
    """Draws images for captions, a batch of one size after another.

    Args:
        model: in evaluation mode.
        num_prompts: captions of a batch.
        num_images: samples of each.
        temperature: divides the scores, >= 0; 0 takes the likeliest token each time.
        top_k, top_p: draw among the k likeliest codes, then among the likeliest of total probability p.
        cond_scale: weight of the caption in the scores: uncond + cond_scale (cond - uncond), uncond being the scores
            without a caption. 1 is no guidance, and costs half as much.
        cache_dtype: see :class:`dalle_fast.models.decoder.Decoder`.
        compile: run the step through torch.compile.

    Raises:
        ValueError: a setting out of range, see :func:`dalle_fast.ops.draw_token.check_sampling`, or a size < 1.
    """

    def __init__(
        self,
        model: Dalle,
        num_prompts: int,
        num_images: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cond_scale: float = 1.0,
        cache_dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        for name, value in (("num_prompts", num_prompts), ("num_images", num_images)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        check_sampling(temperature, top_k, top_p, cond_scale, codes=model.config.image_vocab_size)
        self._settings = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "cond_scale": None if cond_scale == 1 else cond_scale,
        }
        self.num_images = num_images
        guided = cond_scale != 1
        self.decoder = Decoder(model, num_prompts, num_images, guided=guided, cache_dtype=cache_dtype)
        batch, device = self.decoder.samples, self.decoder.position.device
        with torch.inference_mode(False):  # or those made in inference mode could not be written to outside it
            self._tokens = torch.zeros(batch, model.config.image_len, dtype=torch.int64, device=device)
            self._keep = torch.zeros_like(self._tokens, dtype=torch.bool)
            self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
            self._scores = torch.zeros(batch, dtype=torch.float32, device=device)
        self._keeps = False
        self._bound: Callable[[], None] | None = None
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._warm: dict[bool, int] = {False: 0, True: 0}
        # Not the bound method itself: such a cycle would keep the caches until the next garbage collection.
        self._compiled = torch.compile(self._token_step) if compile else None

    @property
    def tokens(self) -> Tensor:
        """(num_prompts * num_images, image_len) int64: those drawn so far, the next batch's in the same memory."""
        return self._tokens

    @torch.no_grad()
    def run(
        self,
        text: Tensor,
        seeds: Tensor,
        *,
        tokens: Tensor | None = None,
        keep: Tensor | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw one batch.

        Args:
            text: (num_prompts, caption_len) int64, padded with PAD_ID, on the model's device.
            seeds: (num_prompts * num_images,) int64, >= 0, one an image.
            tokens, keep: (num_prompts, image_len) int64 and bool: where ``keep`` is True, an image of the prompt has
                the token of ``tokens``. Those that all prompts keep at the start are read at once.
            on_token: called with the number of positions filled so far, after those that are read at once, if any, and
                after each step; :attr:`tokens` has them.

        Returns:
            tokens (num_prompts * num_images, image_len) int64, the samples of a caption side by side, and their
            log-likelihoods given the caption, of kept tokens too, unfiltered and at temperature 1, in nats, fp32.

        Raises:
            FloatingPointError: the model's scores are NaN.
        """
        self._seeds.copy_(seeds)
        self._tokens.zero_()
        self._scores.zero_()
        known = 0
        self._keeps = keep is not None
        if keep is not None:
            self._keep.copy_(keep.repeat_interleave(self.num_images, dim=0))
            self._tokens.copy_((tokens * keep).repeat_interleave(self.num_images, dim=0))
            known = int(keep.all(dim=0).cumprod(dim=0).sum())
        prefix = tokens[:, :known] if known else None
        likelihoods = self._prefill(text, prefix)
        self._scores += likelihoods.repeat_interleave(self.num_images)
        if known and on_token is not None:
            on_token(known)
        for position in range(known, self._tokens.shape[1]):
            self._advance()
            if on_token is not None:
                on_token(position + 1)
        if self._scores.isnan().any():
            raise FloatingPointError("the scores of the next token must be numbers, got NaN from the model")
        return self._tokens.clone(), self._scores.clone()

    def _prefill(self, text: Tensor, prefix: Tensor | None) -> Tensor:
        """See :meth:`dalle_fast.models.decoder.Decoder.prefill`; the steps that follow are those of this batch."""
        likelihoods = self.decoder.prefill(text, prefix)
        self._bound = self.decoder.bind_step(self._tokens, self._bind_draw)
        return likelihoods

    def _token_step(self) -> None:
        """Draw the next token of every sample."""
        if self._bound is not None:
            self._bound()
            return
        decoder = self.decoder
        logits = decoder.step(self._tokens)
        keep = self._keep if self._keeps else None
        draw_token(logits, self._seeds, decoder.position, self._tokens, self._scores, keep=keep, **self._settings)
        decoder.position += 1

    def _bind_draw(self, logits: Tensor) -> partial:
        """The draw in C++ as a call."""
        keep, position = self._keep if self._keeps else None, self.decoder.position
        return bind_draw_token(
            logits, self._seeds, position, self._tokens, self._scores, keep=keep, **self._settings, kernel="cpp"
        )

    def _advance(self) -> None:
        """One step, on a GPU with Triton by replaying the graph of it."""
        step = self._token_step if self._compiled is None else self._compiled
        if not self.decoder.captures:
            step()
            return
        graph = self._graphs.get(self._keeps)
        if graph is None and self._warm[self._keeps] >= WARM_UP_STEPS:
            graph = torch.cuda.CUDAGraph()
            # The default stream of captures is on whatever device the first one of the process was.
            device = self._tokens.device
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                step()
            self._graphs[self._keeps] = graph
        if graph is not None:
            graph.replay()
        else:
            step()
            self._warm[self._keeps] += 1


def draw_seeds(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Seeds of ``count`` images, (count,) int64: consecutive numbers, the first one drawn from ``generator``."""
    device = "cpu" if generator is None else generator.device
    first = torch.randint(LARGEST_SEED - count, (), generator=generator, device=device)
    return first.cpu() + torch.arange(count)


def sample_tokens(
    model: Dalle,
    text: Tensor,
    num_images: int = 1,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cond_scale: float = 1.0,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    tokens: Tensor | None = None,
    keep: Tensor | None = None,
    on_token: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images, as tokens, for each caption: one batch of a :class:`Sampler`.

    Args:
        text: (P, caption_len) int64, padded with PAD_ID, on the model's device.
        num_images: samples a caption.
        temperature, top_k, top_p, cond_scale: see :class:`Sampler`.
        seeds: (P * num_images,) int64, one an image; None draws consecutive ones from ``generator``.
        generator: None takes PyTorch's default.
        tokens, keep, on_token: see :meth:`Sampler.run`.

    Returns:
        See :meth:`Sampler.run`.

    Raises:
        ValueError: a setting out of range, or a size < 1.
        FloatingPointError: the model's scores are NaN.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}
    sampler = Sampler(model, text.shape[0], num_images, **settings)
    seeds = draw_seeds(text.shape[0] * num_images, generator) if seeds is None else seeds
    return sampler.run(text, seeds, tokens=tokens, keep=keep, on_token=on_token)
