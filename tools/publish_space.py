"""Push the page to a Hugging Face Space.

    python -m tools.publish_space --dry_run                          what would be pushed; needs no network and no account
    python -m tools.publish_space --repo_id user/space               create the Space, or bring it up to date

What is pushed is chosen by a list of what the page needs, never by a list of what to leave out: a file that is not known
here stays at home. Needs a token that may write (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse
import glob
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from ldvc.errors import LdvcError

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 10_000_000  # the Hub wants large-file storage from here on, and a Space should start fast

SINGLE_FILES = ("app.py", "README.md", "requirements.txt", "LICENSE")
FOLDERS = {  # folder -> kinds of files in it that the page reads or its README shows
    "ldvc": (".py", ".html", ".css", ".js", ".json", ".txt"),
    "assets": (".jpg", ".png", ".json", ".md", ".safetensors"),
}
NEEDED = (  # beside SINGLE_FILES and what the indexes among the pushed files name
    "ldvc/__init__.py",
    "ldvc/web/page.py",
    "ldvc/web/style.css",
    "assets/examples/examples.json",
    "assets/lite/clip/config.json",
    "assets/lite/clip_tuned/config.json",
    "assets/lite/ldvc/config.json",
)
HARDWARE = ("cpu-basic", "cpu-upgrade", "zero-a10g", "t4-small", "l4x1", "a10g-small")


class PublishError(LdvcError):
    """Nothing was pushed; the sentence says why and what to do."""


def space_files(root: Path = ROOT) -> list[str]:
    """What the Space gets, as sorted paths relative to `root` with forward slashes.

    Links are left out, they may lead anywhere, and so is what git ignores.
    """
    kept = _kept_by_git(root)
    files = [name for name in SINGLE_FILES if (root / name).is_file()]
    for folder, kinds in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            parts = path.relative_to(root).parts
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            linked = any((root / Path(*parts[:depth])).is_symlink() for depth in range(1, len(parts) + 1))
            if path.is_file() and path.suffix in kinds and not hidden and not linked:
                files.append("/".join(parts))
    return sorted(name for name in files if kept is None or name in kept)


def _kept_by_git(root: Path) -> set[str] | None:
    """Paths that git knows or would take; None where `root` is no work tree of its own (a downloaded archive)."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            return None
        return set(git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"))
    except (OSError, subprocess.CalledProcessError):
        return None


def check_files(files: Sequence[str], root: Path = ROOT) -> None:
    """See that the Space would start from these files.

    Raises:
        PublishError: one is too large, one that is needed is missing, or the README does not describe a Space.
    """
    too_large = [name for name in files if (root / name).stat().st_size > MAX_FILE_BYTES]
    if too_large:
        raise PublishError(
            f"Nothing above {MAX_FILE_BYTES / 1e6:.0f} MB is pushed, and that is {_listed(too_large)}: save the weights "
            "again (ldvc.checkpoint.save_checkpoint splits them), or take the file out of the folder."
        )
    needed = {*SINGLE_FILES, *NEEDED}
    for name in files:
        folder = name.rpartition("/")[0]
        if name.endswith(".safetensors.index.json"):
            shards = json.loads((root / name).read_text(encoding="utf-8"))["weight_map"].values()
            needed |= {f"{folder}/{shard}" for shard in shards}
        elif name == "assets/examples/examples.json":
            needed |= {f"{folder}/{each['file']}" for each in json.loads((root / name).read_text(encoding="utf-8"))}
    missing = sorted(needed.difference(files))
    if missing:
        raise PublishError(f"The page cannot start without {_listed(missing)}: bring it back, then publish again.")
    card = metadata_load(root / "README.md") or {}
    if card.get("sdk") != "gradio" or card.get("app_file") not in files:
        raise PublishError(
            "README.md does not begin with what a Space needs: a block between two lines of --- with, among others, "
            "“sdk: gradio” and “app_file: app.py”."
        )


def check_repo_id(repo_id: str) -> None:
    """See that a repository id is one of "user/space".

    Raises:
        PublishError: it is not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"“{repo_id}” is not the name of a Space: {error}") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"“{repo_id}” is not the name of a Space: give it as user/space.")


def publish(
    repo_id: str,
    *,
    root: Path = ROOT,
    api: HfApi | None = None,
    private: bool | None = None,
    hardware: str | None = None,
) -> str:
    """Create the Space if need be and push the files; its `ldvc` and `assets` then hold them and nothing else.

    Args:
        repo_id: "user/space" or "organisation/space".
        root: of the project.
        api: client of the Hub; None = one with the token of this machine.
        private: visibility of a Space that does not exist yet; None = as the account has it.
        hardware: of a Space that does not exist yet; None = the free one.

    Returns:
        Address of the Space.

    Raises:
        PublishError: with a sentence that says what to do.
    """
    check_repo_id(repo_id)
    files = space_files(root)
    check_files(files, root)
    if api is None:
        token = get_token()
        if token is None:
            raise PublishError(
                "There is no Hugging Face token on this machine: make one that may write at "
                "https://huggingface.co/settings/tokens, then run “hf auth login”, or set HF_TOKEN."
            )
        api = HfApi(token=token)
    try:
        api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", space_hardware=hardware, private=private, exist_ok=True
        )
        api.upload_folder(
            repo_id=repo_id,
            repo_type="space",
            folder_path=root,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[f"{folder}/*" for folder in FOLDERS],
            commit_message="Publish the page",
        )
    # The Hub's client raises errors of its own, of Python, and of an HTTP library whose name changes with its version.
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise PublishError(
            f"The Hub did not take the Space {repo_id} ({reason}): see that there is a network, that the token may write, "
            "and that the name is yours; then run the same command again."
        ) from error
    return f"https://huggingface.co/spaces/{repo_id}"


def describe(files: Sequence[str], root: Path = ROOT) -> str:
    """One line for each file with its size, and the total."""
    sizes = [(root / name).stat().st_size for name in files]
    lines = [f"{size:>12,}  {name}" for size, name in zip(sizes, files, strict=True)]
    return "\n".join([*lines, f"{sum(sizes):>12,}  bytes in {len(files)} files ({sum(sizes) / 1e6:.1f} MB)"])


def _listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.publish_space", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo_id", help="user/space")
    parser.add_argument("--dry_run", action="store_true", help="list what would be pushed and stop")
    parser.add_argument("--private", action="store_true", help="a new Space is seen by its owner only")
    parser.add_argument("--hardware", choices=HARDWARE, help="of a new Space; the free one unless told")
    args = parser.parse_args(arguments)
    try:
        if args.repo_id is None and not args.dry_run:
            raise PublishError("Say where to: --repo_id user/space; or look first with --dry_run.")
        if args.repo_id is not None:
            check_repo_id(args.repo_id)
        files = space_files()
        if args.dry_run:
            print(describe(files))
        check_files(files)
        if not args.dry_run:
            print("Pushed:", publish(args.repo_id, private=args.private or None, hardware=args.hardware))
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
