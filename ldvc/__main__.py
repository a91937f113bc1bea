"""The command line.

python -m ldvc segment FOLDER --names "dog, grass" --output OUT       many photos: overlays, masks, JSON, COCO, YOLO, ...
python -m ldvc attention PHOTO --names "dog, grass" --output figure.pdf    what each patch attends to, under three decoders
python -m ldvc compare PHOTO --names "dog, grass" --output figure.pdf      the photo under four decoders
python -m ldvc space PHOTO --names "dog, grass" --output figure.pdf        patches and names before and after two decoders
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from ldvc.annotations import COCO_KINDS
from ldvc.arrays import npz
from ldvc.batch import Batch, find_photos, run, write
from ldvc.class_names import ClassName, class_lists, drop_none_words, parse_names
from ldvc.embedding_space import movement_of, shared_space
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.figures import COLUMN, FORMATS, attention_figure, compare_figure, figure_bytes, space_figure
from ldvc.predictor import PREDICTOR_DECODERS, Predictor
from ldvc.result import Segmentation

FIGURES = {  # command -> decoders from left to right, and the help text
    "attention": (("ldvc", "ldvc_without_lcsa", "zegclip"), "draw what each patch attends to, under three decoders"),
    "compare": (PREDICTOR_DECODERS[::-1], "draw the photo as four decoders segment it"),
    "space": (("ldvc", "zegclip"), "draw patches and names before and after two decoders"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of a command."""
    parser = argparse.ArgumentParser(prog="python -m ldvc", description="Segment photos by class names.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    lists = ", ".join(class_lists())
    shared.add_argument("--names", required=True, help=f'"dog, grass, sofa | couch", or the name of a class list: {lists}')
    shared.add_argument("--model", default="lite", help="lite, a checkpoint folder, or a repository on the Hugging Face Hub")
    shared.add_argument(
        "--threshold",
        type=threshold,
        default="default",
        help='0 to 1; pixels with a lower score are none of these; "none" = no threshold (default: set by the checkpoint)',
    )

    segment = commands.add_parser("segment", parents=[shared], help="segment photos and write files for each")
    segment.add_argument("photos", type=Path, nargs="+", help="files and folders")
    segment.add_argument("--output", type=Path, required=True, help="folder for all files; an earlier run is continued")
    segment.add_argument("--decoder", default="ldvc", choices=PREDICTOR_DECODERS)
    segment.add_argument("--coco", nargs="?", const="rle", choices=COCO_KINDS, help="write coco.json (default: rle)")
    segment.add_argument("--yolo", action="store_true", help="write labels of YOLO segmentation")
    segment.add_argument("--cutouts", action="store_true", help="write a ZIP of PNGs, transparent outside of a class")
    segment.add_argument(
        "--overlay-names", action=argparse.BooleanOptionalAction, default=True, help="write names on the overlay"
    )
    segment.add_argument("--jobs", type=positive, default=1, help="number of processes; several use one thread each")

    for command, (_, text) in FIGURES.items():
        figure = commands.add_parser(command, parents=[shared], help=text)
        figure.add_argument("photo", type=Path)
        figure.add_argument("--output", type=figure_path, required=True, help=f"file with the suffix {', '.join(FORMATS)}")
        figure.add_argument("--width", type=float, default=COLUMN, help="width in inches (default: 3.5, one of two columns)")
        figure.add_argument("--npz", type=Path, help="also write the arrays, documented in ldvc/arrays.py")
        if command == "attention":
            figure.add_argument("--layer", type=int, default=0, help="layer of the decoder, from 1; 0 = the last")
            figure.add_argument("--head", type=int, default=0, help="attention head, from 1; 0 = mean of all")
    return parser.parse_args(arguments)


def figure_path(text: str) -> Path:
    """A path whose suffix is one of `FORMATS`."""
    path = Path(text)
    if path.suffix.lower()[1:] not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text} must end with .{', .'.join(FORMATS)}")
    return path


