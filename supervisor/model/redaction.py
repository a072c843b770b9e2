"""Takes secrets out of texts and streams. No I/O.

May import the other modules of this floor. Called by the log sink, for output and for errors and statuses.

The rule: at the leftmost position where a secret begins, the longest secret that begins there is replaced, and the
search goes on behind it. A stream gives the same result wherever its chunks are cut: a tail that may yet become a
secret (it is a true prefix of one) is held back, and nothing else is, so a line that ends in no such prefix is never
late.

Replacements: ``***`` for secrets, not their name, since a name may hold the value of another secret; what a job's
``redact`` says for a value it names. A replacement that holds a secret itself becomes ``***``.

Of each value these forms are replaced: the value; the value without surrounding white space (``$(cat file)`` drops the
newline); with CRLF for LF where it has several lines; and percent-encoded, as it stands in URLs. Other encodings are
not guessed: a job that prints a secret in base64 has to name that form in ``redact``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import quote

from supervisor.model.errors import InvalidInput

MASK = b"***"
MAX_VALUE = 128 * 1024
"""Longest value in bytes: what Linux allows in an environment variable. Bounds what a stream holds back."""
MAX_REPLACEMENT = 64
"""Longest replacement in bytes: a one-byte value must not blow a log up without bound."""

Finder = Callable[[bytes], "Iterable[tuple[int, int]] | None"]
"""Which of ``SecretSet.sought`` a buffer may hold: each at most once, as (index, the least position). None: any,
anywhere. It may name one that is not there, and misses none that is. A stream's own, so for one thread at a time."""

_PROBE = 4
_MAX_PROBES = 16


def _to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that stand for no byte: not from the system, but JSON can bring them
        return text.encode("utf-8", "surrogatepass")


