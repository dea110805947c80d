# SPDX-License-Identifier: Apache-2.0
"""A config.json of which every field is accounted for: read, known to change nothing, or refused.

Models carry each other's field names with small changes, and the defaults of other people's config
classes differ from what is published. So nothing is passed over: a family asks for the fields that
it knows, `HARMLESS` and `NEUTRAL` say which others may be there, and one more is an error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

HARMLESS = {
    "say who wrote a file, and for which program": (
        "architectures auto_map model_type name_or_path _name_or_path transformers_version "
        "_commit_hash quantization_config expert_dtype unsloth_version unsloth_fixed"
    ),
    "matter in training alone": (
        "attention_dropout aux_loss_alpha ep_size finetuning_task gradient_checkpointing "
        "hidden_dropout initializer_range pretraining_tp router_aux_loss_coef seq_aux"
    ),
    "say how an answer is sampled and where it ends": (
        "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
        "bos_token_id cls_token_id decoder_start_token_id diversity_penalty do_sample "
        "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eod_token_id "
        "eos_token_id epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
        "forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens "
        "min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule "
        "num_beam_groups num_beams num_return_sequences pad_token_id prefix "
        "remove_invalid_values repetition_penalty sep_token_id suppress_tokens "
        "target_lookbehind task_specific_params temperature top_k top_p typical_p unk_token_id"
    ),
    "say what a program hands back beside logits": (
        "output_attentions output_hidden_states output_router_logits output_scores return_dict "
        "return_dict_in_generate tie_last_hidden_states torchscript use_cache"
    ),
    "choose among programs that compute the same": (
        "_attn_implementation _attn_implementation_autoset attn_implementation "
        "chunk_size_feed_forward experts_implementation is_decoder use_bfloat16"
    ),
    "are of classifiers": "id2label label2id num_labels problem_type",
    "count layers that draft, which change no answer": "num_nextn_predict_layers",
}
"""Fields that change no logits whatever they say, by the reason why."""
HARMLESS_NAMES = frozenset(" ".join(HARMLESS.values()).split())

NEUTRAL: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "cross_attention_hidden_size": (None,),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "hc_mult": (None,),
    "index_topk": (None,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (None,),
    "logits_scaling": (None, 1.0),
    "mlp_bias": (False,),
    "n_group": (None, 1),
    "no_rope_layers": (None,),
    "num_shared_experts": (None, 0),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "qkv_bias": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1.0),
    "scoring_func": (None,),
    "shared_expert_intermediate_size": (None, 0),
    "sliding_window": (None,),
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "tie_encoder_decoder": (False,),
    "topk_group": (None, 1),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Fields that change what is computed, and the values that do not. A family reads some."""

SILU = "silu", "swish"
QUANTIZED = (
    None, "jaxcp", "fp8", "mxfp4", "modelopt", "compressed-tensors", "gptq", "awq"
)  # fmt: skip
"""Methods whose tensors say by themselves how they are quantized, see `jaxcp.weights.formats`."""
INSTEAD = {
    "auto-round": "Export it as auto_gptq, with quant_method gptq in its config.json",
    "gguf": "Load the folder of safetensors that the file was made of",
    "torchao": "Its tensors are classes of PyTorch: save them dequantized, as safetensors",
}
"""Advice on methods that are not among them; of others it is `ELSE`."""
ELSE = "Load the plain checkpoint that it was made of; `jaxcp quantize` makes that smaller"
DTYPES = "float32", "bfloat16", "float16"
LEGACY = {"attention": "full_attention", "deepseek_sparse_attention": "indexed_attention"}
"""Kinds of layers under the names that they had before."""


