# SPDX-License-Identifier: Apache-2.0
"""A config.json of which every field is accounted for: read, known to change nothing, or refused.

DeepSeek's models carry each other's names with small changes, and the defaults of other people's
config classes differ from what is published. So nothing is guessed: a field that decides what is
computed must be there, and one that is not known here is an error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

IGNORED = frozenset(
    "architectures attention_dropout auto_map bos_token_id dtype eos_token_id ep_size expert_dtype "
    "initializer_range model_type name_or_path _name_or_path num_nextn_predict_layers "
    "output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp "
    "quantization_config return_dict router_aux_loss_coef torch_dtype transformers_version "
    "use_cache aux_loss_alpha seq_aux".split()
)
"""Of training, sampling, file formats and their authors' code; and the layers that draft."""


class Fields(Mapping):
    """The fields of a config.json; remembers which were asked for."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields, self._read = fields, set(IGNORED)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def dtype(self) -> str:
        return self._fields.get("dtype") or self._fields.get("torch_dtype") or "float32"

    def must_be(self, **wanted: Any) -> None:
        """Raises NotImplementedError, naming all, for fields that are there with other values."""
        wrong = {k: self[k] for k, v in wanted.items() if k in self._fields and self[k] != v}
        if wrong:
            raise NotImplementedError(
                f"{self._kind}: supported are { ({k: wanted[k] for k in wrong}) }; got {wrong}"
            )

    def finish(self) -> None:
        """Raises NotImplementedError, naming all, for fields that nobody has asked for."""
        if unknown := {k: self._fields[k] for k in sorted(self._fields.keys() - self._read)}:
            raise NotImplementedError(
                f"{self._kind}: not known, and may change what is computed: {unknown}. "
                "Remove what does not"
            )

    @property
    def _kind(self) -> str:
        return self._fields.get("model_type", "deepseek")
