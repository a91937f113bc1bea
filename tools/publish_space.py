"""Upload the page to a Hugging Face Space.

    python -m tools.publish_space --dry_run                          show the plan; needs no network and no account
    python -m tools.publish_space --repo_id user/space               create the Space, or update it
    python -m tools.publish_space ... --full user/ldvc-voc12         open the page with a decoder checkpoint for the full CLIP

The default hardware is ZeroGPU, on which a free account can host two Spaces; `--hardware cpu-basic` needs a paid plan. Only
the files that the page needs are uploaded. README.md and requirements.txt are adapted to the hardware. The upload needs a
token that may write (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, SpaceHardware, get_token
from huggingface_hub.utils import filter_repo_objects

from ldvc.errors import LdvcError
from train.files import project_files

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 10_000_000  # larger files need large-file storage on the Hub, and a Space should start fast
SINGLE_FILES = ("app.py", "README.md", "requirements.txt", "LICENSE")
PATTERNS = [
    *SINGLE_FILES,
    *(f"ldvc/*.{kind}" for kind in ("py", "html", "css", "js", "json", "txt")),
    *(f"assets/*.{kind}" for kind in ("jpg", "png", "json", "md", "safetensors")),
    "assets/lite/SHA256SUMS",
]
IGNORED = ["*/.*", "*/__pycache__/*"]
REPLACED = ("ldvc/", "assets/")  # files of the Space in these folders are deleted if they no longer exist here
NEEDED = (*SINGLE_FILES, "ldvc/web/page.py", "ldvc/web/static/style.css")
NEEDED += ("assets/examples/examples.json", "assets/lite/ldvc/config.json")

ZEROGPU = SpaceHardware.ZERO_A10G.value
# The newest version in the documentation of ZeroGPU, and the torchvision version for it.
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0"}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # without it a CPU Space installs gigabytes of CUDA libraries
THUMBNAIL = "assets/page.png"


class PublishError(LdvcError):
    """The upload failed; the sentence says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """The files and settings that are sent to the Hub."""

    repo_id: str
    hardware: str
    files: dict[str, Path | bytes]  # by name in the Space: the path of a file, or the content of an adapted file
    variables: dict[str, str]  # environment variables of the Space
    card: RepoCard  # README.md

    def size(self, name: str) -> int:
        """Bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def __str__(self) -> str:
        """The plan as readable text."""
        total = sum(map(self.size, self.files))
        variables = ", ".join(f"{key}={value}" for key, value in self.variables.items()) or "none"
        lines = [f"Space: {self.repo_id}", f"Hardware: {self.hardware}", f"Variables: {variables}", ""]
        lines += [f"{self.size(name):>12,}  {name}" for name in self.files]
        lines += [f"{total:>12,}  bytes in {len(self.files)} files ({total / 1e6:.1f} MB)", ""]
        lines += [f"README.md begins with:\n---\n{self.card.data}\n---\n"]
        lines += ["requirements.txt:", self.files["requirements.txt"].decode()]
        return "\n".join(lines)


def space_files(root: Path = ROOT) -> list[str]:
    """The files for the Space, as sorted paths relative to `root`, without links and files that git ignores."""
    return sorted(filter_repo_objects(project_files(root), allow_patterns=PATTERNS, ignore_patterns=IGNORED))


def check_files(files: Sequence[str], root: Path = ROOT) -> None:
    """Raise `PublishError` if a file is too large, or if a file that the Space needs is missing."""
    if too_large := [name for name in files if (root / name).stat().st_size > MAX_FILE_BYTES]:
        limit = f"{MAX_FILE_BYTES / 1e6:.0f} MB"
        raise PublishError(f"Larger than {limit}: {', '.join(too_large)}. Save these weights in smaller shards.")
    needed = set(NEEDED)
    for name in files:
        folder = name.rpartition("/")[0]
        if name.endswith(".safetensors.index.json"):
            needed |= {f"{folder}/{shard}" for shard in json.loads((root / name).read_text("utf-8"))["weight_map"].values()}
        elif name == "assets/examples/examples.json":
            needed |= {f"{folder}/{each['file']}" for each in json.loads((root / name).read_text("utf-8"))}
    if missing := sorted(needed.difference(files)):
        raise PublishError(f"The page cannot start without {', '.join(missing)}. Restore them, then publish again.")


def adapt_requirements(text: str, hardware: str) -> str:
    """requirements.txt with exact versions of torch; on CPU hardware from PyTorch's index of CPU wheels."""
    on_cpu = hardware.startswith("cpu-")
    for package, version in TORCH.items():
        line = f"{package}=={version}{'+cpu' if on_cpu else ''}"
        text, count = re.subn(rf"^{package}\b.*$", line, text, flags=re.MULTILINE)
        if count != 1:
            raise PublishError(f"requirements.txt must name {package} in exactly one line.")
    return f"--extra-index-url {CPU_WHEELS}\n{text}" if on_cpu else text


