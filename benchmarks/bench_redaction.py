"""The redactor on build output, in pieces as the log sink reads them."""

from __future__ import annotations

import random

from measured import Findings, measure

from supervisor.model.redaction import Redactor, SecretSet

SIZE = 32 << 20
PIECE = 256 << 10


def output(rng: random.Random, secrets: list[bytes]) -> bytes:
    """Lines like a compiler's, every thousandth with a secret in it."""
    lines = []
    size = 0
    while size < SIZE:
        line = b"cc -O2 -Wall -c src/module_%d/file_%d.c -o build/%x.o" % (
            rng.randrange(100),
            rng.randrange(10_000),
            rng.getrandbits(64),
        )
        if secrets and rng.random() < 0.001:
            line += b" -DTOKEN=" + rng.choice(secrets)
        lines.append(line)
        size += len(line) + 1
    return b"\n".join(lines)


def run(quick: bool) -> Findings:
    found = []
    for count in (1, 10, 50):
        rng = random.Random(count)
        secrets = [b"%032x" % rng.getrandbits(128) for _ in range(count)]
        data = output(rng, secrets)
        known = SecretSet({secret: b"***" for secret in secrets})

        def redact(data: bytes = data, known: SecretSet = known) -> None:
            redactor = Redactor(known)
            for start in range(0, len(data), PIECE):
                redactor.feed(data[start : start + PIECE])
            redactor.finish()

        note = f"{PIECE >> 10} KiB pieces"
        found.append(measure(f"redactor: {count} secrets", "MB/s", len(data) / 1e6, redact, note))
    return Findings(found)
