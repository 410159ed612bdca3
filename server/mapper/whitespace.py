"""White space beside thoughts and calls, which is not shown."""

from __future__ import annotations


class WhitespaceTrimmer:
    """Trims the text of one candidate: `start_region` and ``feed`` as it comes, ``flush`` when it ended.

    White space stays as the model wrote it, except where a region borders on another. Trailing white space is held back
    until more text shows that no border follows it. ``in_thought`` says that thoughts began before the text.
    """

    def __init__(self, in_thought: bool) -> None:
        self._has_border = self._is_at_start = in_thought
        self._keeps_end = not in_thought
        self._held: list[str] = []

    def start_region(self, is_answer: bool) -> None:
        """A region begins. Plain text that the answer begins with has no border before it."""
        self._is_at_start = self._has_border or not is_answer
        self._has_border = True
        self._keeps_end = is_answer
        self._held = []

    def feed(self, text: str) -> str:
        """What can be shown; "" where that is nothing."""
        if self._is_at_start:
            text = text.lstrip()
            self._is_at_start = not text
        kept = text.rstrip()
        if not kept:
            self._held.append(text)
            return ""
        shown = "".join([*self._held, kept])
        self._held = [text[len(kept) :]]
        return shown

    def flush(self) -> str:
        """White space at the very end of an answer, which no border follows."""
        return "".join(self._held) if self._keeps_end else ""