def _forms(value: bytes) -> Iterable[bytes]:
    forms = []
    for form in (value, value.strip()):
        forms += [form, quote(form, safe="").encode("ascii")]
        if b"\n" in form:
            forms.append(form.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    for form in forms:
        yield from (form[i : i + MAX_VALUE] for i in range(0, len(form), MAX_VALUE))


def secret_values(
    secrets: Mapping[str, str], redact: Mapping[str, str], host_secrets: Mapping[str, str]
) -> dict[bytes, bytes]:
    """The values to replace in an attempt's output, in every form, with their replacements. Empty ones are left out.

    ``secrets`` and ``host_secrets`` are name → value, ``redact`` is value → replacement; it wins where both name a
    value. Never raises: an overlong value becomes several, an overlong replacement is shortened.
    """
    values: dict[bytes, bytes] = {}
    for value in (*host_secrets.values(), *secrets.values()):
        values.update(dict.fromkeys(_forms(_to_bytes(value)), MASK))
    for value, replacement in redact.items():
        values.update(dict.fromkeys(_forms(_to_bytes(value)), _to_bytes(replacement)[:MAX_REPLACEMENT]))
    bad = {replacement for replacement in set(values.values()) if any(value in replacement for value in values)}
    return {value: MASK if replacement in bad else replacement for value, replacement in values.items()}


class SecretSet:
    """A fixed set of values and their replacements, prepared for searching. Immutable, shared by many streams.

    Raises InvalidInput for an empty or overlong value and for an overlong replacement; the message holds neither.
    """

    def __init__(self, values: Mapping[str | bytes, str | bytes] | Mapping[bytes, bytes] | Mapping[str, str]) -> None:
        pairs: dict[bytes, bytes] = {}
        for value, replacement in values.items():
            pairs[_to_bytes(value)] = _to_bytes(replacement)
        for value_bytes, replacement_bytes in pairs.items():
            if not 0 < len(value_bytes) <= MAX_VALUE:
                raise InvalidInput("redact", "a value is empty or too long", f"1 to {MAX_VALUE} bytes")
            if len(replacement_bytes) > MAX_REPLACEMENT:
                raise InvalidInput("redact", "a replacement is too long", f"at most {MAX_REPLACEMENT} bytes")
        # Longest first: the rank settles which of two secrets at one position wins.
        self._pairs = sorted(pairs.items(), key=lambda pair: (-len(pair[0]), pair[0]))
        # To see quickly that a buffer does not end in the beginning of a secret; see ``_hold``.
        self._within = b"".join(value[:-1] for value, _ in self._pairs)
        self._inner_bytes = bytes(set(self._within))
        self._beginnings = [
            {value[:length] for value, _ in self._pairs if len(value) > length} for length in range(_PROBE)
        ]
        self._failures: dict[bytes, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._pairs)

    @property
    def values(self) -> dict[bytes, bytes]:
        return dict(self._pairs)

    @property
    def sought(self) -> Sequence[bytes]:
        """The values in the order in which a ``Finder`` names them."""
        return [value for value, _ in self._pairs]

    def text(self, text: str) -> str:
        """The text without secrets; what is not valid UTF-8 afterwards is shown as U+FFFD."""
        return self.replace(_to_bytes(text), final=True)[0].decode("utf-8", "replace") if self._pairs else text

    def replace(self, buffer: bytes, final: bool, finder: Finder | None = None) -> tuple[bytes, int]:
        """The redacted beginning of ``buffer``, and the position from which the rest must be held back.

        With ``final`` nothing is held back. ``finder`` only spares searches: the result is the same without it.
        """
        # One bytes.find a secret beats `re` several times over: each scans at memory speed, and most find nothing.
        heap = []
        find = buffer.find
        candidates = finder(buffer) if finder is not None else None
        if candidates is None:
            candidates = ((rank, 0) for rank in range(len(self._pairs)))
        for rank, least in candidates:
            position = find(self._pairs[rank][0], least)
            if position >= 0:
                heap.append((position, rank))
        hold = len(buffer) if final else self._hold(buffer, 0)
        if not heap:
            return (buffer, hold) if hold == len(buffer) else (buffer[:hold], hold)
        heapq.heapify(heap)
        out: list[bytes] = []
        done = 0
        # A match before `hold` is certain: a longer secret that began there would make the position one to hold.
        while heap:
            position, rank = heap[0]
            if position >= hold:
                break
            value, replacement = self._pairs[rank]
            if position >= done:
                out.append(buffer[done:position])
                out.append(replacement)
                done = position + len(value)
                if done > hold:
                    hold = self._hold(buffer, done)
            position = find(value, done)
            if position >= 0:
                heapq.heapreplace(heap, (position, rank))
            else:
                heapq.heappop(heap)
        out.append(buffer[done:hold])
        return b"".join(out), hold

    def mask_of_prefix(self, tail: bytes) -> bytes:
        """What stands for ``tail``, a true prefix of some secret, where the stream was cut before it went on."""
        for value, replacement in self._pairs:
            if value.startswith(tail):
                return replacement
        return tail

    def _hold(self, buffer: bytes, start: int) -> int:
        """The leftmost position from ``start`` on whose rest is a true prefix of a secret; else the end."""
        end = len(buffer)
        # The last byte of such a rest lies within the secret, not at its end: an ordinary newline settles it at once.
        if start >= end or buffer[-1] not in self._inner_bytes:
            return end
        # A rest of four bytes or more has its last four within a secret; a shorter one is one of a few.
        if end - start >= _PROBE and buffer[-_PROBE:] not in self._within:
            for length in range(_PROBE - 1, 0, -1):
                if buffer[-length:] in self._beginnings[length]:
                    return end - length
            return end
        hold = end
        for value, _ in self._pairs:
            hold = min(hold, self._prefix_at(buffer, max(start, end - len(value) + 1), value))
        return hold

    def _prefix_at(self, buffer: bytes, start: int, value: bytes) -> int:
        """The leftmost position from ``start`` on whose rest is a prefix of ``value``; else the end."""
        probe = value[:_PROBE]
        position = buffer.find(probe, start)
        for _ in range(_MAX_PROBES):
            if position < 0:
                break
            if value.startswith(buffer[position:]):
                return position
            position = buffer.find(probe, position + 1)
        if position >= 0:  # repetitive text: trying each place would be quadratic
            return self._prefix_at_by_failures(buffer, position, value)
        end = len(buffer)
        for length in range(min(_PROBE - 1, end - start, len(value) - 1), 0, -1):
            if buffer.endswith(value[:length]):
                return end - length
        return end

    def _prefix_at_by_failures(self, buffer: bytes, start: int, value: bytes) -> int:
        """The same in linear time: the state of Knuth, Morris and Pratt's automaton behind the last byte."""
        failures = self._failures.get(value)
        if failures is None:
            failures = self._failures[value] = _failure_function(value)
        matched = 0
        for byte in buffer[start:]:
            while matched and value[matched] != byte:
                matched = failures[matched - 1]
            if value[matched] == byte:
                matched += 1
        return len(buffer) - matched


def _failure_function(value: bytes) -> list[int]:
    failures = [0] * len(value)
    matched = 0
    for i in range(1, len(value)):
        while matched and value[matched] != value[i]:
            matched = failures[matched - 1]
        if value[matched] == value[i]:
            matched += 1
        failures[i] = matched
    return failures


class Redactor:
    """One stream without its secrets. ``feed`` chunks, then ``finish``; the results joined are the redacted stream.

    ``finder`` speaks of the same set and makes it faster.
    """

    __slots__ = ("_finder", "_secrets", "_tail")

    def __init__(
        self,
        values: SecretSet | Mapping[str | bytes, str | bytes] | Mapping[bytes, bytes] | Mapping[str, str],
        finder: Finder | None = None,
    ) -> None:
        self._secrets = values if isinstance(values, SecretSet) else SecretSet(values)
        self._finder = finder
        self._tail = b""

    @property
    def pending(self) -> int:
        """How many bytes are held back. They are the last ones fed, so a stream can be taken up again before them."""
        return len(self._tail)

    def feed(self, chunk: bytes) -> bytes:
        if not self._secrets:
            return chunk
        buffer = self._tail + chunk if self._tail else chunk
        out, hold = self._secrets.replace(buffer, final=False, finder=self._finder)
        self._tail = buffer[hold:]
        return out

    def finish(self, cut: bool = False) -> bytes:
        """The rest, at the stream's end.

        ``cut``: the stream went on but bsup cut it here, so a secret that has begun is replaced as if it were whole.
        """
        tail, self._tail = self._tail, b""
        if not tail:
            return b""
        return self._secrets.mask_of_prefix(tail) if cut else self._secrets.replace(tail, final=True)[0]


def redact_text(text: str, values: Mapping[str, str]) -> str:
    """A whole text with ``values`` (value → replacement) replaced."""
    return SecretSet(values).text(text)


__all__ = ["MASK", "MAX_REPLACEMENT", "MAX_VALUE", "Finder", "Redactor", "SecretSet", "redact_text", "secret_values"]
