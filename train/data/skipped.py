"""Photos that cannot be read: a run skips them and lists them."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from ldvc.errors import DataError
from train.data.reader import SegmentationDataset

logger = logging.getLogger(__name__)


class SkippedPhotos:
    """A list of skipped photos, each once.

    With a file, all processes and loader workers of a run, and later resumed runs, share one list: a line per photo, with tabs
    between data set, file stem and reason.

    Args:
        file: the list, or None to keep it in this process only.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file = None if file is None else Path(file)
        self._own: dict[tuple[str, str], str] = {}

    def add(self, dataset: SegmentationDataset, index: int, error: DataError) -> None:
        """Adds photo `index` of a data set."""
        self._note(dataset.name, dataset.stems[index], " ".join(str(error).split()))

    def merge(self, other: SkippedPhotos) -> None:
        """Adds the photos of another list."""
        for (name, stem), reason in other.found().items():
            self._note(name, stem, reason)

    def forget(self) -> None:
        """Empties the list."""
        self._own.clear()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _note(self, name: str, stem: str, reason: str) -> None:
        if (name, stem) in self._own:
            return
        new = (name, stem) not in self.found()
        self._own[name, stem] = reason
        if new:
            logger.warning("skipped: %s", reason)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(f"{name}\t{stem}\t{reason}\n")  # one short write, which other processes cannot interrupt

    def found(self) -> dict[tuple[str, str], str]:
        """(Data set, stem) -> reason, of every process that shares the file."""
        if self.file is None or not self.file.is_file():
            return dict(self._own)
        lines = [line.split("\t", 2) for line in self.file.read_text(encoding="utf-8").splitlines()]
        return {(line[0], line[1]): line[2] for line in lines if len(line) == 3} | self._own

    def __len__(self) -> int:
        return len(self.found())

    def summary(self) -> str:
        """One line for the end of a run; empty when nothing was skipped."""
        found = self.found()
        if not found:
            return ""
        counts = Counter(name for name, _ in found)
        parts = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        where = f"listed in {self.file}" if self.file else f"the first: {next(iter(found.values()))}"
        return f"skipped photos that cannot be used: {parts}; {where}"
