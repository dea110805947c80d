# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4's configuration, from what the hub publishes and from what transformers writes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcp.layers.compressed import SharedHeadDims
from jaxcp.layers.mla import IndexDims
from jaxcp.layers.rope import Rope, merged
from jaxcp.models.hf_config import SILU, HFConfig

KINDS = {
    "W": "sliding_attention",
    "C": "compressed_sparse_attention",
    "H": "heavily_compressed_attention",
}
"""A layer's kind -> what transformers calls it."""
HUB_RATIOS = {0: "W", 4: "C", 128: "H"}
"""What `compress_ratios` in the hub's config.json says of a layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertDims:
    """The first `hash_layers` layers choose experts by token id, the others by score.

    `limit` cuts what the gate and up projections of every expert, the shared one too, hand on.
    """

    dim: int
    count: int
    per_tok: int
    shared: int = 1
    hash_layers: int = 0
    route_scale: float = 1.0
    limit: float

    def __post_init__(self):
        if not 1 <= self.per_tok <= self.count:
            raise ValueError(f"needs 1 <= per_tok <= count; got {self.per_tok} of {self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamDims:
    """Residual streams, and how often the matrix that mixes them is normalised."""

    count: int
    iterations: int
    eps: float

    def __post_init__(self):
        if self.count < 1 or self.iterations < 1:
            raise ValueError(f"needs count and iterations of at least 1; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV4Config:
    """`layer_kinds`, a letter a layer: W a window alone, H and a compressed entry for every block
    of `heavy_ratio` tokens, C and those that an index selects among blocks of `sparse_ratio`.
    `num_mtp_layers`: 1 adds the layer that drafts the token after next, of kind W. Ratios, `window`
    and `max_positions` count tokens. `from_hf` reads a config.json, `to_hf` writes one.

    Raises:
      ValueError: not one letter a layer, or a window or ratio below 1.
      NotImplementedError: more than one MTP layer.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    heads: SharedHeadDims
    layer_kinds: str
    sparse_ratio: int = 4
    heavy_ratio: int = 128
    window: int
    index: IndexDims
    experts: ExpertDims
    streams: StreamDims
    rope: Rope
    """Of W layers."""
    compressed_rope: Rope
    """Of C and H layers: queries, keys and entries."""
    max_positions: int
    norm_eps: float = 1e-6
    num_mtp_layers: int = 0
    dtype: str = "float32"
    remat: bool = False
    reproducible_experts: bool = False
    """MoE layers give the same bits on every mesh, slower (`MoE.reproducible`)."""

    def __post_init__(self):
        if len(self.layer_kinds) != self.num_layers or set(self.layer_kinds) - set(KINDS):
            raise ValueError(
                f"layer_kinds has a letter of W, C, H for each of {self.num_layers} layers; "
                f"got {self.layer_kinds!r}"
            )
        if self.num_mtp_layers not in (0, 1):
            raise NotImplementedError(
                "num_mtp_layers must be 0 or 1 (deeper drafts use the one layer again); "
                f"got {self.num_mtp_layers}"
            )
        if self.window < 1 or self.sparse_ratio < 1 or self.heavy_ratio < 1:
            raise ValueError(
                "window and ratios must be at least 1; "
                f"got {self.window}, {self.sparse_ratio} and {self.heavy_ratio}"
            )

    def kind(self, layer: int) -> str:
        """W, C or H. The layer after the last is the MTP layer: W."""
        return self.layer_kinds[layer] if layer < self.num_layers else "W"

    def ratio(self, layer: int) -> int:
        """Tokens of a compressed block; 0 where there are none."""
        return {"W": 0, "C": self.sparse_ratio, "H": self.heavy_ratio}[self.kind(layer)]

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "DeepSeekV4Config":
        """From a `config.json` of model_type deepseek_v4, the hub's or transformers'.

        Raises:
          KeyError: a field that decides what is computed is not there. Nothing is left to the
            defaults of transformers, whose layer types are not those of any published model.
          NotImplementedError: a field with a value, or of a name, that is not known here.
        """
        d = HFConfig(fields, aliases=HF_ALIASES)
        d["scoring_func"]  # must be there
        d.only(
            hidden_act=SILU, attention_bias=(False,), mlp_bias=(False,),
            tie_word_embeddings=(False,), scoring_func=("sqrtsoftplus",),
            topk_method=("noaux_tc",), norm_topk_prob=(True,), num_key_value_heads=(1,),
            router_jitter_noise=(0.0,),
        )  # fmt: skip
        heads = SharedHeadDims(
            num_heads=d.size("num_attention_heads"),
            head_dim=d.size("head_dim"),
            rope_dim=_rope_dim(d),
            q_rank=d.size("q_lora_rank"),
            out_rank=d.size("o_lora_rank"),
            out_groups=d.size("o_groups"),
        )
        kinds, sparse_ratio, heavy_ratio = _layers(d)
        rope, compressed_rope = _ropes(d)
        config = cls(
            vocab_size=d.size("vocab_size"),
            num_layers=d.size("num_hidden_layers"),
            embed_dim=d.size("hidden_size"),
            heads=heads,
            layer_kinds=kinds,
            sparse_ratio=sparse_ratio,
            heavy_ratio=heavy_ratio,
            window=d.size("sliding_window"),
            index=IndexDims(
                num_heads=d.size("index_n_heads"),
                head_dim=d.size("index_head_dim"),
                top_k=d.size("index_topk"),
            ),
            experts=ExpertDims(
                dim=d.size("moe_intermediate_size"),
                count=d.size("n_routed_experts"),
                per_tok=d.size("num_experts_per_tok"),
                shared=d.count("n_shared_experts"),
                hash_layers=_hash_layers(d),
                route_scale=d.number("routed_scaling_factor"),
                limit=d.number("swiglu_limit"),
            ),
            streams=StreamDims(
                count=d.size("hc_mult"),
                iterations=d.size("hc_sinkhorn_iters"),
                eps=d.number("hc_eps"),
            ),
            rope=rope,
            compressed_rope=compressed_rope,
            max_positions=d.size("max_position_embeddings"),
            norm_eps=d.number("rms_norm_eps"),
            num_mtp_layers=d.count("num_nextn_predict_layers", None) or 0,
            dtype=d.dtype(published="bfloat16"),
        )
        d.finish()
        return config

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` reads, and transformers."""
        h, e = self.heads, self.experts
        part = {"partial_rotary_factor": h.rope_dim / h.head_dim}
        learned = self.num_layers - e.hash_layers
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.embed_dim,
            "num_attention_heads": h.num_heads,
            "num_key_value_heads": 1,
            "head_dim": h.head_dim,
            "qk_rope_head_dim": h.rope_dim,
            "q_lora_rank": h.q_rank,
            "o_lora_rank": h.out_rank,
            "o_groups": h.out_groups,
            "layer_types": [KINDS[kind] for kind in self.layer_kinds],
            "compress_rates": {KINDS["C"]: self.sparse_ratio, KINDS["H"]: self.heavy_ratio},
            "sliding_window": self.window,
            "index_n_heads": self.index.num_heads,
            "index_head_dim": self.index.head_dim,
            "index_topk": self.index.top_k,
            "moe_intermediate_size": e.dim,
            "n_routed_experts": e.count,
            "num_experts_per_tok": e.per_tok,
            "n_shared_experts": e.shared,
            "num_hash_layers": e.hash_layers,
            "mlp_layer_types": ["hash_moe"] * e.hash_layers + ["moe"] * learned,
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "routed_scaling_factor": e.route_scale,
            "swiglu_limit": e.limit,
            "hc_mult": self.streams.count,
            "hc_sinkhorn_iters": self.streams.iterations,
            "hc_eps": self.streams.eps,
            "rope_theta": self.rope.theta,
            "compress_rope_theta": self.compressed_rope.theta,
            "rope_parameters": {
                "main": self.rope.to_hf() | part,
                "compress": self.compressed_rope.to_hf() | part,
            },
            "max_position_embeddings": self.max_positions,
            "num_nextn_predict_layers": self.num_mtp_layers,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "dtype": self.dtype,
        }


HF_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "intermediate_size": "moe_intermediate_size",
}


def _rope_dim(d: HFConfig) -> int:
    size, part = d.size("qk_rope_head_dim", None), d.number("partial_rotary_factor", None)
    if size is None and part is None:
        raise KeyError("qk_rope_head_dim")
    given = {int(x) for x in (size, part and d.size("head_dim") * part) if x is not None}
    if len(given) > 1:
        raise ValueError(
            "qk_rope_head_dim and partial_rotary_factor * head_dim must be the same; "
            f"got {size} and {part} * {d['head_dim']}"
        )
    return given.pop()


def _layers(d: HFConfig) -> tuple[str, int, int]:
    """`(layer_kinds, sparse_ratio, heavy_ratio)`; extra ratios at the end are of draft layers."""
    count = d.size("num_hidden_layers")
    types, ratios = d.kinds("layer_types", count), d.places("compress_ratios")
    rates = dict(d.get("compress_rates") or {})
    found = []
    if types is not None:
        letters = {name: kind for kind, name in KINDS.items()}
        found.append("".join(_each(types, letters, "layer_types")))
        sparse, heavy = (d["compress_rates"][KINDS[kind]] for kind in "CH")
    else:
        sparse, heavy = rates.get(KINDS["C"], 4), rates.get(KINDS["H"], 128)
    if unknown := rates.keys() - {KINDS["C"], KINDS["H"]}:
        raise NotImplementedError(f"deepseek_v4: compress_rates, not known are {sorted(unknown)}")
    if ratios is not None:
        found.append("".join(_each(ratios[:count], HUB_RATIOS, "compress_ratios")))
        if (sparse, heavy) != (4, 128):
            raise ValueError(f"compress_ratios are of 4 and 128; got compress_rates={rates}")
    if not found:
        raise KeyError("compress_ratios")
    if len(set(found)) > 1:
        raise ValueError(f"layer_types and compress_ratios say {' and '.join(found)}: not the same")
    return found[0], sparse, heavy


def _each(values: Sequence, known: Mapping, field: str) -> list[str]:
    if unknown := sorted(set(values) - known.keys()):
        raise NotImplementedError(
            f"deepseek_v4: {field} are of {list(known)}; got {field} with {unknown}"
        )
    return [known[value] for value in values]


def _hash_layers(d: HFConfig) -> int:
    layers, given = d.size("num_hidden_layers"), d.count("num_hash_layers", None)
    listed = d.leading("mlp_layer_types", layers, "hash_moe", "moe")
    counts = {min(x, layers) for x in (given, listed) if x is not None}
    if not counts:
        raise KeyError("num_hash_layers")
    if len(counts) > 1:
        raise ValueError(
            f"deepseek_v4: mlp_layer_types has {listed} hash_moe, num_hash_layers={given}; "
            "make them agree"
        )
    return counts.pop()


def _ropes(d: HFConfig) -> tuple[Rope, Rope]:
    """Of window layers, and of layers with compressed entries."""
    rope = merged(d) or {}
    if "main" in rope and "compress" in rope:
        d.get("rope_theta"), d.get("compress_rope_theta")  # theirs are inside
        main, compressed = dict(rope.pop("main")), dict(rope.pop("compress"))
        if rope:
            raise NotImplementedError(f"deepseek_v4: rope_parameters, not known are {sorted(rope)}")
    else:
        bases = d["rope_theta"], d["compress_rope_theta"]
        if rope.get("rope_theta", bases[0]) not in bases:
            raise ValueError(
                f"deepseek_v4: rope_theta must be one number; got {rope['rope_theta']} among the "
                f"rope_parameters and {bases[0]} beside them"
            )
        main, compressed = {"rope_theta": bases[0]}, rope | {"rope_theta": bases[1]}
        if rope.get("rope_type") == "yarn":
            compressed.setdefault("attention_factor", 1.0)  # V4 does not scale cos and sin
    part = _rope_dim(d) / d["head_dim"]
    for one in (main, compressed):
        if one.pop("partial_rotary_factor", part) != part:
            raise ValueError(f"partial_rotary_factor must be {part} everywhere")
    main, compressed = ({"rope_parameters": one} for one in (main, compressed))
    return Rope.from_hf(main, interleaved=True), Rope.from_hf(compressed, interleaved=True)
