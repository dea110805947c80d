# SPDX-License-Identifier: Apache-2.0
"""The devices of a command, and a checkpoint loaded on them."""

import contextlib
import dataclasses
import pathlib

MOST_EMULATED = 512
"""CPU devices that a command makes; so many still start in seconds, and share a few cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Shards over the devices. On a machine with CPUs only, as many are emulated as it takes."""

    seq: int = 1
    """Shards of the sequence."""
    model: int = 1
    """Shards of heads and widths."""

    @property
    def count(self) -> int:
        return self.seq * self.model


ONE_DEVICE = Devices()


@contextlib.contextmanager
def loaded(checkpoint: pathlib.Path, devices: Devices):
    """Load a checkpoint's model and tokenizer on a mesh over the devices asked for."""
    from jaxcp.mesh import MeshConfig

    config = MeshConfig(seq=devices.seq, model=devices.model)
    want_devices(config.size)
    import jax

    from jaxcp.weights import load

    with jax.set_mesh(config.make(jax.devices()[: config.size])):
        model, tokenizer = load(checkpoint)
        if tokenizer is None:
            raise ValueError(f"{checkpoint} has no tokenizer.json; the command line talks in text")
        yield model, tokenizer


def want_devices(count: int) -> None:
    """Emulate `count` devices where there are only CPUs; accelerators stay as they are."""
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", min(count, MOST_EMULATED))
    except RuntimeError:  # jax runs already, with the devices that it has
        pass
    if jax.default_backend() == "cpu" and count > jax.device_count():
        raise ValueError(
            f"needed {count:,} devices; here are CPUs, which emulate {jax.device_count()} at most"
        )
