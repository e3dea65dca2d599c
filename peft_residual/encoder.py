"""The prompt encoder: a raw prompt, a network, and the projected prompt that the frozen model sees."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn

from .config import ResidualPromptTuningConfig
from .initialization import initialize_prompt
from .networks import build_network
from .storage import checkpoint
from .storage.sharded import gathered_state, gathered_tensors


_RANDOM_STATE_LOCK = threading.RLock()


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator seeded, and put its state back: modules take their weights from no other."""
    with _RANDOM_STATE_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class ResidualPromptEncoder(BasePromptEncoder):
    """Soft prompt trained through a network: `E' = E + φ(E)` (Razdaibiedina et al., 2023, section 3).

    It sits in `model.prompt_encoder[adapter_name]`. `P` is the number of virtual tokens, `H` the embedding width.

    While it has trainable parameters, every call computes the projected prompt. Frozen, it computes the projected
    prompt once, without dropout, and serves that: inference costs what plain prompt tuning costs.

    Args:
        config ([`ResidualPromptTuningConfig`]): With `token_dim` filled in.
        word_embeddings (`torch.nn.Module`): The base model's word embedding module; read once, for the start.

    **Attributes**:
        - **embedding** (`torch.nn.Embedding`) -- The raw prompt `E`, `embedding.weight` of shape `[P, H]`, float32;
          for a network that mixes `M` rows of the vocabulary, their weights `[P, M]`.
        - **network** (`torch.nn.Module`) -- The network `φ`.

    Raises:
        ValueError: If the config does not fit the model, or the start cannot be made.
    """

    _projected: Tensor | None

    def __init__(self, config: ResidualPromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        config.check_token_dim()
        width = getattr(word_embeddings, "embedding_dim", config.token_dim)
        if width != config.token_dim:
            raise ValueError(
                f"`token_dim`={config.token_dim} does not fit the model, whose word embeddings have width {width}. "
                f"Load the adapter into the base model that it was trained for, or set token_dim={width}."
            )
        self.config = config
        seed = config.prompt_tuning_init_seed
        with torch.device("cpu"):  # whatever the user's default device is: PEFT moves the encoder
            generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
            # Drawn first, so that prompt and network do not start from the same stream of numbers.
            network_seed = int(torch.randint(2**62, (), generator=generator))
            with _own_random_state(network_seed):
                self.network = build_network(config)
            # In inference mode the weights come from a checkpoint, and the start's sources may be gone.
            if config.inference_mode:
                raw = torch.zeros(config.total_virtual_tokens, config.embedding_width)
            else:
                raw = initialize_prompt(config, word_embeddings, generator)
                if config.mixes_vocabulary:  # token i starts as row i, from the first again after the last
                    self.network.get_buffer("rows").copy_(raw)
                    raw = nn.functional.one_hot(torch.arange(config.total_virtual_tokens) % len(raw), len(raw)).float()
            self.embedding = nn.Embedding.from_pretrained(raw, freeze=False)
        self.register_buffer("_projected", None, persistent=False)
        self._projected_key: tuple[tuple[int, int, int], ...] = ()
        self.requires_grad_(not config.inference_mode)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Return the projected prompt.

        Args:
            indices (`torch.Tensor`, *optional*): Positions of virtual tokens, any shape, as PEFT passes them.

        Returns:
            `torch.Tensor`: `[P, H]`, or `[*indices.shape, H]`, float32 (the parameters' type if wider).
        """
        if self.is_trainable:
            self._projected = None  # optimizers may write in ways that leave no trace
            prompt = self.project()
        else:
            prompt = self.frozen_projection()
        return prompt if indices is None else prompt[indices]

    @property
    def is_trainable(self) -> bool:
        """Whether any weight of the prompt or its network takes a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def project(self) -> Tensor:
        """Compute `E' = E + φ(E)` from the live weights, with gradients: `[P, H]`, never below float32."""
        raw = self.embedding.weight
        # What is trained must be what is saved: at full precision, whatever the frozen model runs in.
        with torch.autocast(raw.device.type, enabled=False):
            if raw.dtype in (torch.float16, torch.bfloat16):
                raw = raw.float()
                # Taken one by one from their modules, which is where ZeRO-3 notices that it must gather them.
                floats = {n: self.network.get_parameter(n).float() for n, _ in self.network.named_parameters()}
                floats |= {n: b.float() if b.is_floating_point() else b for n, b in self.network.named_buffers()}
                shell = self._skeleton.train(self.network.training)
                output = torch.func.functional_call(shell, floats, (raw,), tie_weights=True)
            else:
                output = self.network(raw)
            return _add_skip(self.config, raw, output)

    @functools.cached_property
    def _skeleton(self) -> nn.Module:
        """The network without weights, and without the hooks of trainers, which take no weights but their own.

        It is no submodule: `nn.Module` does not see what `cached_property` keeps.
        """
        with _own_random_state(0):
            return build_network(self.config).to("meta")  # built on "meta", some users' networks fail

    @torch.no_grad()
    def frozen_projection(self) -> Tensor:
        """The projected prompt of frozen weights, without dropout: computed when they change, else remembered."""
        projected = self._remembered()
        if projected is None:
            projected = project_state(self.config, gathered_state(self), self.network).to(self.embedding.weight.device)
            self._remember(projected)
        return projected

    def _remembered(self) -> Tensor | None:
        return self._projected if self._projected_key == self._key() else None

    def _remember(self, projected: Tensor) -> None:
        self._projected = projected
        self._projected_key = self._key()

    def _key(self) -> tuple[tuple[int, int, int], ...]:
        # Which tensors they are, and torch's count of the writes to each: a later `load_state_dict` is noticed.
        tensors = [*self.parameters(), *self.network.buffers()]
        return tuple((id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> ResidualPromptEncoder:
        """Move or cast, and forget the projection of weights that were rounded."""
        dtype = self.embedding.weight.dtype
        is_valid = self._remembered() is not None
        super()._apply(fn, recurse)
        if is_valid and self.embedding.weight.dtype == dtype:
            self._projected_key = self._key()
        else:
            self._projected = None
        return self

    # --- PEFT's hooks for saving and loading ----------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: PeftModel,
        config: ResidualPromptTuningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        prefix, encoder = f"prompt_encoder.{adapter_name}.", model.prompt_encoder[adapter_name]
        names = [
            checkpoint.EMBEDDING_KEY,
            *(checkpoint.NETWORK_PREFIX + name for name in encoder._skeleton.state_dict()),
        ]
        state = gathered_tensors({name: state_dict[prefix + name] for name in names if prefix + name in state_dict})
        if checkpoint.EMBEDDING_KEY not in state:
            raise ValueError(
                f"`state_dict` has no `{prefix}{checkpoint.EMBEDDING_KEY}`, so adapter {adapter_name!r} cannot be saved "
                "from it. Pass the whole model's state dict, or none. The Trainer has one under ZeRO-3 if "
                "`stage3_gather_16bit_weights_on_model_save` (accelerate: `zero3_save_16bit_model`) is true."
            )
        if not state[checkpoint.EMBEDDING_KEY].numel():
            raise ValueError(
                f"`{prefix}{checkpoint.EMBEDDING_KEY}` is empty in `state_dict`: its numbers are spread over processes "
                "(ZeRO-3). Call `model.save_pretrained` in every process, or pass "
                "`state_dict=accelerator.get_state_dict(engine)`."
            )
        return checkpoint.pack(encoder.project_saved(state), state)

    def project_saved(self, state: Mapping[str, Tensor]) -> Tensor:
        """The projected prompt of a gathered state: `[P, H]`, float32, on the CPU, in eval mode, autocast off.

        A frozen adapter that was loaded keeps the projection that it was loaded with, to the last bit.
        """
        recomputed = project_state(self.config, state, self.network)
        remembered = None if self.is_trainable else self._remembered()
        if remembered is not None:
            remembered = remembered.to("cpu", torch.float32, copy=True)
            if _is_same_projection(remembered, recomputed):
                return remembered
        return recomputed

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: PeftModel,
        config: ResidualPromptTuningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check a checkpoint against this adapter, then name its tensors as the live model does."""
        encoder = model.prompt_encoder[adapter_name]
        projected, state, others = checkpoint.unpack(state_dict)
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            raise ValueError(
                f"Adapter {adapter_name!r} is partitioned by DeepSpeed ZeRO-3, and a file cannot be loaded into it. "
                "Load it before `deepspeed.initialize` or `accelerator.prepare`, or resume from DeepSpeed's own "
                "checkpoint (`Trainer.train(resume_from_checkpoint=...)`)."
            )
        own = encoder.state_dict()
        checkpoint.check_leaves(own, state)
        check_projection(encoder.config, state, projected, encoder.network)
        # Copied: a file's tensors may lie at odd addresses, where torch takes other kernels, to other last bits.
        live = {f"prompt_encoder.{adapter_name}.{k}": t.to(own[k].device, copy=True) for k, t in state.items()}
        return {**others, **live, checkpoint.PROJECTED_KEY: projected.to(own[checkpoint.EMBEDDING_KEY].device)}

    def _load_adapter_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        # `load_state_dict` of the model has set the weights by their names; what is left is their projection.
        self._remember(state_dict[checkpoint.PROJECTED_KEY])


def _add_skip(config: ResidualPromptTuningConfig, raw: Tensor, output: Tensor) -> Tensor:
    return raw + output if config.has_skip else output


@torch.no_grad()
def project_state(
    config: ResidualPromptTuningConfig, state: Mapping[str, Tensor], live_network: nn.Module | None = None
) -> Tensor:
    """Compute the projected prompt of an encoder's state, on the CPU, in float32, in eval mode, autocast off.

    Args:
        config ([`ResidualPromptTuningConfig`]): The adapter's configuration.
        state (`Mapping[str, torch.Tensor]`): `embedding.weight` and `network.*`, on any device, in any type.
        live_network (`torch.nn.Module`, *optional*): Where buffers come from that are not in the state.

    Returns:
        `torch.Tensor`: `[P, H]`, float32, on the CPU.

    Raises:
        ValueError: If the state is another network's.
    """
    with _own_random_state(0):  # the weights that the network starts with are replaced on the next lines
        network = build_network(config).eval()
    raw = state[checkpoint.EMBEDDING_KEY].to("cpu", torch.float32)
    prefix, persistent = checkpoint.NETWORK_PREFIX, network.state_dict()
    recomputed = {prefix + name for name, _ in network.named_buffers() if name not in persistent}
    found = {key: tensor for key, tensor in state.items() if key.startswith(prefix) and key not in recomputed}
    checkpoint.check_leaves({prefix + name: tensor for name, tensor in persistent.items()}, found)
    network.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in found.items()})
    live_buffers = dict(live_network.named_buffers()) if live_network is not None else {}
    for name, buffer in network.named_buffers():
        if name not in persistent and name in live_buffers:
            buffer.copy_(live_buffers[name])
    with torch.autocast("cpu", enabled=False):
        return _add_skip(config, raw, network(raw)).clone()


def _is_same_projection(projected: Tensor, recomputed: Tensor) -> bool:
    """Whether two projections differ by no more than other hardware's rounding explains."""
    if projected.shape != recomputed.shape:
        return False
    tolerance = 1e-3 * float(projected.abs().nan_to_num(posinf=0).max())
    return torch.allclose(recomputed, projected, rtol=1e-3, atol=tolerance, equal_nan=True)


def check_projection(
    config: ResidualPromptTuningConfig,
    state: Mapping[str, Tensor],
    projected: Tensor,
    live_network: nn.Module | None = None,
) -> None:
    """Check that a checkpoint's network, run with this config, makes the projected prompt that the checkpoint holds.

    Settings such as the activation leave no trace in the shapes of the weights; this is where they show.

    Raises:
        ValueError: If it does not, beyond what other hardware's rounding explains.
    """
    if _is_same_projection(projected.cpu().float(), project_state(config, state, live_network)):
        return
    settings = {name: value for name, value in vars(config).items() if name.startswith("encoder_")}
    raise ValueError(
        "The checkpoint's raw prompt and network do not give its own projected prompt under this config: the "
        f"checkpoint was trained with other settings, or is damaged. Settings here: {settings}. Compare them with the "
        "checkpoint's `adapter_config.json`, or save or download the adapter again."
    )
