"""What every source of captioned pictures shares: the pair, the sample that cannot be used, the count of both."""

import json
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Pair = tuple[np.ndarray, str]  # pixels uint8 (3, S, S), caption of one line


class Example(NamedTuple):
    """A pair with what else is known of it: the CLIP embedding of its picture, float32 (D,), where one is stored."""

    pixels: np.ndarray
    caption: str
    embedding: np.ndarray | None


class BrokenSample(Exception):
    """A sample that cannot be used. `reason` is one of few, to be counted; `detail` says more about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass
class Report:
    """How many pairs were read and, by reason, how many could not be; `first` names one sample for each reason."""

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Count one sample that cannot be used."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def add(self, other: "Report") -> None:
        """Count what another report counted, too."""
        self.read += other.read
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])

    def __str__(self) -> str:
        total = sum(self.skipped.values())
        reasons = (f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in sorted(self.skipped.items()))
        return f"{self.read:,} pairs read, {total:,} skipped" + (": " + ", ".join(reasons) if total else "")


def read_caption(data: bytes, is_json: bool = False) -> str:
    """Caption bytes -> one line of text; in JSON the value of "caption", else of "text". Raises BrokenSample."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BrokenSample("caption is not UTF-8", str(error)) from error
    if is_json:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BrokenSample("JSON cannot be read", str(error)) from error
        value = (record.get("caption") or record.get("text")) if isinstance(record, dict) else None
        text = value if isinstance(value, str) else ""
    text = " ".join(text.split())
    if not text:
        raise BrokenSample("no caption")
    return text
