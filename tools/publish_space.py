"""Upload the page to a Hugging Face Space.

    python -m tools.publish_space --dry_run                 list the files with their sizes; needs no network and no account
    python -m tools.publish_space --repo_id user/space      create the Space, or update it

A list says what the page needs; other files are not uploaded. Needs a token that may write (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import filter_repo_objects

from ldvc.errors import LdvcError

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 10_000_000  # larger files need large-file storage on the Hub, and a Space should start fast
SINGLE_FILES = ("app.py", "README.md", "requirements.txt", "LICENSE")
PATTERNS = [
    *SINGLE_FILES,
    *(f"ldvc/*.{kind}" for kind in ("py", "html", "css", "js", "json", "txt")),
    *(f"assets/*.{kind}" for kind in ("jpg", "png", "json", "md", "safetensors")),
]
IGNORED = ["*/.*", "*/__pycache__/*"]
NEEDED = (
    *SINGLE_FILES, "ldvc/web/page.py", "ldvc/web/static/style.css", "assets/examples/examples.json",
    "assets/lite/ldvc/config.json",
)  # fmt: skip


class PublishError(LdvcError):
    """Nothing was uploaded; the sentence says why and what to do."""


def space_files(root: Path = ROOT) -> list[str]:
    """The files for the Space, as sorted paths relative to `root`; without links and what git ignores."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8")
    if listed.returncode == 0:
        names = set(filter(None, listed.stdout.split("\0")))
    else:  # no repository: a downloaded archive
        names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    real = (name for name in names if (root / name).is_file() and (root / name).resolve() == root.resolve() / name)
    return sorted(filter_repo_objects(real, allow_patterns=PATTERNS, ignore_patterns=IGNORED))


def check_files(files: Sequence[str], root: Path = ROOT) -> None:
    """See that the Space would start from these files.

    Raises:
        PublishError: one is too large, one that is needed is missing, or the README does not describe a Space.
    """
    too_large = [name for name in files if (root / name).stat().st_size > MAX_FILE_BYTES]
    if too_large:
        limit = f"{MAX_FILE_BYTES / 1e6:.0f} MB"
        raise PublishError(f"Larger than {limit}: {', '.join(too_large)}. Save these weights in smaller shards.")
    needed = set(NEEDED)
    for name in files:
        folder = name.rpartition("/")[0]
        if name.endswith(".safetensors.index.json"):
            needed |= {f"{folder}/{shard}" for shard in json.loads((root / name).read_text("utf-8"))["weight_map"].values()}
        elif name == "assets/examples/examples.json":
            needed |= {f"{folder}/{each['file']}" for each in json.loads((root / name).read_text("utf-8"))}
    missing = sorted(needed.difference(files))
    if missing:
        raise PublishError(f"The page cannot start without {', '.join(missing)}. Restore them, then publish again.")
    card = metadata_load(root / "README.md") or {}
    if card.get("sdk") != "gradio" or card.get("app_file") not in files:
        raise PublishError("README.md must begin with the settings of a Space, with “sdk: gradio” and “app_file: app.py”.")


def publish(
    repo_id: str,
    *,
    root: Path = ROOT,
    api: HfApi | None = None,
    private: bool | None = None,
    hardware: str | None = None,
) -> str:
    """Create the Space if it does not exist and upload the files; files that are no longer here are deleted there.

    Args:
        repo_id: "user/space" or "organisation/space".
        api: client of the Hub; None = one with the token of this machine.
        private, hardware: of a new Space; None = the account's default, and the free hardware.

    Returns:
        Address of the Space.

    Raises:
        PublishError: with a sentence that says what to do.
    """
    files = space_files(root)
    check_files(files, root)
    if api is None and get_token() is None:
        raise PublishError("There is no Hugging Face token on this machine. Run “hf auth login”, or set HF_TOKEN.")
    api = api or HfApi()
    try:
        api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", space_hardware=hardware, private=private, exist_ok=True
        )
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=root,
            allow_patterns=[name.replace("[", "[[]") for name in files],
            delete_patterns=["ldvc/*", "assets/*"],
            commit_message="Publish the page",
        )
    except Exception as error:  # of the Hub's client, of Python, or of the HTTP library that the client uses
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise PublishError(
            f"The Hub did not accept the Space {repo_id} ({reason}). Check the network, the name (user/space, a user that is "
            "yours), and that the token may write; then run the same command again."
        ) from error
    return f"https://huggingface.co/spaces/{repo_id}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.publish_space", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--repo_id", help="user/space")
    target.add_argument("--dry_run", action="store_true", help="list what would be uploaded and stop")
    parser.add_argument("--private", action="store_true", help="only the owner sees a new Space")
    parser.add_argument("--hardware", help="of a new Space, for example zero-a10g")
    args = parser.parse_args(arguments)
    try:
        if args.dry_run:
            files = space_files()
            sizes = [(ROOT / name).stat().st_size for name in files]
            for size, name in zip(sizes, files, strict=True):
                print(f"{size:>12,}  {name}")
            print(f"{sum(sizes):>12,}  bytes in {len(files)} files ({sum(sizes) / 1e6:.1f} MB)")
            check_files(files)
        else:
            print("Published:", publish(args.repo_id, private=args.private or None, hardware=args.hardware))
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
