"""What has become of every word: which may still pad a message, and what results tell."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lpgan_jax.analysis.audit.values import (
    INPUT,
    NO_WORD,
    Rest,
    Sum,
    Value,
    WordSet,
    closure,
    grown,
    join,
)


class Ledger:
    """The criteria for corrections, messages and results (see the package).

    Attributes:
        pads: for each word, the number of the correction (from 1) that it pads, minus the number of
            the message, or 0.
        spent: for each word, whether it can pad no message (any more).
        blinds: for each word, whether a share of S1's that it pads is blinded by it: the word was
            put to use.
    """

    def __init__(self) -> None:
        self.pads = np.zeros(1, np.int32)
        self.spent = np.ones(1, bool)
        self.blinds = np.zeros(1, bool)
        self.names: list[str] = []
        """Of the corrections."""
        self._contents: list[Rest | None] = []  # of each message, what it depends on
        self._masks: list[list[WordSet]] = []  # of each correction, what it depends on besides
        self._used = np.zeros(1, bool)  # words that a correction depends on besides
        self._seen: set[Rest] = set()
        self._seen_dealt: set[int] = set()
        self._terms: list[WordSet] = []  # of each fresh share, the words that blind it
        self._shown: set[int] = set()
        self._masked_by: dict[Rest, set[int]] = {}
        self._masks_of: dict[int, set[int]] = {}

    def for_server(self) -> Ledger:
        """For the messages of one server, once all corrections are settled: none is sent yet."""
        self.spent = self._used = np.zeros(1, bool)  # of no use any more, and large
        server = Ledger()
        server.pads, server.names, server._masks = self.pads, self.names, self._masks
        # S2 knows what was subtracted from a correction: such words pad no message.
        server.spent = self.pads > 0
        server.spent[NO_WORD] = True
        server.blinds = np.zeros(len(self.pads), bool)
        return server

    @property
    def messages(self) -> int:
        """How many were sent so far."""
        return len(self._contents)

    def cover(self, total: int) -> None:
        """Make room for new words."""
        self.pads, self.spent = grown(self.pads, total), grown(self.spent, total)
        self.blinds = grown(self.blinds, total)

    # Corrections --------------------------------------------------------------------------------

    def correct(self, name: str, value: Value, from_s1: bool, opened: bool) -> list[str]:
        """Add a correction; what is wrong with it.

        Args:
            name: for people.
            value: the correction.
            from_s1: whether all words that pad it are of S1's seed.
            opened: whether it depends on what the servers know or open.
        """
        self.names.append(name)
        number, problems = len(self.names), []
        self._masks.append([words for rest in closure(value.rest, set()) for words in rest.words])
        if opened:
            problems.append(f"{name} depends on what the servers open")
        self._used = grown(self._used, len(self.pads))
        for words in self._masks[-1]:
            self._used[words.index] = True
        pads = np.zeros(1, np.int32) if value.ids is None else value.ids.reshape(-1)
        if (pads == NO_WORD).any() or not from_s1:
            problems.append(f"{name} is not padded by words of S1's seed")
        elif self.pads[pads].any() or self.spent[pads].any() or _repeat(pads):
            problems.append(f"{name}: a word pads it and another element of a correction")
        self.pads[pads[pads != NO_WORD]] = number
        return problems

    def spend_corrections(self, pads: np.ndarray) -> None:
        """S2 knows what was subtracted: what pads a correction pads no message."""
        self.spent[pads] = True

    def settle(self) -> list[str]:
        """What is wrong with the corrections together, once all are there."""
        used = grown(self._used, len(self.pads))[: len(self.pads)]
        return [
            f"{self.names[number - 1]}: a word that pads it is used otherwise"
            for number in sorted(self._numbers(used))
        ]

    # Messages -----------------------------------------------------------------------------------

    def send(self, pads: np.ndarray, rest: Rest | None) -> list[str]:
        """Criteria 1 to 3 for one server's message; then its words are spent."""
        self._contents.append(rest)
        if not pads.size:
            return []
        problems = []
        bare, dealt = pads == NO_WORD, self.pads[pads] > 0
        reused = self.spent[pads] & ~bare & ~dealt
        self._spend(rest)
        inside = self.spent[pads] & ~reused & ~bare & ~dealt
        self.spent[pads] = True
        real = pads[~bare]
        masks = real[self.pads[real] == 0]
        self.pads[masks], self.blinds[masks] = -self.messages, True
        repeated = len(real) - len(np.unique(real)) if _repeat(real) else 0
        for count, text in (
            (bare.sum(), "are not masked by a word of the sender's own"),
            (dealt.sum(), "are masked by nothing but a share of a dealt value"),
            (reused.sum(), "have a mask that an earlier message depends on"),
            (inside.sum(), "have a mask that the message depends on otherwise"),
            (repeated, "repeat the mask of another element"),
        ):
            if count:
                problems.append(f"{count:,} of {pads.size:,} elements {text}")
        return problems

    def _spend(self, start: Rest | None) -> None:
        """All that `start` depends on can mask nothing from here on."""
        for rest in closure(start, self._seen):
            dealt = set() if rest.dealt is None else {rest.dealt}
            for words in rest.words:
                index = words.index
                self.spent[index] = True
                dealt.update(self._numbers(index))
            for number in dealt - self._seen_dealt:
                self._seen_dealt.add(number)
                for words in self._masks[number - 1]:
                    self.spent[words.index] = True

    def _numbers(self, index: slice | np.ndarray) -> set[int]:
        """Of the corrections that some words pad."""
        pads = self.pads[index]
        return set(np.unique(pads[pads > 0]).tolist())

    # Results ------------------------------------------------------------------------------------

    def pair(self, ids: np.ndarray, correction: int) -> None:
        """S1 has these words where S2 has a correction: a dealt value's shares, if they pad it."""
        self.blinds[ids[self.pads[ids] == correction]] = True

    def term(self, ids: np.ndarray | None) -> Sum | None:
        """A fresh share, where every element is blinded by a word of its own that was put to use.

        That is one that a dealt share consists of (see `pair`), or the mask of a message: whoever
        gets results sees no messages. (That it gets no mask without the message is looked at in
        `show`.)
        """
        if ids is None or not ids.size or not self.blinds[ids.flat[0]]:
            return None
        if not self.blinds[ids].all() or _repeat(ids.reshape(-1)):
            return None
        self._terms.append(WordSet.of(ids))
        return Sum(frozenset([len(self._terms)]))

    def show(self, name: str, value: Value) -> list[str]:
        """Criterion 6: what is wrong with a result.

        Args:
            name: for people.
            value: S1's share of it.
        """
        problems = []
        if not value.private:
            return []
        if value.sum is None:
            problems.append(f"{name} is no sum of fresh shares")
        else:
            self._shown |= value.sum.terms
        if missing := self._never_used(value):
            problems.append(
                f"{name} depends on the masks of {missing} messages and not on these messages: "
                "together with what was sent, it tells what they hide"
            )
        return problems

    def shown(self) -> list[str]:
        """What is wrong with the results together."""
        used = np.zeros(len(self.pads), bool)
        for number in self._shown - {INPUT}:
            index = self._terms[number - 1].index
            if used[index].any():
                return ["results: one dealt share blinds two of them"]
            used[index] = True
        return []

    def _never_used(self, value: Value) -> int:
        """How many messages' masks a result depends on without depending on the message."""
        masked: set[int] = set()
        seen: set[Rest] = set()
        used: set[int] = set()
        found = closure(join([value.rest], value.ids), seen)
        for rest in found:
            if rest not in self._masked_by:
                dealt = set() if rest.dealt is None else {rest.dealt}
                self._masked_by[rest] = self._messages(rest.words, dealt)
            masked |= self._masked_by[rest]
        while found:  # and on what these messages were made of
            opened = {rest.message for rest in found if rest.message is not None} - used
            used |= opened
            found = [r for number in opened for r in closure(self._contents[number - 1], seen)]
        return len(masked - used)

    def _messages(self, words: Iterable[WordSet], dealt: set[int]) -> set[int]:
        """Those whose masks are among some words, or are what some dealt values depend on."""
        found: set[int] = set()
        for some in words:
            numbers = set(np.unique(self.pads[some.index]).tolist())
            found |= {-number for number in numbers if number < 0}
            dealt |= {number for number in numbers if number > 0}
        for number in dealt:
            if number not in self._masks_of:
                self._masks_of[number] = set()  # a correction may depend on itself, wrongly
                self._masks_of[number] = self._messages(self._masks[number - 1], set())
            found |= self._masks_of[number]
        return found


def _repeat(words: np.ndarray) -> bool:
    """Whether a word occurs twice."""
    if not words.size:
        return False
    low = int(words.min())
    held = np.zeros(int(words.max()) + 1 - low, bool)
    held[words - low] = True
    return int(np.count_nonzero(held)) < words.size
