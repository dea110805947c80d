# SPDX-License-Identifier: Apache-2.0
"""Samples tokens from logits: greedy, temperature, top-k, top-p, min-p.

What a row has said before, and what it is asked to say or not, changes its logits first
(`penalties.py`).
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Shaped

from jaxcp.context_parallel.shards import on_shards
from jaxcp.inference.checks import integer
from jaxcp.text.grammar import checked_grammar, checked_schema
from jaxcp.text.stop_strings import check_stops

MOST = np.iinfo(np.int32).max
COLDEST = float(np.finfo(np.float32).tiny)  # it and its reciprocal are normal numbers
GRAMMARS = "json_schema", "regex", "grammar"
MOST_LOGPROBS = 20  # as of OpenAI
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """`temperature=0` is greedy. The others cut the distribution, as transformers does and in its
    order: temperature, `top_k`, `top_p`, `min_p`.

    `top_k` leaves that many tokens, `top_p` the fewest whose probability reaches it; of tokens
    that tie, those with the smaller ids. `min_p` leaves those whose probability is at least that
    part of the best one's. Source: arXiv 2407.01082.

    Raises:
      ValueError: an option is no number, not finite, or out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not _is(numbers.Real, self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be >= 0 (0 is greedy) and finite; got {self.temperature!r}"
            )
        if self.top_k is not None and (not _is(numbers.Integral, self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be at least 1 or None; got {self.top_k!r}")
        if not _is(numbers.Real, self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p!r}")
        if not _is(numbers.Real, self.min_p) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1]; got {self.min_p!r}")

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, "B"]:
        """One token a row, int32. The same key gives the same tokens."""
        return sample(logits, key, self.options())

    def options(self) -> tuple[Any, ...] | None:
        """The argument of `sample`: None for greedy, else four scalars that may be traced."""
        if self.temperature == 0:
            return None
        temperature = min(max(float(self.temperature), COLDEST), 1 / COLDEST)
        top_k = MOST if self.top_k is None else min(int(self.top_k), MOST)
        return (
            np.float32(temperature),
            np.int32(top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
        )


NOT_FINITE = -1
"""The token of a row with NaN or infinity among its logits."""


NO_TOKEN = -2
"""The token of a row whose grammar allows none."""


def not_finite(tokens: int) -> FloatingPointError:
    """The error of a row with `NOT_FINITE` after so many tokens."""
    return FloatingPointError(
        f"the logits after {tokens} tokens are not finite: weights or activations are NaN, or "
        "overflow; look at what `jaxcp.load` logged of the checkpoint, or compute in float32"
    )


class RowOptions(NamedTuple):
    """The numbers by which a row of a batch is sampled; or arrays `[B]` of them, one a row."""

    temperature: Any = 0.0
    """0: greedy."""
    top_k: Any = MOST
    top_p: Any = 1.0
    min_p: Any = 0.0
    seed: Any = 0
    """Its bits, as int32."""
    repetition_penalty: Any = 1.0
    presence_penalty: Any = 0.0
    frequency_penalty: Any = 0.0
    penalized: Any = 0
    """1: penalties or biases change its logits."""
    logprobs: Any = 0
    """1: log-probabilities are wanted."""
    masked: Any = 0
    """1: a grammar rules tokens out."""

    def bits(self) -> list[int]:
        """The numbers of one row as int32, floats by their bits."""
        return [int(np.float32(x).view(np.int32)) if isinstance(x, float) else int(x) for x in self]

    @classmethod
    def of_columns(cls, columns: Mapping[str, Int32[Array, "B"]]) -> "RowOptions":
        """Take arrays of the `bits` of rows, by name, among others."""
        floats = {name for name, default in cls()._asdict().items() if isinstance(default, float)}
        return cls(
            *(
                jax.lax.bitcast_convert_type(columns[name], jnp.float32)
                if name in floats
                else columns[name]
                for name in cls._fields
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Sampler):
    """Options of a request.

    Before `temperature` and what cuts the distribution, the logits are changed in this order:
    biases, the penalty of repetition, those of presence and frequency; then a grammar rules out.

    Args:
      seed: the token at a position is drawn by `(seed, position)`: the same seed gives the same
        text, whatever else runs beside it.
      stop_tokens: ids that end the answer; None takes the engine's.
      repetition_penalty: divides the positive logits of tokens that prompt or answer have, and
        multiplies the negative ones; above 0, and 1 changes nothing. Source: arXiv 1909.05858.
      presence_penalty: is taken from the logits of tokens that the answer has; -2 to 2, as OpenAI.
      frequency_penalty: is taken from the logit of a token as often as the answer has it; -2 to 2.
      logit_bias: by id, what is added to a logit. 100 all but forces a token, -100 bans it.
      logprobs: how many of the most probable tokens are named, with their log-probabilities by the
        model's own distribution, beside each token of the answer and its own: 0 to 20, or None
        for no log-probabilities.
      stop: strings before the first of which the text ends; the tokens stay as they were made.
      n: answers, with the seeds `seed`, `seed + 1` and so on.
      json_schema: that the answer is JSON by this schema: what it says, or its text. Between its
        parts it may have any whitespace, unless the schema has llguidance's
        `"x-guidance": {"whitespace_flexible": false}`.
      regex: that the answer is matched by this regular expression, in the syntax of Rust's.
      grammar: that the answer follows this grammar, in the syntax of Lark. One of these three.
    Raises:
      ValueError: an option is no number, or out of its range; or a grammar that cannot be followed.
      ModuleNotFoundError: a grammar, and no llguidance (the extra `grammar`).
    """

    max_new_tokens: int = 256
    seed: int = 0
    stop_tokens: Collection[int] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    logprobs: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self):
        super().__post_init__()
        integer("max_new_tokens", self.max_new_tokens, 1)
        integer("seed", self.seed, 0, 2**32 - 1)
        penalty = self.repetition_penalty
        if not _is(numbers.Real, penalty) or not COLDEST <= penalty <= 1 / COLDEST:
            raise ValueError(
                f"repetition_penalty must be positive and finite (1 is none); got {penalty!r}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            if not _is(numbers.Real, penalty) or not -2 <= penalty <= 2:
                raise ValueError(f"{name} must be in [-2, 2] (0 is none); got {penalty!r}")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.logprobs is not None:
            integer("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        object.__setattr__(self, "stop", check_stops(self.stop))
        integer("n", self.n, 1)
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", checked_schema(self.json_schema))
        self.compiled_grammar()

    @property
    def penalizes(self) -> bool:
        """True if penalties or biases change the logits."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1, 0, 0) or bool(self.logit_bias)

    @functools.cached_property
    def bits(self) -> list[int]:
        """Numbers of `row_options` as int32; made once, since every step asks for them."""
        return self.row_options().bits()

    def compiled_grammar(self) -> str | None:
        """The grammar of whatever kind, as `Grammars.constraint` takes it; None: there is none."""
        kinds = [kind for kind in GRAMMARS if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise ValueError(f"an answer follows one grammar; got {' and '.join(kinds)}")
        text = getattr(self, kinds[0]) if kinds else None
        if kinds and not isinstance(text, str):
            raise ValueError(f"{kinds[0]} must be text; got {text!r:.100}")
        return checked_grammar(kinds[0], text) if kinds else None

    def each(self) -> list["Sampling"]:
        """The options of every one of `n` answers."""
        seeds = [(self.seed + i) % 2**32 for i in range(self.n)]
        return [dataclasses.replace(self, n=1, seed=seed) for seed in seeds]

    def row_options(self) -> RowOptions:
        options = self.options()
        temperature, top_k, top_p, min_p = RowOptions()[:4] if options is None else options
        return RowOptions(
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            min_p=float(min_p),
            seed=int(np.uint32(self.seed).view(np.int32)),
            repetition_penalty=float(self.repetition_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            penalized=int(self.penalizes),
            logprobs=int(self.logprobs is not None),
            masked=int(any(getattr(self, kind) is not None for kind in GRAMMARS)),
        )


@jax.named_scope("sample")
def sample_rows(
    logits: Float[Array, "B V"], positions: Int[Array, "B"], options: RowOptions
) -> Int[Array, "B"]:
    """One token a row, int32, each by its own options; it is drawn by `(seed, position)`.

    `NOT_FINITE` stands for the token of a row whose logits have none to choose from, `NO_TOKEN` for
    that of one whose grammar leaves none.
    """
    logits = whole_rows(logits)
    positions, options = as_rows_of(logits, (positions, options))
    temperature, top_k, top_p, min_p = (x[:, None] for x in options[:4])
    seeds = jax.lax.bitcast_convert_type(options.seed, jnp.uint32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    most = jnp.max(logits, axis=-1)  # NaN where one is
    scaled = (logits - most[:, None]) / jnp.where(temperature > 0, temperature, 1.0)
    scaled = _cut(scaled, top_k, top_p, min_p)

    def draw(seed, position, row):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    drawn = jax.vmap(draw)(seeds, positions, scaled).astype(jnp.int32)
    drawn = jnp.where(options.temperature > 0, drawn, best)
    none = jnp.where(jnp.isneginf(most) & (options.masked > 0), NO_TOKEN, NOT_FINITE)
    return jnp.where(jnp.isfinite(most), drawn, none)


@jax.named_scope("sample")
def sample(
    logits: Float[Array, "B V"], key: jax.Array, options: tuple[Any, ...] | None
) -> Int[Array, "B"]:
    """One token a row, int32, by `Sampler.options()`; under `jit` one program for all that draw.

    `NOT_FINITE` stands for the token of a row whose logits have none to choose from.
    """
    logits = whole_rows(logits)
    most = jnp.max(logits, axis=-1)  # NaN where one is
    if options is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        temperature, *cuts = options
        # the best one is 0 whatever the temperature: nothing overflows but to -inf
        logits = _cut((logits - most[:, None]) / temperature, *cuts)
        token = jax.random.categorical(key, logits, axis=-1)
    return jnp.where(jnp.isfinite(most), token, NOT_FINITE).astype(jnp.int32)


def whole_rows(logits: jax.Array) -> jax.Array:
    """`logits` with every row on one device: under a mesh the vocabulary may be sharded."""
    if jax.sharding.get_abstract_mesh().empty:
        return logits
    return jax.sharding.reshard(logits, jax.P(jax.typeof(logits).sharding.spec[0], None))


def as_rows_of(logits: jax.Array, arrays: Any) -> Any:
    """`arrays [B, ...]`, with rows where those of `logits` are."""
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    rows = jax.P(jax.typeof(logits).sharding.spec[0])
    return jax.tree.map(lambda x: jax.sharding.reshard(x, rows), arrays)


def lines_of(
    array: Shaped[Array, "R V"], lines: Int[Array, "B"], logits: Float[Array, "B V"]
) -> Shaped[Array, "B V"]:
    """`array[lines]`, with rows where those of `logits` are."""
    rows = jax.P("data")
    take = on_shards(lambda array, lines: array.at[lines].get(mode="clip"), (rows, rows), rows)
    return as_rows_of(logits, take(array, lines))


def _is(kind, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _biases(biases: Any) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias must be a dict of ids and floats; got {biases!r:.100}")
    ids = [integer("an id of logit_bias", i, 0, MOST) for i in biases]
    for number in biases.values():
        if not _is(numbers.Real, number) or not abs(number) <= LARGEST:
            raise ValueError(f"a bias of logit_bias must be finite in float32; got {number!r}")
    return dict(zip(ids, map(float, biases.values()), strict=True))


def _cut(logits, top_k, top_p, min_p):
    """-inf for all tokens but those that are left; `logits` of the best are 0."""
    cut = jnp.any((top_k < logits.shape[-1]) | (top_p < 1))
    logits = jax.lax.cond(cut, _most_probable, lambda x, *_: x, logits, top_k, top_p)
    return jnp.where(logits >= jnp.log(min_p), logits, -jnp.inf)


def _most_probable(logits, top_k, top_p):
    """-inf for all but the `top_k` best and, of those, the fewest whose probability reaches top_p.

    Of tokens that tie with the last one kept, the first. Source of top_p: arXiv 1904.09751.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    probability = jax.nn.softmax(jnp.where(rank < top_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the tokens ranked above
    within = (rank < top_k) & ((before < top_p) | (top_p >= 1))
    kept = jnp.maximum(1, jnp.sum(within, axis=-1, keepdims=True, dtype=jnp.int32))
    last = jnp.max(jnp.where(rank >= kept - 1, ordered, -jnp.inf), axis=-1, keepdims=True)
    above, ties = logits > last, logits == last
    spare = kept - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    first = jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= spare
    return jnp.where(above | (ties & first), logits, -jnp.inf)
