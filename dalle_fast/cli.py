"""The command line: ``dalle-fast demo | data | train-dvae | train | sample | info``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from dalle_fast import __version__

__all__ = ["main"]

_DTYPES = ("float32", "bfloat16", "float16")
_DATA_HELP = "folder of images with captions, .tar shards, or a brace pattern"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; what goes wrong is said in one sentence on stderr."""
    args = _parse(_make_parser(), arguments)
    try:
        args.run(args)
    except KeyboardInterrupt as interrupt:
        print(f"dalle-fast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, ArithmeticError, OSError) as error:
        if args.traceback:
            raise
        print(f"dalle-fast: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    args, rest = parser.parse_known_args(arguments)
    # argparse looks for captions in one place, before or after the flags. As there, what has a space is no flag.
    end = rest.index("--") if "--" in rest else len(rest)
    if hasattr(args, "captions") and not any(word.startswith("-") and " " not in word for word in rest[:end]):
        args.captions += rest[:end] + rest[end + 1 :]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dalle-fast", description="Train and sample DALL-E style models.")
    parser.add_argument("--version", action="version", version=f"dalle_fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_data(commands)
    _add_train_dvae(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_info(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="make a data set, train both models on it and show what they learned")
    parser.add_argument("--data", choices=("shapes", "emoji"), default="shapes", help="which data set")
    parser.add_argument("--font", type=Path, help="colour emoji font, for --data emoji")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from dalle_fast.demo import run_demo

    run_demo(args.data, args.out, font=args.font)


def _add_data(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("data", help="make a data set, or encode one to tokens")
    kinds = parser.add_subparsers(title="data sets", required=True, metavar="KIND")

    shapes = kinds.add_parser("shapes", help="captioned drawings of one or two coloured shapes")
    shapes.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    shapes.add_argument("--train", type=int, default=12000, help="training drawings (default: 12000)")
    shapes.add_argument("--heldout", type=int, default=512, help="drawings of held-out compositions (default: 512)")
    shapes.add_argument("--size", type=int, default=32, help="side in pixels (default: 32)")
    shapes.add_argument("--seed", type=int, default=0, help="of the drawings (default: 0)")
    shapes.set_defaults(run=_data_shapes)

    emoji = kinds.add_parser("emoji", help="every emoji of a colour font, captioned with its name")
    emoji.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    emoji.add_argument("--font", type=Path, required=True, help="for example NotoColorEmoji.ttf")
    emoji.add_argument("--size", type=int, default=64, help="side in pixels (default: 64)")
    emoji.add_argument("--seed", type=int, default=0, help="of the held-out choice (default: 0)")
    emoji.set_defaults(run=_data_emoji)

    _add_data_encode(kinds)


def _add_data_encode(kinds: argparse._SubParsersAction) -> None:
    from dalle_fast.config import add_arguments
    from dalle_fast.training.encode import EncodeConfig

    parser = kinds.add_parser(
        "encode", help="the tokens of captioned images, for train; the same command goes on where it was stopped"
    )
    parser.add_argument("dvae", type=Path, metavar="DVAE", help="run or checkpoint of train-dvae")
    parser.add_argument("data", metavar="DATA", help=_DATA_HELP)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write token shards to")
    add_arguments(parser.add_argument_group("configuration"), EncodeConfig)
    parser.set_defaults(run=_data_encode)


def _data_shapes(args: argparse.Namespace) -> None:
    from dalle_fast.data.shapes import write_shapes

    counts = write_shapes(args.out, train=args.train, heldout=args.heldout, size=args.size, seed=args.seed)
    print(f"{args.out}: {counts['train']} training drawings, {counts['heldout']} held-out ones")


def _data_emoji(args: argparse.Namespace) -> None:
    from dalle_fast.data.emoji import write_emoji

    summary = write_emoji(args.out, args.font, size=args.size, seed=args.seed)
    print(
        f"{args.out}: {summary.train} training emoji, {summary.heldout} held-out ones, "
        f"{summary.left_out} that the font cannot draw"
    )


def _data_encode(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dalle_fast.config import from_arguments
    from dalle_fast.training.encode import EncodeConfig, encode

    config = from_arguments(EncodeConfig, args)
    with ExitStack() as stack:
        bar = None

        def show(done: int, total: int | None) -> None:
            nonlocal bar
            if bar is None:
                # What an earlier process encoded counts as done, but not into the speed.
                bar = stack.enter_context(tqdm(initial=done, total=total, unit="image", disable=None))
            bar.update(done - bar.n)

        manifest = encode(args.dvae, args.data, args.out, config, on_progress=show)
    skipped = ", ".join(f"{reason} {count}" for reason, count in manifest.skipped.items())
    print(
        f"{args.out}: {manifest.samples} images in {len(manifest.shards)} shards, "
        f"{sum(manifest.skipped.values())} skipped" + (f" ({skipped})" if skipped else "")
    )


def _add_train_dvae(commands: argparse._SubParsersAction) -> None:
    from dalle_fast.config import add_arguments
    from dalle_fast.training.dvae import TrainDVAEConfig
    from dalle_fast.training.presets import DVAE_PRESETS

    parser = commands.add_parser("train-dvae", help="stage one: train the discrete VAE on images")
    _add_run_arguments(parser, list(DVAE_PRESETS), _DATA_HELP)
    add_arguments(parser.add_argument_group("configuration"), TrainDVAEConfig)
    parser.set_defaults(run=_train_dvae)


def _train_dvae(args: argparse.Namespace) -> None:
    from dalle_fast.config import from_arguments
    from dalle_fast.training.dvae import TrainDVAEConfig, train_dvae
    from dalle_fast.training.presets import DVAE_PRESETS

    defaults = _saved_config(args.out, TrainDVAEConfig, "dvae") if args.resume else DVAE_PRESETS[args.preset]
    config = from_arguments(TrainDVAEConfig, args, defaults=defaults)
    print(train_dvae(args.data, args.out, config, resume=args.resume))


def _add_train(commands: argparse._SubParsersAction) -> None:
    from dalle_fast.config import add_arguments
    from dalle_fast.training.presets import PRIOR_PRESETS
    from dalle_fast.training.prior import TrainConfig

    parser = commands.add_parser("train", help="stage two: train the transformer on captioned images")
    _add_run_arguments(parser, list(PRIOR_PRESETS), f"{_DATA_HELP}; or a folder of token shards")
    parser.add_argument("--dvae", type=Path, help="run or checkpoint of train-dvae; needed unless --resume is given")
    add_arguments(parser.add_argument_group("configuration"), TrainConfig)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from dalle_fast.config import from_arguments
    from dalle_fast.pipeline import load_dvae_config
    from dalle_fast.training.presets import PRIOR_PRESETS
    from dalle_fast.training.prior import TrainConfig, fit_to_dvae, train_prior

    if args.resume:
        defaults = _saved_config(args.out, TrainConfig, "dalle")
    else:
        if args.dvae is None:
            raise ValueError("--dvae must name the run or checkpoint of a dVAE, got none")
        # The image side follows from the dVAE; a flag that says otherwise is refused later, by name.
        defaults = fit_to_dvae(PRIOR_PRESETS[args.preset], load_dvae_config(args.dvae))
    config = from_arguments(TrainConfig, args, defaults=defaults)
    print(train_prior(args.data, args.out, args.dvae, config, resume=args.resume))


def _add_run_arguments(parser: argparse.ArgumentParser, presets: list[str], data_help: str) -> None:
    parser.add_argument("data", metavar="DATA", help=data_help)
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory: checkpoints, logs, images")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument(
        "--preset",
        choices=presets,
        default=presets[0],
        help=f"where defaults come from (default: {presets[0]})",
    )


def _saved_config(out: Path, config_class: type, kind: str) -> object:
    """The configuration a run was started with."""
    from dalle_fast.checkpoint import CheckpointError, latest_checkpoint, load_config
    from dalle_fast.config import from_dict

    path = latest_checkpoint(out)
    saved = load_config(path, kind)
    if "train" not in saved:
        raise CheckpointError(f"checkpoint {path} cannot be resumed: config.json lacks the field train")
    return from_dict(config_class, saved["train"] | {"model": saved["model"]})


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sample", help="draw images for captions, or complete an image")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="run or checkpoint of train, or a saved pipeline")
    parser.add_argument("captions", nargs="*", metavar="CAPTION", help="one or several")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="captions instead, one a line")
    parser.add_argument("-n", "--num-images", type=int, default=16, help="images to draw of each (default: 16)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("out.png"),
        help="grid to write (default: out.png); out/ gets the single images, out.json settings, seeds and scores",
    )
    parser.add_argument("--no-singles", dest="singles", action="store_false", help="write no single images")
    parser.add_argument("--best", type=int, metavar="K", help="keep the K of highest score of each caption, in order")
    parser.add_argument("--stream", action="store_true", help="write the grid again and again while it is drawn")
    parser.add_argument("--strict", action="store_true", help="refuse a caption that is too long instead of cutting it")

    group = parser.add_argument_group("drawing")
    group.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next (default: 0)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    group.add_argument("--top-k", type=int, help="draw among the k likeliest codes")
    group.add_argument("--top-p", type=float, help="draw among the likeliest codes of this total probability")
    group.add_argument(
        "--cond-scale", type=float, default=1.0, help="weight of the caption against none: guidance (default: 1)"
    )

    group = parser.add_argument_group("completing an image")
    group.add_argument("--image", type=Path, metavar="FILE", help="image to complete, cut to the models' size")
    masks = group.add_mutually_exclusive_group()
    masks.add_argument("--keep-rows", type=int, metavar="N", help="rows of tokens to keep (default: 15 of 32)")
    masks.add_argument("--keep-mask", type=Path, metavar="FILE", help="image that is white where tokens are kept")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument("--batch-size", type=int, help="images drawn together (default: what fits the memory)")
    group.add_argument("--memory-budget", type=_bytes, metavar="BYTES", help="for keys, values and buffers, such as 4G")
    group.add_argument(
        "--dtype",
        choices=("auto", *_DTYPES),
        default="auto",
        help="of the blocks' matrices; auto is as saved on a CPU, bfloat16 on a GPU",
    )
    group.add_argument("--cache-dtype", choices=_DTYPES, help="of keys and values (default: the matrices')")
    parser.set_defaults(run=_sample, usage_error=parser.error)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text.upper().removesuffix("B").removesuffix("I"))
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 800M or 4G, got {text!r}")
    number, unit = match.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _sample(args: argparse.Namespace) -> None:
    from dalle_fast.sample import run_sample

    if args.prompts is not None and args.captions:
        args.usage_error("argument --prompts: not allowed with argument CAPTION")
    if args.prompts is None and not args.captions:
        args.usage_error("the following arguments are required: CAPTION or --prompts")
    for name in ("keep_rows", "keep_mask"):
        if getattr(args, name) is not None and args.image is None:
            args.usage_error(f"argument --{name.replace('_', '-')}: needs --image")
    run_sample(args)


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="what this machine and this installation can do")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    from dalle_fast.ops.backends import describe

    print(describe())
