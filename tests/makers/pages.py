"""Pages of the documentation, as readers of GitHub meet them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def headings(page: str) -> list[str]:
    """All headings of a page, named from the root of the repository."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading: small letters, spaces to hyphens, no punctuation, no back ticks."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def leads_somewhere(link: str) -> bool:
    """Whether a page is there, and has the heading that is named behind its #."""
    page, _, name = link.partition("#")
    return (ROOT / page).is_file() and (not name or name in map(anchor, headings(page)))