def threshold(text: str) -> float | str | None:
    """A number from 0 to 1, "default", or None for "none"."""
    if text in ("none", "default"):
        return None if text == "none" else text
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def classes_and_threshold(options: argparse.Namespace) -> tuple[list[ClassName], float | str | None]:
    """The classes of `--names` (a class list, or names as people type them), and the threshold."""
    class_list = class_lists().get(options.names.strip())
    classes, none_named = drop_none_words(parse_names(class_list.classes if class_list else options.names))
    return classes, "default" if none_named and options.threshold is None else options.threshold


def segment(options: argparse.Namespace) -> str:
    """Segment many photos; returns a sentence about the outcome. Raises LdvcError if no photo could be read."""
    names, background = classes_and_threshold(options)
    batch_fields = {each.name for each in fields(Batch)}
    batch_options = {name: value for name, value in vars(options).items() if name in batch_fields}
    batch = Batch(**batch_options | {"names": tuple(names), "background": background})
    photos = find_photos(options.photos, options.output)
    if not photos:
        raise LdvcError(f"There are no photos in {', '.join(map(str, options.photos))}.")
    outcomes = run(batch, photos, jobs=options.jobs)
    skipped, resumed = sum(each.problem is not None for each in outcomes), sum(each.resumed for each in outcomes)
    skipped_note = f"{skipped} could not be read, see {options.output / 'skipped.txt'}"
    if skipped == len(photos):
        raise LdvcError(f"No photo was segmented: {skipped_note}.")
    sentence = f"{len(photos) - skipped} of {len(photos)} photos are in {options.output}"
    if resumed:
        sentence += f", {resumed} of them from an earlier run"
    return f"{sentence}; {skipped_note}." if skipped else f"{sentence}."


def draw(options: argparse.Namespace) -> str:
    """Draw a figure of a photo; returns a sentence about the files."""
    names, background = classes_and_threshold(options)
    main = Predictor.from_pretrained(options.model)
    image, results = main.encode_image(options.photo), {}
    for decoder in FIGURES[options.command][0]:
        with suppress(CheckpointError, WeightsNotFoundError):  # a checkpoint need not have all decoders
            results[decoder] = main.sibling(decoder).segment(names, image=image, background=background, features=True)
    if options.command == "attention":
        figure = attention_figure(results, **layer_and_head(results, options), width=options.width)
    elif options.command == "compare":
        figure = compare_figure(results, width=options.width)
    else:
        space = shared_space({decoder: movement_of(result) for decoder, result in results.items()})
        figure = space_figure(space, results["ldvc"], width=options.width)
    write(options.output, figure_bytes(figure, options.output.suffix.lower()[1:]))
    if options.npz:
        write(options.npz, npz(results))
    return f"The figure is in {options.output}" + (f", the arrays are in {options.npz}." if options.npz else ".")


def layer_and_head(results: dict[str, Segmentation], options: argparse.Namespace) -> dict[str, int | None]:
    """Arguments of `attention_figure`; raises LdvcError if a decoder has no such layer or head."""
    layers, heads = map(min, zip(*(result.attention_shape for result in results.values()), strict=True))
    if not (0 <= options.layer <= layers and 0 <= options.head <= heads):
        raise LdvcError(
            f"The decoders have {layers} layers and {heads} heads, counted from 1; 0 is the last layer or the mean of heads."
        )
    return {"layer": (options.layer or layers) - 1, "head": options.head - 1 if options.head else None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = parse(arguments)
    try:
        print((segment if options.command == "segment" else draw)(options))
        return 0
    except LdvcError as error:
        problem, status = error, 1
    except OSError as error:
        problem, status = f"A file cannot be used: {error}", 1
    except BrokenProcessPool:
        problem, status = "A process ended, perhaps because memory ran out. Use fewer --jobs; finished photos are kept.", 1
    except KeyboardInterrupt:
        problem, status = "Stopped. Run the same command again to continue.", 130
    print(problem, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
