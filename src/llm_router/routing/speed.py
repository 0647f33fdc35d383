"""How fast a deployment answers, by what was measured lately: moving averages that forget with time.

Pure arithmetic over instants that the caller gives. Not for: choosing by it (policies.py), or what operators see
(the histograms of instruments.py).

Each reply tells how long it took in all (t), how much of that it took to generate (g: after the first byte of a
stream, all of it for a plain reply) and how many tokens it had (n). Of each a moving average is kept, and

    seconds for a reply of n tokens = fixed_s + n * per_token_s,   fixed_s = mean t - mean g,   per_token_s = mean g / mean n

so that deployments that happened to get short replies can be compared with those that got long ones.
"""

from __future__ import annotations

import math

NEW_SHARE = 0.2
"""What one more reply counts for, against all before it: about the last ten replies matter."""

HALF_LIFE_S = 30.0
"""Before a new reply is taken in, older ones lose half of their weight per this time. A deployment that is tried once
in a while (see `REMEASURE_S` in policies.py, twice this) is judged by that try, not by what it was long ago."""


class Speed:
    """Moving averages of one deployment. Not shared between threads.

    Attributes:
        samples: replies taken in; 0 means that nothing is known and the other numbers are 0.
        fixed_s: seconds before the first token.
        per_token_s: seconds for each output token; 0 when no reply said how many it had.
        output_tokens: mean output tokens of a reply.
        observed_at: instant of the newest reply; minus infinity before the first.
        tried_at: instant at which a policy last chose the deployment in order to measure it; minus infinity before.
    """

    __slots__ = (
        "_generation_s",
        "_total_s",
        "fixed_s",
        "observed_at",
        "output_tokens",
        "per_token_s",
        "samples",
        "tried_at",
    )

    def __init__(self) -> None:
        self.samples = 0
        self.fixed_s = 0.0
        self.per_token_s = 0.0
        self.output_tokens = 0.0
        self.observed_at = -math.inf
        self.tried_at = -math.inf
        self._total_s = 0.0
        self._generation_s = 0.0

    def observe(self, now: float, total_s: float, first_byte_s: float | None = None, output_tokens: int = 0) -> None:
        """Takes in a reply that came whole and was a success.

        Args:
            now: monotonic instant of its end.
            total_s: seconds from sending the request to the last byte of the reply.
            first_byte_s: seconds to its first byte if it was a stream; None for a plain reply.
            output_tokens: by its usage; 0 when unknown, and for embeddings.
        """
        total_s = max(0.0, total_s)
        generation_s = 0.0 if output_tokens <= 0 else total_s - min(max(0.0, first_byte_s or 0.0), total_s)
        if self.samples:
            age_s = max(0.0, now - self.observed_at)
            # The first replies are a plain mean, so that the very first one is no fifth of all that follows.
            share = max(NEW_SHARE, 1.0 / (self.samples + 1))
            new = 1.0 - (1.0 - share) * 0.5 ** (age_s / HALF_LIFE_S)
        else:
            new = 1.0
        self.samples += 1
        self.observed_at = now
        self._total_s += new * (total_s - self._total_s)
        self._generation_s += new * (generation_s - self._generation_s)
        self.output_tokens += new * (max(0, output_tokens) - self.output_tokens)
        self.fixed_s = max(0.0, self._total_s - self._generation_s)
        self.per_token_s = self._generation_s / self.output_tokens if self.output_tokens > 0.0 else 0.0

    def seconds(self, output_tokens: float) -> float:
        """What a reply of so many tokens is expected to take; 0 before anything was measured."""
        return self.fixed_s + output_tokens * self.per_token_s

    @property
    def total_s(self) -> float:
        """Mean seconds of a whole reply."""
        return self._total_s

    @property
    def tokens_per_s(self) -> float:
        """Mean output tokens per second while generating; 0 when unknown."""
        return 1.0 / self.per_token_s if self.per_token_s else 0.0

    def __repr__(self) -> str:
        if not self.samples:
            return "Speed(never measured)"
        return (
            f"Speed({self._total_s:.3g} s a reply, {self.fixed_s:.3g} s to its first token, "
            f"{self.tokens_per_s:.3g} tokens/s, samples={self.samples})"
        )
