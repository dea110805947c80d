# SPDX-License-Identifier: Apache-2.0
"""The interface of every language model, whatever its layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxcp.attention.attend import Attend
from jaxcp.attention.cache import Cache, empty_cache
from jaxcp.attention.pool import Pool, empty_pool
from jaxcp.attention.whole_sequence import WholeSequence
from jaxcp.context_parallel import Strategy
from jaxcp.layers.gather import gathered, lies_in_parts
from jaxcp.layers.remat import policy_of
from jaxcp.layers.router_stats import RouterStats
from jaxcp.layers.stack import Layers, layers_in
from jaxcp.sharding import gathered_beside, tokens_spec


class LanguageModel(nnx.Module):
    """A model is `config`, `embedded`, `layers`, `final_norm` and `lm_head`; the rest follows.

    With `config.tie_embeddings` it has no `lm_head`: `embed` is the head. One whose layers are not
    all of it has a `forward` of its own.

    Tokens are `[B, T]`, in the strategy's layout and sharded `P("data", "seq")` under a mesh, in
    natural order without one; `positions` says which token is which.
    """

    config: Any
    embed: Any
    layers: Layers
    final_norm: Any
    lm_head: Any
    spelling: tuple[str, ...] = ()
    """Names of tensors in the checkpoint that was loaded, for `save` (`models/weight_table`)."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end an answer, by the checkpoint that was loaded: what `Engine` goes by."""
    generation: str = ""
    """The text of generation_config.json in the checkpoint that was loaded, for `save`."""

    def forward(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Final hidden states, and what the routers of all MoE layers did, if there are any."""
        with jax.named_scope("embed"):
            x = self.embedded(tokens, positions)
        x, stats = self.through(self.layers, x, attend, positions)
        return self.final_norm(x), stats

    def embedded(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Any:
        """Make of the ids what the first layer takes, in the dtype of the computation."""
        raise NotImplementedError

    def head_kernel(self) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits."""
        if getattr(self.config, "tie_embeddings", False):
            return self.embed.get_value().T
        return self.lm_head.get_value()

    def attentions(self) -> dict[str, tuple[Any, int]]:
        """The attention of each stack of layers by its name, and how many layers it has.

        One that keeps something has `empty(room, layers=)`.
        """
        layers = self.layers
        return {
            name: (getattr(layers, name).attention, len(layers_in(name))) for name in layers.names
        }

    def makers(self, *, drafting: bool = True) -> dict[str, Callable[[Any], Any]]:
        """Functions that make the kind of each stack of layers, empty, in a room.

        Args:
          drafting: with those of layers that only draft.
        """
        return {
            name: functools.partial(attention.empty, layers=count)
            for name, (attention, count) in self.attentions().items()
            if drafting or name in self.layers.names
        }

    def init_pool(
        self, *, pages: int, page: int, states: int, cache_dtype: str | None = None,
        drafting: bool = False, rolled_back: int = 0,
    ) -> Pool:  # fmt: skip
        """An empty pool of so many pages of `page` tokens, and states, on each device.

        Args:
          cache_dtype, rolled_back: see `empty_pool`, and what it raises.
          drafting: with room for layers that only draft.
        """
        return empty_pool(
            self.makers(drafting=drafting), pages=pages, page=page, states=states,
            dtype=self.config.dtype, cache_dtype=cache_dtype, rolled_back=rolled_back,
        )  # fmt: skip

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache for `max_len` tokens a row, sharded over the mesh in scope.

        Raises:
          ValueError: the model has fewer positions than `max_len`.
        """
        limit = getattr(self.config, "max_positions", max_len)
        if max_len > limit:
            raise ValueError(f"the model has {limit} positions; got max_len={max_len}")
        return empty_cache(
            self.makers(),
            batch_size=batch_size,
            max_len=max_len,
            dtype=self.config.dtype,
            recent=getattr(self.config, "ngram_width", 1) - 1,
        )

    def hidden(self, tokens, positions, **options):
        """`forward` over a whole sequence, no cache; `options` as `attend_over` takes them."""
        return self.forward(tokens, positions, self.attend_over(positions, **options))

    def hidden_and_drafts(
        self,
        tokens: Int[Array, "B T"],
        following: Int[Array, "B T n"],
        positions: Int[Array, "B T"],
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], list[Float[Array, "B T D"]], RouterStats | None]:
        """`hidden`, with the drafts of MTP layers, one a depth, the nearest token first.

        `logits` of draft i are those of the token i + 2 places on. The stats of MTP layers come
        after those of the trunk, in the order in which their selection biases are named.

        Args:
          following: the n tokens after each one, see `jaxcp.data.lookahead.following`.
        Raises:
          NotImplementedError: the family has no MTP layer.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no drafts to train; set num_mtp_layers=0"
        )

    def attend_over(
        self,
        positions,
        *,
        segment_ids=None,
        strategy: Strategy | None = None,
        consecutive: bool = False,
        length: int | None = None,
    ) -> Attend:
        """Attention over a whole sequence, for `forward`; `strategy` defaults to `Ring()`.

        `consecutive`: see `context_parallel_attention`; `length`: tokens of a row before a layout
        filled it up, without which recurrent layers raise ValueError on more than one shard.
        """
        return WholeSequence(
            positions, segment_ids=segment_ids, strategy=strategy, consecutive=consecutive,
            length=length,
        )  # fmt: skip

    def through(
        self, layers: Layers, x: Any, attend: Attend, *inputs: Any
    ) -> tuple[Any, RouterStats | None]:
        """Pass `x` through the layers, each of which also gets `inputs` and its own `attend`."""
        block = self.recomputed(_block, attend, static_argnums=2 + len(inputs))
        return layers.run(lambda layer, x, here: block(layer, x, *inputs, here), x, attend)

    def recomputed(self, block: Callable, attend: Attend, *, static_argnums: int) -> Callable:
        """`block`, which gathers its weights where they lie in parts, and whose backward pass
        computes again what `config.remat` says.

        Nothing is computed again over a cache: `attend` keeps what layers write, and there is no
        backward pass.
        """
        dtype = self.config.dtype

        def whole(module, *inputs):
            return block(gathered(module, dtype), *inputs)

        policy = policy_of(self.config.remat, gathers=lies_in_parts(self))
        if policy is None or getattr(attend, "keeps_rows", False):
            return whole
        return jax.checkpoint(whole, static_argnums=static_argnums, policy=policy)

    @jax.named_scope("head")
    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states, accumulated in float32."""
        head = gathered_beside(self.head_kernel(), tokens_spec(hidden))
        return jnp.einsum("btd,dv->btv", hidden.astype(jnp.float32), head.astype(jnp.float32))

    def __call__(self, tokens, positions, **options):
        """Float32 logits `[B, T, V]` of a whole sequence; `options` as `hidden` takes them."""
        return self.logits(self.hidden(tokens, positions, **options)[0])


def _block(layer, x, *inputs):
    return layer(x, *inputs)


def embed(table, ids, dtype):
    """Rows of `table`, laid out as `ids` are."""
    spec = tokens_spec(ids)
    sharding = None if spec is None else type(spec)(*spec, None)
    table = gathered_beside(jnp.asarray(table), spec)
    return table.at[ids].get(mode="clip", out_sharding=sharding).astype(dtype)