def make_plan(repo_id: str, *, root: Path = ROOT, hardware: str = ZEROGPU, full: str | None = None) -> Plan:
    """Make the plan of an upload, without network.

    Args:
        repo_id: "user/space" or "organisation/space".
        hardware: one of `SpaceHardware`.
        full: Hub id of a decoder checkpoint for the full CLIP, with which the page opens; None = it opens with lite.

    Raises:
        PublishError: the sentence says what to do.
    """
    for each in filter(None, (repo_id, full)):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", each):
            raise PublishError(f"“{each}” is no name on the Hub; give user/name.")
    names = space_files(root)
    check_files(names, root)
    card = RepoCard((root / "README.md").read_text("utf-8"))
    if card.data.get("sdk") != "gradio" or card.data.get("app_file") not in names:
        raise PublishError("README.md must begin with the settings of a Space, with “sdk: gradio” and “app_file: app.py”.")
    card.data["suggested_hardware"] = hardware
    if THUMBNAIL in names:
        card.data["thumbnail"] = f"https://huggingface.co/spaces/{repo_id}/resolve/main/{THUMBNAIL}"
    for key in ("models", "preload_from_hub") if full else ():  # downloaded when the Space is built
        card.data[key] = [*card.data.get(key, []), full]
    requirements = adapt_requirements((root / "requirements.txt").read_text("utf-8"), hardware)
    adapted = {"README.md": str(card).encode(), "requirements.txt": requirements.encode()}
    files = {name: adapted.get(name, root / name) for name in names}
    return Plan(repo_id, hardware, files, {"LDVC_MODEL": "full", "LDVC_FULL": full} if full else {}, card)


def publish(plan: Plan, *, api: HfApi | None = None, private: bool | None = None, move: bool = False) -> str:
    """Create the Space if it does not exist, upload the files, delete old files, and return the address.

    Args:
        api: client of the Hub; None = a client with the token of this machine.
        private: whether a new Space is private; None = the account's default.
        move: whether to move an existing Space to the plan's hardware.

    Raises:
        PublishError: the sentence says what to do.
    """
    if api is None and get_token() is None:
        raise PublishError("There is no Hugging Face token on this machine. Run “hf auth login”, or set HF_TOKEN.")
    api, repo_id = api or HfApi(), plan.repo_id
    space: dict[str, Any] = {"repo_id": repo_id, "repo_type": "space"}
    try:
        api.create_repo(**space, space_sdk="gradio", space_hardware=plan.hardware, private=private, exist_ok=True)
        if move:
            api.request_space_hardware(repo_id, plan.hardware)
        for key, value in plan.variables.items():
            api.add_space_variable(repo_id, key, value)
        old = [name for name in api.list_repo_files(**space) if name.startswith(REPLACED) and name not in plan.files]
        operations = [CommitOperationAdd(name, content) for name, content in plan.files.items()]
        operations += map(CommitOperationDelete, old)
        api.create_commit(**space, operations=operations, commit_message="Publish the page")
    except Exception as error:  # raised by the Hub's client, Python, or the HTTP library
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise PublishError(
            f"The Hub did not accept the Space {repo_id} on {plan.hardware} ({reason}). Check the network, the name "
            "(user/space, a user that is yours), that the token may write, and that your account may have this hardware (a "
            "free one: two Spaces on ZeroGPU); then run the same command again."
        ) from error
    return f"https://huggingface.co/spaces/{repo_id}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, kinds = parser.add_argument, [each.value for each in SpaceHardware]
    add("--repo_id", help="user/space")
    add("--dry_run", action="store_true", help="show the plan and stop")
    add("--private", action="store_true", help="only the owner sees a new Space")
    hardware = f"default: {ZEROGPU} (ZeroGPU) for a new Space; one that exists is moved only if this is given"
    add("--hardware", choices=kinds, help=hardware)
    full = "Hub id of a decoder checkpoint that the page opens with; without it, a Space's variables stay as they are"
    add("--full", help=full)
    args = parser.parse_args(arguments)
    if not (args.repo_id or args.dry_run):
        parser.error("give --repo_id user/space, or --dry_run")
    try:
        plan = make_plan(args.repo_id or "user/space", hardware=args.hardware or ZEROGPU, full=args.full)
        if args.dry_run:
            print(plan)
        else:
            print("Published:", publish(plan, private=args.private or None, move=args.hardware is not None))
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