class HFConfig(Mapping):
    """The fields of a config.json; remembers which were asked for.

    `aliases`: other names of fields. `harmless`: names, beside `HARMLESS`, that change no logits.
    The typed readers take a default for a field that is not there; null is only taken where it is
    that default.

    Raises:
      ValueError: a field and its alias contradict each other.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        *,
        aliases: Mapping[str, str] | None = None,
        harmless: Iterable[str] = (),
    ):
        self._fields, self._read = dict(fields), {*HARMLESS_NAMES, *harmless}
        for alias, name in (aliases or {}).items():
            if alias in self._fields:
                value = self._fields.pop(alias)
                if self._fields.setdefault(name, value) != value:
                    raise ValueError(
                        f"{self.model_type}: {name} and {alias} are one thing; "
                        f"got {self._fields[name]!r} and {value!r}"
                    )

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def model_type(self) -> str:
        return self._fields.get("model_type", "config.json")

    def size(self, key: str, *default: int | None) -> Any:
        """A whole number of at least 1."""
        return self._value(key, default, lambda x: _is_whole(x) and x > 0, "a whole number above 0")

    def count(self, key: str, *default: int | None) -> Any:
        """A whole number, or 0."""
        return self._value(key, default, lambda x: _is_whole(x) and x >= 0, "a whole number, or 0")

    def number(self, key: str, *default: float | None) -> Any:
        return self._value(key, default, _is_number, "a finite number")

    def flag(self, key: str, *default: bool | None) -> Any:
        return self._value(key, default, lambda x: isinstance(x, bool), "true or false")

    def word(self, key: str, *default: str | None) -> Any:
        return self._value(key, default, lambda x: isinstance(x, str), "a string")

    def places(self, key: str) -> list[int] | None:
        """A list of whole numbers, or null."""
        return self._value(key, (None,), _are_whole, "a list of whole numbers")

    def kinds(self, key: str, layers: int) -> list[str] | None:
        """Read what a list says of each layer, None where there is none."""
        kinds = self._value(key, (None,), _are_words, "a list of strings")
        if kinds is None:
            return None
        if len(kinds) != layers:
            raise NotImplementedError(
                f"{self.model_type}: {key} must have a word for each of {layers} layers; "
                f"got {len(kinds)}: {key}={kinds}"
            )
        return [LEGACY.get(kind, kind) for kind in kinds]

    def leading(self, key: str, layers: int, first: str, rest: str) -> int | None:
        """Count the layers that are `first` in a list where all others are `rest`, after them."""
        kinds = self.kinds(key, layers)
        if kinds is None:
            return None
        count = kinds.count(first)
        if kinds != [first] * count + [rest] * (layers - count):
            raise NotImplementedError(
                f"{self.model_type}: {layers} {key}, the {first} ones first and all others {rest}; "
                f"got {key}={kinds}"
            )
        return count

    def dtype(self, published: str) -> str:
        """Read the dtype of computation; `published` is what the family is published in."""
        older = self.get("torch_dtype")
        name = self.get("dtype") or older or published
        dtype = name.removeprefix("torch.") if isinstance(name, str) else name
        if dtype not in DTYPES:
            raise NotImplementedError(
                f"{self.model_type}: dtype must be one of {', '.join(DTYPES)}; got dtype={name!r}"
            )
        return dtype

    def only(self, **allowed: tuple) -> None:
        """Raises NotImplementedError, naming all, for fields that are there with other values."""
        wrong = {k: self[k] for k in allowed if k in self._fields and self[k] not in allowed[k]}
        if wrong:
            supported = {k: allowed[k][0] for k in wrong}
            raise NotImplementedError(f"{self.model_type}: supported are {supported}; got {wrong}")

    def agree(self, **values: Any) -> None:
        """Raises ValueError for a field that is there and says something else than another one."""
        for key, value in values.items():
            if self.get(key, value) != value:
                raise ValueError(
                    f"{self.model_type}: {key} must agree with the fields that it repeats; "
                    f"got {key}={self[key]!r}, they say {value!r}"
                )

    def finish(self) -> None:
        """Raises NotImplementedError, naming all, for fields that nobody has asked for."""
        self._check_quantization(self.get("quantization_config") or {})
        rest = {k: self._fields[k] for k in sorted(self._fields.keys() - self._read)}
        if unknown := {k: v for k, v in rest.items() if v not in NEUTRAL.get(k, ())}:
            known = {k: NEUTRAL[k][0] for k in unknown if k in NEUTRAL}
            raise NotImplementedError(
                f"{self.model_type}: not known, and may change what is computed: {unknown}. "
                + (f"They may only be {known}" if known else "Remove what does not")
            )

    def _check_quantization(self, says: Mapping[str, Any]) -> None:
        old = any(says.get(f"load_in_{bits}bit") for bits in (4, 8))
        method = says.get("quant_method", "bitsandbytes" if old else None)
        if method not in QUANTIZED:
            raise NotImplementedError(
                f"{self.model_type}: quantization_config has a quant_method of "
                f"{', '.join(map(str, QUANTIZED[1:]))}; got {method}. "
                + INSTEAD.get(str(method).removeprefix("intel/"), ELSE)
            )

    def _value(self, key: str, default: tuple, is_good: Callable[[Any], bool], what: str) -> Any:
        value = self.get(key, *default) if default else self[key]
        if is_good(value) or (value is None and default == (None,)):
            return value
        raise ValueError(f"{self.model_type}: {key} must be {what}; got {key}={value!r}")


def shortest_cycle(pattern: str) -> str:
    """Return the shortest start of `pattern` that, cycled, is all of it."""
    sizes = range(1, len(pattern) + 1)
    return pattern[: next(n for n in sizes if pattern.startswith(pattern[n:]))]


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -1e38 < x < 1e38


def _are_words(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(word, str) for word in x)


def _are_whole(x: Any) -> bool:
    return isinstance(x, list) and all(map(_is_whole, x))
